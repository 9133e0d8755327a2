"""The precision of a run: what its weights are, what its forward passes compute, and what it saves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from popi.config import load
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.loading import load as load_model
from popi.engine.packing import Scored
from popi.errors import InputError
from popi.training import joint, precision
from popi.training.joint import run
from popi.training.likelihood import computing, token_likelihood
from popi.training.models import JointModels, LoraOptions, Role
from popi.training.precision import Precision
from popi.training.rollouts import EngineRollouts
from tests.training.rank_runs import make_inputs, metrics, write_recipe

MODEL = "popi-mini-base"


@pytest.mark.parametrize(("native", "wanted"), [(True, "mixed"), (False, "float32")])
def test_auto_is_mixed_where_bfloat16_is_native(monkeypatch, native, wanted):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: native)
    assert precision.resolve("auto") == wanted
    assert precision.resolve("bfloat16") == "bfloat16"


LORA = LoraOptions(rank=2, alpha=4, targets="all-linear")


@pytest.mark.parametrize(
    ("name", "zero", "trained", "adapted", "under_an_adapter", "frozen"),
    [
        ("float32", False, torch.float32, torch.float32, torch.float32, torch.float32),
        ("mixed", False, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
        ("mixed", True, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bfloat16", False, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_have_the_type_of_what_is_done_with_them(name, zero, trained, adapted, under_an_adapter, frozen):
    def models(**writer):
        return JointModels(
            Role(MODEL, "llm", {}, **writer),
            Role(MODEL, "prompted", {}, trained=False),
            shared=False,
            max_tokens=16,
            batch_tokens=1024,
            reduction="sum",
            precision=Precision.of(name, zero=zero),
        )

    whole, small = models(), models(lora=LORA)
    assert {value.dtype for value in whole.trained("writer").values()} == {trained}
    assert {value.dtype for value in whole.generator.parameters()} == {frozen}
    assert {value.dtype for value in small.trained("writer").values()} == {adapted}
    assert {value.dtype for value in small.writer.parameters() if not value.requires_grad} == {under_an_adapter}


def test_samples_under_autocast_have_the_log_probabilities_of_the_policy():
    model, tokenizer = load_model(MODEL, "cpu", "float32")
    abilities = verify(model, ChatTokens(tokenizer, MODEL), MODEL)

    def within():
        return computing(model, autocast=True)

    rollouts = EngineRollouts(model, abilities=abilities, batch_tokens=2048, within=within)
    prompts = [[5, 6, 7, 8, 9, 10, 11]] * 3 + [[20, 21, 22]] * 2
    samples = rollouts.sample(prompts, seeds=range(5), max_tokens=12, temperature=1.0, top_p=1.0)
    items = [Scored(prompt, sample.token_ids) for prompt, sample in zip(prompts, samples, strict=True)]
    found = token_likelihood(model, items, batch_tokens=2048, layout=abilities.layout, within=within)
    exact = token_likelihood(model, items, batch_tokens=2048, layout=abilities.layout)
    for sample, policy, float32 in zip(samples, found.logps_R_T, exact.logps_R_T, strict=True):
        length = len(sample.token_ids)
        assert (torch.tensor(sample.logprobs) - policy[:length]).abs().mean() < 0.05
        assert 0 < (policy - float32)[:length].abs().max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        ({"precision": "mixed"}, torch.float32),
        ({"precision": "mixed", "gradient_checkpointing": True, "writer.lora": {"rank": 4}}, torch.float32),
        ({"precision": "bfloat16"}, torch.bfloat16),
    ],
    ids=["mixed", "adapters", "bfloat16"],
)
def test_a_run_in_half_precision_is_close_to_one_in_float32(tmp_path, monkeypatch, changes, saved):
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)
    file = write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path))
    out, exact = tmp_path / "half", tmp_path / "float32"
    # Without a learning rate, the steps differ by rounding, and by the few tokens that it changes.
    still = {"writer.learning_rate": 0.0, "generator.learning_rate": 0.0, "writer.temperature": 0.05}
    run(load(file, {**still, **changes}), out, source="a test", report=lambda measured: None)
    run(load(file, still), exact, source="a test", report=lambda measured: None)
    for found, wanted in zip(metrics(out), metrics(exact), strict=True):
        assert found["generator/loss"] == pytest.approx(wanted["generator/loss"], rel=0.03)
    written = load_file(out / "generator" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {saved}
    assert json.loads((out / "config.json").read_text())["precision"] == changes["precision"]


@pytest.mark.slow
def test_a_run_is_not_resumed_where_auto_means_another_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)
    recipe = load(write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path)), {"precision": "auto", "steps": 1})
    for native in (False, True):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, native=native: native)
        if not native:
            run(recipe, tmp_path / "run", source="a test", report=lambda measured: None)
    with pytest.raises(InputError, match="was made with precision 'float32', not 'mixed'"):
        run(recipe, tmp_path / "run", source="a test", report=lambda measured: None)
