import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from popi.config import load
from popi.errors import InputError
from popi.pretraining import pretrain
from popi.pretraining.pretrain import build, learn, lessons_of, run
from popi.testing import tiny_model

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/mini_base/*.yaml"))
SMALL = {
    "architecture.hidden_size": 64,
    "architecture.intermediate_size": 96,
    "architecture.num_hidden_layers": 3,
    "architecture.num_attention_heads": 2,
    "evaluate_every": 10_000,
}


def small(recipe, **overrides):
    tree = load(recipe).model_dump()
    phases = [
        {**phase, "steps": 2, "lessons": dict.fromkeys(phase["lessons"], 2), "signals": (2, 3)}
        for phase in tree["phases"][-2:]
    ]
    heads = {"architecture.num_key_value_heads": 2} if "num_key_value_heads" in tree["architecture"] else {}
    return load(recipe, {**SMALL, **heads, "phases": phases, "checkpoint_every": 1, **overrides})


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_step_moves_every_weight():
    recipe = small(RECIPES[0])
    _, tokenizer = tiny_model("llama")
    learner = build(recipe.architecture, tokenizer, seed=0)
    before = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
    lessons = lessons_of(recipe.phases[0].lessons, signals=(2, 3), seed=0, step=0)
    for _ in range(2):
        measured = learn(learner, tokenizer, lessons, lr=1e-3, bf16=False, batch_tokens=4096)
    assert measured["response"] > 0
    assert [name for name, value in learner.model.named_parameters() if torch.equal(value, before[name])] == []


def test_training_on_the_same_lessons_lowers_every_loss():
    recipe = small(RECIPES[0])
    _, tokenizer = tiny_model("llama")
    learner = build(recipe.architecture, tokenizer, seed=0)
    lessons = lessons_of(recipe.phases[0].lessons, signals=(2, 3), seed=0, step=0)
    seen = [learn(learner, tokenizer, lessons, lr=3e-3, bf16=False, batch_tokens=4096) for _ in range(12)]
    for name in ("response", "styles", "shows", "believes"):
        assert seen[-1][name] < seen[0][name]


def test_no_two_steps_share_a_lesson():
    counts = small(RECIPES[0]).phases[0].lessons
    lessons = [lessons_of(counts, signals=(2, 3), seed=0, step=step) for step in (0, 1)]
    texts = [[made.response for made in step] for step in lessons]
    assert not set(texts[0]) & set(texts[1])


@pytest.fixture
def short_work(monkeypatch):
    """Less text for the tokenizer and fewer held-out users: what is tested is how a run goes on."""
    monkeypatch.setattr(pretrain, "TOKENIZER_LESSONS", 200)
    monkeypatch.setattr(pretrain, "PROBE_PAIRS", 2)
    monkeypatch.setattr(pretrain, "PROBE_USERS", 2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_resumed_run_ends_with_the_weights_of_a_straight_one(recipe, tmp_path, short_work):
    resolved = small(recipe)
    last = resolved.phases[-1].name
    run(resolved, tmp_path / "straight", source="a test", report=lambda measured: None)

    class Stopped(Exception):
        pass

    def stop_after(count):
        def report(measured):
            if measured["step"] == count:
                raise Stopped

        return report

    for count in (1, 3):
        with pytest.raises(Stopped):
            run(resolved, tmp_path / "resumed", source="a test", report=stop_after(count))
    run(resolved, tmp_path / "resumed", source="a test", report=lambda measured: None)
    assert "a test" in (tmp_path / "straight" / last / "README.md").read_text()
    straight, resumed = (weights(tmp_path / name / last) for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="was made with recipe"):
        run(small(recipe, seed=9), tmp_path / "resumed", source="a test", report=lambda measured: None)


@pytest.mark.slow
def test_kill_in_the_middle_leaves_a_folder_that_goes_on(tmp_path):
    import yaml

    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(small(RECIPES[0]).model_dump_json())))
    command = [sys.executable, "-m", "popi", "train", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (Path(result["models"]) / "model.safetensors").exists()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]
