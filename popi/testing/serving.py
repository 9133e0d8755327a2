"""A vLLM server on loopback, for tests and benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from popi.errors import BackendError

FASTEST_START = (
    *("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni"),
    "--no-enable-chunked-prefill",
)
"""The options with which :class:`popi.backends.vllm.VLLMBackend` runs vLLM on a CPU; it starts fastest with them."""

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}

SECONDS = 300
"""Maximum time to start. Without compilation a server starts in 20 s on an idle core."""


@dataclass(frozen=True, slots=True)
class VLLMServer:
    """A running server.

    Attributes:
        url: The base URL of its API.
        process: The leader of a process group, to which the engine belongs.
    """

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Kills the whole process group, as an operating system does when memory runs out."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def vllm_server(
    model: str,
    *,
    name: str,
    port: int | None = None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[VLLMServer]:
    """Runs ``vllm serve`` during the block.

    Args:
        model: A folder or hub id.
        name: The server's name of the model.
        port: Loopback port; ``None`` chooses a free one.
        options: Further command line arguments of ``vllm serve``.
        environment: Further environment variables.
        log: File for its output; ``None`` keeps the output only while it starts.

    Raises:
        BackendError: If it does not start, with the end of its output.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *FASTEST_START, *options]
    with tempfile.NamedTemporaryFile() if log is None else log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
            start_new_session=True,
        )
        server = VLLMServer(f"http://127.0.0.1:{port}/v1", process)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/health", process, Path(output.name))
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            server.kill()  # the engine may outlive the leader of its group


def free_port() -> int:
    """Returns a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:  # a URLError is one
            time.sleep(0.2)
    raise BackendError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
