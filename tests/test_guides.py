"""Every block of the guide to applications runs as it is printed, against a server on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from popi.cli import main
from popi.prompt_files import read_prompts
from tests.servers import KEY, SERVED, needs_vllm

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "applications.md").read_text(encoding="utf-8").replace("gpt-4.1-mini", SERVED)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.M | re.S)
FILES = re.findall(r"`([\w.]+\.yaml)`", GUIDE)

LIGHT = "\nimport sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"


def blocks(kind: str) -> list[str]:
    return [text for language, text in BLOCKS if language == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the guide names."""
    folder = tmp_path_factory.mktemp("guide")
    for name, text in zip(FILES, blocks("yaml"), strict=True):
        (folder / name).write_text(text)
    users = folder / "users.jsonl"
    assert main(["data", "miniworld", "--users", "1", "--out", str(users)]) == 0
    out = str(folder / "summaries.jsonl")
    assert main(["summarize", "--signals", str(users), "--model", SERVED, "--out", out, "--inference", "empty"]) == 0
    return folder


@pytest.fixture
def environment(vllm_url: str) -> dict[str, str]:
    """The client finds the server in place of OpenAI's."""
    return {**os.environ, "OPENAI_BASE_URL": vllm_url, "OPENAI_API_KEY": os.environ[KEY]}


def run(command: list[str | Path], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_guide_has_blocks_of_all_kinds() -> None:
    assert [len(blocks(kind)) for kind in ("python", "yaml", "sh")] == [5, 4, 3]


def test_the_prompt_set_of_the_guide_is_read(place: Path) -> None:
    prompts = read_prompts(place / "editors.yaml")
    assert prompts.inference_messages("")[-1].content.startswith("Examples from one editor")


def test_the_first_example_has_at_most_ten_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_of_the_guide_runs_without_torch(
    code: str, place: Path, environment: dict[str, str], clean_python: Path
) -> None:
    assert run([clean_python, "-c", code + LIGHT], place, environment).strip()


@pytest.mark.slow
@pytest.mark.parametrize("line", blocks("sh"))
def test_the_commands_of_the_guide_run(line: str, place: Path, environment: dict[str, str]) -> None:
    needs_vllm()
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "inference", "generators"))
    command = ["sh", "-c", line.replace("popi ", f"{sys.executable} -m popi ", 1)]
    record = json.loads(run(command, place, {**environment, "PYTHONPATH": paths}))
    assert record["response"]
    # No server listens at the address of "own".
    assert record["route"] == ("api" if "routes.yaml" in line else "")
