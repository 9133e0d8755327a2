"""Packing: which responses are computed together, and what of their prompts is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby, pairwise

from transformers import PreTrainedModel

from popi.engine.trees import TokenTree, common_prefix

# Logits are the largest thing in the work of scoring: at most 2^28 of them at once, 1 GiB in fp32.
MAX_LOGITS = 2**28

# Activations of more tokens at once leave the caches of a processor (docs/log.md). A GPU wants all that it can hold.
CPU_OWN_TOKENS = 2048

# Branches of a row are hidden from each other by a mask, but computed (docs/log.md): a row has about as many tokens
# behind its prefix as in it, within these bounds.
ROW_OWN_TOKENS = 192, 512


@dataclass(frozen=True, slots=True)
class Scored:
    """A response to be scored: token ids of the prompt, at least one, and of the response, at least one."""

    prompt: list[int]
    response: list[int]

    def behind(self, prefix: int) -> list[int]:
        """What a model reads of it behind so many tokens: the last one is predicted, never read."""
        return [*self.prompt[prefix:], *self.response[:-1]]


@dataclass(frozen=True, slots=True)
class Row:
    """Items that are computed in one row of a forward pass.

    Attributes:
        items: Which of the items.
        prefix: The leading tokens of all their prompts, computed once for all rows of a pass that have them.
        tree: What is read of the items behind it, in their order.
    """

    items: list[int]
    prefix: list[int]
    tree: TokenTree

    @classmethod
    def of(cls, scored: Sequence[Scored], items: list[int], prefix: int) -> Row:
        """Lays out items that have so many leading tokens in common."""
        tree = TokenTree.of([scored[index].behind(prefix) for index in items])
        return cls(items, scored[items[0]].prompt[:prefix], tree)


def pack(
    model: PreTrainedModel, items: Sequence[Scored], *, batch_tokens: int, share: bool, together: int = 1
) -> Iterator[list[Row]]:
    """Sorts items into forward passes: those that begin alike in a row, rows of like length in a pass.

    Args:
        model: The model that will score.
        items: What to score.
        batch_tokens: The most tokens of the rows of a pass.
        share: Whether the model has a plain cache, so that prompts can share what they have in common.
        together: So many neighbours have equal prompts and are in one pass.
    """
    units = [list(range(start, start + together)) for start in range(0, len(items), together)]
    max_scored = MAX_LOGITS // model.config.get_text_config().vocab_size
    max_own = CPU_OWN_TOKENS if model.device.type == "cpu" else batch_tokens
    if share:
        blocks = list(_blocks(items, units, shared_prefixes([item.prompt for item in items])))
    else:
        blocks = [[Row.of(items, [index], 0) for index in unit] for unit in units]
    return _passes(items, blocks, batch_tokens, max_own, max_scored)


def tokens_of(rows: Sequence[Row]) -> int:
    """How many tokens the model reads in a pass, a prefix of several rows counted once, padding not at all."""
    return sum(len(prefix) for prefix, _ in groupby(row.prefix for row in rows)) + sum(
        len(row.tree.tokens) for row in rows
    )


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
        common = common_prefix(prompts[group[0]][:length], prompt[:own]) if group else 0
        apart = max(len(group) - 1, 0) * length + (len(equals) - 1) * own
        if (len(group) + len(equals) - 1) * common > apart:
            group, length = group + equals, common
        else:
            group, length = equals, own
        for index in group if len(group) > 1 else ():
            lengths[index] = length
    return lengths


def _blocks(items: Sequence[Scored], units: Sequence[list[int]], prefix_lengths: Sequence[int]) -> Iterator[list[Row]]:
    """Units with a prefix in common share rows, as like in length as may be; the others have a row each.

    A unit that is too long for a row has a row for each of its items: they stay in one pass.
    """

    def prompt(unit: list[int]) -> list[int]:
        return items[unit[0]].prompt

    def beginning(unit: list[int]) -> tuple[int, list[int]]:
        return prefix_lengths[unit[0]], prompt(unit)[: prefix_lengths[unit[0]]]

    in_order = sorted(units, key=lambda unit: (*beginning(unit), prompt(unit)))
    for (length, _), alike in groupby(in_order, key=beginning):
        most = min(max(length, ROW_OWN_TOKENS[0]), ROW_OWN_TOKENS[1])
        parts: list[tuple[int, list[int]]] = []
        for _, same in groupby(alike, key=prompt):
            apart = [(_size(items, unit, length), unit) for unit in same]
            whole = [index for _, unit in apart for index in unit]
            size = _size(items, whole, length)
            parts += [(size, whole)] if length and size <= most else apart
        long = [unit for size, unit in parts if size > most or not length]
        yield from ([Row.of(items, [index], length) for index in unit] for unit in long)
        short = [(size, unit) for size, unit in parts if size <= most and length]
        yield from ([Row.of(items, row, length)] for row in _balanced(short, most))


def _size(items: Sequence[Scored], unit: Sequence[int], prefix: int) -> int:
    """How many tokens the tree of some items has."""
    read = sorted(items[index].behind(prefix) for index in unit)
    return sum(map(len, read)) - sum(common_prefix(*pair) for pair in pairwise(read))


def _balanced(parts: Sequence[tuple[int, list[int]]], most: int) -> list[list[int]]:
    """Distributes parts of given sizes over as few rows as hold about this much each, the largest parts first."""
    total = sum(size for size, _ in parts)
    rows: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(max(1, round(total / most)))]
    for size, part in sorted(parts, reverse=True):
        filled, number, row = heappop(rows)
        heappush(rows, (filled + size, number, row + part))
    return [row for _, _, row in rows if row]


def _passes(
    items: Sequence[Scored], blocks: Sequence[list[Row]], batch_tokens: int, max_own: int, max_scored: int
) -> Iterator[list[Row]]:
    """Blocks of rows of like length, those with a common prefix side by side.

    The rows of a pass hold at most ``batch_tokens`` tokens, at most ``max_own`` of them behind the prefixes, and at
    most ``max_scored`` responses' tokens, unless one block alone holds more.
    """

    def own(block: list[Row]) -> int:
        return max(len(row.tree.tokens) for row in block)

    longest: dict[tuple[int, ...], int] = {}
    for block in blocks:
        prefix = tuple(block[0].prefix)
        longest[prefix] = max(longest.get(prefix, 0), len(prefix) + own(block))

    batch: list[Row] = []
    front = rest = scored = 0
    for block in sorted(blocks, key=lambda block: (longest[tuple(block[0].prefix)], block[0].prefix, own(block))):
        front, rest = max(front, len(block[0].prefix)), max(rest, own(block))
        more = sum(len(items[index].response) for row in block for index in row.items)
        scored, count = scored + more, len(batch) + len(block)
        if batch and (count * (front + rest) > batch_tokens or count * rest > max_own or scored > max_scored):
            yield batch
            batch, front, rest, scored = [], len(block[0].prefix), own(block), more
        batch.extend(block)
    if batch:
        yield batch
