"""The users of an evaluation: one sample for each seed, of a world or dealt from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from popi import registry
from popi.data.example import PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import ConfigError, InputError, did_you_mean

GENERATORS = {"miniworld": "popi.data.miniworld:generate"}
"""What makes the users of each world, as ``module:name``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Users that are measured together.

    Attributes:
        seed: Tells samples apart.
        examples: Each with test pairs. No user is in two samples of an evaluation.
    """

    seed: int
    examples: Sequence[PersonalizationExample]


def from_world(world: str, *, split: str, users: int, seeds: Sequence[int]) -> list[Sample]:
    """Has a world make ``users`` users for each seed.

    Raises:
        ConfigError: If there is no such world, or no user is asked for.
        InputError: If the world has no such split.
    """
    if world not in GENERATORS:
        raise ConfigError(f"unknown world {world!r}", field="world", fix=did_you_mean(world, GENERATORS))
    if users < 1:
        raise ConfigError("at least one user is needed", field="users")
    generate = registry.load(GENERATORS[world])
    return [Sample(seed, list(generate(split=split, users=users, seed=seed))) for seed in seeds]


def from_file(path: Path, *, users: int | None, seeds: Sequence[int]) -> list[Sample]:
    """Deals the users of a file who have test pairs into a sample for each seed.

    Args:
        path: JSON lines, see :func:`popi.data.example.read_examples`.
        users: Of each sample; ``None`` deals out everybody.
        seeds: The first one shuffles the users.

    Raises:
        ConfigError: If no user is asked for.
        InputError: If the file is broken, or has too few such users.
    """
    examples = [example for example in read_examples(path) if example.tests]
    size = len(examples) // len(seeds) if users is None else users
    if users is not None and users < 1:
        raise ConfigError("at least one user is needed", field="users")
    if not size or size * len(seeds) > len(examples):
        raise InputError(
            f"{len(examples)} users with test pairs, and {max(size, 1) * len(seeds)} are needed",
            file=path,
            fix="ask for fewer users or seeds" if examples else "give users their test pairs in the field tests",
        )
    order = np.random.default_rng(seeds[0]).permutation(len(examples))
    # Users of one cluster stand together, where the first of them is: what they share is dealt to one sample, but for
    # the cluster at the border of two.
    rank: dict[str, int] = {}
    for place in order:
        rank.setdefault(examples[place].cluster, len(rank))
    dealt = sorted(order, key=lambda place: rank[examples[place].cluster])
    return [
        Sample(seed, [examples[place] for place in dealt[turn * size : (turn + 1) * size]])
        for turn, seed in enumerate(seeds)
    ]
