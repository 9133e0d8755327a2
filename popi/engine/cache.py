"""Key/value caches: a prefix is computed once, and everything that begins with it goes on from there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

MASKED_ATTENTION = ("sdpa", "eager")
"""The attention implementations, by the beginnings of their names, that follow a mask of single places."""


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether a model's cache holds one key and one value for every token in every layer, at positions that we give.

    Only then can its prefixes be shared. Sliding windows and recurrent states are not of this kind, and attention
    that knows no mask of single places cannot keep branches apart.
    """
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids"} <= parameters.keys():
        return False
    if not str(model.config._attn_implementation).startswith(MASKED_ATTENTION):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class Prefixes:
    """Cached prefixes, one in a row, from which any tokens go on.

    Each prefix is computed once, whatever goes on from it: a mask says what a token sees of its row behind the prefix,
    so that branches of it are hidden from each other. Gradients flow through the prefixes where they are on.

    Args:
        model: A model with a plain cache.
        prefixes: Token ids of the prefix of each row, equal ones side by side; may be empty ones.
        room: The most tokens that will be appended to a row, where that is done in many steps; 0 if in one.
    """

    def __init__(self, model: PreTrainedModel, prefixes: Sequence[Sequence[int]], *, room: int = 0) -> None:
        self._model = model
        self._lengths_R = torch.tensor([len(prefix) for prefix in prefixes], device=model.device)
        width = int(self._lengths_R.max())
        self._within_R_W = torch.arange(width, device=model.device) < self._lengths_R[:, None]
        self._cache: Cache = self._computed(prefixes) if width else DynamicCache(config=model.config)
        if width and room:
            self._cache = Cache(layers=[_RoomyLayer(keys, values, room) for keys, values, _ in self._cache])

    def _computed(self, prefixes: Sequence[Sequence[int]]) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        runs = [(prefix, len(list(equals))) for prefix, equals in groupby(prefixes)]
        # Padding stands on the right, where a causal model needs no mask.
        tokens_P_W = pad([prefix for prefix, _ in runs], self._model.device)
        self._model.base_model(input_ids=tokens_P_W, past_key_values=cache, use_cache=True)
        if len(runs) < len(prefixes):
            counts_P = torch.tensor([count for _, count in runs], device=self._model.device)
            cache.batch_select_indices(torch.arange(len(runs), device=counts_P.device).repeat_interleave(counts_P))
        return cache

    def __call__(self, tokens_R_T: Tensor, seen_R_T_L: Tensor, depths_R_T: Tensor) -> Tensor:
        """Appends tokens to the rows and gives the logits behind each of them, ``[R, T, V]``.

        Args:
            tokens_R_T: Token ids.
            seen_R_T_L: Which of the L tokens that were appended so far, these included, each of these sees.
            depths_R_T: How far each stands behind its prefix, from 0.
        """
        rows, new = tokens_R_T.shape
        seen_R_T_W = self._within_R_W[:, None].expand(rows, new, -1)
        hidden_R_T_A = ~torch.cat((seen_R_T_W, seen_R_T_L), dim=2)
        mask_R_T_A = torch.zeros_like(hidden_R_T_A, dtype=self._model.dtype)
        mask_R_T_A.masked_fill_(hidden_R_T_A, torch.finfo(self._model.dtype).min)
        logits: Tensor = self._model(
            input_ids=tokens_R_T,
            attention_mask=mask_R_T_A[:, None],
            position_ids=self._lengths_R[:, None] + depths_R_T,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits

    def keep(self, rows_K: Tensor) -> None:
        """Drops all rows but these."""
        self._lengths_R, self._within_R_W = self._lengths_R[rows_K], self._within_R_W[rows_K]
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

    def __init__(self, keys_R_H_L_D: Tensor, values_R_H_L_D: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._roomy_keys, self._roomy_values = _with_room(keys_R_H_L_D, room), _with_room(values_R_H_L_D, room)
        self._length = keys_R_H_L_D.shape[2]
        self.dtype, self.device, self.is_initialized = keys_R_H_L_D.dtype, keys_R_H_L_D.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[2]
        self._roomy_keys[:, :, start : self._length] = key_states
        self._roomy_values[:, :, start : self._length] = value_states
        return self._roomy_keys[:, :, : self._length], self._roomy_values[:, :, : self._length]

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        self._roomy_keys, self._roomy_values = self._roomy_keys[indices], self._roomy_values[indices]


def _with_room(states_R_H_L_D: Tensor, room: int) -> Tensor:
    rows, heads, length, size = states_R_H_L_D.shape
    roomy_R_H_L_D = states_R_H_L_D.new_empty((rows, heads, length + room, size))
    roomy_R_H_L_D[:, :, :length] = states_R_H_L_D
    return roomy_R_H_L_D


def pad(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Rows of numbers as one right-padded tensor ``[R, T]``."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
