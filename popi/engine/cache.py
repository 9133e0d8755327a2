"""Layouts of a batch that a model's cache supports, and prefixes that are computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

Layout = Literal["shared", "padded", "single", "plain"]
"""How the sequences of a batch are laid out.

- ``shared``: sequences that start with the same tokens share their keys and values, and a mask separates the rest.
  Needs a cache with one key and one value for each token, and attention that follows any mask.
- ``padded``: each sequence has a row, padded on the left, with a padding mask. For sliding windows, chunked attention
  and recurrent states that leave out padding.
- ``single``: one sequence at a time, with a cache.
- ``plain``: one sequence at a time, without a cache: each step reads the whole sequence. Any causal model can do it.
"""

MASKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations, by the start of their names, that follow a mask of single positions."""

STATES = "cache_params"
"""Name of the cache among the arguments of models that keep recurrent states and no keys."""

CACHE_NAMES = ("past_key_values", STATES)
"""Names of the cache among the arguments of models."""


def parameters_of(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments of a model's forward pass."""
    return frozenset(inspect.signature(model.forward).parameters)


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model's cache has one key and one value for each token in every layer, at positions that we set.

    Only such a cache can be shared, and only if the attention follows a mask of single positions.
    """
    if not {"past_key_values", "position_ids"} <= parameters_of(model):
        return False
    if not str(model.config._attn_implementation).startswith(MASKED_ATTENTION):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout that a model's signature and configuration suggest."""
    if has_plain_cache(model):
        return "shared"
    parameters = parameters_of(model)
    return "padded" if "attention_mask" in parameters and parameters & {*CACHE_NAMES} else "single"


def fixed_length(model: PreTrainedModel) -> int | None:
    """Number of tokens up to which positions are encoded in the same way in a sequence of any length.

    In a longer one the encoding of all positions depends on the length of the longest sequence of the batch (longrope,
    dynamic NTK), so it is computed separately. ``None`` means no limit.
    """
    # transformers resets dynamic NTK only in a sequence that is shorter than the limit.
    return min((limit - (kind == "dynamic") for kind, limit in _length_dependent(model)), default=None)


def outdated(model: PreTrainedModel, cached: int, length: int) -> bool:
    """Whether keys are encoded in another way than in a sequence of this length.

    Args:
        model: The model.
        cached: Length of the sequence when the keys were computed.
        length: Present length of the sequence.
    """
    return any(
        length >= limit if kind == "dynamic" else cached <= limit < length for kind, limit in _length_dependent(model)
    )


def reset_positions(model: PreTrainedModel) -> None:
    """Resets the encoding of positions to that of short sequences: dynamic NTK keeps that of the longest one so far."""
    if _length_dependent(model):
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)


def _length_dependent(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Kind and limit of the position encodings that depend on the length of a sequence."""
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return [
        (rope["rope_type"], rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        for rope in by_layer_type or [parameters]
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]


class Prefixes:
    """Cached prefixes, one in each row, that any tokens can follow.

    Each prefix is computed once. A mask says what a token sees of the tokens that follow its prefix, so that branches
    are hidden from each other. Gradients flow through the prefixes if they are enabled.

    Args:
        model: A model with a plain cache.
        prefixes: Token ids of the prefix of each row, equal ones next to each other. May be empty.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Sequence[Sequence[int]]) -> None:
        self._model = model
        lengths = [len(prefix) for prefix in prefixes]
        self._lengths_R = torch.tensor(lengths, device=model.device)
        width = max(lengths)
        self._within_R_W = torch.arange(width, device=model.device) < self._lengths_R[:, None]
        self._cache: Cache = self._computed(prefixes) if width else DynamicCache(config=model.config)

    def _computed(self, prefixes: Sequence[Sequence[int]]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        runs = [(prefix, len(list(equals))) for prefix, equals in groupby(prefixes)]
        # Padding is on the right, where a causal model needs no mask.
        tokens_P_W = pad([prefix for prefix, _ in runs], self._model.device)
        self._model.base_model(input_ids=tokens_P_W, past_key_values=cache, use_cache=True)
        if len(runs) < len(prefixes):
            # Computed here, because a device would have to be waited for.
            places = [place for place, (_, count) in enumerate(runs) for _ in range(count)]
            cache.batch_select_indices(torch.tensor(places, device=self._model.device))
        return cache

    def __call__(self, tokens_R_T: Tensor, seen_R_T_T: Tensor, depths_R_T: Tensor) -> Tensor:
        """Computes the logits of the tokens that follow the prefixes, ``[R, T, V]``.

        Args:
            tokens_R_T: Token ids, ``[R, T]``.
            seen_R_T_T: Which of these tokens each of them sees, ``[R, T, T]``.
            depths_R_T: Position of each token after its prefix, from 0, ``[R, T]``.
        """
        rows, new = tokens_R_T.shape
        seen_R_T_W = self._within_R_W[:, None].expand(rows, new, -1)
        hidden_R_T_A = ~torch.cat((seen_R_T_W, seen_R_T_T), dim=2)
        mask_R_T_A = torch.zeros_like(hidden_R_T_A, dtype=self._model.dtype)
        mask_R_T_A.masked_fill_(hidden_R_T_A, lowest(self._model.dtype))
        logits: Tensor = self._model(
            input_ids=tokens_R_T,
            attention_mask=mask_R_T_A[:, None],
            position_ids=self._lengths_R[:, None] + depths_R_T,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits


def lowest(dtype: torch.dtype) -> float:
    """The value of a mask where a token is hidden. Autocast would round the lowest float32 to minus infinity."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)


@contextmanager
def head_at(model: PreTrainedModel, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Makes the model compute logits at these positions only, ``[1, N, V]``, inside the block.

    The hidden states are selected before the head, inside the model's own forward pass. Later operations on the logits
    (scales, soft caps) still apply.
    """

    def select(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows_N, columns_N][None], *args[1:])

    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def pad(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Rows of numbers as one right-padded tensor ``[R, T]``."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
