import json
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
    assert "another recipe" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
