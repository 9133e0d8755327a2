"""A model that is there is loaded; one that is not, or is broken, is an error of one line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from popi.backends.base import ScoreRequest
from popi.backends.transformers import TransformersBackend
from popi.errors import ConfigError, InputError, ModelError
from popi.prompts import Message
from popi.testing import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in tiny_model():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


async def test_a_folder_serves_as_the_model_that_was_saved(folder: Path, capfd: pytest.CaptureFixture) -> None:
    request = ScoreRequest([Message("user", "hello")], "a short answer")
    backend = TransformersBackend(str(folder))
    live = TransformersBackend.from_model(*tiny_model(), str(folder))
    assert backend.model == live.model
    assert backend.capabilities == live.capabilities
    assert backend.capabilities.context_length == 2048
    assert await backend.score([request]) == await live.score([request])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_dtype_is_float32_on_a_cpu_unless_asked(folder: Path, dtype: str, expected: torch.dtype) -> None:
    backend = TransformersBackend(str(folder), device="cpu", dtype=dtype)
    assert {weight.dtype for weight in backend._model.parameters()} == {expected}


BREAKS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: (folder / "config.json").write_text("{"),
    "model type `nonsense`": lambda folder: edit(folder, model_type="nonsense"),
    "SafetensorError": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
    "no file named": lambda folder: (folder / "model.safetensors").unlink(),
    "model.layers.2": lambda folder: edit(folder, num_hidden_layers=3),
    "lm_head.weight": lambda folder: edit(folder, vocab_size=400),
    "tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("named", BREAKS)
def test_a_broken_model_is_an_error_that_names_what_is_broken(folder: Path, named: str) -> None:
    BREAKS[named](folder)
    with pytest.raises(ModelError, match=named) as caught:
        TransformersBackend(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["nobody/has-this-model", "./not/here", "", "popi-mini-bass"])
def test_a_model_that_is_nowhere_is_an_error_without_a_wait(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        TransformersBackend(name)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("options", [{"dtype": "float7"}, {"device": "abacus"}, {"device": "cuda:99"}])
def test_a_device_or_dtype_that_is_not_is_an_error(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TransformersBackend(str(folder), **options)
    assert isinstance(caught.value, InputError)
    assert next(iter(options.values())) in str(caught.value)


def test_want_of_memory_is_told_apart_from_a_broken_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PreTrainedModel, place: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(ModelError, match=r"tiny' has no room in memory; free the device, or take a smaller model$"):
        TransformersBackend(str(folder))
