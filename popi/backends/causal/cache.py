"""Key/value caches: a prefix is computed once, and every row that begins with it goes on from there."""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model's cache holds one key and one value for every token in every layer, at positions that we give.

    Only then can its rows be shared, shifted and dropped. Sliding windows and recurrent states are not of this kind.
    """
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids"} <= parameters.keys():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class PrefixedRows:
    """Rows of tokens that go on from cached prefixes.

    Each prefix is computed once. Prefixes are right-padded for that, where a causal model needs no mask; the rows are
    left-padded copies, so that all go on at the same column.

    Args:
        model: A model with a plain cache.
        prefixes: Token ids of the distinct prefixes; may be empty ones.
        sources: The prefix of each row, as an index, in ascending order.
        room: The most tokens that a row will go on for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefixes: Sequence[Sequence[int]],
        sources: Sequence[int],
        room: int,
    ) -> None:
        self._model = model
        device = model.device
        lengths_P = [len(prefix) for prefix in prefixes]
        width = max(lengths_P)
        lengths_R = torch.tensor([lengths_P[source] for source in sources], device=device)
        self._next_R = lengths_R
        self._mask_R_L: Tensor | None = None
        if min(lengths_P) < width:
            columns = torch.arange(width + room, device=device)
            self._mask_R_L = columns >= (width - lengths_R)[:, None]
        self._width = width
        cache = DynamicCache(config=model.config)
        self._cache: Cache = cache
        if width:
            model.base_model(input_ids=pad(prefixes, device), past_key_values=cache, use_cache=True)
            self._cache = _expand_cache(cache, lengths_P, sources, room)

    def __call__(self, tokens_R_T: Tensor) -> Tensor:
        """Appends tokens to every row and gives the logits behind each of them, ``[R, T, V]``."""
        steps = tokens_R_T.shape[1]
        positions_R_T = self._next_R[:, None] + torch.arange(steps, device=tokens_R_T.device)
        self._next_R = self._next_R + steps
        self._width += steps
        mask = None if self._mask_R_L is None else self._mask_R_L[:, : self._width]
        output = self._model(
            input_ids=tokens_R_T,
            attention_mask=mask,
            position_ids=positions_R_T,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        rows_K = torch.tensor(rows, device=self._next_R.device)
        self._next_R = self._next_R[rows_K]
        self._mask_R_L = None if self._mask_R_L is None else self._mask_R_L[rows_K]
        self._cache.batch_select_indices(rows_K)


class OwnCache:
    """One row of tokens with whatever a model remembers by itself: a window, a state, or nothing.

    Args:
        model: Any causal language model.
        prefix: Token ids in front of what will be appended; may be empty.
    """

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int]) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        names = (name for name in ("past_key_values", "cache_params") if name in parameters)
        self._name = next(names, None)
        self._cache = DynamicCache(config=model.config) if self._name else None
        self._tokens_1_L = torch.empty((1, 0), dtype=torch.long, device=model.device)
        if prefix:
            self(torch.tensor([prefix], device=model.device))

    def __call__(self, tokens_1_T: Tensor) -> Tensor:
        """Appends tokens and gives the logits behind at least the last of them, ``[1, T, V]``."""
        if self._name is None:
            self._tokens_1_L = torch.cat((self._tokens_1_L, tokens_1_T), dim=1)
            logits: Tensor = self._model(input_ids=self._tokens_1_L).logits
            return logits
        output = self._model(input_ids=tokens_1_T, use_cache=True, **{self._name: self._cache})
        logits = output.logits
        return logits


class _RoomyLayer(DynamicLayer):
    """A layer of a cache with room for what is to come: appending copies the new tokens, not the whole layer."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._roomy_keys, self._roomy_values, self._length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[2]
        self._roomy_keys[:, :, start : self._length] = key_states
        self._roomy_values[:, :, start : self._length] = value_states
        return self._roomy_keys[:, :, : self._length], self._roomy_values[:, :, : self._length]

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._roomy_keys, self._roomy_values = self._roomy_keys[indices], self._roomy_values[indices]


def _expand_cache(cache: DynamicCache, lengths_P: Sequence[int], sources: Sequence[int], room: int) -> Cache:
    layers: list[Any] = [
        _RoomyLayer(_expand(keys, lengths_P, sources, room), _expand(values, lengths_P, sources, room), keys.shape[2])
        for keys, values, _ in cache
    ]
    return Cache(layers=layers)


def _expand(states_P_H_L_D: Tensor, lengths_P: Sequence[int], sources: Sequence[int], room: int) -> Tensor:
    """One row for each source, its states moved to the right end of the prefix's columns, with room behind."""
    _, heads, width, size = states_P_H_L_D.shape
    # Zeros, not whatever was in memory: a masked place still takes part as 0 x value.
    rows_R_H_L_D = states_P_H_L_D.new_zeros((len(sources), heads, width + room, size))
    for source, length in enumerate(lengths_P):
        rows = slice(bisect_left(sources, source), bisect_right(sources, source))
        rows_R_H_L_D[rows, :, width - length : width] = states_P_H_L_D[source, :, :length]
    return rows_R_H_L_D


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of token ids as one right-padded tensor ``[R, T]``. What stands in the padding is never looked at."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
