"""Training whose summaries a vLLM server samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from popi.backends.vllm_worker import NAME
from popi.config import load
from popi.errors import ConfigError, InputError, PopiError
from popi.models import find
from popi.testing import VLLMServer, vllm_server
from popi.training import joint
from popi.training.joint import run
from popi.training.server_rollouts import ServerRollouts
from popi.training.snapshots import PREFIX
from tests.servers import CONTEXT, SERVED, needs_vllm
from tests.training.rank_runs import distance, make_inputs, metrics, write_recipe

KEY = "POPI_TEST_ROLLOUTS"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A server that takes weights. It requires a key."""
    needs_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "secret")
        with vllm_server(
            find(SERVED),
            name=SERVED,
            options=[
                *("--max-model-len", str(CONTEXT)),
                *("--worker-extension-cls", NAME),
                *("--logprobs-mode", "processed_logprobs"),
            ],
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": "secret", "VLLM_SERVER_DEV_MODE": "1"},
            log=tmp_path_factory.mktemp("server") / "log",
        ) as running:
            yield running


def train(folder: Path, out: str, **changes: Any) -> Path:
    recipe = load(write_recipe(folder / "recipe.yaml", make_inputs(folder)), {"evaluate_every": 3, **changes})
    run(recipe, folder / out, source="a test", report=lambda measured: None)
    return folder / out


@pytest.mark.slow
def test_a_run_is_that_of_the_engine_and_ends_in_one_line_without_its_server(
    server: VLLMServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "draw_curves", lambda metrics, picture: None)
    served = {"writer.rollouts": "vllm-server", "writer.server": {"url": server.url, "key": KEY}}
    for name, changes in (("whole", {}), ("adapter", {"writer.lora": {"rank": 4}})):
        engine = train(tmp_path, f"{name}-engine", steps=3, **changes)
        vllm = train(tmp_path, f"{name}-server", steps=3, **served, **changes)
        for mine, other in zip(metrics(engine), metrics(vllm), strict=True):
            assert mine["reward"] == pytest.approx(other["reward"], abs=1e-4)
            assert 0 < other["sampling/sampling_logp_difference/mean"] < 1e-4
        assert distance(engine, vllm) < 1e-2
    assert not list(Path("/dev/shm").glob(f"{PREFIX}*"))
    monkeypatch.delenv(KEY)
    with pytest.raises(ConfigError, match=f"writer.server.key: {KEY} is not set"):
        train(tmp_path, "keyless", **served)
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(PopiError, match=r"the vLLM server at http://127.0.0.1:\d+/v1 responded 401"):
        train(tmp_path, "locked", **served)
    monkeypatch.setenv(KEY, "secret")
    sample = ServerRollouts.sample

    def killed(self: ServerRollouts, *args: Any, **options: Any) -> Any:
        if metrics_of(tmp_path / "killed"):
            server.kill()
        return sample(self, *args, **options)

    monkeypatch.setattr(ServerRollouts, "sample", killed)
    with pytest.raises(PopiError, match=r"the vLLM server at .* does not respond \(.*; the same command resumes"):
        train(tmp_path, "killed", steps=3, **served)
    assert len(metrics_of(tmp_path / "killed")) == 1


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return metrics(folder) if (folder / "metrics.jsonl").exists() else []


@pytest.mark.slow
def test_a_server_that_takes_no_weights_is_named(
    vllm_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.servers import KEY as SHARED_KEY

    monkeypatch.setenv(SHARED_KEY, "secret")
    served = {"writer.rollouts": "vllm-server", "writer.server": {"url": vllm_url, "key": SHARED_KEY}}
    with pytest.raises(PopiError, match=r"responded 404 .*; start it with VLLM_SERVER_DEV_MODE=1 and vllm serve"):
        train(tmp_path, "run", **served)


@pytest.mark.parametrize(
    ("writer", "says"),
    [
        ({"rollouts": "vllm-server"}, "vllm-server needs a server, such as server: {url: "),
        ({"server": {"url": "http://127.0.0.1:1/v1"}}, "vllm-server needs a server"),
        ({"rollouts": "vllm-server", "server": {"url": "http://a/v1"}, "cache_gib": 1}, "cache_gib needs rollouts"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, writer: dict[str, Any], says: str) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", make_inputs(tmp_path))
    with pytest.raises(InputError, match=says):
        load(file, {f"writer.{name}": value for name, value in writer.items()})
