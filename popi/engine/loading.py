"""Loads a causal language model and its tokenizer, and reports problems as errors of one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from popi.engine.attention import group_heads
from popi.engine.gguf import located
from popi.engine.model_files import diagnose
from popi.engine.quiet import quiet
from popi.errors import ConfigError, ModelError
from popi.models import folder_of

log = logging.getLogger(__name__)

Read = TypeVar("Read")

DTYPES = ("auto", "float32", "bfloat16", "float16")

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub."""


def load(name_or_path: str, device: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer. Code that comes with a model is not executed.

    Args:
        name_or_path: Name of a model, a folder, a GGUF file, or a hub id.
        device: Device of the model; ``None`` is the first GPU if there is one, else the CPU.
        dtype: One of :data:`DTYPES`; ``auto`` is that of :func:`auto_dtype`.

    Raises:
        ModelError: If the model is not found, it is broken, or the device is out of memory.
        ConfigError: If the device is not available, or the dtype is unknown.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
    where = located(name_or_path)

    def read(local_files_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        chosen = dtype if dtype != "auto" else auto_dtype(where, place, local_files_only=local_files_only)
        return _from_pretrained(where, getattr(torch, chosen), local_files_only=local_files_only)

    with _explained(f"the model {name_or_path!r}", where), quiet():
        model, tokenizer = _here_or_from_hub(where, read)
        group_heads(model)
        return model.train(False).to(place), tokenizer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads only the tokenizer of a model.

    Args:
        name_or_path: Name of a model, a folder, a GGUF file, or a hub id.

    Raises:
        ModelError: If the model or its tokenizer is not found, or broken.
    """
    where = located(name_or_path)
    with _explained(f"the tokenizer of {name_or_path!r}", where, tokenizer_only=True), quiet():
        return _here_or_from_hub(where, partial(_tokenizer, where))


@contextmanager
def _explained(what: str, where: str, *, tokenizer_only: bool = False) -> Iterator[None]:
    """Turns an exception inside the block into an error of one line."""
    try:
        yield
    except ModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory while loading {what}", fix="free the device, or use a smaller model"
        ) from error
    # Many libraries read configurations, weights and tokenizers, each with its own exceptions.
    except Exception as error:
        folder = folder_of(where)
        problem = None if folder is None else diagnose(folder, tokenizer_only=tokenizer_only)
        if problem is not None:
            raise problem from error
        fix = None if isinstance(error, ImportError) else "check the name, or download the model again"
        raise ModelError(f"{what} cannot be loaded: {_first_line(error)}", fix=fix) from error


def _here_or_from_hub(where: str, read: Callable[[bool], Read]) -> Read:
    """Reads local files, or else those of the hub; the argument of ``read`` is ``local_files_only``."""
    try:
        return read(True)
    except OSError:
        if Path(where).exists():
            raise
    try:
        # One short request: a download retries for most of a minute if the hub does not respond.
        HfApi().model_info(where, timeout=HUB_TIMEOUT)
    except Exception as error:
        raise ModelError(
            f"the model {where!r} was not found in the cache or on the Hugging Face hub: {_first_line(error)}",
            fix="check the name, the network, and whether the model requires a login (hf auth login)",
        ) from error
    return read(False)


def _tokenizer(where: str, local_files_only: bool) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        where, local_files_only=local_files_only, trust_remote_code=False
    )
    return tokenizer


def _from_pretrained(
    where: str, dtype: torch.dtype, *, local_files_only: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = _tokenizer(where, local_files_only)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        where,
        dtype=dtype,
        local_files_only=local_files_only,
        trust_remote_code=False,
        output_loading_info=True,
        # Reported below with a name: weights that are missing or have another shape would be random.
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    wrong = sorted({*report["missing_keys"], *mismatched})
    if wrong:
        raise ModelError(
            f"the weights of {where} do not fit its config.json: {_some(wrong)}", fix="download the model again"
        )
    if unused := sorted(report["unexpected_keys"]):
        log.warning("%s: config.json leaves weights unused: %s", where, _some(unused))
    return model, tokenizer


def default_dtype(place: torch.device | None = None) -> str:
    """The dtype that ``auto`` selects on a device for a model in float32; by default the first GPU or the CPU."""
    return "float32" if (place or _device(None)).type == "cpu" else "bfloat16"


def auto_dtype(where: str, place: torch.device | None = None, *, local_files_only: bool = True) -> str:
    """The dtype that ``auto`` selects for a model.

    On a CPU it is bfloat16 if the processor multiplies in bfloat16 and the configuration of the model is in half
    precision, else float32. On other devices it is bfloat16.

    Args:
        where: A folder, or a hub id.
        place: The device, by default the first GPU or the CPU.
        local_files_only: Whether the configuration is not downloaded.

    Raises:
        OSError: If the configuration is not found.
    """
    place = place or _device(None)
    if place.type != "cpu" or not has_bfloat16(place):
        return default_dtype(place)
    config = AutoConfig.from_pretrained(where, local_files_only=local_files_only, trust_remote_code=False)
    declared = config.dtype or config.get_text_config().dtype
    return "bfloat16" if declared in (torch.bfloat16, torch.float16) else default_dtype(place)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 natively. A CPU that emulates it takes twice the time of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # The exception for a missing device depends on its kind.
    except Exception as error:
        raise ConfigError(f"device {name!r} is not available: {_first_line(error)}", fix="use cpu or cuda") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Some messages have the reason on the next line.
    message = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
