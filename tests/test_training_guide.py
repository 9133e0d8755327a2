"""What the guide to training says is so: its user is one, its recipe is one, and its commands run."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from popi.cli import main
from popi.config import load
from popi.data.example import PersonalizationExample
from popi.models import shipped

GUIDE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.M | re.S))
SMALL = ["steps=2", "users_per_step=2", "writer.samples=3", "writer.max_tokens=48", "evaluate_users=4"]


def test_the_user_of_the_guide_is_one():
    example = PersonalizationExample.model_validate_json(BLOCKS["json"])
    assert len(example.user.signals) == 2 and len(example.tests) == 1


@pytest.mark.slow
def test_the_commands_of_the_guide_run_on_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(BLOCKS["yaml"])
    assert recipe["writer"]["model"] not in shipped()
    text = BLOCKS["yaml"].replace(recipe["writer"]["model"], "popi-mini-base")
    Path("own.yaml").write_text(text)
    assert load(Path("own.yaml")).steps == recipe["steps"]
    assert main(["data", "miniworld", "--users", "12", "--out", "users.jsonl"]) == 0
    lines = [shlex.split(line)[1:] for line in BLOCKS["sh"].splitlines()]
    assert [words[0] for words in lines] == ["train", "train", "eval"]
    for words in lines:
        small = [word for value in SMALL for word in ("--set", value)] if words[0] == "train" else []
        assert main([*words, *small]) == 0
    assert {"results.md", "results.json"} <= {path.name for path in Path("evaluation").iterdir()}
