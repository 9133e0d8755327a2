"""Token trees: sequences that begin alike are computed together, what they have in common once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Sequences of tokens in one row, in preorder: behind each token stands everything that goes on from it.

    A token of the tree sees itself and what it goes on from: place ``p`` is seen from ``q`` where
    ``p <= q < ends[p]`` (tree attention, as in SpecInfer, arXiv 2305.09781).

    Attributes:
        tokens: Token ids.
        depths: The place of each in its sequence, from 0.
        ends: The place behind everything that goes on from each.
        paths: The places of the tokens of each sequence.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Sequence[list[int]]) -> TokenTree:
        """Merges sequences as far as they begin alike."""
        tree = cls([], [], [], [[] for _ in sequences])
        path: list[int] = []
        previous: list[int] = []
        # In order, a sequence has no more in common with any before it than with the one right before it.
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
        """Whether the tree is more than one sequence."""
        return any(end < len(self.tokens) for end in self.ends)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences have in common."""
    # Slices are compared in C: a search by halves is faster than a walk.
    return bisect_left(range(1, min(len(first), len(second)) + 1), True, key=lambda end: first[:end] != second[:end])
