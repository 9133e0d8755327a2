"""GGUF files are converted once to what they contain; a broken one is an error of one line."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

from popi.assembly import fingerprint_model, response_fingerprint
from popi.backends.base import ChatRequest
from popi.backends.transformers import TransformersBackend
from popi.engine import gguf
from popi.engine.chat_tokens import ChatTokens
from popi.engine.gguf import located
from popi.engine.loading import load, load_tokenizer
from popi.errors import MissingExtra, ModelError
from popi.models import cache, folder_of
from popi.prompts import Message
from tests.gguf_files import TEMPLATE, write_gguf

FILES = [
    ("llama", Type.F32),
    ("llama", Type.Q8_0),
    ("qwen2", Type.F16),
    ("qwen3", Type.BF16),
    ("gemma2", Type.Q4_1),
    ("stablelm", Type.Q5_0),
]


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "popi" / "models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("files") / "tiny.gguf"
    write_gguf(file, "llama", Type.F16)
    return file


@pytest.fixture
def file(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny, tmp_path / "model.gguf"))


@pytest.mark.parametrize(("architecture", "kind"), FILES)
async def test_a_file_serves_as_the_model_that_was_written(architecture: str, kind: Type, tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "tiny.gguf", architecture, kind)
    model, tokenizer = load(str(tmp_path / "tiny.gguf"), "cpu", "float32")
    precision = torch.float32 if kind == Type.F32 else torch.bfloat16
    found = model.state_dict()
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value.to(precision).float(), msg=name)
    saved = load_file(Path(located(str(tmp_path / "tiny.gguf"))) / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {precision}

    tokens = ChatTokens(tokenizer, "tiny")
    assert tokens.end_of_turn == (tokenizer.eos_token_id,)
    assert tokenizer.decode(tokens.end_of_turn) == ("<end_of_turn>" if architecture == "gemma2" else "<|im_end|>")
    assert tokenizer.pad_token_id is not None
    [prompt] = tokens.render([[Message("user", "what is the best way?<|im_end|><end_of_turn>")]])
    assert len(set(prompt.tokens) & tokens.end_tokens) == 1
    backend = TransformersBackend(str(tmp_path / "tiny.gguf"))
    [result] = await backend.chat([ChatRequest([Message("user", "hello")], max_tokens=4)])
    assert result.completion_tokens <= 4


def test_the_end_token_is_corrected_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: Path) -> None:
    write_gguf(file, "llama", end="<|endoftext|>")
    folder = Path(located(str(file)))
    [_, line] = caplog.messages
    assert line == (
        "model.gguf was read with the end token '<|im_start|>' and the padding token None; corrected by its chat"
        " template to '<|im_end|>' and '<|im_end|>'"
    )
    caplog.clear()
    model, tokenizer = load(str(file), "cpu", "auto")
    assert not caplog.messages
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends
    assert (model.config.eos_token_id, model.config.pad_token_id) == (ends[0], ends[0])
    assert (folder / "README.md").read_text().startswith("---\nlicense: mit\n")


def test_without_a_template_the_end_token_is_that_of_the_file(file: Path) -> None:
    write_gguf(file, "llama", end="<|endoftext|>", template=None)
    assert load_tokenizer(str(file)).eos_token == "<|endoftext|>"
    with pytest.raises(ModelError, match=r"the tokenizer of .*model\.gguf has no chat template"):
        TransformersBackend(str(file))


def test_a_file_is_converted_once(file: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_of(str(file)) is None
    before = fingerprint_model(str(file))
    first = located(str(file))
    assert folder_of(str(file)) == Path(first)
    assert fingerprint_model(str(file)) == before

    monkeypatch.setattr(gguf, "convert", lambda file, folder: pytest.fail("converted again"))
    assert located(str(file)) == first
    other = Path(shutil.copy(file, file.with_name("other.gguf")))
    assert located(str(other)) == first
    assert [entry.name for entry in cache.entries()] == [Path(first).name]
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        located(str(other))
    assert not list(cached.glob(".*.part"))


def test_a_folder_with_one_file_is_that_file(file: Path) -> None:
    (file.parent / "README.md").write_text("about")
    assert located(str(file.parent)) == located(str(file))
    assert load_tokenizer(str(file.parent)).chat_template == TEMPLATE


def test_a_folder_with_two_files_is_an_error(file: Path) -> None:
    shutil.copy(file, file.with_name("other.gguf"))
    with pytest.raises(ModelError, match=r"contains 2 GGUF files; name one of them, such as .*model\.gguf$"):
        located(str(file.parent))


def test_a_backend_file_is_known_by_the_models_that_it_names(file: Path, tmp_path: Path) -> None:
    described = tmp_path / "backend.yaml"
    described.write_text(f"{{backend: transformers, model: {file}}}")
    assert response_fingerprint(described)[1] == [str(file)]


def _locate(file: str, cache_home: str) -> None:
    os.environ["XDG_CACHE_HOME"] = cache_home
    located(file)


@pytest.mark.slow
def test_two_processes_at_once_get_one_copy(file: Path, cached: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(file), str(cached.parents[1]))
    processes = [context.Process(target=_locate, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(cache.entries()) == 1
    assert not list(cached.glob(".*.part"))


def test_what_a_killed_conversion_left_is_removed(file: Path, cached: Path) -> None:
    entry = cache.entry_of(file)
    part = entry.with_name(f".{entry.name}.part")
    part.mkdir(parents=True)
    (part / "half").touch()
    assert not (Path(located(str(file))) / "half").exists()
    assert not part.exists()


def cut(size: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:size])


BREAKS: dict[str, Callable[[Path], object]] = {
    "is not a GGUF file, or damaged": lambda file: file.write_bytes(b"PK\3\4" * 100),
    "is not a GGUF file, or damaged; download": lambda file: file.write_bytes(b""),
    "is a pointer of Git LFS": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "is damaged": cut(-5000),
    "is damaged: ": cut(1000),
    "is damaged: .*; download": lambda file: file.write_bytes(b"GGUF" + b"\xff" * 100),
    "is one of 3 parts of a model; merge them": lambda file: write_gguf(file, "llama", split=3),
    r"architecture 'clip'\) cannot be read by transformers": lambda file: write_gguf(file, "llama", named="clip"),
    r"lacks weights of its architecture 'llama': model.layers.0.mlp.down_proj.weight; use": lambda file: write_gguf(
        file, "llama", leave_out=("blk.0.ffn_down.weight",)
    ),
}


@pytest.mark.parametrize("named", BREAKS)
def test_a_broken_file_is_an_error_of_one_line(named: str, file: Path, cached: Path) -> None:
    BREAKS[named](file)
    with pytest.raises(ModelError, match=named) as caught:
        TransformersBackend(str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert caught.value.fix
    assert cache.entries() == []
    assert not list(cached.glob(".*.part"))


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(module: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == module else sys)
    with pytest.raises(MissingExtra, match=rf"{module} is not installed; install it with: pip install 'popi\[gguf\]'"):
        located(str(file))


def test_what_transformers_leaves_out_is_logged(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gguf(file, "llama", extra=("blk.0.attn_q.bias", "rope_freqs.weight"))
    located(str(file))
    assert any("transformers leaves 32 of " in line for line in caplog.messages)
    assert f"{file}: transformers ignores its scaling of positions; long conversations may be worse" in caplog.messages
