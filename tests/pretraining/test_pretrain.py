import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from popi.config import load
from popi.errors import BackendError, ConfigError, InputError, PopiError
from popi.pretraining import pretrain
from popi.pretraining.learner import build, learn
from popi.pretraining.pretrain import lessons_of, run
from popi.pretraining.probes import probe_following, probe_writing
from popi.prompts import DEFAULT
from popi.testing import ScriptedBackend, tiny_model
from popi.trained import TrainingRecord, training_record

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


def quietly(recipe, folder):
    run(recipe, folder, source="a test", report=lambda metrics: None)


@pytest.fixture
def learner():
    _, tokenizer = tiny_model("llama")
    return build(small(RECIPES[0]).architecture, tokenizer, seed=0), tokenizer


@pytest.fixture
def lessons():
    return lessons_of(small(RECIPES[0]).phases[0].lessons, signals=(2, 3), seed=0, step=0)


def test_a_step_moves_every_weight(learner, lessons):
    learner, tokenizer = learner
    before = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
    for _ in range(2):
        metrics = learn(learner, tokenizer, lessons, lr=1e-3, bf16=False, batch_tokens=4096)
    assert metrics["response"] > 0
    assert [name for name, value in learner.model.named_parameters() if torch.equal(value, before[name])] == []


def test_training_on_the_same_lessons_lowers_every_loss(learner, lessons):
    steps = [learn(*learner, lessons, lr=3e-3, bf16=False, batch_tokens=4096) for _ in range(12)]
    for name in ("response", "styles", "shown", "beliefs"):
        assert steps[-1][name] < steps[0][name]


def test_a_diverged_step_stops_the_run_and_leaves_the_weights(learner, lessons):
    learner, tokenizer = learner
    before = learner.model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        learner.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        PopiError, match="training diverged: the gradient norm became nan at step 1; lower the learning"
    ):
        learn(learner, tokenizer, lessons, lr=1e-3, bf16=False, batch_tokens=4096)
    assert torch.equal(learner.model.model.embed_tokens.weight, before)


def test_no_two_steps_share_a_lesson():
    counts = small(RECIPES[0]).phases[0].lessons
    lessons = [lessons_of(counts, signals=(2, 3), seed=0, step=step) for step in (0, 1)]
    texts = [[item.response for item in step] for step in lessons]
    assert not set(texts[0]) & set(texts[1])


@pytest.mark.parametrize("architecture", [{"model_type": "llamma"}, {"model_type": "llama", "hidden_size": "wide"}, {}])
def test_an_architecture_that_is_not_a_model_is_one_line(architecture):
    _, tokenizer = tiny_model("llama")
    with pytest.raises(ConfigError, match="field architecture: transformers cannot make a model of it") as caught:
        build(architecture, tokenizer, seed=0)
    assert "\n" not in str(caught.value)


@pytest.fixture
def short(monkeypatch):
    """Less text for the tokenizer and fewer held-out users."""
    monkeypatch.setattr(pretrain, "TOKENIZER_LESSONS", 200)
    monkeypatch.setattr(pretrain, "PROBE_PAIRS", 2)
    monkeypatch.setattr(pretrain, "PROBE_USERS", 2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_resumed_run_ends_with_the_weights_of_a_straight_one(recipe, tmp_path, short):
    resolved = small(recipe)
    last = resolved.phases[-1].name
    quietly(resolved, tmp_path / "straight")

    class Stopped(Exception):
        pass

    def stop_after(count):
        def report(metrics):
            if metrics["step"] == count:
                raise Stopped

        return report

    for count in (1, 3):
        with pytest.raises(Stopped):
            run(resolved, tmp_path / "resumed", source="a test", report=stop_after(count))
    quietly(resolved, tmp_path / "resumed")
    straight, resumed = (load_file(tmp_path / name / last / "model.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="was made with recipe"):
        quietly(small(recipe, seed=9), tmp_path / "resumed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two phases with two steps each."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TOKENIZER_LESSONS": 200, "PROBE_PAIRS": 2, "PROBE_USERS": 2}.items():
            patch.setattr(pretrain, name, value)
        quietly(small(RECIPES[0]), folder)
    return folder


@pytest.mark.parametrize("phase", [phase.name for phase in small(RECIPES[0]).phases])
def test_a_model_is_saved_in_bfloat16_with_its_card_and_its_record(finished, phase):
    weights = load_file(finished / phase / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((finished / phase / "config.json").read_text())["dtype"] == "float32"
    assert training_record(str(finished / phase)) == TrainingRecord(None, DEFAULT.hash)
    card = (finished / phase / "README.md").read_text()
    assert "`popi train a test`" in card and f"`{DEFAULT.hash}`" in card


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of the finished run without its last phase, to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / small(RECIPES[0]).phases[-1].name)
    return folder


@pytest.mark.parametrize("file", ["checkpoint.pt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x02"])
def test_a_damaged_file_of_a_run_is_one_line(damaged, file, content, short):
    (damaged / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        quietly(small(RECIPES[0]), damaged)
    assert file.split("/")[0] in str(caught.value)
    assert caught.value.fix


def test_a_checkpoint_of_another_model_is_one_line(damaged, short):
    torch.save({"step": 4, "model": {}, "heads": {}, "optimizers": []}, damaged / "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt: is not a checkpoint of this model; remove the file"):
        quietly(small(RECIPES[0]), damaged)


async def test_failed_scores_stop_the_measurement_and_failed_summaries_have_no_claims():
    backend = ScriptedBackend(lambda request: "", lambda request: float("nan"))
    with pytest.raises(BackendError, match="cannot be measured: malformed response"):
        await probe_following(backend, 1)
    written = await probe_writing(backend, 2)
    assert (written["precision"], written["recall"], written["accuracy"]) == (0, 0, 0.5)


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path):
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
