"""The generator's trainer with a tiny model."""

import pytest
import torch
from transformers import TrainingArguments

from popi.data.example import HeldOutPair
from popi.engine.chat_tokens import ChatTokens
from popi.errors import PopiError
from popi.testing import tiny_model
from popi.training.generator import GeneratorTrainer, GeneratorUpdate
from popi.training.scoring import Judged, PairScorer

ITEMS = [
    Judged(context, HeldOutPair(prompt=f"What about {n}?", chosen=f"This {n}.", rejected="That, I think."), 0.1 * n)
    for n, context in enumerate(["- short", None, "- long answers", "- emoji"])
]


def trained(tmp_path, batch, accumulated):
    model, tokenizer = tiny_model()
    trainer = GeneratorTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        ),
        scorer=PairScorer(model, ChatTokens(tokenizer, "tiny")),
        items=ITEMS,
        loss="dpo",
        beta=0.1,
    )
    trainer.train()
    return torch.cat([value.detach().flatten() for value in model.parameters()]), trainer.state.log_history[0]


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 2), (1, 4)])
def test_the_pairs_of_a_step_teach_the_same_in_one_batch_and_in_several(tmp_path, batch, accumulated):
    whole, logged = trained(tmp_path, 4, 1)
    parts, logged_in_parts = trained(tmp_path, batch, accumulated)
    before = torch.cat([value.detach().flatten() for value in tiny_model()[0].parameters()])
    assert (whole - before).abs().max() > 1e-4
    assert (whole - parts).abs().max() < 1e-6
    for name in ("margin", "accuracy", "generator_loss", "tokens/update"):
        assert logged_in_parts[name] == pytest.approx(logged[name], abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_not_followed(value):
    model, _ = tiny_model()
    update = GeneratorUpdate(model, learning_rate=0.1, steps=2, warmup=0, clip=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    with pytest.raises(PopiError, match=r"the norm of the generator's gradient became (nan|inf) after 4 steps; lower"):
        update(4)
    untouched = tiny_model()[0].state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in model.state_dict().items())
