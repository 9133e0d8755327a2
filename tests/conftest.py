"""What every test shares: no hub, no display, no deadline, and the publishers' data where at hand."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.clean import build_wheel, install
from tests.servers import CONTEXT, KEY, SERVED, mini_server, needs_vllm

if TYPE_CHECKING:
    from popi.backends.vllm import VLLMBackend

ROOT = Path(__file__).resolve().parent.parent

# Set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core. More threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Session fixtures that are slow to make. The files that use one of a group run in one worker, any other file in any.
GROUPS = {"servers": ("vllm_url", "vllm_backend"), "wheel": ("wheel", "clean_python")}

# A shell ignores Ctrl-C in what it starts in the background, and so do the programs that a test would interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is not a failing test. In continuous integration the examples are the same every time: a new find there
# would blame a change that has nothing to do with it, and people who run the tests find it too.
settings.register_profile("popi", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("popi")


class ByFile(LoadScopeScheduling):
    """Sends the tests of a file to one worker, and those of all files that use the same slow fixtures.

    The groups of pytest-xdist have no effect: they rely on a private name of earlier versions of pytest.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _group_of(ROOT / nodeid.split("::", 1)[0])


@cache
def _group_of(file: Path) -> str:
    beside = file.with_name("conftest.py")
    files = [file, beside] if beside.exists() and beside != Path(__file__) else [file]
    names = {name for each in files for name in re.findall(r"\w+", each.read_text(encoding="utf-8"))}
    return next((group for group, fixtures in GROUPS.items() if names & set(fixtures)), str(file))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The publishers' files: in ``POPI_SHARED_DATA``, else in ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("POPI_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no publishers' data: name their folder in POPI_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real ``vllm serve`` for all tests that ask for one."""
    needs_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "secret")
        with mini_server(tmp_path_factory.mktemp("vllm") / "log") as server:
            yield server.url


@pytest.fixture(scope="session")
def vllm_backend() -> Iterator[VLLMBackend]:
    """A real vLLM engine for all tests that leave it as it is."""
    needs_vllm()
    from popi.backends.vllm import VLLMBackend

    backend = VLLMBackend(SERVED, context_length=CONTEXT, cache_gib=0.25)
    yield backend
    asyncio.run(backend.close())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and its base dependencies, and nothing else."""
    return install(wheel, tmp_path_factory.mktemp("clean"))
