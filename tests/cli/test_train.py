import json
import sys
from pathlib import Path

import pytest

from popi.cli import main

RECIPE = Path(__file__).parents[2] / "recipes" / "mini_base"


def test_a_dry_run_prints_the_resolved_recipe_and_its_size(capsys):
    assert main(["train", str(RECIPE), "--dry-run", "--set", "phases.0.steps=3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    phases = printed["recipe"]["phases"]
    assert phases[0]["steps"] == 3
    assert printed["steps"] == sum(phase["steps"] for phase in phases)
    assert printed["lessons"] == sum(phase["steps"] * sum(phase["lessons"].values()) for phase in phases)


@pytest.mark.parametrize("words", [["nowhere.yaml"], [str(RECIPE), "--set", "seed"], [str(RECIPE), "--set", "sead=1"]])
def test_bad_input_is_one_line_and_exit_code_two(words, capsys, tmp_path):
    assert main(["train", *words, "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_a_folder_of_another_run_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": {}}))
    assert main(["train", str(RECIPE), "--out", str(tmp_path)]) == 2
    assert "was made with recipe" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_without_the_extra_it_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "popi.pretraining.pretrain", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["train", str(RECIPE)]) == 2
    assert "pip install 'popi[local]'" in capsys.readouterr().err


def test_an_architecture_that_makes_no_model_is_one_line(capsys, tmp_path, monkeypatch):
    from popi.pretraining import pretrain

    monkeypatch.setattr(pretrain, "TOKENIZER_LESSONS", 40)
    words = ["--set", "architecture.hidden_size=193", "--out", str(tmp_path / "run")]
    assert main(["train", str(RECIPE), *words]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "field architecture: transformers cannot make a model of it" in printed


def test_no_two_runs_in_one_folder(capsys, tmp_path):
    from popi.config import load
    from popi.run_folder import RunFolder

    with RunFolder.open(tmp_path / "run", load(RECIPE)):
        assert main(["train", str(RECIPE), "--out", str(tmp_path / "run")]) == 1
    assert "is being written by another process" in capsys.readouterr().err
