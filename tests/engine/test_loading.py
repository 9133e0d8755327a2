"""Models are loaded; a missing or broken one is an error of one line."""

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
from popi.engine import loading
from popi.engine.loading import auto_dtype, load, load_tokenizer
from popi.errors import ConfigError, InputError, ModelError
from popi.models import find, shipped
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


@pytest.mark.parametrize(
    ("dtype", "declared", "native", "expected"),
    [
        ("auto", "float32", True, torch.float32),
        ("auto", "bfloat16", True, torch.bfloat16),
        ("auto", "float16", True, torch.bfloat16),
        ("auto", "bfloat16", False, torch.float32),
        ("bfloat16", "float32", False, torch.bfloat16),
        ("float32", "bfloat16", True, torch.float32),
    ],
)
def test_the_dtype_on_a_cpu_is_half_where_model_and_processor_are_unless_asked(
    folder: Path, dtype: str, declared: str, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder, dtype=declared)
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: native)
    backend = TransformersBackend(str(folder), device="cpu", dtype=dtype)
    assert {weight.dtype for weight in backend._model.parameters()} == {expected}


def test_the_mini_models_compute_in_float32_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: True)
    assert {auto_dtype(find(name), torch.device("cpu")) for name in shipped()} == {"float32"}


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def remove(*files: Path) -> None:
    for file in files:
        file.unlink()


def make_adapter(folder: Path) -> None:
    remove(folder / "config.json", weights(folder))
    (folder / "adapter_config.json").write_text("{}")


def make_shards(folder: Path) -> None:
    weights(folder).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


BREAKS: dict[str, Callable[[Path], object]] = {
    "config.json is damaged: Expecting": lambda folder: (folder / "config.json").write_text("{"),
    "contains no config.json": lambda folder: remove(folder / "config.json"),
    "config.json has no model_type": lambda folder: edit(folder, model_type=""),
    "type 'nonsense' is not known to transformers": lambda folder: edit(folder, model_type="nonsense"),
    "code that comes with the model": lambda folder: edit(folder, model_type="own", auto_map={"AutoConfig": "x.C"}),
    "models of type 'clip' do not generate text": lambda folder: edit(folder, model_type="clip"),
    "not a multiple of the number of attention heads": lambda folder: edit(folder, num_attention_heads=5),
    "safetensors is damaged: .*incomplete metadata": lambda folder: weights(folder).write_bytes(
        weights(folder).read_bytes()[:-100]
    ),
    "safetensors is damaged: .*header too small": lambda folder: weights(folder).write_bytes(b""),
    "safetensors is damaged": lambda folder: weights(folder).write_bytes(b"\0" * 100),
    "pointer of Git LFS": lambda folder: weights(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
    "pytorch_model.bin is damaged": lambda folder: weights(folder).rename(folder / "pytorch_model.bin"),
    "contains no weights": lambda folder: remove(weights(folder)),
    "has a config.json, but its weights are GGUF only": lambda folder: weights(folder).rename(folder / "q4.gguf"),
    "is an adapter, not a model": make_adapter,
    "model-00002-of-00002.safetensors is missing": make_shards,
    "do not fit its config.json: model.layers.2.* and 8 more": lambda folder: edit(folder, num_hidden_layers=3),
    "do not fit its config.json: lm_head.weight": lambda folder: edit(folder, vocab_size=400),
    "contains no tokenizer": lambda folder: remove(*folder.glob("tokenizer*")),
    "tokenizer.json is damaged": lambda folder: (folder / "tokenizer.json").write_text('{"version":'),
    "no chat template": lambda folder: remove(folder / "chat_template.jinja"),
}


@pytest.mark.parametrize("named", BREAKS)
def test_a_broken_model_is_an_error_that_names_what_is_broken(folder: Path, named: str) -> None:
    BREAKS[named](folder)
    with pytest.raises(ModelError, match=named) as caught:
        TransformersBackend(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert caught.value.fix


def test_a_broken_tokenizer_is_named_without_its_model(folder: Path) -> None:
    remove(folder / "config.json", weights(folder))
    load_tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged: Expecting"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("read", [TransformersBackend, load_tokenizer])
def test_a_path_to_a_file_is_an_error_that_says_what_to_give(
    folder: Path, name: str, read: Callable[[str], object]
) -> None:
    (folder / name).touch()
    with pytest.raises(ModelError, match="file, not the folder of a model; give the folder"):
        read(str(folder / name))


def test_weights_that_the_configuration_does_not_use_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, num_hidden_layers=1)
    load(str(folder), "cpu", "auto")
    assert caplog.messages == [
        f"{folder}: config.json leaves weights unused: model.layers.1.input_layernorm.weight and 8 more"
    ]


@pytest.mark.parametrize("name", ["nobody/has-this-model", "./not/here", "", "popi-mini-bass"])
def test_a_missing_model_is_an_error_without_a_wait(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        TransformersBackend(name)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("options", [{"dtype": "float7"}, {"device": "abacus"}, {"device": "cuda:99"}])
def test_an_unknown_device_or_dtype_is_an_error(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        TransformersBackend(str(folder), **options)
    assert isinstance(caught.value, InputError)
    assert next(iter(options.values())) in str(caught.value)


def test_out_of_memory_is_not_a_broken_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: PreTrainedModel, place: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(
        ModelError, match=r"out of memory while loading .*tiny'; free the device, or use a smaller model$"
    ):
        TransformersBackend(str(folder))
