"""Scoring: the log-probability of given responses, with what they share in front computed once."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from popi.backends.causal.cache import PrefixedRows, pad

# Logits are the largest thing in the work of scoring: at most 2^28 of them at once, 1 GiB in fp32.
MAX_LOGITS = 2**28

# Activations of more tokens at once leave the caches of a processor (docs/log.md). A GPU wants all that it can hold.
CPU_OWN_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Scored:
    """A response to be scored: token ids of the prompt, at least one, and of the response, at least one."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, slots=True)
class Packed:
    """Items that are computed together.

    Attributes:
        indices: Which of the items.
        prefix_lengths: How many leading tokens of each one's prompt are computed once for its neighbours too.
    """

    indices: list[int]
    prefix_lengths: list[int]


def pack(model: PreTrainedModel, items: Sequence[Scored], *, batch_tokens: int, share: bool) -> Iterator[Packed]:
    """Sorts items into forward passes: like lengths together, and what prompts share side by side.

    Args:
        model: The model that will score.
        items: What to score.
        batch_tokens: The most tokens of the rows of a batch.
        share: Whether the model has a plain cache, so that prompts can share the prefix that they have in common.
    """
    prefix_lengths = shared_prefixes([item.prompt for item in items]) if share else [0] * len(items)
    max_scored = MAX_LOGITS // model.config.get_text_config().vocab_size
    max_own = CPU_OWN_TOKENS if model.device.type == "cpu" else batch_tokens
    for batch in _batches(items, prefix_lengths, batch_tokens, max_own, max_scored):
        yield Packed(batch, [prefix_lengths[index] for index in batch])


def score(
    model: PreTrainedModel,
    items: Sequence[Scored],
    *,
    batch_tokens: int,
    share: bool,
    check: Callable[[], None],
) -> list[float]:
    """Sums the log-probabilities of each response's tokens given its prompt, in nats.

    Args:
        model: The model, in evaluation mode.
        items: What to score.
        batch_tokens: The most tokens of the rows of a batch.
        share: Whether the model has a plain cache.
        check: Called before every batch; stops the work by raising.
    """
    sums = [0.0] * len(items)
    for batch in pack(model, items, batch_tokens=batch_tokens, share=share):
        check()
        chosen = [items[index] for index in batch.indices]
        found = response_logits(model, chosen, batch.prefix_lengths)
        logprobs_N = -cross_entropy(found.logits_N_V.float(), found.targets_N, reduction="none")
        sums_R = logprobs_N.new_zeros(len(chosen), dtype=torch.float64)
        for index, logprob in zip(
            batch.indices, sums_R.index_add(0, found.rows_N, logprobs_N.double()).tolist(), strict=True
        ):
            sums[index] = logprob
    if any(map(math.isnan, sums)):
        raise ArithmeticError("the model's logits are not numbers")
    return sums


def shared_prefixes(prompts: Sequence[list[int]]) -> list[int]:
    """How many leading tokens of each prompt are computed once for several prompts.

    A prefix of k tokens that n prompts share saves (n - 1) k tokens. Neighbours in sorted order join the group in
    front of them when the whole group then saves more than it and they would apart. The last token of a prompt stays
    out of it: the logits behind that one are of the response.

    Returns:
        One length for each prompt, 0 for one that shares with none. The prompts of a group are equal up to it.
    """
    lengths = [0] * len(prompts)
    group: list[int] = []
    length = 0
    in_order = sorted(range(len(prompts)), key=lambda index: prompts[index])
    for prompt, same in groupby(in_order, key=lambda index: prompts[index]):
        equals, own = list(same), len(prompt) - 1
        common = _common_prefix(prompts[group[0]][:length], prompt[:own]) if group else 0
        apart = max(len(group) - 1, 0) * length + (len(equals) - 1) * own
        if (len(group) + len(equals) - 1) * common > apart:
            group, length = group + equals, common
        else:
            group, length = equals, own
        for index in group if len(group) > 1 else ():
            lengths[index] = length
    return lengths


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    # Slices are compared in C: a search by halves is faster than a walk.
    return bisect_left(range(1, min(len(first), len(second)) + 1), True, key=lambda end: first[:end] != second[:end])


