"""The parts behind the seams of TRL have the results of its own."""

import pytest
import torch

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.errors import InputError, PopiError
from popi.prompts import DEFAULT
from popi.testing import tiny_model

pytestmark = pytest.mark.slow


def make(folder, **options):
    from trl.trainer.grpo_config import GRPOConfig

    from popi.training.rollouts import EngineRollouts
    from popi.training.writer import WriterTrainer

    model, tokenizer = tiny_model()
    abilities = verify(model, ChatTokens(tokenizer, "tiny"), "tiny")
    model.save_pretrained(folder / "initial")
    model.config.name_or_path = str(folder / "initial")
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=6,
        num_generations=3,
        max_completion_length=8,
        temperature=0.7,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        **options,
    )
    return WriterTrainer(
        model,
        tokenizer,
        arguments,
        conversations=[DEFAULT.inference_messages(f"[1] said: I like {'very ' * n}much {n}") for n in range(4)],
        names=["Ada", "Ben", "Cem", "Dov"],
        order=range(4),
        parse=lambda place, reply, truncated: (place, reply, truncated),
        reward=lambda users, replies, step: ([float(len(reply)) for _, reply, _ in replies], {}),
        rollouts=EngineRollouts(model, abilities=abilities, batch_tokens=4096),
        abilities=abilities,
        batch_tokens=4096,
    )


@pytest.fixture
def trainer(tmp_path):
    return make(tmp_path)


def batch(trainer):
    rows = [{**trainer.train_dataset[place], "user": place} for place in (0, 0, 0, 2, 2, 2)]
    trainer.model.train()
    return trainer._generate_and_score_completions(rows)


def test_the_update_is_that_of_whole_sequences(trainer):
    from trl.trainer.grpo_trainer import GRPOTrainer

    made = batch(trainer)
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
    keep = made["completion_ids"].shape[1]

    def gradient(logps):
        trainer.model.zero_grad()
        (logps * made["completion_mask"] * torch.linspace(-1, 1, keep)).sum().backward()
        return torch.cat([value.grad.flatten() for value in trainer.model.parameters()])

    ours, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, keep, compute_entropy=True
    )
    theirs, their_entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, keep, compute_entropy=True
    )
    real = made["completion_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropies[real], their_entropies[real].detach(), atol=1e-4, rtol=1e-4)
    mine, other = gradient(ours), gradient(theirs)
    assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(("loss_type", "room"), [("grpo", None), ("dr_grpo", 8)])
def test_the_loss_is_that_of_grpo_and_of_dr_grpo(trainer, loss_type, room):
    made = batch(trainer)
    keep = made["completion_ids"].shape[1]
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
    mask_R_T = made["completion_mask"].float()
    trainer.loss_type = loss_type
    logps_R_T, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1), keep
    )
    # GRPO averages over the tokens of each completion, Dr. GRPO divides their sum by the maximum length.
    ratios_R_T = (logps_R_T - logps_R_T.detach()).exp()
    sums_R = (-ratios_R_T * made["advantages"][:, None] * mask_R_T).sum(dim=1)
    expected = (sums_R / (room or mask_R_T.sum(dim=1))).mean()
    trainer.current_gradient_accumulation_steps = 1
    torch.testing.assert_close(trainer._compute_loss(trainer.model, made), expected)


def test_a_step_samples_the_same_again_and_another_step_other_summaries(trainer):
    prompts = [trainer.train_dataset[0]["prompt"]] * 4
    first = trainer.roll_out(prompts)["completion_ids"]
    assert trainer.roll_out(prompts)["completion_ids"] == first
    assert len(set(map(tuple, first))) > 1
    trainer.state.global_step = 1
    second = trainer.roll_out(prompts)["completion_ids"]
    assert second != first
    # A step has its samples and its judges whatever phase of the run it is in.
    trainer.state.global_step, trainer._first = 0, 1
    assert trainer.roll_out(prompts)["completion_ids"] == second


