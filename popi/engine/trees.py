"""Token trees: sequences that start with the same tokens, which are computed once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Sequences of tokens in one row, in preorder: each token is followed by all its continuations.

    A token of the tree sees itself and its ancestors: position ``p`` is visible from ``q`` if ``p <= q < ends[p]``
    (tree attention, as in SpecInfer, arXiv 2305.09781).

    Attributes:
        tokens: Token ids.
        depths: Position of each token in its sequence, from 0.
        ends: Position after the last continuation of each token.
        paths: Positions of the tokens of each sequence.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[list[int]]) -> TokenTree:
        """Merges the common first tokens of sequences."""
        tree = cls([], [], [], [[] for _ in sequences])
        path: list[int] = []
        previous: list[int] = []
        # In sorted order, a sequence has the longest common prefix with the one right before it.
        for index in sorted(range(len(sequences)), key=sequences.__getitem__):
            sequence = sequences[index]
            kept, size = common_prefix(previous, sequence), len(tree.tokens)
            tree._close(path[kept:])
            path = [*path[:kept], *range(size, size + len(sequence) - kept)]
            tree.tokens.extend(sequence[kept:])
            tree.depths.extend(range(kept, len(sequence)))
            tree.ends.extend([0] * (len(sequence) - kept))
            tree.paths[index] = path
            previous = sequence
        tree._close(path)
        return tree

    def _close(self, places: Sequence[int]) -> None:
        for place in places:
            self.ends[place] = len(self.tokens)

    @property
    def branches(self) -> bool:
        """Whether the tree has more than one sequence."""
        return any(end < len(self.tokens) for end in self.ends)


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common prefix of two sequences."""
    # Slices are compared in C, so a binary search is faster than a loop.
    return bisect_left(range(1, min(len(first), len(second)) + 1), True, key=lambda end: first[:end] != second[:end])
