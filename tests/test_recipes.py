"""Every recipe's command for two steps, and every benchmark on its smallest shape."""

import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from popi.cli import main
from popi.config import load
from popi.evaluation.results import Cell, Results
from popi.models import find
from popi.testing import free_port, tiny_model
from tests.servers import needs_vllm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 2, "data.users": 24, "users_per_step": 2, "writer.num_generations": 3, "evaluate_users": 4}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def python(script, *words):
    return subprocess.run([sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("popi_*/*.yaml")), ids=lambda path: path.stem)
def test_a_joint_recipe_runs(recipe, tmp_path, capsys):
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), *changes]) == 0
    steps = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    assert 0 <= steps[-1]["held_out"]["accuracy"] <= 1
    printed = capsys.readouterr()
    assert "popi: reference: " in printed.err
    for role in json.loads(printed.out)["models"].split(", "):
        assert (Path(role) / "model.safetensors").exists()


def test_the_bare_loop_runs(tmp_path):
    out = tmp_path / "curve.jsonl"
    small = ["--steps", "2", "--users-per-step", "2", "--held-out", "2", "--every", "2"]
    done = python("recipes/bare/popi_loop.py", *small, "--out", out)
    assert done.returncode == 0, done.stderr
    steps = lines_of(out)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0 <= line["accuracy"] <= 1 and line["reward"] < 0 for line in steps)
    assert 0 <= steps[-1]["held_out_accuracy"] <= 1
    # Another run does not go on with the curve of the one before.
    assert python("recipes/bare/popi_loop.py", *small, "--out", out).returncode == 0
    assert lines_of(out)[0]["step"] == 1 and len(lines_of(out)) == 2


@pytest.fixture(scope="module")
def bare():
    spec = importlib.util.spec_from_file_location("popi_loop", ROOT / "recipes" / "bare" / "popi_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bare_loop_is_the_recipe(bare):
    recipe = load(ROOT / "recipes" / "popi_mini")
    writer, generator = recipe.writer, recipe.generator
    assert (recipe.users_per_step, writer.num_generations) == (bare.USERS_PER_STEP, bare.NUM_GENERATIONS)
    assert (recipe.pairs_per_summary, recipe.warmup) == (bare.PAIRS, bare.WARMUP)
    assert (writer.max_tokens, writer.temperature) == (bare.MAX_TOKENS, bare.TEMPERATURE)
    assert (writer.learning_rate, generator.learning_rate) == (bare.WRITER_LR, bare.GENERATOR_LR)
    assert (writer.max_grad_norm, generator.max_grad_norm) == (bare.WRITER_MAX_NORM, bare.GENERATOR_MAX_NORM)
    assert (generator.beta, writer.beta) == (bare.BETA, bare.REWARD_BETA)
    assert (writer.kl_coef, writer.length_penalty) == (bare.KL_COEF, bare.LENGTH_PENALTY)
    assert {writer.model, generator.model} == {bare.MODEL}
    assert recipe.data.users == recipe.steps * recipe.users_per_step, "no user occurs twice"


def test_the_learning_rate_of_the_bare_loop_is_that_of_the_framework(bare):
    steps = 12
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, bare.WARMUP, steps)
    for step in range(steps):
        assert bare.share_of_rate(step, steps) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_the_bare_loop_drops_a_truncated_claim_and_counts_a_tie_as_half(bare):
    writer = bare.Chat(find(bare.MODEL))
    said = writer.tokenizer("- likes lists\n- dislikes emoji", add_special_tokens=False)["input_ids"]
    assert bare.read_summary(writer, torch.tensor(said)) == "- likes lists"
    whole = torch.tensor([*said, writer.tokenizer.eos_token_id])
    assert bare.read_summary(writer, whole) == "- likes lists\n- dislikes emoji"
    assert bare.accuracy(torch.tensor([-1.0, 0.0, 0.0, 2.0])) == 0.5
    assert bare.accuracy(torch.tensor(0.0)) == 0.5


