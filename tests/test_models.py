"""Where a model's name leads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from popi import models
from popi.errors import ModelError
from tests.hub import in_hub_cache


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shipped models, and a folder that is none."""
    shelf = tmp_path / "shelf"
    for name in ("popi-mini-base", "popi-mini-reader"):
        (shelf / name).mkdir(parents=True)
        (shelf / name / "config.json").write_text("{}")
    (shelf / "__pycache__").mkdir()
    monkeypatch.setattr(models, "FOLDER", shelf)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return shelf


def test_a_shipped_name_is_its_folder(shelf: Path) -> None:
    assert models.shipped() == ["popi-mini-base", "popi-mini-reader"]
    assert models.find("popi-mini-reader") == str(shelf / "popi-mini-reader")


def test_a_path_that_exists_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.find(str(tmp_path / "org")) == str(tmp_path / "org")
    assert models.find("org/name") == "org/name"
    assert models.find("~/org") == str(tmp_path / "org")


@pytest.mark.parametrize("name", ["org/name", "Qwen/Qwen3-0.6B", "a_b/c.d-e"])
def test_a_hub_id_is_itself(name: str) -> None:
    assert models.find(name) == name


@pytest.mark.parametrize(
    "name", ["", "nothing", "./org/name", "/org/name", "../name", "~/name", "org/name/more", "org/", "org/na me"]
)
def test_what_is_nowhere_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        models.find(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_slip_of_the_finger_gets_a_hint() -> None:
    with pytest.raises(ModelError, match="did you mean popi-mini-base"):
        models.find("popi-mini-bass")


def test_a_model_is_known_by_its_files_and_one_of_the_hub_by_its_commit(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = models.fingerprint("popi-mini-base")
    assert before == models.fingerprint(str(shelf / "popi-mini-base"))
    (shelf / "popi-mini-base" / "config.json").write_text('{"hidden_size": 8}')
    assert models.fingerprint("popi-mini-base") != before

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert models.fingerprint("org/name") is None
    for commit in ("0a1b", "2c3d"):
        in_hub_cache(tmp_path / "cache", "org/name", commit, shelf / "popi-mini-base")
        assert models.fingerprint("org/name") == commit
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert models.fingerprint("org/name") is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    kind = "file" if name == "config.json" else "weights file"
    with pytest.raises(ModelError, match=f"is a {kind}, not the folder of a model; give the folder that contains it"):
        models.find(str(tmp_path / name))


def test_a_gguf_file_is_itself_and_stands_for_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "quantised"
    folder.mkdir()
    file = folder / "Q4.GGUF"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.find(str(file)) == models.find(str(folder)) == models.find("~/quantised/Q4.GGUF") == str(file)
    assert models.folder_of(str(file)) is None
    assert models.fingerprint(str(file)) == models.fingerprint(str(folder))
    (folder / "config.json").write_text("{}")
    assert models.find(str(folder)) == str(folder)


def test_a_model_that_can_be_downloaded_is_found_after_that(tmp_path: Path) -> None:
    name = "smollm2-135m-instruct"
    with pytest.raises(ModelError, match=f"has not been downloaded; download it with: popi models get {name}$"):
        models.find(name)
    with pytest.raises(ModelError, match=f"did you mean {name}"):
        models.find("smollm2-135m-instrukt")
    assert not models.is_local(name)
    entry = models.cache.root() / name
    entry.mkdir(parents=True)
    (entry / "config.json").write_text("{}")
    assert models.find(name) == str(entry)
    assert models.is_local(name)
    assert models.downloaded() == [name]


@pytest.mark.parametrize(("given", "expected"), [("/cache", "/cache"), ("relative", "/home/ann/.cache"), (None, None)])
def test_the_cache_is_in_the_cache_of_the_user(
    given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert models.cache.root() == Path(expected or "/home/ann/.cache") / "popi" / "models"
