"""The recipes for clusters: they are planned from public configurations, and run two steps with small stand-ins."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from popi.cli import main
from popi.config import load
from popi.config.joint import Lora
from popi.testing import tiny_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "cluster"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = sorted(FOLDER.glob("*.sh"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")

LLAMA = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
CONFIGS = {
    "llama_3b": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True},
    "qwen3_8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "llama_70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"tie_word_embeddings": False},
}
"""The published shapes of the models."""

FAMILY = {"llama_3b": "llama", "qwen3_8b": "qwen3", "llama_70b": "llama"}
BILLIONS = {"llama_3b": 3.2, "qwen3_8b": 8.2, "llama_70b": 70.6}

SMALL = ["steps=2", "data.users=4", "users_per_step=2", "writer.num_generations=2", "writer.max_tokens=16"]
SMALL += ["evaluate_users=2", "warmup=1", "precision=float32", "batch_tokens=1024"]

SHORT = ["--signal-tokens", "500", "--summary-tokens", "100", "--answer-tokens", "100", "--set", "batch_tokens=2048"]
"""Sizes that are planned in less time. What does not fit with them does not fit with those of the recipes."""


def words(changes):
    return [word for change in changes for word in ("--set", change)]


def models(folder):
    return [f"{role}.model={folder}" for role in ("writer", "generator")]


def test_every_recipe_has_a_configuration():
    assert {recipe.stem for recipe in RECIPES} == set(CONFIGS)


def test_the_recipe_of_three_billion_parameters_is_popi_as_released():
    recipe = load(FOLDER / "llama_3b.yaml")
    writer, generator = recipe.writer, recipe.generator
    assert (recipe.steps * recipe.users_per_step, recipe.users_per_step) == (20_000, 8) and recipe.data.users == 20_000
    assert (writer.num_generations, writer.temperature, writer.max_tokens) == (8, 0.6, 2048)
    assert (writer.kl_coef, generator.beta, writer.beta, generator.loss) == (2e-3, 0.01, None, "dpo")
    assert (writer.learning_rate, generator.learning_rate, recipe.warmup) == (1e-6, 1e-6, 150)
    assert (writer.max_grad_norm, generator.max_grad_norm) == (1.0, 10.0)
    assert (recipe.schedule, recipe.engine.kind, recipe.precision) == ("sequential", "zero3", "mixed")
    assert not writer.scale_by_std and recipe.pairs_per_summary == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned_from_a_configuration_alone(recipe, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[recipe.stem]))
    assert main(["plan", str(recipe), "--gpus", "8", *SHORT, *words(models(tmp_path))]) == 0
    *phases, last = map(json.loads, capsys.readouterr().out.splitlines())
    resolved = load(recipe)
    assert [phase["phase"] for phase in phases] == (
        ["1-both"] if resolved.schedule == "interleaved" else ["1-writer", "2-generator"]
    )
    whole = 2 * BILLIONS[recipe.stem]
    for phase in phases:
        assert phase["total_gb"] == pytest.approx(sum(phase["gb"].values()), abs=0.01)
        assert phase["total_gb"] == max(phase["moments_gb"].values())
        assert phase["gb"]["weights"] == pytest.approx(whole / 8, rel=0.05), "ZeRO-3 divides weights in bfloat16"
    assert phases[0]["moments_gb"]["rollouts"] > whole, "the weights of the writer are gathered for rollouts"
    assert last["fits"] == (max(phase["total_gb"] for phase in phases) <= 80)
    assert last["verdict"].startswith("fits: " if last["fits"] else "does not fit: ")
    assert last["fits"] == (recipe.stem != "llama_70b")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps_on_two_ranks(recipe, tmp_path):
    model, tokenizer = tiny_model(FAMILY[recipe.stem])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    users = tmp_path / "users.jsonl"
    assert main(["data", "miniworld", "--users", "8", "--signals", "2", "--tests", "1", "--out", str(users)]) == 0
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    changes = [*SMALL, *models(tmp_path / "model"), f"data.file={users}"]
    command = [*torchrun, "-m", "popi", "train", str(recipe), "--out", str(tmp_path / "run"), *words(changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == ([1, 2] if load(recipe).schedule == "interleaved" else [1, 2, 3, 4])
    for role in ("writer", "generator"):
        assert (tmp_path / "run" / role / "model.safetensors").exists()
    if load(recipe).writer.lora == Lora():
        assert (tmp_path / "run" / "writer" / "adapter").is_dir()


def command_of(script):
    """The command that a script passes to torchrun, with the values of its variables."""
    [line] = re.findall(r"(?:^|\s)(torchrun .*?)(?: &)?$", script.read_text().replace("\\\n", " "), re.M)
    return shlex.split(re.sub(r'"?\$\{?(\w+|@)[^"}\s]*\}?"?', r"<\1>", line))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_starts_an_existing_recipe(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert os.access(script, os.X_OK)
    [default] = re.findall(r"^recipe=\$\{1:-(.*)\}$", script.read_text(), re.M)
    assert (ROOT / default).resolve() in RECIPES
    found = command_of(script)
    assert found[found.index("-m") :][:3] == ["-m", "popi", "train"] and found[-2] == "<recipe>"
    several = "--nnodes" in found
    assert several == ("--rdzv-endpoint" in found) and several != ("--standalone" in found)


@pytest.mark.parametrize("script", SCRIPTS[:1], ids=lambda path: path.name)
def test_a_script_passes_its_options_on(script, tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "GPUS": "2"}
    done = subprocess.run([script, "own.yaml", "--out", "run"], env=environment, capture_output=True, text=True)
    expected = "--standalone --nproc-per-node 2 -m popi train own.yaml --out run"
    assert " ".join(done.stdout.split()) == expected


def test_a_job_goes_back_into_the_queue_before_its_time_is_over():
    text = (FOLDER / "slurm.sh").read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR1@120" in text
    assert re.search(r"^trap 'scontrol requeue .*' USR1$", text, re.M)
    assert text.rstrip().endswith("wait $!")


def test_rows_of_the_hub_become_users(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    rows = [
        {
            "prompt": f"What is {n}?",
            "response_x": f"Short {n}.",
            "response_y": f"Long {n}, which takes a while.",
            "level_x": "child",
            "level_y": "expert",
            "scorer_level": "expert" if n % 2 else "child",
            "label": n % 2,
        }
        for n in range(21)
    ]
    rows.append({**rows[0], "scorer_level": "teacher"})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(code, "README.md", "exec"), {})
    assert main(["data", "convert", "csv", "users.csv", "--out", "users.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["users"] == 4
    users = [json.loads(line) for line in Path("users.jsonl").read_text().splitlines()]
    assert all(len(user["user"]["signals"]) == 4 and len(user["tests"]) == 1 for user in users)
    child = next(user for user in users if user["user"]["user_id"].startswith("child"))
    assert child["tests"][0]["chosen"].startswith("Short")
