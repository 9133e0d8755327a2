"""Loads a causal language model and its tokenizer, or says in one line why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from popi.engine.attention import group_heads
from popi.errors import ConfigError, ModelError
from popi.models import find

Read = TypeVar("Read")

DTYPES = ("auto", "float32", "bfloat16", "float16")

HUB_TIMEOUT = 10.0
"""Seconds that the hub has to answer."""


def load(name_or_path: str, device: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode and its tokenizer. No code that comes with a model is run.

    Args:
        name_or_path: A shipped model's name, a folder, or a hub id.
        device: Where to put it; ``None`` is the first GPU if there is one, else the CPU.
        dtype: One of :data:`DTYPES`; ``auto`` is float32 on a CPU, else bfloat16.

    Raises:
        ModelError: If there is no such model, it is broken, or the device cannot hold it.
        ConfigError: If there is no such device or dtype.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}", fix=f"one of {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = default_dtype(place)
    where = find(name_or_path)

    def read(local_files_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return _from_pretrained(where, getattr(torch, dtype), local_files_only=local_files_only)

    with _told(f"the model {name_or_path!r}"), quiet():
        model, tokenizer = _here_or_from_hub(where, read)
        group_heads(model)
        return model.train(False).to(place), tokenizer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer alone.

    Args:
        name_or_path: A shipped model's name, a folder, or a hub id.

    Raises:
        ModelError: If there is none, or it is broken.
    """
    where = find(name_or_path)
    with _told(f"the tokenizer of {name_or_path!r}"), quiet():
        return _here_or_from_hub(where, partial(_tokenizer, where))


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what goes wrong within it into an error of one line."""
    try:
        yield
    except ModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{what} has no room in memory", fix="free the device, or take a smaller model") from error
    # Configurations, weights and tokenizers are read by many libraries, each with errors of its own.
    except Exception as error:
        raise ModelError(
            f"{what} cannot be loaded: {_first_line(error)}", fix="check the name, or fetch the model again"
        ) from error


def _here_or_from_hub(where: str, read: Callable[[bool], Read]) -> Read:
    """Reads from files that are here, else from the hub; ``read`` is told whether it may not ask that."""
    try:
        return read(True)
    except OSError:
        if Path(where).exists():
            raise
    try:
        # One short question: a download retries for most of a minute when nobody answers.
        HfApi().model_info(where, timeout=HUB_TIMEOUT)
    except Exception as error:
        raise ModelError(
            f"no model {where!r} here, and none from the Hugging Face hub: {_first_line(error)}",
            fix="check the name, the network, and whether the model asks for a login (hf auth login)",
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
        # Reported below, with a name; weights that are missing or misshapen would be random ones.
        ignore_mismatched_sizes=True,
    )
    model, report = loaded
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    wrong = sorted({*report["missing_keys"], *mismatched})
    if wrong:
        raise ModelError(
            f"the weights of {where} do not fit its configuration: {wrong[0]} and {len(wrong) - 1} more",
            fix="fetch the model again",
        )
    return model, tokenizer


def default_dtype(place: torch.device | None = None) -> str:
    """What ``auto`` is on a device, by default the first GPU or the CPU."""
    return "float32" if (place or _device(None)).type == "cpu" else "bfloat16"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # What an absent device raises depends on its kind.
    except Exception as error:
        raise ConfigError(f"no device {name!r}: {_first_line(error)}", fix="cpu, or cuda where there is one") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars and reports of a load or a save off the terminal: what matters of them becomes an error."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
