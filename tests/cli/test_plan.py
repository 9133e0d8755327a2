import json

import pytest
import yaml

from popi.cli import main

RECIPE = {
    "task": "joint",
    "name": "tiny",
    "data": {"file": "absent.jsonl"},
    "writer": {"model": "popi-mini-base", "max_tokens": 32, "num_generations": 2},
    "generator": {"model": "popi-mini-base"},
    "steps": 10,
    "users_per_step": 2,
    "batch_tokens": 1024,
}
SHORT = ["--signal-tokens", "200", "--answer-tokens", "30"]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(RECIPE))
    return str(tmp_path / "own.yaml")


def planned(capsys, *words):
    assert main(["plan", *words]) == 0
    *phases, last = map(json.loads, capsys.readouterr().out.splitlines())
    return phases, last


@pytest.mark.slow
def test_a_recipe_is_planned(recipe, capsys):
    phases, last = planned(capsys, recipe, *SHORT, "--tokens-per-second", "1000")
    [phase] = phases
    assert phase["phase"] == "1-both" and last["fits"]
    # 3,033,856 weights in float32; both roles have two states of the optimizer.
    assert phase["gb"]["weights"] == pytest.approx(2 * 0.0121, abs=2e-4)
    assert phase["gb"]["optimizer state"] == pytest.approx(4 * 0.0121, abs=4e-4)
    # 2 users x 2 summaries x 32 tokens are written; each of them and the signals are read for the gradient, and each
    # summary with the pair: 100 + 32 + 2 x 30.
    assert last["writer step: tokens written"] == 128
    assert last["writer step: tokens of updates"] == 2 * (200 + 64) + 4 * 192
    assert last["writer step: tokens read"] == 2 * 200 + 2 * (200 + 64)
    seconds = (928 + 3 * 1296) / 1000
    assert last["writer step: seconds"] == pytest.approx(seconds)
    assert last["run: hours without sampling"] == pytest.approx(10 * seconds / 3600)


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_a_remedy(recipe, capsys):
    phases, last = planned(capsys, recipe, *SHORT, "--gpu-memory", "1", "--set", "batch_tokens=8192")
    assert not last["fits"] and last["verdict"].startswith("does not fit: ")
    assert phases[0]["total_gb"] > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3", "--set", "engine.kind=ddp"], "2 users cannot be divided among 3 GPUs"),
        (["--gpus", "2"], "field engine.kind: is single, but there are 2 GPUs"),
        (["--set", "writer.model=absent"], "model 'absent' not found"),
        (["--signal-tokens", "0"], "--signal-tokens"),
        (["--gpu-memory", "-1"], "--gpu-memory"),
    ],
)
def test_bad_input_is_an_error_of_one_line(recipe, capsys, words, message):
    assert main(["plan", recipe, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and not printed.out


def test_a_folder_without_a_configuration_is_an_error(recipe, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["plan", recipe, "--set", f"writer.model={tmp_path / 'empty'}"]) == 2
    assert "the configuration of" in capsys.readouterr().err


def test_a_recipe_of_another_task_is_an_error(capsys):
    assert main(["plan", "recipes/mini_base"]) == 2
    assert "field task: is pretrain, but only joint recipes are planned" in capsys.readouterr().err


@pytest.mark.slow
def test_a_generator_that_only_scores_is_whole_or_divided_or_elsewhere(recipe, capsys, tmp_path):
    served = str(tmp_path / "servers.yaml")
    zero2 = ["--gpus", "2", "--set", "engine.kind=zero2", "--set", "train=writer", "--set", "precision=float32"]

    def other(*words):
        phases, _ = planned(capsys, recipe, *SHORT, *zero2, *words)
        return phases[0]["gb"].get("other model", 0.0)

    whole = other()
    assert whole == pytest.approx(0.0121, abs=2e-4)
    assert other("--set", "engine.scorer=sharded") == pytest.approx(whole / 2, abs=2e-4)
    assert other("--set", f"generator.model={served}") == 0.0
