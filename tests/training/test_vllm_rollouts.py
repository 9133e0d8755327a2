"""Training whose summaries vLLM samples."""

from __future__ import annotations

import json
import os
import sys
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from popi.config import JointRecipe, load
from popi.errors import InputError, MissingExtra, PopiError
from popi.io import lock
from popi.training.joint import run
from popi.training.snapshots import PREFIX, SHARED_MEMORY, TOLERANCE, TOLERANCE_OF_HALF, remove_abandoned, shared_memory
from tests.servers import needs_vllm

pytestmark = pytest.mark.slow


def write(folder: Path, **writer: Any) -> Path:
    """Three steps of a shipped model: its sizes are those that vLLM supports."""
    tree = {
        "task": "joint",
        "name": "mini",
        "data": {"world": "miniworld", "users": 8},
        "writer": {
            "model": "popi-mini-base",
            "learning_rate": 1e-4,
            "num_generations": 4,
            "max_tokens": 32,
            "temperature": 0.8,
            **writer,
        },
        "generator": {"model": "popi-mini-base", "learning_rate": 1e-4, "beta": 0.5},
        "steps": 3,
        "users_per_step": 2,
        "warmup": 0,
        "evaluate_users": 2,
        "precision": "float32",
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def recipe(folder: Path, **writer: Any) -> JointRecipe:
    """The recipe, read again."""
    resolved = load(write(folder, **writer))
    assert isinstance(resolved, JointRecipe)
    return resolved


VLLM: dict[str, Any] = {"rollouts": "vllm-colocate", "cache_gib": 0.25}


def trained(folder: Path, **writer: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """The metrics of each step, and the weights of the writer."""
    from safetensors.torch import load_file

    folder.mkdir()
    run(recipe(folder, **writer), folder / "run", source="a test", report=lambda metrics: None)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    weights = load_file(folder / "run" / "writer" / "model.safetensors")
    return [json.loads(line) for line in lines], torch.cat([value.flatten() for value in weights.values()])


@pytest.fixture(autouse=True)
def installed() -> None:
    needs_vllm()


def test_a_run_is_that_of_the_engine(tmp_path: Path) -> None:
    ours, engine = trained(tmp_path / "engine")
    theirs, vllm = trained(tmp_path / "vllm", **VLLM)
    for mine, other in zip(ours, theirs, strict=True):
        # The same tokens, so the same rewards.
        assert mine["tokens/rollout"] == other["tokens/rollout"]
        assert mine["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert 0 < other["sampling/sampling_logp_difference/mean"] < 1e-4
        assert other["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert "sampling/sampling_logp_difference/mean" not in mine
    assert (vllm - engine).norm() < 1e-2 * (engine - initial()).norm()
    assert not list(Path("/dev/shm").glob(f"{PREFIX}*"))


@pytest.mark.parametrize("changes", [{"precision": "mixed"}, {"writer.lora": {"rank": 4}}], ids=str)
def test_vllm_has_the_weights_of_adapters_and_of_other_precisions(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = write(tmp_path, learning_rate=1e-3, **VLLM)
    run(load(file, changes), tmp_path / "run", source="a test", report=lambda metrics: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tolerance = TOLERANCE_OF_HALF if "precision" in changes else TOLERANCE
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < tolerance for line in lines)


def initial() -> torch.Tensor:
    from popi.engine.loading import load as load_model

    model, _ = load_model("popi-mini-base", None, "float32")
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_weights_that_vllm_did_not_take_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from popi.backends.vllm import VLLMBackend

    async def forgotten(self: VLLMBackend, folder: Path) -> None:
        pass

    monkeypatch.setattr(VLLMBackend, "update_weights", forgotten)
    says = r"log-probabilities of the sampled tokens differ by [\d.]+ nats from those of the writer after 1 steps, .*"
    with pytest.raises(PopiError, match=says):
        trained(tmp_path / "stale", learning_rate=1e-3, **VLLM)
    assert len((tmp_path / "stale" / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_an_engine_that_is_killed_ends_the_run_and_the_next_start_resumes_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    others = set(active_children())

    def kill(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            [engine] = set(active_children()) - others
            engine.kill()

    resolved, out = recipe(tmp_path, **VLLM).model_copy(update={"checkpoint_every": 1}), tmp_path / "run"
    with pytest.raises(PopiError, match=r"^vLLM, which samples the summaries, has ended; the same command resumes"):
        run(resolved, out, source="a test", report=kill)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert set(active_children()) == others
    assert not list(Path("/dev/shm").glob(f"{PREFIX}*"))
    steps: list[int] = []
    run(resolved, out, source="a test", report=lambda metrics: steps.append(metrics["step"]))
    assert steps == [3]
    assert (out / "writer").exists()


def test_weights_that_do_not_fit_into_shared_memory_go_elsewhere() -> None:
    assert shared_memory(1) == (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
    assert shared_memory(2**60) is None


def test_weights_of_a_killed_run_are_removed_by_the_next_one(tmp_path: Path) -> None:
    held, old, young = (tmp_path / f"{PREFIX}{name}" for name in ("held", "old", "young"))
    for folder in (held, old, young):
        folder.mkdir()
    lock_of_a_run = lock(held)
    for folder in (held, old):
        os.utime(folder, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [held, young]
    lock_of_a_run.close()


def test_vllm_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("popi.backends.vllm", "popi.training.vllm"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"vllm is not installed; install it with: pip install 'popi\[vllm\]'"):
        trained(tmp_path / "missing", **VLLM)


def test_memory_of_vllm_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe.yaml, field writer: .*cache_gib needs rollouts: vllm-colocate"):
        recipe(tmp_path, cache_gib=1)
