"""The generator's trainer with a tiny model."""

import pytest
import torch
from transformers import TrainingArguments

from popi.data.example import HeldOutPair
from popi.errors import PopiError
from popi.testing import tiny_model
from popi.training.adapters import trainable
from popi.training.generator import GeneratorTrainer, pair_metrics
from popi.training.objective import LogRatios
from popi.training.scoring import ConditionedPair, PairLogps
from popi.training.updates import AdamWUpdate, Schedule
from tests.training.helpers import scorer_of, summary

ITEMS = [
    ConditionedPair(
        context and summary(context),
        HeldOutPair(prompt=f"What about {n}?", chosen=f"This {n}.", rejected="That, I think."),
        PairLogps(0.1 * n, 0.3),
    )
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
        scorer=scorer_of(model, tokenizer),
        items=ITEMS,
        loss="dpo",
        beta=0.1,
    )
    trainer.train()
    return torch.cat([value.detach().flatten() for value in model.parameters()]), trainer.state.log_history[0]


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 2), (1, 4)])
def test_a_step_is_the_same_in_one_batch_and_in_several(tmp_path, batch, accumulated):
    whole, logged = trained(tmp_path, 4, 1)
    parts, logged_in_parts = trained(tmp_path, batch, accumulated)
    before = torch.cat([value.detach().flatten() for value in tiny_model()[0].parameters()])
    assert (whole - before).abs().max() > 1e-4
    assert (whole - parts).abs().max() < 1e-6
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "generator/loss",
        "tokens/update",
    ):
        assert logged_in_parts[name] == pytest.approx(logged[name], abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_applied(value):
    model, _ = tiny_model()
    update = AdamWUpdate(trainable(model), Schedule(0.1, steps=2, warmup=0), max_grad_norm=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    with pytest.raises(PopiError, match=r"the gradient norm of the generator became (nan|inf) after 4 steps; lower"):
        update.step(4)
    untouched = tiny_model()[0].state_dict()
    assert all(torch.equal(weight, untouched[name]) for name, weight in model.state_dict().items())


def test_the_metrics_of_pairs_by_hand():
    ratios = LogRatios(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]))
    assert pair_metrics(ratios, 0.5, 0.7) == {
        "rewards/chosen": 0.25,
        "rewards/rejected": 0.5,
        "rewards/margins": -0.25,
        "rewards/accuracies": 0.5,
        "generator/loss": 0.7,
    }
