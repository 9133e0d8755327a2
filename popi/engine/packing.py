"""Packing: which responses share a forward pass, and which part of their prompts is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby, pairwise

from transformers import PreTrainedModel

from popi.engine.cache import Layout, fixed_length
from popi.engine.trees import TokenTree, common_prefix

# Logits take the most memory in scoring: at most 2^28 of them per pass, 1 GiB in fp32.
MAX_LOGITS = 2**28

# The activations of more tokens do not fit the caches of a CPU (docs/log.md). A GPU is faster with more.
CPU_OWN_TOKENS = 2048

# Attention between the branches of a row is masked, but computed (docs/log.md): a row has about as many tokens after
# its prefix as in it, within these bounds.
ROW_OWN_TOKENS = 192, 512


@dataclass(frozen=True, slots=True)
class Scored:
    """A response to score: token ids of the prompt and of the response, at least one each."""

    prompt: list[int]
    response: list[int]

    def after_prefix(self, prefix: int) -> list[int]:
        """The tokens that a model reads after a prefix of this length. The last token is predicted, never read."""
        return [*self.prompt[prefix:], *self.response[:-1]]


@dataclass(frozen=True, slots=True)
class Row:
    """Items that are computed in one row of a forward pass.

    Attributes:
        items: Indices of the items.
        prefix: The first tokens of all their prompts, computed once for all rows of a pass that have them.
        tree: The tokens that are read after it, in the order of the items.
    """

    items: list[int]
    prefix: list[int]
    tree: TokenTree

    @classmethod
    def of(cls, scored: Sequence[Scored], items: list[int], prefix: int) -> Row:
        """Makes a row of items whose prompts share their first ``prefix`` tokens."""
        tree = TokenTree.of([scored[index].after_prefix(prefix) for index in items])
        return cls(items, scored[items[0]].prompt[:prefix], tree)

    @classmethod
    def whole(cls, scored: Sequence[Scored], index: int) -> Row:
        """Makes a row of one item and reads its last token too, because the length of the sequence affects scores."""
        return cls([index], [], TokenTree.of([[*scored[index].prompt, *scored[index].response]]))


def pack(
    model: PreTrainedModel, items: Sequence[Scored], *, batch_tokens: int, layout: Layout, together: int = 1
) -> Iterator[list[Row]]:
    """Sorts items into forward passes: those with the same first tokens in a row, rows of similar length in a pass.

    An item that is longer than :func:`popi.engine.cache.fixed_length` has a separate pass, with the items that have to
    be in the same pass.

    Args:
        model: The model that will score.
        items: Prompts and responses.
        batch_tokens: Maximum number of tokens in the rows of a pass.
        layout: Layout of the batch. Rows are padded on the right, which needs no mask, so ``padded`` and ``single``
            make no difference. In ``plain`` each unit has a separate pass.
        together: Number of neighbours that have equal prompts and have to be in one pass.
    """
    units = [list(range(start, start + together)) for start in range(0, len(items), together)]
    fixed = fixed_length(model)
    if fixed is not None:
        long = [unit for unit in units if max(_length(items[index]) for index in unit) > fixed]
        yield from ([Row.whole(items, index) for index in unit] for unit in long)
        units = [unit for unit in units if max(_length(items[index]) for index in unit) <= fixed]
    if layout == "plain":
        yield from ([Row.of(items, [index], 0) for index in unit] for unit in units)
        return
    if layout == "shared":
        blocks = list(_blocks(items, units, shared_prefixes([item.prompt for item in items])))
    else:
        blocks = [[Row.of(items, [index], 0) for index in unit] for unit in units]
    max_scored = MAX_LOGITS // model.config.get_text_config().vocab_size
    max_own = CPU_OWN_TOKENS if model.device.type == "cpu" else batch_tokens
    yield from _passes(items, blocks, batch_tokens, max_own, max_scored)


def _length(item: Scored) -> int:
    return len(item.prompt) + len(item.response)


def tokens_of(rows: Sequence[Row]) -> int:
    """Number of tokens that the model reads in a pass. A prefix of several rows counts once, padding does not count."""
    return sum(len(prefix) for prefix, _ in groupby(row.prefix for row in rows)) + sum(
        len(row.tree.tokens) for row in rows
    )


def shared_prefixes(prompts: Sequence[list[int]]) -> list[int]:
    """The number of first tokens of each prompt that are computed once for several prompts.

    A prefix of k tokens that n prompts share saves (n - 1) k tokens. In sorted order, a prompt joins the group before
    it if the whole group then saves more than both would separately. The last token of a prompt is never part of the
    prefix: its logits predict the response.

    Returns:
        One length for each prompt, 0 if it shares none. The prompts of a group are equal up to it.
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
    """Puts units with a common prefix into rows of similar length; all other items have a row each.

    If a unit is too long for a row, each of its items has a row, and all of them stay in one pass.
    """

    def prompt(unit: list[int]) -> list[int]:
        return items[unit[0]].prompt

    def beginning(unit: list[int]) -> tuple[int, list[int]]:
        return prefix_lengths[unit[0]], prompt(unit)[: prefix_lengths[unit[0]]]

    in_order = sorted(units, key=lambda unit: (*beginning(unit), prompt(unit)))
    for (length, _), group in groupby(in_order, key=beginning):
        most = min(max(length, ROW_OWN_TOKENS[0]), ROW_OWN_TOKENS[1])
        parts: list[tuple[int, list[int]]] = []
        for _, same in groupby(group, key=prompt):
            apart = [(_size(items, unit, length), unit) for unit in same]
            whole = [index for _, unit in apart for index in unit]
            size = _size(items, whole, length)
            parts += [(size, whole)] if length and size <= most else apart
        long = [unit for size, unit in parts if size > most or not length]
        yield from ([Row.of(items, [index], length) for index in unit] for unit in long)
        short = [(size, unit) for size, unit in parts if size <= most and length]
        yield from ([Row.of(items, row, length)] for row in _balanced(short, most))


def _size(items: Sequence[Scored], unit: Sequence[int], prefix: int) -> int:
    """Number of tokens in the tree of these items."""
    read = sorted(items[index].after_prefix(prefix) for index in unit)
    return sum(map(len, read)) - sum(common_prefix(*pair) for pair in pairwise(read))


def _balanced(parts: Sequence[tuple[int, list[int]]], most: int) -> list[list[int]]:
    """Distributes parts of given sizes over rows of about this size, the largest parts first."""
    total = sum(size for size, _ in parts)
    rows: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(max(1, round(total / most)))]
    for size, part in sorted(parts, reverse=True):
        filled, number, row = heappop(rows)
        heappush(rows, (filled + size, number, row + part))
    return [row for _, _, row in rows if row]


def _passes(
    items: Sequence[Scored], blocks: Sequence[list[Row]], batch_tokens: int, max_own: int, max_scored: int
) -> Iterator[list[Row]]:
    """Groups blocks of similar length into passes, those with a common prefix next to each other.

    The rows of a pass have at most ``batch_tokens`` tokens, of which at most ``max_own`` after the prefixes and at most
    ``max_scored`` in responses, unless a single block has more.
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
