"""Batches of models whose cache cannot be shared: rows padded on the left, or one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from popi.engine.cache import CACHE_NAMES, STATES, outdated, parameters_of, reset_positions
from popi.engine.slots import prefill_tokens

JOINABLE = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Cache layers to which rows can be added while others are running."""


class _Runner:
    """Runs a model with its own cache, and passes a padding mask and positions if the model accepts them.

    Args:
        model: Any causal language model.
        cached: Whether to use a cache, if the model has one.

    Attributes:
        caches: Whether a cache is used.
    """

    def __init__(self, model: PreTrainedModel, *, cached: bool = True) -> None:
        self._model, self._parameters = model, parameters_of(model)
        self._name = next((name for name in CACHE_NAMES if name in self._parameters), "") if cached else ""
        self.caches = bool(self._name)

    def __call__(self, tokens_N_T: Tensor, mask_N_L: Tensor, cache: Cache) -> Tensor:
        """Reads tokens, and returns the logits of the last one of each row, ``[N, V]``.

        Args:
            tokens_N_T: Token ids, ``[N, T]``.
            mask_N_L: 0 for padding, which is on the left, else 1, for the tokens in the cache and these, ``[N, L]``.
            cache: The cache; these tokens are added to it.
        """
        new = tokens_N_T.shape[1]
        options: dict[str, Any] = {self._name: cache, "use_cache": True} if self.caches else {"use_cache": False}
        if "attention_mask" in self._parameters:
            # A recurrent state contains the earlier tokens: a model with only such states gets a mask of the new
            # tokens.
            options["attention_mask"] = mask_N_L[:, -new:] if self._name == STATES else mask_N_L
        if "position_ids" in self._parameters:
            options["position_ids"] = (mask_N_L.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        logits_N_T_V: Tensor = self._model(input_ids=tokens_N_T, **options).logits
        return logits_N_T_V[:, -1]


class PaddedSlots:
    """Drafts of a model that takes a padding mask: each has a row of the model's own cache.

    Prompts have at least two tokens: a row needs one before the first step.

    Args:
        model: The model.
        batch_tokens: Maximum size of the batch in tokens: prompts, padding and room for new tokens. A draft that does
            not fit runs in its own batch.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int) -> None:
        self._model, self._batch_tokens, self._device = model, batch_tokens, model.device
        self._run = _Runner(model)
        self._joins = all(type(layer) in JOINABLE for layer in DynamicCache(config=model.config).layers)
        # Rows cannot be added later to a cache of another kind.
        self._prefill_tokens = prefill_tokens(model) if self._joins else batch_tokens
        self._clear()

    def _clear(self) -> None:
        """Starts with an empty batch."""
        self._cache: Cache | None = None
        self._mask_N_L = torch.empty(0, 0, dtype=torch.long, device=self._device)
        self._left: list[int] = []
        self._new: list[list[int]] = []

    def plan(self, candidates: Iterable[tuple[list[int], int]]) -> int:
        """See :meth:`popi.engine.slots.SharedSlots.plan`."""
        if self._left and not self._joins:
            return 0
        width, distinct = self._mask_N_L.shape[1], set[tuple[int, ...]]()
        for prompt, limit in candidates:
            wider, left = max(width, len(prompt) - 1), max(limit, *self._left, 0)
            if self._left and (len(self._left) + 1) * (wider + left) > self._batch_tokens:
                break
            distinct.add(tuple(prompt))
            if len(distinct) > 1 and len(distinct) * max(map(len, distinct)) > self._prefill_tokens:
                break
            width = wider
            self._new.append(prompt)
            self._left.append(limit)
        return len(self._new)

    def prefill(self, waiting: int) -> None:
        """Computes the prompts of the drafts that :meth:`plan` added, except their last tokens."""
        if not self._new:
            return
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, self._new)))}
        width = max(len(prompt) - 1 for prompt in places)
        tokens = [[0] * (width + 1 - len(prompt)) + [*prompt[:-1]] for prompt in places]
        mask = [[0] * (width + 1 - len(prompt)) + [1] * (len(prompt) - 1) for prompt in places]
        cache, mask_P_W = DynamicCache(config=self._model.config), torch.tensor(mask, device=self._device)
        self._run(torch.tensor(tokens, device=self._device), mask_P_W, cache)
        index_M = torch.tensor([places[tuple(prompt)] for prompt in self._new], device=self._device)
        cache.reorder_cache(index_M)  # type: ignore[arg-type]
        self._new = []
        self._join(cache, mask_P_W[index_M])

    def _join(self, cache: Cache, mask_M_W: Tensor) -> None:
        """Adds rows to the batch."""
        if self._cache is None:
            self._cache, self._mask_N_L = cache, mask_M_W
            return
        length = max(self._mask_N_L.shape[1], mask_M_W.shape[1])
        for layer, other in zip(self._cache.layers, cache.layers, strict=True):
            if isinstance(layer, DynamicLayer) and isinstance(other, DynamicLayer):
                _join_attention(layer, other, length)
            if isinstance(layer, LinearAttentionLayer) and isinstance(other, LinearAttentionLayer):
                _join_states(layer, other)
        self._mask_N_L = torch.cat([_pad_left(mask, 1, length) for mask in (self._mask_N_L, mask_M_W)])

    def step(self, last_N: Tensor) -> Tensor:
        """Reads the last token of each draft, and returns the logits of the next one, ``[N, V]``."""
        self._mask_N_L = torch.cat((self._mask_N_L, torch.ones_like(last_N)[:, None]), dim=1)
        self._left = [left - 1 for left in self._left]
        assert self._cache is not None, "prefill makes it"
        return self._run(last_N[:, None], self._mask_N_L, self._cache)

    def keep(self, places: Sequence[int]) -> None:
        """Keeps these drafts, and drops all others and the columns that contain only padding."""
        if not places:
            self._clear()
            return
        assert self._cache is not None, "prefill makes it"
        index_K = torch.tensor(places, device=self._device)
        self._cache.reorder_cache(index_K)  # type: ignore[arg-type]
        self._left = [self._left[place] for place in places]
        self._mask_N_L = self._mask_N_L[index_K]
        padding = int((self._mask_N_L.cumsum(dim=1) == 0).all(dim=0).sum())
        if padding and self._joins:
            self._mask_N_L = self._mask_N_L[:, padding:]
            for layer in self._cache.layers:
                if isinstance(layer, DynamicLayer):
                    _set_length(layer, self._mask_N_L.shape[1])

    def erase(self, places: Sequence[int]) -> None:
        """Does nothing, because rows do not attend to each other."""


class SingleSlot:
    """One draft at a time, with the model's own cache.

    Args:
        model: Any causal language model.
        cached: Whether to use a cache, if the model has one.
    """

    def __init__(self, model: PreTrainedModel, *, cached: bool = True) -> None:
        self._model, self._run = model, _Runner(model, cached=cached)
        self._tokens: list[int] = []
        self._cache, self._cached = DynamicCache(config=model.config), 0

    def plan(self, candidates: Iterable[tuple[list[int], int]]) -> int:
        """See :meth:`popi.engine.slots.SharedSlots.plan`."""
        taken = [prompt for prompt, _ in islice(candidates, 0 if self._tokens else 1)]
        for prompt in taken:
            self._tokens = list(prompt)
        return len(taken)

    def prefill(self, waiting: int) -> None:
        """Starts a new draft; its first step reads its prompt."""
        if self._cached == 0:
            reset_positions(self._model)

    def step(self, last_1: Tensor) -> Tensor:
        """Reads the unread tokens of the draft, and returns the next logits, ``[1, V]``."""
        if self._cached:
            self._tokens.append(int(last_1))
        if not self._run.caches or outdated(self._model, self._cached, len(self._tokens)):
            self._cache, self._cached = DynamicCache(config=self._model.config), 0
        tokens_1_L = torch.tensor([self._tokens], device=self._model.device)
        unread, self._cached = self._cached, len(self._tokens)
        return self._run(tokens_1_L[:, unread:], torch.ones_like(tokens_1_L), self._cache)

    def keep(self, places: Sequence[int]) -> None:
        """Drops the draft unless it is kept."""
        if not places:
            self._tokens, self._cached = [], 0
            self._cache = DynamicCache(config=self._model.config)

    def erase(self, places: Sequence[int]) -> None:
        """Does nothing, because no other draft is running."""


def _join_attention(layer: DynamicLayer, other: DynamicLayer, length: int) -> None:
    stored = length if not isinstance(layer, DynamicSlidingWindowLayer) else min(length, layer.sliding_window - 1)
    assert layer.keys is not None and layer.values is not None and other.keys is not None and other.values is not None
    layer.keys = torch.cat([_pad_left(keys, 2, stored) for keys in (layer.keys, other.keys)])
    layer.values = torch.cat([_pad_left(values, 2, stored) for values in (layer.values, other.values)])
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def _join_states(layer: LinearAttentionLayer, other: LinearAttentionLayer) -> None:
    for states, others in ((layer.conv_states, other.conv_states), (layer.recurrent_states, other.recurrent_states)):
        for place, state in states.items():
            if state is not None and (other_state := others[place]) is not None:
                states[place] = torch.cat((state, other_state))


def _set_length(layer: DynamicLayer, length: int) -> None:
    """Drops columns on the left."""
    stored = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length, stored = length, min(length, layer.sliding_window - 1)
    assert layer.keys is not None and layer.values is not None, "the prompts have been read"
    layer.keys, layer.values = layer.keys[:, :, -stored:], layer.values[:, :, -stored:]


def _pad_left(states: Tensor, dim: int, length: int) -> Tensor:
    shape = list(states.shape)
    shape[dim] = length - shape[dim]
    return torch.cat((states.new_zeros(shape), states), dim=dim)
