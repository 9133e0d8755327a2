"""GGUF files: each is converted once, to a folder that transformers and vLLM load.

transformers reads a GGUF file slowly, does not save what it has read, and often gets its end token wrong. The converted
copy has the end token that its chat template puts after a response.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)

from popi.engine.chat_tokens import TEMPLATE_ARGUMENTS
from popi.engine.model_files import LFS
from popi.engine.quiet import quiet, silence_deepspeed
from popi.engine.turns import read_turn
from popi.errors import MissingExtra, ModelError, one_line
from popi.io import write_text
from popi.models import cache, find
from popi.prompts import Message

log = logging.getLogger(__name__)

MAGIC = b"GGUF"

AGAIN = "download or copy the file again"

OTHER = "use the model's folder with config.json and safetensors"

FROM_GGUF = ("quantization_config", "architectures", "_name_or_path", "_model_name_or_path")
"""Fields of a configuration that are true of the GGUF file only."""

NOT_WEIGHTS = ("rope_freqs", "rope_factors")
"""Starts of the names of tensors that hold the scaling of positions."""

CONTROL = 3
"""Type of the control tokens in a GGUF file."""

CARD = """\
---
license: {licence}
library_name: transformers
---
# {name}

Converted from `{file}` (sha256 `{digest}`) by popi for transformers {version}, in {dtype}.
"""


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a GGUF file says.

    Attributes:
        architecture: Name of the architecture.
        licence: Licence of the model; may be empty.
        end: The end token; ``None`` if the file has none.
        padding: The padding token; ``None`` if the file has none.
        control: The control tokens, by the spelling.
        parts: Number of files of the model.
        scaling: Whether positions are scaled, for a longer context.
        numbers: Number of weights.
        dtype: ``float32`` if all matrices are, else ``bfloat16``.
    """

    architecture: str
    licence: str
    end: int | None
    padding: int | None
    control: tuple[str, ...]
    parts: int
    scaling: bool
    numbers: int
    dtype: str


def located(name_or_path: str) -> str:
    """Finds a model like :func:`popi.models.find`. A GGUF file is converted first, if it has not been before.

    Raises:
        ModelError: If the model is not found, or it is a GGUF file that cannot be converted.
        MissingExtra: If the packages that read GGUF are not installed.
    """
    where = find(name_or_path)
    file = Path(where)
    if not file.is_file():
        return where
    entry = cache.entry_of(file)
    with cache.filling(entry) as part:
        if part is not None:
            convert(file, part)
    return str(entry)


def check_packages() -> None:
    """Checks that the packages that read GGUF are installed.

    Raises:
        MissingExtra: If one is not.
    """
    for module in ("gguf", "accelerate"):
        if find_spec(module) is None:
            raise MissingExtra(module, "gguf")


def convert(file: Path, folder: Path) -> None:
    """Converts a GGUF file to a model of transformers, in bfloat16 unless its weights are in float32.

    Args:
        file: The GGUF file.
        folder: An existing folder for the model, its tokenizer and its card.

    Raises:
        ModelError: If the file is not GGUF, it is damaged, or transformers does not support its architecture or
            quantisation.
        MissingExtra: If the packages that read GGUF are not installed.
    """
    check_packages()
    silence_deepspeed()
    _check_magic(file)
    header = _header(file)
    log.warning("converting %s for transformers, once; popi models lists the copy", file.name)
    with _explained(file, header.architecture), quiet(), _no_bars():
        read = partial(_read, file)
        tokenizer = read(AutoTokenizer)
        model, report = read(AutoModelForCausalLM, dtype=getattr(torch, header.dtype), output_loading_info=True)
        _check_weights(file, header, model, report)
        # transformers knows those of some architectures only, and splits the others into characters.
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in header.control if token in known], special_tokens=True)
        ends = repair(tokenizer, header.end, header.padding, file.name)
        _copy_of(model, tokenizer, ends).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    card = CARD.format(
        licence=header.licence or "unknown",
        name=file.stem,
        file=file.name,
        digest=cache.digest(file),
        version=__version__,
        dtype=header.dtype,
    )
    write_text(folder / "README.md", card)


def _read(file: Path, kind: Any, **options: Any) -> Any:
    return kind.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, **options)


