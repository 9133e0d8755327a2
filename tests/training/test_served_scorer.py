"""A generator behind a backend scores as the same model in this process, and the writer is trained the same."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from popi.config import load
from popi.data.example import HeldOutPair
from popi.errors import BackendError, ConfigError, InputError
from popi.testing import ScriptedBackend
from popi.training import joint
from popi.training.joint import run
from popi.training.models import JointModels, Role
from popi.training.reference import Reference, reference_key
from popi.training.reward import PairReward
from popi.training.scoring import ConditionedPair, PairLogps
from popi.training.served_scorer import ServedScorer
from tests.servers import KEY, SERVED
from tests.training.helpers import answer_format, summary
from tests.training.rank_runs import make_inputs, metrics, write_recipe

MODEL = "popi-mini-base"


def backend_file(folder: Path, **tree) -> str:
    file = folder / "generator.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ratios_are_those_of_a_model_in_this_process(tmp_path, reduction):
    def scorer(model):
        return JointModels(
            Role(MODEL, "llm", {}),
            Role(model, "prompted", {}, trained=False),
            shared=False,
            max_tokens=16,
            batch_tokens=2048,
            reduction=reduction,
        ).scorer

    pairs = [HeldOutPair(prompt=f"Why {n}?", chosen="Because. " * n, rejected="No.") for n in (1, 2, 3)]
    items = [
        ConditionedPair(each, pair, PairLogps(-1.0, -2.0))
        for pair in pairs
        for each in (None, summary("- likes short answers"))
    ]
    served, local = scorer(backend_file(tmp_path, backend="transformers", model=MODEL)), scorer(MODEL)
    found, wanted = served.ratios(items), local.ratios(items)
    served.close()
    assert found.chosen_N.tolist() == pytest.approx(wanted.chosen_N.tolist(), abs=1e-4)
    assert found.rejected_N.tolist() == pytest.approx(wanted.rejected_N.tolist(), abs=1e-4)
    assert served.tokens_read > 0


def test_a_backend_that_does_not_score_is_refused():
    with pytest.raises(ConfigError, match=r"generator\.model: scripted does not score responses; name a backend"):
        backend = ScriptedBackend()
        backend.capabilities = replace(backend.capabilities, score=False)
        ServedScorer(backend, answer_format())


def test_a_response_that_cannot_be_scored_ends_the_run(tmp_path):
    backend = ScriptedBackend(context_length=2)
    scorer = ServedScorer(backend, answer_format())
    pair = HeldOutPair(prompt="Why?", chosen="So.", rejected="No.")
    with pytest.raises(BackendError, match="cannot score a pair: too long"):
        scorer.ratios([ConditionedPair(None, pair, PairLogps(0.0, 0.0))])


def test_pairs_that_cannot_be_scored_are_left_out_of_the_reward_and_counted():
    pairs = [
        HeldOutPair(prompt="Why?", chosen=chosen, rejected="No.") for chosen in ("So.", "far too long " * 90, "Yes.")
    ]
    backend = ScriptedBackend(context_length=200)
    reference = Reference({reference_key(pair): PairLogps(-1.0, -2.0) for pair in pairs})

    def rewarded(tests):
        reward = PairReward(
            ServedScorer(backend, answer_format()),
            tests,
            reference,
            loss="dpo",
            beta=1.0,
            reward_beta=1.0,
            pairs_per_summary=3,
            length_penalty=0.0,
            count_tokens=len,
            seed=0,
        )
        return reward([0, 1], [summary("- short"), summary("- long")], 0)

    rewards, metrics = rewarded([pairs, pairs[1:2]])
    [expected, _], clean = rewarded([[pairs[0], pairs[2]], pairs[:1]])
    assert rewards[0] == pytest.approx(expected) and math.isnan(rewards[1])
    assert (metrics["rewards/failed"], clean["rewards/failed"]) == (0.5, 0.0)
    with pytest.raises(BackendError, match="cannot score a pair: too long"):
        rewarded([pairs[1:2], pairs[1:2]])


@pytest.mark.parametrize("changes", [{"train": "both"}, {"train": "writer", "generator.lora": {"rank": 2}}], ids=str)
def test_a_served_generator_is_not_trained(tmp_path, changes):
    file = write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path))
    with pytest.raises(InputError, match="a generator that is described by a backend file needs train: writer"):
        load(file, {"generator.model": "servers.yaml", **changes})


@pytest.mark.slow
@pytest.mark.parametrize("place", ["process", "server"])
def test_a_writer_is_trained_as_with_a_generator_in_this_process(request, tmp_path, monkeypatch, place):
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)
    if place == "server":
        monkeypatch.setenv(KEY, "secret")
        served = {
            "backend": "openai",
            "model": SERVED,
            "options": {"base_url": request.getfixturevalue("vllm_url"), "key": KEY, "tokenizer": MODEL},
        }
    else:
        served = {"backend": "transformers", "model": MODEL}
    recipe = write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path))
    for name, generator in (("local", MODEL), ("served", backend_file(tmp_path, **served))):
        changes = {"train": "writer", "generator.model": generator}
        run(load(recipe, changes), tmp_path / name, source="a test", report=lambda measured: None)
    for found, wanted in zip(metrics(tmp_path / "served"), metrics(tmp_path / "local"), strict=True):
        for each in ("reward", "grad_norm", "rewards/margins"):
            assert found[each] == pytest.approx(wanted[each], rel=1e-3, abs=1e-4)
        assert found.get("held_out", {}) == pytest.approx(wanted.get("held_out", {}), rel=1e-3)
    assert not (tmp_path / "served" / "generator").exists()
