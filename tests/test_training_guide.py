"""The examples of the training guide: its user, its recipe, its module and its commands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from popi.backends.vllm_worker import NAME
from popi.cli import main
from popi.config import load
from popi.data.example import PersonalizationExample
from popi.models import shipped
from popi.personalizer import Personalizer
from popi.signals import Statement

GUIDE = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.M | re.S))
RECIPE, WITH_ADAPTERS, WITH_ENGINE, WITH_VLLM, WITH_SERVER = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.M | re.S)
CONVERTING, COMMANDS, SEVERAL, PLANNING = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.M | re.S)
SMALL = ["steps=2", "users_per_step=2", "writer.num_generations=3", "writer.max_tokens=48", "evaluate_users=4"]


def test_the_user_of_the_guide_is_valid():
    example = PersonalizationExample.model_validate_json(BLOCKS["json"])
    assert len(example.user.signals) == 2 and len(example.tests) == 1


def test_the_conversion_of_the_guide_gives_its_figures(tmp_path, monkeypatch, capsys, shared_data):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(CONVERTING.replace("\\\n", ""))[1:]
    words[words.index("domain_specific_preference.test.json")] = str(
        shared_data / "dsp" / "domain_specific_preference.test.json"
    )
    assert main([*words, "--json"]) == 0
    train, evaluation, *others = map(json.loads, capsys.readouterr().out.splitlines())
    assert f"| `--tests 5 --rejected 3` | {train['users']} | {evaluation['users'] // 4} | 312 to 314 |" in GUIDE
    sides = [record for record in others if "side" in record]
    assert len(sides) == 4
    for side in sides:
        figures = [str(side[name]) for name in ("answers", "cut", "marked", "words_before", "words_after")]
        assert f"| `{side['out']}` | {side['side']} | {' | '.join(figures)} |" in GUIDE


@pytest.mark.parametrize(("fields", "kind"), [(WITH_VLLM, "vllm-colocate"), (WITH_SERVER, "vllm-server")])
def test_the_fields_of_vllm_belong_to_the_writer(tmp_path, fields, kind):
    recipe = yaml.safe_load(RECIPE)
    recipe["writer"] |= yaml.safe_load(fields)["writer"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert load(tmp_path / "own.yaml").writer.rollouts == kind
    assert NAME in GUIDE


@pytest.mark.slow
def test_adapters_of_the_guide_are_trained_and_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE)
    for role, fields in yaml.safe_load(WITH_ADAPTERS).items():
        recipe[role] |= {**fields, "model": "popi-mini-base"}
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["data", "miniworld", "--users", "12", "--out", "users.jsonl"]) == 0
    assert main(["train", "own.yaml", *[word for value in SMALL for word in ("--set", value)]]) == 0
    assert json.loads(Path("runs/own/writer/adapter/adapter_config.json").read_text())["r"] == 16
    assert main(["generate", "--model", "runs/own/generator", "--prompt", "How are you?"]) == 0


@pytest.mark.slow
def test_the_generator_of_the_guide_is_trained_and_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("notes.py").write_text(BLOCKS["python"])
    recipe = yaml.safe_load(RECIPE)
    recipe["writer"]["model"] = recipe["generator"]["model"] = "popi-mini-base"
    recipe["generator"]["generation"] = "notes:NotesGenerator"
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["data", "miniworld", "--users", "12", "--out", "users.jsonl"]) == 0
    assert main(["train", "own.yaml", *[word for value in SMALL for word in ("--set", value)]]) == 0
    personalizer = Personalizer.load(
        "runs/own/writer", generator="runs/own/generator", generation="notes:NotesGenerator"
    )
    personalizer.observe("ann", Statement(text="I like short answers."))
    assert personalizer.respond_sync("ann", "How are you?").text


@pytest.mark.slow
def test_the_commands_of_the_guide_run_on_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE)
    assert recipe["writer"]["model"] not in shipped()
    text = RECIPE.replace(recipe["writer"]["model"], "popi-mini-base")
    Path("own.yaml").write_text(text)
    assert load(Path("own.yaml")).steps == recipe["steps"]
    assert main(["data", "miniworld", "--users", "12", "--out", "users.jsonl"]) == 0
    lines = [shlex.split(line)[1:] for line in COMMANDS.splitlines()]
    assert [words[0] for words in lines] == ["train", "train", "eval"]
    for words in lines:
        small = [word for value in SMALL for word in ("--set", value)] if words[0] == "train" else []
        assert main([*words, *small]) == 0
    assert {"results.md", "results.json"} <= {path.name for path in Path("evaluation").iterdir()}


@pytest.mark.slow
def test_the_command_for_several_processes_runs_on_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE) | yaml.safe_load(WITH_ENGINE)
    recipe["writer"]["model"] = recipe["generator"]["model"] = "popi-mini-base"
    Path("own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["data", "miniworld", "--users", "12", "--out", "users.jsonl"]) == 0
    small = [word for value in SMALL for word in ("--set", value)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [*shlex.split(SEVERAL), *small]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[:5000]
    assert json.loads(ended.stdout)["models"] == "runs/several/writer, runs/several/generator"
    assert json.loads(Path("runs/several/config.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_the_recipe_of_the_guide_is_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(RECIPE)
    Path("own.yaml").write_text(RECIPE.replace(recipe["writer"]["model"], "popi-mini-base"))
    assert main(["data", "miniworld", "--users", "80", "--out", "users.jsonl"]) == 0
    capsys.readouterr()
    assert main(shlex.split(PLANNING)[1:]) == 0
    printed = capsys.readouterr()
    assert "; measured where no option gives them" in printed.err
    phase, last = map(json.loads, printed.out.splitlines())
    assert phase["total_gb"] < 24 and last["fits"] and last["run: hours without sampling"] > 0


def test_the_engine_of_the_guide_is_shown(tmp_path, capsys):
    recipe = yaml.safe_load(RECIPE) | yaml.safe_load(WITH_ENGINE)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "own.yaml"), "--show-engine"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["role"] for each in shown] == ["writer", "generator"]
    assert all(each["deepspeed"]["zero_optimization"]["stage"] == 2 for each in shown)
    assert main(["train", str(tmp_path / "own.yaml"), "--show-engine", "--set", "engine.kind=ddp"]) == 2
    assert "field engine.kind: is ddp, without DeepSpeed; set it to zero1, zero2 or zero3" in capsys.readouterr().err