def _check_magic(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(len(LFS))
    if start == LFS:
        raise ModelError(f"{file} is a pointer of Git LFS, not the file itself", fix="download it (git lfs pull)")
    if not start.startswith(MAGIC):
        raise ModelError(f"{file} is not a GGUF file, or damaged", fix=AGAIN)


def _header(file: Path) -> Header:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        value = partial(_value, reader)
        architecture = str(value("general.architecture", ""))
        tensors = [tensor for tensor in reader.tensors if not tensor.name.startswith(NOT_WEIGHTS)]
        matrices = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
        header = Header(
            architecture=architecture,
            licence=one_line(str(value("general.license", ""))),
            end=value("tokenizer.ggml.eos_token_id", None),
            padding=value("tokenizer.ggml.padding_token_id", None),
            control=tuple(_control(value)),
            parts=int(value("split.count", 1)),
            scaling=len(tensors) < len(reader.tensors)
            or value(f"{architecture}.rope.scaling.type", "none") not in ("none", ""),
            numbers=sum(math.prod(map(int, tensor.shape)) for tensor in tensors),
            dtype="float32" if matrices <= {"F32"} else "bfloat16",
        )
    # The reader trusts the file: damage appears as an error of numpy, of an enumeration or of memory.
    except Exception as error:
        raise ModelError(f"{file} is damaged: {_reason(error)}", fix=AGAIN) from error
    if header.parts > 1:
        raise ModelError(
            f"{file} is one of {header.parts} parts of a model", fix="merge them with: llama-gguf-split --merge"
        )
    return header


def _control(value: Callable[[str, Any], Any]) -> Iterator[str]:
    tokens, kinds = value("tokenizer.ggml.tokens", []), value("tokenizer.ggml.token_type", [])
    return (token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL)


def _value(reader: Any, key: str, default: Any) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


@contextmanager
def _explained(file: Path, architecture: str) -> Iterator[None]:
    """Turns an exception inside the block into an error of one line."""
    try:
        yield
    except ModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelError(f"out of memory while converting {file}", fix="use a smaller model") from error
    # transformers raises many types of exceptions for an architecture or a tokenizer that it does not know.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk
        what = f"{file} (architecture {architecture!r}) cannot be read by transformers {__version__}"
        raise ModelError(f"{what}: {_reason(error)}", fix=OTHER) from error


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hides the progress bars that do not obey the settings of transformers."""
    from transformers import modeling_gguf_pytorch_utils as weights
    from transformers.integrations import ggml as tokenizers

    modules: tuple[Any, ...] = weights, tokenizers
    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


def _check_weights(file: Path, header: Header, model: PreTrainedModel, report: Any) -> None:
    """Checks that the file has all weights of the model, and warns of what the model leaves out."""
    if missing := sorted(report["missing_keys"] | {str(key) for key in report["mismatched_keys"]}):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{file} lacks weights of its architecture {header.architecture!r}: {missing[0]}{more}", fix=OTHER
        )
    numbers = sum(weight.numel() for weight in model.parameters())
    if header.numbers > numbers:
        log.warning("%s: transformers leaves %d of %d weights unused", file, header.numbers - numbers, header.numbers)
    positions = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if header.scaling and positions.get("rope_type") == "default":
        log.warning("%s: transformers ignores its scaling of positions; long conversations may be worse", file)


def repair(tokenizer: PreTrainedTokenizerBase, end: int | None, padding: int | None, name: str) -> list[int]:
    """Sets the end token that the chat template puts after a response, and a padding token.

    Args:
        tokenizer: The tokenizer, as transformers has read it.
        end: The end token by the file.
        padding: The padding token by the file.
        name: Name of the model, for the log.

    Returns:
        The tokens that end a response: the end token, and that of the file if it is another. May be empty.
    """
    before = tokenizer.eos_token, tokenizer.pad_token
    by_file, pad = (_token(tokenizer, number) for number in (end, padding))
    tokenizer.eos_token = _end_by_template(tokenizer, by_file, name) or by_file or tokenizer.eos_token
    tokenizer.pad_token = pad or tokenizer.pad_token or tokenizer.eos_token
    after = tokenizer.eos_token, tokenizer.pad_token
    if after != before:
        log.warning(
            "%s was read with the end token %r and the padding token %r; corrected by its chat template to %r and %r",
            *(name, *before, *after),
        )
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in dict.fromkeys((tokenizer.eos_token, by_file)) if token]


def _token(tokenizer: PreTrainedTokenizerBase, number: int | None) -> str | None:
    if number is None or not 0 <= number < len(tokenizer):
        return None
    return str(tokenizer.convert_ids_to_tokens(number))


def _end_by_template(tokenizer: PreTrainedTokenizerBase, by_file: str | None, name: str) -> str | None:
    """The first control token that the chat template puts after a response; ``None`` if there is none."""

    def apply(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        plain = [asdict(message) for message in messages]
        options: dict[str, Any] = {**TEMPLATE_ARGUMENTS, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(plain, tokenize=False, **options))

    try:
        after = read_turn(apply, name).after if tokenizer.chat_template else ""
    except ModelError:
        # It is reported when the converted model is loaded.
        return None
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    end = next((_token(tokenizer, number) for number in tokens if number in control), None)
    return None if end in {tokenizer.bos_token, tokenizer.unk_token} - {by_file} else end


def _copy_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> PreTrainedModel:
    """The same model, as one that transformers saves."""
    config = model.config.to_dict()
    for name in FROM_GGUF:
        config.pop(name, None)
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config |= {**special, "eos_token_id": tokenizer.eos_token_id, "dtype": str(model.dtype).removeprefix("torch.")}
    # Without memory for weights, which are those of the model.
    with torch.device("meta"):
        copy: PreTrainedModel = type(model)(type(model.config)(**config))
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.tie_weights()
    copy.generation_config = GenerationConfig(**special, eos_token_id=ends[0] if len(ends) == 1 else ends or None)
    return copy