@pytest.mark.parametrize(
    ("script", "words", "heads"),
    [
        ("reward_scoring.py", ["--users", "1", "--samples", "2", "--lengths", "32"], 2),
        ("train_step.py", ["--users", "1", "--lengths", "100", "--samples", "2", "--summaries", "4"], 3),
        ("packed.py", ["--rows", "2", "--length", "20", "--new", "3"], 3),
    ],
)
def test_a_benchmark_finds_both_sides_equal(script, words, heads):
    done = python(f"benchmarks/speed/{script}", *words, "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == heads + 1


def test_joint_steps_at_the_shape_of_a_real_model_are_measured():
    small = ["--shape", "15m", "--steps", "2", "--users", "1", "--samples", "2", "--summary", "16", "--length", "200"]
    done = python("benchmarks/speed/joint_steps.py", *small, "--answer", "30", "--peak-tflops", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == ["rollout", "scoring", "update", "utilisation", "memory:"]


def test_the_rollouts_of_vllm_have_the_tokens_of_the_engine():
    needs_vllm()
    few = ["data.users=8", "users_per_step=2", "evaluate_users=2", "writer.num_generations=4", "writer.max_tokens=32"]
    done = python("benchmarks/speed/rollouts.py", "--steps", "2", "--cache-gib", "0.25", "--set", *few)
    assert done.returncode == 0, done.stderr
    updates = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    assert [words[:2] for words in updates] == [["0", "8/8"], ["1", "8/8"]]
    assert all(0 < float(words[3]) < 1e-3 for words in updates)


def test_the_benchmark_of_a_step_stops_where_gradients_differ(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "speed")
    train_step = importlib.import_module("train_step")
    monkeypatch.setattr(train_step, "gradient_difference", lambda ours, plain: 2e-5)
    with pytest.raises(AssertionError, match="the gradients differ by 2e-05 and 2e-05"):
        train_step.measure(train_step.MODEL, 1, 100, 2, 4, 1)


def test_every_way_of_joining_is_a_recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    joining = importlib.import_module("joining")
    made = {name: load(joining.RECIPE, way.changes) for name, way in joining.WAYS.items()}
    assert {(made[name].generator.loss, made[name].generator.beta) for name in ("interleaved", "ipo", "ipo-0.05")} == {
        ("dpo", 0.5),
        ("ipo", 0.5),
        ("ipo", 0.05),
    }


def test_the_peak_of_a_side_does_not_depend_on_what_was_measured_before(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "speed")
    peak = importlib.import_module("reward_scoring").peak
    shape = 1, 2, 2, 128
    ours, usual, again = (peak(side, "popi-mini-base", shape) for side in ("ours", "usual", "ours"))
    assert ours == pytest.approx(again, rel=0.2, abs=2)
    assert min(ours, usual) > 1


@pytest.mark.parametrize(
    ("ways", "from_file"), [(["shared-weights", "writer-alone"], False), (["generator-without-context"], True)]
)
def test_ways_of_joining_are_trained_and_measured(tmp_path, monkeypatch, ways, from_file):
    # Set by a training in this process, it would hide what DeepSpeed prints among the results.
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    small = [f"{name}={value}" for name, value in SMALL.items()]
    words = ["--ways", *ways, "--users", "6", "--out", tmp_path / "out"]
    if from_file:
        data, recipe = tmp_path / "users.jsonl", tmp_path / "other.yaml"
        assert main(["data", "miniworld", "--users", "6", "--out", str(data)]) == 0
        recipe.write_text(
            (ROOT / "recipes" / "popi_mini" / "config.yaml").read_text().replace("popi-mini\n", "other\n")
        )
        words += ["--recipe", recipe, "--data", data]
    done = python("benchmarks/joining.py", *words, "--set", *small)
    assert done.returncode == 0, done.stderr
    cells = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [line[0] for line in cells[2:]] == ways
    assert {len(line) for line in cells} == {7}
    assert all(re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", cell) for line in cells[2:] for cell in line[1:3])
    for way in ways:
        samples = any("tokens/rollout" in line for line in lines_of(tmp_path / "out" / way / "metrics.jsonl"))
        assert samples != way.startswith("generator"), "only a generator that learns alone samples nothing"
    if from_file:
        assert (tmp_path / "out" / ways[0] / "measured-6").is_dir()
        config = json.loads((tmp_path / "out" / ways[0] / "config.json").read_text())
        assert "other" in json.dumps(config)


def test_a_killed_command_at_scale_writes_one_summary_per_user(tmp_path):
    needs_vllm()
    small = ["--users", "24", "--shards", "3", "--kills", "1", "--max-tokens", "64", "--max-concurrency", "2"]
    done = python("benchmarks/summarize_at_scale.py", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["vLLM", "vLLM"]
    assert any(line.startswith("popi, all") for line in lines)
    assert lines[-1] == "24 summaries of 24 users: 0 missing, 0 twice, 0 of unknown users"


def test_transfer_has_a_column_for_every_kind_of_backend(tmp_path):
    needs_vllm()
    small = ["--users", "4", "--seeds", "1", "--judged", "2", "--port", str(free_port())]
    done = python("benchmarks/transfer.py", *small, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = Results.model_validate_json((tmp_path / "results.json").read_text())
    assert results.users == 4 and len(results.cells) == 6 * 5
    assert {cell.column: cell.accuracy is not None for cell in results.cells} == {
        "popi-mini-base": True,
        "popi-mini-reader": True,
        "popi-mini-reader-olmo": True,
        "popi-mini-reader-phi": True,
        "popi-mini-reader-phi-as-text": False,
    }
    assert "popi-mini-reader-phi-as-text (win rate)" in done.stdout
    assert done.stdout.count("of the oracle's gain") == 5
    costs = {(cell.row, cell.column): (cell.prompt_tokens, cell.completion_tokens) for cell in results.cells}
    for name in dict.fromkeys(cell.column for cell in results.cells):
        read = {row: costs[row, name][0] for row in ("no-context", "popi-summary", "raw-signals")}
        assert read["no-context"] < read["popi-summary"] < read["raw-signals"]
    assert costs["popi-summary", "popi-mini-reader-phi"] == costs["popi-summary", "popi-mini-reader-phi-as-text"]
    assert done.stdout.startswith("4 users, 1 samples; ")


def test_a_price_tells_what_a_thousand_answers_cost(tmp_path):
    transfer = runpy.run_path(str(ROOT / "benchmarks" / "transfer.py"))
    (file := tmp_path / "api.yaml").write_text("{backend: openai, model: m, price: {prompt: 0.5, completion: 2}}")
    cell = Cell.model_construct(prompt_tokens=58.0, completion_tokens=38.0)
    told = [transfer["cost_of"](cell, transfer["price_of"](model)) for model in (str(file), "popi-mini-base")]
    assert told == ["58 + 38, 0.105", "58 + 38"]
    unknown = Cell.model_construct(prompt_tokens=None, completion_tokens=None)
    assert transfer["cost_of"](unknown, transfer["price_of"](str(file))) == "not counted"


def test_the_backends_benchmark_finds_equal_texts():
    needs_vllm()
    small = ["--users", "2", "--pairs", "8", "--requests", "4", "--repeats", "1"]
    done = python("benchmarks/speed/backends.py", *small)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("transformers", "vLLM"))]
    assert len(lines) == 3 and all("2/2" in line for line in lines)
    assert "more, %" in done.stdout


@pytest.mark.parametrize(
    ("name", "published"),
    [("dsp", "domain_specific_preference.test.json"), ("prefeval", "PrefEval")],
)
def test_the_commands_of_a_recipe_for_smollm2(tmp_path, monkeypatch, capsys, shared_data, name, published):
    """The commands of its README, with a tiny model in the place of SmolLM2, and two steps."""
    folder = ROOT / "recipes" / f"smollm2_{name}"
    [block] = re.findall(r"^```sh\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    commands = [shlex.split(line)[1:] for line in block.replace("\\\n", "").splitlines()]
    assert [command[0] for command in commands] == ["models", "data", "train", "eval"]
    assert commands[0] == ["models", "get", load(folder).writer.model]
    model, tokenizer = tiny_model()
    model.config.max_position_embeddings = 8192
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    places = {
        published: str(shared_data / name),
        f"recipes/smollm2_{name}": str(folder),
        load(folder).writer.model: str(tmp_path / "tiny"),
    }
    changes = SMALL | {f"{role}.model": tmp_path / "tiny" for role in ("writer", "generator")}
    changes |= {"writer.max_tokens": 16, "precision": "float32"}
    small = [word for field, value in changes.items() for word in ("--set", f"{field}={value}")]
    monkeypatch.chdir(tmp_path)
    for command in commands[1:]:
        more = {"train": small, "eval": ["--users", "2", "--rows", "no-context,popi-summary"]}.get(command[0], [])
        assert main([*(places.get(word, word) for word in command), *more]) == 0, command
    assert [line["step"] for line in lines_of(Path(f"runs/popi-smollm2-{name}/metrics.jsonl"))] == [1, 2]
    results = Results.model_validate_json(Path(f"runs/{name}/table/results.json").read_text())
    assert {cell.row for cell in results.cells} == {"no-context", "popi-summary"} and results.users == 6
