"""Real servers for tests, on loopback."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

KEY = "POPI_TEST_KEY"
"""The environment variable that holds the key of every server here."""

SERVED, CONTEXT = "popi-mini-base", 512
"""The model of the vLLM server, and the most tokens of a request to it."""

# What starts fastest on a CPU: no compilation, one process, a small cache.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"]


def needs_vllm() -> None:
    """Skips a test where vLLM is not installed; in continuous integration that is a failure."""
    if importlib.util.find_spec("vllm") is None:
        if "CI" in os.environ:
            pytest.fail("vLLM is not installed")
        pytest.skip("vLLM is not installed")


@contextmanager
def vllm_server(model: str, name: str, log: Path) -> Iterator[str]:
    """Runs ``vllm serve`` and gives the base URL of its API."""
    port = free_port()
    with vllm_process(model, name, log, port):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def vllm_process(model: str, name: str, log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ``vllm serve`` on a port, in a process group of its own, which may be killed before its time."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        name,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(CONTEXT), *OPTIONS]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_API_KEY": os.environ[KEY]}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/health", process, log)
        yield process
    finally:
        # Its group may be gone, killed by who asked for it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all of its group at once, as a machine does that runs out of memory."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, *, seconds: float = 300) -> None:
    """Asks until the server answers, or shows why it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
