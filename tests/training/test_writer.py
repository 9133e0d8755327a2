"""What we put behind TRL's seams does what TRL's own would do."""

import pytest
import torch

from popi.errors import InputError
from popi.prompts import DEFAULT
from popi.testing import tiny_model

pytestmark = pytest.mark.slow


def make(folder, **options):
    from trl.trainer.grpo_config import GRPOConfig

    from popi.training.writer import WriterTrainer

    model, tokenizer = tiny_model()
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
        order=range(4),
        names=["Ada", "Ben", "Cem", "Dov"],
        earn=lambda users, summaries, tokens, step: ([float(n) for n in tokens], {}),
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
def test_the_loss_is_that_of_our_objective(trainer, loss_type, room):
    from popi.training.objective import policy_loss

    made = batch(trainer)
    keep = made["completion_ids"].shape[1]
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
    trainer.loss_type = loss_type
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)
    expected = policy_loss(
        logps, logps.detach(), made["advantages"], made["completion_mask"].float(), kl=0.0, room=room
    )
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


def test_the_summaries_of_a_user_are_sampled_in_one_batch(trainer):
    prompts = [trainer.train_dataset[place]["prompt"] for place in (0, 0, 0, 2, 2, 2)]
    together = trainer.roll_out(prompts)["completion_ids"]
    passes: list[torch.Size] = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    trainer._batch_tokens = 1
    assert trainer.roll_out(prompts)["completion_ids"] == together
    # Each prompt is read once, and its three summaries are branches of its row.
    assert [rows for rows, columns in passes if columns > 3] == [1, 1]
    assert (1, 3) in passes


def test_a_user_whose_signals_the_chat_template_refuses_is_named(trainer):
    prompts = [trainer.train_dataset[place]["prompt"] for place in (1, 2)]
    template = "{% if 'much 2' in messages[-1]['content'] %}{{ raise_exception('no twos') }}{% endif %}a"
    trainer._chat._tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"the signals of user 'Cem' cannot be read: .*no twos.*; mend the chat"):
        trainer.roll_out(prompts)


def test_processes_that_sample_for_one_step_sample_apart(trainer, monkeypatch):
    prompts = [trainer.train_dataset[0]["prompt"]] * 4
    both = trainer.roll_out(prompts)["completion_ids"]
    monkeypatch.setattr(type(trainer.accelerator), "process_index", 1)
    assert trainer.roll_out(prompts[:2])["completion_ids"] == both[2:]


def test_what_is_earned_goes_by_the_steps_of_the_run(trainer):
    asked = []
    trainer._earn = lambda users, summaries, tokens, step: (asked.append(step) or [0.0], {})
    trainer._first, trainer.state.global_step = 4, 2
    trainer._reward(trainer._chat.encode(["- likes lists"]), user=[0])
    assert asked == [6]


def test_groups_are_rewarded_against_their_own_mean(trainer):
    trainer.scale_rewards = "none"
    made = batch(trainer)
    counts = made["completion_mask"].sum(dim=1).tolist()
    sampled = [ids[:length].tolist() for ids, length in zip(made["completion_ids"], counts, strict=True)]
    texts = [trainer.read(ids).text for ids in sampled]
    lengths = torch.tensor([float(len(ids)) for ids in trainer._chat.encode(texts)]).view(2, 3)
    assert lengths.std(dim=1).min() > 0
    torch.testing.assert_close(made["advantages"].view(2, 3), lengths - lengths.mean(dim=1, keepdim=True))


def test_reading_leaves_out_what_was_not_finished(trainer):
    end = next(iter(trainer._ends))
    ids = trainer._chat.encode(["- likes lists\n- likes emoji"])[0]
    assert trainer.read([*ids, end]).text == "- likes lists\n- likes emoji"
    assert trainer.read(ids).text == "- likes lists"
    assert trainer.read([end]).status == "not_enough_evidence"


def test_citations_cost_nothing(trainer):
    asked = []
    trainer._earn = lambda users, summaries, tokens, step: (asked.append(tokens) or [0.0] * len(tokens), {})
    trainer._reward(trainer._chat.encode(["- likes lists", "- likes lists [1, 2, 3]"]), user=[0, 0])
    [[bare, cited]] = asked
    assert bare == cited == len(trainer._chat.encode(["- likes lists"])[0])


def test_a_reference_that_is_not_wholly_on_the_device_is_no_room(tmp_path, monkeypatch):
    reference, _ = tiny_model()
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda name, **options: reference)
    make(tmp_path, beta=0.1)
    reference.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(torch.OutOfMemoryError, match="no room for the initial writer beside the one that learns"):
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
