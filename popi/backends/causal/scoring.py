"""Scoring: the log-probability of given responses, with what they share in front computed once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from popi.backends.causal.cache import PADDING, Branches, pad

# Logits are the largest thing in the work of scoring: at most 2^28 of them at once, 1 GiB in fp32.
MAX_LOGITS = 2**28

# Activations of more tokens at once leave the caches of a processor (docs/log.md). A GPU wants all that it can hold.
CPU_OWN_TOKENS = 2048


# Branches of a row are hidden from each other by a mask, but computed: attention costs the square of their sum.
ROW_OWN_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Scored:
    """A response to be scored: token ids of the prompt, at least one, and of the response, at least one."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """Items that are computed in one row of a forward pass.

    Attributes:
        items: Which of the items.
        prefix: How many leading tokens of their prompts are computed once for all of them.
    """

    items: list[int]
    prefix: int


def pack(model: PreTrainedModel, items: Sequence[Scored], *, batch_tokens: int, share: bool) -> Iterator[list[Row]]:
    """Sorts items into forward passes: those that share a prefix in a row, rows of like length together.

    Args:
        model: The model that will score.
        items: What to score.
        batch_tokens: The most tokens of the rows of a pass.
        share: Whether the model has a plain cache, so that prompts can share the prefix that they have in common.
    """
    prefix_lengths = shared_prefixes([item.prompt for item in items]) if share else [0] * len(items)
    max_scored = MAX_LOGITS // model.config.get_text_config().vocab_size
    max_own = CPU_OWN_TOKENS if model.device.type == "cpu" else batch_tokens
    return _passes(items, _rows(items, prefix_lengths), batch_tokens, max_own, max_scored)


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
        batch_tokens: The most tokens of the rows of a pass.
        share: Whether the model has a plain cache.
        check: Called before every pass; stops the work by raising.
    """
    sums_I = torch.zeros(len(items), dtype=torch.float64)
    for rows in pack(model, items, batch_tokens=batch_tokens, share=share):
        check()
        found = response_logits(model, items, rows)
        logprobs_N = -cross_entropy(found.logits_N_V.float(), found.targets_N, reduction="none")
        sums_I.index_add_(0, found.items_N.cpu(), logprobs_N.double().cpu())
    if bool(sums_I.isnan().any()):
        raise ArithmeticError("the model's logits are not numbers")
    return sums_I.tolist()


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


def _rows(items: Sequence[Scored], prefix_lengths: Sequence[int]) -> list[Row]:
    """Items with a prefix in common share a row, up to :data:`ROW_OWN_TOKENS`; the others have one each."""

    def prefix(index: int) -> list[int]:
        return items[index].prompt[: prefix_lengths[index]]

    rows: list[Row] = []
    room = 0
    for index in sorted(range(len(items)), key=lambda index: (prefix_lengths[index], prefix(index))):
        length, own = prefix_lengths[index], _own_tokens(items[index], prefix_lengths[index])
        joins = rows and length and own <= room and prefix(rows[-1].items[-1]) == prefix(index)
        if not joins:
            rows.append(Row([], length))
            room = ROW_OWN_TOKENS
        rows[-1].items.append(index)
        room -= own
    return rows


def _passes(
    items: Sequence[Scored], rows: Sequence[Row], batch_tokens: int, max_own: int, max_scored: int
) -> Iterator[list[Row]]:
    """Rows of like lengths, those with a common prefix side by side.

    The rows of a pass hold at most ``batch_tokens`` tokens, at most ``max_own`` of them behind the prefixes, and at
    most ``max_scored`` responses' tokens, unless one row alone holds more.
    """

    def own(row: Row) -> int:
        return sum(_own_tokens(items[index], row.prefix) for index in row.items)

    def like(row: Row) -> tuple[int, list[int], int]:
        return row.prefix, items[row.items[0]].prompt[: row.prefix], own(row)

    batch: list[Row] = []
    rest = scored = 0
    for row in sorted(rows, key=like):
        rest, more = max(rest, own(row)), sum(len(items[index].response) for index in row.items)
        scored, count = scored + more, len(batch) + 1
        if batch and (count * (row.prefix + rest) > batch_tokens or count * rest > max_own or scored > max_scored):
            yield batch
            batch, rest, scored = [], own(row), more
        batch.append(row)
    if batch:
        yield batch


def tokens_of(items: Sequence[Scored], rows: Sequence[Row]) -> int:
    """How many tokens the model reads in rows, a prefix counted once in each, padding not at all."""
    return sum(row.prefix + sum(_own_tokens(items[index], row.prefix) for index in row.items) for row in rows)


@dataclass(frozen=True, slots=True)
class ResponseLogits:
    """What a model predicts in the places of the tokens of responses, the tokens of one in order.

    Attributes:
        logits_N_V: Logits, ``[N, V]``.
        targets_N: The tokens that stand there, ``[N]``.
        items_N: Which item each belongs to, ``[N]``.
        offsets_N: Which token of its response each is, ``[N]``.
    """

    logits_N_V: Tensor
    targets_N: Tensor
    items_N: Tensor
    offsets_N: Tensor


def response_logits(model: PreTrainedModel, items: Sequence[Scored], rows: Sequence[Row]) -> ResponseLogits:
    """Runs one pass of :func:`pack`. Gradients flow through it where they are on, through the shared prefixes too."""
    read = [[_read(items[index], row.prefix) for index in row.items] for row in rows]
    scored: list[tuple[int, int, int, int, int]] = []
    for place, (row, parts) in enumerate(zip(rows, read, strict=True)):
        end = 0
        for index, part in zip(row.items, parts, strict=True):
            end += len(part)
            # The logits behind a token are those of the next one.
            first = end - len(items[index].response)
            scored += [(place, first + n, token, index, n) for n, token in enumerate(items[index].response)]
    rows_N, columns_N, targets_N, items_N, offsets_N = torch.tensor(scored, device=model.device).unbind(dim=1)
    with _head_at(model, rows_N, columns_N):
        prefixes = [items[row.items[0]].prompt[: row.prefix] for row in rows]
        logits_N_V = _run(model, prefixes, read)[0]
    return ResponseLogits(logits_N_V, targets_N, items_N, offsets_N)


def _read(item: Scored, prefix: int) -> list[int]:
    """What the model reads of an item behind the prefix: the last token is predicted, never read."""
    return [*item.prompt[prefix:], *item.response[:-1]]


def _own_tokens(item: Scored, prefix: int) -> int:
    """How many these are."""
    return len(item.prompt) - prefix + len(item.response) - 1


def _run(model: PreTrainedModel, prefixes: Sequence[list[int]], read: Sequence[Sequence[list[int]]]) -> Tensor:
    """The model's logits behind the branches of each row, one branch after the other."""
    tokens_R_T = pad([list(chain(*parts)) for parts in read], model.device)
    if not any(prefixes):
        # Right padding needs no mask, as a causal model looks only back.
        logits: Tensor = model(input_ids=tokens_R_T, use_cache=False).logits
        return logits
    owners = [[branch for branch, part in enumerate(parts) for _ in part] for parts in read]
    offsets = [[offset for part in parts for offset, _ in enumerate(part)] for parts in read]
    branches = Branches(model, prefixes)
    return branches(tokens_R_T, pad(owners, model.device, PADDING), pad(offsets, model.device))


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