def test_a_prompt_that_the_chat_template_rejects_is_named(trainer):
    prompts = [trainer.train_dataset[place]["prompt"] for place in (1, 2)]
    template = "{% if 'much 2' in messages[-1]['content'] %}{{ raise_exception('no twos') }}{% endif %}a"
    trainer._chat._tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"the prompt of user 'Cem' cannot be rendered: .*no twos.*; fix the chat"):
        trainer.roll_out(prompts)


def test_logits_that_are_not_finite_end_the_run(trainer):
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(PopiError, match="a logit of the writer became nan after 0 steps; lower the learning rate"):
        trainer.roll_out([trainer.train_dataset[0]["prompt"]])


def test_processes_that_sample_for_one_step_sample_apart(trainer, monkeypatch):
    prompts = [trainer.train_dataset[0]["prompt"]] * 4
    both = trainer.roll_out(prompts)["completion_ids"]
    monkeypatch.setattr(type(trainer.accelerator), "process_index", 1)
    assert trainer.roll_out(prompts[:2])["completion_ids"] == both[2:]


def test_the_reward_function_gets_the_step_of_the_run(trainer):
    steps = []
    trainer._reward_fn = lambda users, replies, step: (steps.append(step) or [0.0], {})
    trainer._first, trainer.state.global_step = 4, 2
    trainer._reward(trainer._chat.encode(["- likes lists"]), user=[0])
    assert steps == [6]


def test_a_reply_that_was_not_scored_does_not_count_for_its_group(trainer):
    trainer.scale_rewards = "none"
    trainer._reward_fn = lambda users, replies, step: ([1.0, float("nan"), 3.0, 5.0, 5.0, 5.0], {})
    assert batch(trainer)["advantages"].tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_groups_are_rewarded_against_their_own_mean(trainer):
    trainer.scale_rewards = "none"
    made = batch(trainer)
    counts = made["completion_mask"].sum(dim=1).tolist()
    sampled = [ids[:length].tolist() for ids, length in zip(made["completion_ids"], counts, strict=True)]
    lengths = torch.tensor([float(len(trainer.read(0, ids)[1])) for ids in sampled]).view(2, 3)
    assert lengths.std(dim=1).min() > 0
    torch.testing.assert_close(made["advantages"].view(2, 3), lengths - lengths.mean(dim=1, keepdim=True))


def test_a_completion_is_parsed_without_its_end_and_without_reasoning(trainer):
    end = next(iter(trainer._abilities.end_tokens))
    list_, thought, open_ = trainer._chat.encode(
        ["- likes lists", "<think>so\n</think>\n- likes lists", "<think>so then"]
    )
    assert trainer.read(1, [*list_, end]) == (1, "- likes lists", False)
    assert trainer.read(2, list_) == (2, "- likes lists", True)
    assert trainer.read(0, [*thought, end]) == (0, "- likes lists", False)
    # A reply that ended inside its reasoning has no text.
    assert trainer.read(0, [*open_, end]) == (0, "", True)
    assert trainer.read(0, [end]) == (0, "", False)


def test_a_reference_that_does_not_fit_the_device_is_out_of_memory(tmp_path, monkeypatch):
    reference, _ = tiny_model()
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda name, **options: reference)
    make(tmp_path, beta=0.1)
    reference.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(torch.OutOfMemoryError, match="no room for the initial writer beside the trained one"):
        make(tmp_path, beta=0.1)


def test_memory_is_what_the_guide_says(tmp_path):
    trainer = make(tmp_path, beta=0.1, max_steps=1, save_strategy="no", logging_strategy="no", disable_tqdm=True)
    held = []
    trainer.create_optimizer().register_step_pre_hook(
        lambda optimizer, *_: held.append(sum(value.grad.nbytes for value in trainer.model.parameters()))
    )
    trainer.train()
    parameters = sum(value.numel() for value in trainer.model.parameters())
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held += [sum(value.nbytes for value in values) for values in (trainer.model.parameters(), moments)]
    assert sum(held) == 16 * parameters
    assert sum(value.nbytes for value in trainer.ref_model.parameters()) == 4 * parameters