def _batches(
    items: Sequence[Scored], prefix_lengths: Sequence[int], batch_tokens: int, max_own: int, max_scored: int
) -> Iterator[list[int]]:
    """Indices of items of like lengths, those with a common prefix side by side.

    The rows of a batch hold at most ``batch_tokens`` tokens, at most ``max_own`` of them behind the prefixes, and at
    most ``max_scored`` responses' tokens, unless one item alone holds more.
    """

    def like(index: int) -> tuple[int, list[int], int]:
        length, item = prefix_lengths[index], items[index]
        return length, item.prompt[:length], len(item.prompt) - length + len(item.response)

    batch: list[int] = []
    prefix = rest = scored = 0
    for index in sorted(range(len(items)), key=like):
        length, _, own = like(index)
        prefix, rest, scored = max(prefix, length), max(rest, own), scored + len(items[index].response)
        rows = len(batch) + 1
        if batch and (rows * (prefix + rest) > batch_tokens or rows * rest > max_own or scored > max_scored):
            yield batch
            batch, prefix, rest, scored = [], length, own, len(items[index].response)
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class ResponseLogits:
    """What a model predicts in the places of the tokens of responses, one response after the other.

    Attributes:
        logits_N_V: Logits, ``[N, V]``.
        targets_N: The tokens that stand there, ``[N]``.
        rows_N: Which response each belongs to, ``[N]``, ascending.
    """

    logits_N_V: Tensor
    targets_N: Tensor
    rows_N: Tensor


def response_logits(model: PreTrainedModel, items: Sequence[Scored], prefix_lengths: Sequence[int]) -> ResponseLogits:
    """Runs one batch of :func:`pack`. Gradients flow through it where they are on, through the shared prefixes too."""
    rests = [[*item.prompt[length:], *item.response] for item, length in zip(items, prefix_lengths, strict=True)]
    tokens_R_T = pad(rests, model.device)
    # The logits behind a token are those of the next one.
    places = [
        (row, column)
        for row, (item, rest) in enumerate(zip(items, rests, strict=True))
        for column in range(len(rest) - len(item.response) - 1, len(rest) - 1)
    ]
    rows_N, columns_N = torch.tensor(places, device=model.device).unbind(dim=1)
    with _head_at(model, rows_N, columns_N):
        logits_N_V = _run(model, items, prefix_lengths, tokens_R_T[:, :-1])
    return ResponseLogits(logits_N_V, tokens_R_T[rows_N, columns_N + 1], rows_N)


def _run(model: PreTrainedModel, items: Sequence[Scored], prefix_lengths: Sequence[int], tokens_R_T: Tensor) -> Tensor:
    """The model's logits behind the tokens; right padding needs no mask, as a causal model looks only back."""
    if not any(prefix_lengths):
        logits: Tensor = model(input_ids=tokens_R_T, use_cache=False).logits
        return logits[0]
    prefixes: list[list[int]] = []
    sources: list[int] = []
    named = (item.prompt[:length] for item, length in zip(items, prefix_lengths, strict=True))
    for source, (prefix, rows) in enumerate(groupby(named)):
        prefixes.append(prefix)
        sources.extend(source for _ in rows)
    return PrefixedRows(model, prefixes, sources, room=tokens_R_T.shape[1])(tokens_R_T)[0]


@contextmanager
def _head_at(model: PreTrainedModel, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Within it, the model gives logits at these places alone, ``[1, N, V]``.

    The hidden states are picked in front of the head, inside the model's own forward pass: what a family does to its
    logits afterwards (scales, soft caps) still happens.
    """

    def pick(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows_N, columns_N][None], *args[1:])

    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
