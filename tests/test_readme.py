"""Every block of commands in the README runs, and its list of files is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.M | re.S)


def commands(kind):
    lines = [line for language, block in BLOCKS if language == kind for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder with the recipes, and an environment in which popi is a command."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "inference", "generators"))
    return folder, {**os.environ, "PYTHONPATH": paths, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_readme_has_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"sh", "python"}


@pytest.mark.parametrize("command", [line for line in commands("sh") if line.startswith("make")])
def test_make_knows_its_targets(command):
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(place):
    folder, environment = place
    lines = [line for line in commands("sh") if line.startswith("popi")]
    assert len(lines) >= 5
    for line in lines:
        done = subprocess.run(
            line.replace("popi ", f"{sys.executable} -m popi ", 1),
            shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_the_python_blocks_run(place, code):
    folder, environment = place
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2


def listed_files():
    """The paths in the section on files."""
    folder = ""
    for line in README.partition("## Files")[2].splitlines():
        name = line.split()[0] if line.strip() else ""
        if line.startswith("      "):
            yield folder + name
        elif line.startswith("    "):
            folder = name
            yield name


def test_every_listed_file_exists():
    paths = list(listed_files())
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_is_listed():
    modules = {
        f"popi/{path.name}{'/' if path.is_dir() else ''}"
        for path in (ROOT / "popi").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    assert modules - set(listed_files()) == set()
