"""Joint training with tiny models: which weights change, and that an interruption changes nothing."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial

import pytest
import torch
import yaml

from popi.config import load
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import ConfigError, InputError, PopiError
from popi.io import read_jsonl, write_jsonl
from popi.run_folder import RunFolder, load_state
from popi.signals import PreferencePair, Statement, UserSignals
from popi.training import joint
from popi.training import trainers as trainers_module
from popi.training.contexts import Contexts
from popi.training.curves import draw_curves
from popi.training.generator import GeneratorTrainer
from popi.training.objective import LogRatios
from popi.training.ranks import Ranks
from popi.training.scoring import PairScorer
from popi.training.users import read_users
from popi.training.writer import WriterTrainer
from tests.brief import brief_model
from tests.hub import in_hub_cache

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """A picture takes longer than the steps of these runs."""
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models on disk. They would drop out, were it not forbidden: no two runs would be alike."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        model, tokenizer = brief_model(seed=seed)
        model.config.attention_dropout = 0.1
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """Twelve users in a file, one of them without evidence."""
    path = tmp_path_factory.mktemp("data") / "users.jsonl"
    write_jsonl(
        path,
        [
            PersonalizationExample(
                user=UserSignals(
                    user_id=f"user {n}",
                    signals=(
                        Statement(text=f"I like answer {n}."),
                        PreferencePair(prompt="How?", chosen=f"So {n}.", rejected="No."),
                    )
                    * (n > 0),
                ),
                tests=tuple(
                    HeldOutPair(prompt=f"What about {n}{k}?", chosen=f"This {n}.", rejected="That, I think.")
                    for k in "ab"
                ),
            )
            for n in range(12)
        ],
    )
    return path


@pytest.fixture
def recipe(models, users, tmp_path):
    """Makes a recipe of a few steps."""

    def make(**changes):
        tree = {
            "task": "joint",
            "name": "tiny",
            "data": {"file": str(users)},
            "writer": {
                "model": str(models / "one"),
                "learning_rate": 0.01,
                "num_generations": 3,
                "max_tokens": 8,
                "temperature": 1.0,
            },
            "generator": {"model": str(models / "two"), "learning_rate": 0.01, "beta": 0.1},
            "steps": 3,
            "users_per_step": 2,
            "warmup": 1,
            "evaluate_every": 2,
            "evaluate_users": 3,
            "checkpoint_every": 1,
            "precision": "float32",
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load(file, changes)

    return make


def train(recipe, out, report=lambda measured: None):
    from popi.training.joint import run

    run(recipe, out, source="a test", report=report)
    return {name: weights(out / name) for name in ("writer", "generator") if (out / name).exists()}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def changed(before, after):
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


SCHEDULES = [
    {"schedule": "sequential"},
    {"schedule": "alternating", "steps": 4},
    {"schedule": "interleaved"},
    {"schedule": "interleaved", "shared": True},
    {"schedule": "alternating", "steps": 4, "shared": True},
]


def same_model(recipe, models, changes):
    return recipe(**changes, **({"generator.model": str(models / "one")} if changes.get("shared") else {}))


@pytest.mark.parametrize("changes", SCHEDULES, ids=str)
def test_every_weight_of_both_roles_changes(recipe, models, tmp_path, changes):
    resolved = same_model(recipe, models, changes)
    trained = train(resolved, tmp_path / "run")
    for role, name in (("writer", resolved.writer.model), ("generator", resolved.generator.model)):
        before = weights(models / name.rpartition("/")[2])
        assert changed(before, trained[role]) == set(before)
    if resolved.shared:
        assert not changed(trained["writer"], trained["generator"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = resolved.steps * (1 if resolved.schedule == "interleaved" else 2)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(0 <= line["held_out"]["accuracy"] <= 1 for line in lines if "held_out" in line)
    for line in lines:
        parts = {"update"} if line["phase"].endswith("generator") else {"rollout", "scoring", "update"}
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(line)
        assert {f"{what}/{part}" for what in ("seconds", "tokens") for part in parts} <= set(line)
    # The summaries for a generator that is trained apart are sampled before its first step.
    sampled = [line["step"] for line in lines if line.get("tokens/rollout")]
    alone = {"sequential": [1, 2, 3, 4], "alternating": [1, 2, 3, 5, 6, 7], "interleaved": [1, 2, 3]}
    assert sampled == alone[resolved.schedule]
    spent = sum(line.get("tokens/rollout", 0) for line in lines)
    assert 0 < spent <= resolved.cost()["max_rollout_tokens"]
    for role in trained:
        card = (tmp_path / "run" / role / "README.md").read_text()
        assert f"# tiny-{role}" in card and "| command | `popi train a test` |" in card
        assert f"| steps | {steps} |" in card
    samples = sorted((tmp_path / "run" / "samples").iterdir())
    assert [json.loads(line)["user_id"] for line in samples[-1].read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "role"),
    [
        ({"train": "writer"}, "writer"),
        ({"train": "generator"}, "generator"),
        ({"train": "generator", "generator.context": "none"}, "generator"),
        ({"train": "generator", "generator.context": "raw-signals"}, "generator"),
    ],
    ids=str,
)
def test_a_role_alone_is_trained_and_the_other_does_not_change(recipe, models, tmp_path, changes, role):
    trained = train(recipe(**changes), tmp_path / "run")
    assert list(trained) == [role]
    before = weights(models / {"writer": "one", "generator": "two"}[role])
    assert changed(before, trained[role]) == set(before)
    # What stays is kept beside the checkpoints, in full precision.
    [phase] = (tmp_path / "run" / "phases").iterdir()
    assert [path.name for path in phase.iterdir()] == ["weights.pt"]
    kept = torch.load(phase / "weights.pt", weights_only=True)
    other = {"writer": "generator", "generator": "writer"}[role]
    before = weights(models / {"writer": "one", "generator": "two"}[other])
    assert all(torch.equal(value, kept[other][name]) for name, value in before.items())


class Stopped(Exception):
    pass


def stop_at(step):
    def report(measured):
        if measured["step"] == step:
            raise Stopped

    return report


LORA = {"writer.lora": {"rank": 2}, "generator.lora": {"rank": 2}}


@pytest.mark.parametrize("changes", [*SCHEDULES, LORA, {**LORA, "schedule": "sequential"}], ids=str)
def test_a_resumed_run_ends_with_the_weights_of_a_straight_one(recipe, models, tmp_path, changes):
    resolved = same_model(recipe, models, changes)
    straight = train(resolved, tmp_path / "straight")
    steps = len((tmp_path / "straight" / "metrics.jsonl").read_text().splitlines())
    for step in sorted({2, 3, steps - 1}):
        with pytest.raises(Stopped):
            train(resolved, tmp_path / "resumed", stop_at(step))
    train(resolved, tmp_path / "resumed")
    [kept], [again] = ((tmp_path / name / "phases").glob("*/weights.pt") for name in ("straight", "resumed"))
    torch.testing.assert_close(load_state(kept), load_state(again), rtol=0, atol=0)

    def figures(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [
            {key: line.get(key) for key in ("step", "phase", "reward", "rewards/margins", "held_out")} for line in lines
        ]

    assert figures("straight") == figures("resumed")
    # A finished run is left as it is, and freed of what a run that was killed when it had ended may leave.
    (again.parent / "checkpoint-1").mkdir()
    models_of = [tmp_path / "resumed" / role / "model.safetensors" for role in straight]
    written = [model.stat().st_mtime_ns for model in models_of]
    assert train(resolved, tmp_path / "resumed", stop_at(1)).keys() == straight.keys()
    assert [model.stat().st_mtime_ns for model in models_of] == written
    assert list(again.parent.iterdir()) == [again]


def test_a_run_resumed_in_a_later_epoch_has_the_same_order_of_users(recipe, tmp_path):
    resolved = recipe(steps=6, evaluate_every=9)
    straight = train(resolved, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(resolved, tmp_path / "resumed", stop_at(6))
    resumed = train(resolved, tmp_path / "resumed")
    assert not changed(straight["writer"], resumed["writer"])


def test_a_run_that_was_killed_resumes(recipe, tmp_path):
    recipe()
    command = [sys.executable, "-m", "popi", "train", str(tmp_path / "recipe.yaml"), "--out"]
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True, timeout=300)
    for wait in (0, 0.3):
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if any((tmp_path / "killed" / "phases").glob("*/checkpoint-*")):
                break
            time.sleep(0.005)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True, timeout=300)
    for role in ("writer", "generator"):
        assert not changed(weights(tmp_path / "straight" / role), weights(tmp_path / "killed" / role))


def test_a_loss_that_is_not_finite_stops_the_run(recipe, models, tmp_path, monkeypatch):
    of_pass = PairScorer._of_pass

    def broken(*args):
        places, found = of_pass(*args)
        return places, LogRatios(float("nan") * found.chosen_N, found.rejected_N)

    monkeypatch.setattr(PairScorer, "_of_pass", broken)
    with pytest.raises(PopiError, match=r"the loss became nan after 0 steps; lower the learning rate"):
        train(recipe(), tmp_path / "run")


def test_ranks_with_different_weights_stop_the_run(recipe, tmp_path, monkeypatch):
    def apart(self, found):
        return [*found, [0.0]] if isinstance(found[0], list) else list(found)

    monkeypatch.setattr(Ranks, "gather", apart)
    with pytest.raises(PopiError, match="the ranks have different weights after 2 steps; resume from the last"):
        train(recipe(), tmp_path / "run")


@pytest.mark.parametrize("every", [1, 9])
def test_a_writer_that_diverges_stops_the_run(recipe, tmp_path, every):
    with pytest.raises(PopiError, match=r"a logit of the writer became nan after \d steps; lower the learning rate"):
        train(recipe(**{"writer.learning_rate": 1e30, "evaluate_every": every}), tmp_path / "run")


def test_a_generator_that_diverges_in_the_last_step_is_not_saved(recipe, tmp_path):
    changes = {"train": "generator", "generator.learning_rate": 1e30, "steps": 1, "warmup": 0}
    with pytest.raises(PopiError, match=r"the mean margin of held-out users became nan after 1 steps; lower the"):
        train(recipe(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize("room", [3_000, 200_000])
def test_a_run_on_a_full_disk_fails_in_one_line_and_resumes_later(recipe, tmp_path, room):
    recipe()
    command = [sys.executable, "-m", "popi", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
    full = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, preexec_fn=limit)
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert "cannot write" in last and "same command" in last
    assert "Traceback" not in full.stderr
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "run" / "generator" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "answers"),
    [
        ({}, 2040),
        ({"train": "generator"}, 2040),
        ({"train": "generator", "generator.context": "none"}, 2048),
        ({"train": "generator", "generator.context": "raw-signals"}, 2030),
    ],
    ids=str,
)
def test_a_pair_of_a_held_out_user_that_is_too_long_is_known_before_the_first_step(
    recipe, users, tmp_path, changes, answers
):
    resolved = recipe(**changes, **{"data.file": str(tmp_path / "users.jsonl")})
    held_out = read_users(users, users=None, held_out=resolved.evaluate_users, seed=resolved.seed).held_out[0]
    made = [example for _, example in read_jsonl(users, PersonalizationExample)]
    long = HeldOutPair(prompt="?", chosen="7" * answers, rejected="No.")
    write_jsonl(
        tmp_path / "users.jsonl",
        [
            example.model_copy(update={"tests": (*example.tests[1:], long)}) if example == held_out else example
            for example in made
        ],
    )
    with pytest.raises(InputError, match=f"user '{held_out.user.user_id}': the pair with the prompt '.' needs"):
        train(resolved, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_recipe_is_refused(recipe, tmp_path):
    train(recipe(steps=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"was made with recipe.steps 1, not 2; choose"):
        train(recipe(steps=2), tmp_path / "run")


def test_other_signals_are_other_data(recipe, users, tmp_path):
    copy = tmp_path / "users.jsonl"
    copy.write_text(users.read_text())
    resolved = recipe(**{"data.file": str(copy), "steps": 1})
    train(resolved, tmp_path / "run")
    copy.write_text(users.read_text().replace("I like answer", "I hate answer"))
    with pytest.raises(InputError, match=r"was made with data .*; put the data back, or choose another"):
        train(resolved, tmp_path / "run")


def test_only_pairs_that_the_run_uses_have_a_reference(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="popi")
    train(recipe(steps=1), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "reference.json").read_text())["logps"]
    visited, held_out, pairs_of_a_user = 2, 3, 2
    assert len(stored) == pairs_of_a_user * (visited + held_out)
    assert "reference: scoring 10 pairs" in caplog.text


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(recipe, tmp_path, caplog):
    straight = train(recipe(), tmp_path / "straight")
    with pytest.raises(Stopped):
        train(recipe(), tmp_path / "run", stop_at(3))
    damaged = tmp_path / "run" / "phases" / "1-both" / "checkpoint-2"
    (damaged / "state.pt").write_bytes(b"half a file")
    resumed = train(recipe(), tmp_path / "run")
    assert f"{damaged} is damaged (state.pt has 11 bytes, not " in caplog.text
    for role, weights_of in straight.items():
        assert not changed(weights_of, resumed[role])


@pytest.mark.parametrize("role", ["writer", "generator"])
def test_a_model_of_other_files_is_another_run(recipe, models, tmp_path, role):
    name = {"writer": "one", "generator": "two"}[role]
    copy = shutil.copytree(models / name, tmp_path / "model")
    resolved = recipe(**{f"{role}.model": str(copy), "steps": 2})
    with pytest.raises(Stopped):
        train(resolved, tmp_path / "run", stop_at(2))
    template = copy / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + " ")
    with pytest.raises(
        InputError, match=f"was made with {role}_model .*; put the {role} model back, or choose another"
    ):
        train(resolved, tmp_path / "run")
    template.write_text(before)
    train(resolved, tmp_path / "run")


def test_a_model_of_the_hub_is_its_commit_for_the_whole_run(recipe, models, tmp_path):
    recipe()
    values = ["--set", "writer.model=org/one", "--set", "steps=2"]
    command = ["-m", "popi", "train", str(tmp_path / "recipe.yaml"), *values, "--out", str(tmp_path / "run")]

    def python(*words):
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)

    in_hub_cache(tmp_path / "hub", "org/one", "0a1b", models / "one")
    assert python(*command).returncode == 0
    # The reference of the KL divergence is read from where the model says that it comes from.
    name = "import torch; print(models._load('org/one', torch.float32)[0].config.name_or_path)"
    assert python("-c", f"from popi.training import models; {name}").stdout.endswith("snapshots/0a1b\n")
    in_hub_cache(tmp_path / "hub", "org/one", "2c3d", models / "one")
    refused = python(*command)
    assert refused.returncode == 2
    assert "was made with writer_model " in refused.stderr and "; put the writer model back" in refused.stderr


def test_a_model_whose_settings_of_sampling_stay_unused_can_be_saved(recipe, models, tmp_path):
    copy = shutil.copytree(models / "one", tmp_path / "model")
    (copy / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 7]}')
    train(recipe(**{"writer.model": str(copy), "generator.model": str(copy), "steps": 1}), tmp_path / "run")
    for role in ("writer", "generator"):
        written = json.loads((tmp_path / "run" / role / "generation_config.json").read_text())
        assert {2, 7} <= set(written["eos_token_id"]) and "top_p" not in written


def test_a_writer_is_measured_against_the_initial_one_in_every_round_and_leaves_no_trainer_behind(
    recipe, models, tmp_path, monkeypatch
):
    initial, trainers = weights(models / "one"), []

    def watched(kind):
        def make(*args, **options):
            assert all(trainer() is None for trainer in trainers)
            trainer = kind(*args, **options)
            trainers.append(weakref.ref(trainer))
            if kind is WriterTrainer:
                reference = trainer.ref_model.state_dict()
                assert all(torch.equal(value, reference[name]) for name, value in initial.items())
            return trainer

        return make

    for kind in (WriterTrainer, GeneratorTrainer):
        monkeypatch.setattr(trainers_module, kind.__name__, watched(kind))
    gc.disable()
    try:
        train(recipe(schedule="alternating", steps=4), tmp_path / "run")
    finally:
        gc.enable()
    assert len(trainers) == 4


def test_summaries_that_the_generator_learns_from_are_sampled_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("popi.training.contexts.CHUNK", 2)
    resolved = recipe(schedule="sequential", steps=4)
    straight = train(resolved, tmp_path / "straight")
    sample = Contexts._sample
    sampled = []

    def counted(self, users, **options):
        if len(sampled) == 2 and not (tmp_path / "resumed" / "mended").exists():
            raise Stopped
        sampled.append([user.user.user_id for user in users])
        return sample(self, users, **options)

    monkeypatch.setattr(Contexts, "_sample", counted)
    with pytest.raises(Stopped):
        train(resolved, tmp_path / "resumed")
    (tmp_path / "resumed" / "mended").touch()
    with pytest.raises(Stopped):
        train(resolved, tmp_path / "resumed", stop_at(6))
    resumed = train(resolved, tmp_path / "resumed")
    asked = [user for chunk in sampled for user in chunk]
    assert len(sampled) > 3 and len(asked) == len(set(asked))
    for role in straight:
        assert not changed(straight[role], resumed[role])


def test_no_two_phases_draw_the_same(recipe, tmp_path, monkeypatch):
    drawn = []

    def seed_of(*parts):
        drawn.append(parts)
        return 0

    monkeypatch.setattr("popi.training.writer.seed_of", seed_of)
    monkeypatch.setattr("popi.training.reward.seed_of", seed_of)
    train(recipe(schedule="alternating", steps=2), tmp_path / "run")
    rollouts = [parts for parts in drawn if "rollout" in parts]
    assert len(rollouts) == len(set(rollouts)) == 2 * 2 * 3
    assert {parts[2] for parts in drawn} == {0, 2}


def test_a_folder_of_something_else_is_left_as_it_is(recipe, tmp_path):
    thesis = tmp_path / "mine" / "writer" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(InputError, match="contains writer, which does not belong to a run; choose another folder"):
        train(recipe(), tmp_path / "mine")
    assert thesis.read_text() == "years of work"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["writer"]
    with pytest.raises(InputError, match="is a file; name a folder"):
        train(recipe(), thesis)


def test_a_run_that_was_refused_leaves_no_folder(recipe, tmp_path):
    with pytest.raises(InputError):
        train(recipe(**{"writer.model": str(tmp_path / "nowhere")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(recipe(steps=1), tmp_path / "run")


def test_a_second_process_in_a_folder_changes_nothing(recipe, tmp_path):
    first, second = recipe(steps=1), recipe(steps=2)
    with RunFolder.open(tmp_path / "run", first) as folder:
        with pytest.raises(PopiError, match="is being written by another process"):
            train(second, tmp_path / "run")
        folder.begin({})
    RunFolder.open(tmp_path / "run", first).__exit__(None, None, None)


@pytest.mark.parametrize("where", ["popi.training.scoring.PairScorer.passes", "popi.engine.service.Decoder.step"])
def test_out_of_memory_is_one_line(recipe, tmp_path, monkeypatch, where):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(where, full)
    with pytest.raises(PopiError) as caught:
        train(recipe(), tmp_path / "run")
    assert str(caught.value) == joint.OUT_OF_MEMORY and "\n" not in str(caught.value)
    assert "lower batch_tokens, writer.num_generations or writer.max_tokens" in joint.OUT_OF_MEMORY


def test_one_gpu_at_a_time(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 GPUs are visible, but the engine is single; make one visible \(CUDA_"):
        train(recipe(), tmp_path / "run")


def test_one_process_at_a_time(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but the engine"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_the_run_logs_once_that_there_are_no_curves(recipe, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", logger="popi.training.joint")
    monkeypatch.setattr(joint, "draw_curves", draw_curves)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib.figure", None)
        train(recipe(evaluate_every=1), tmp_path / "run")
    said = [message for message in caplog.messages if "curves.png" in message]
    assert said == ["curves.png is not drawn: matplotlib is not installed; install it with: pip install 'popi[bench]'"]
    assert not (tmp_path / "run" / "curves.png").exists()
    train(recipe(steps=1), tmp_path / "another")
    assert (tmp_path / "another" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_warmup_as_long_as_a_phase_is_logged(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="popi.training.joint")
    train(recipe(schedule="alternating", steps=4, warmup=2), tmp_path / "run")
    assert "warmup (2 steps) is not shorter than a phase (2 steps)" in caplog.messages
    caplog.clear()
    train(recipe(steps=2), tmp_path / "another")
    assert not any("warmup" in message for message in caplog.messages)


def test_users_of_a_file_with_fewer_pairs_than_wanted_are_counted(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="popi.training.joint")
    train(recipe(pairs_per_summary=3, steps=1), tmp_path / "run")
    assert "8 of 8 users have fewer than 3 pairs; all of their pairs score their summaries" in caplog.messages


def test_a_file_with_too_few_users_says_so(recipe, tmp_path):
    with pytest.raises(
        InputError, match=r"11 of 12 users have evidence and pairs, 30 are held out, and none is left for training"
    ):
        train(recipe(evaluate_users=30), tmp_path / "run")
