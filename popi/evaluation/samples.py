"""The users of an evaluation: one sample per seed, from a world or from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from popi import registry
from popi.data.example import PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import ConfigError, InputError, did_you_mean
from popi.io import BadRows

GENERATORS = {"miniworld": "popi.data.miniworld:generate"}
"""The functions that make the users of a world, as ``module:name``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Users that are measured together.

    Attributes:
        seed: The seed of the sample.
        examples: The users, each with held-out pairs. No user is in two samples of an evaluation.
    """

    seed: int
    examples: Sequence[PersonalizationExample]


def from_world(
    world: str,
    *,
    split: str,
    users: int,
    seeds: Sequence[int],
    advance: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """Makes ``users`` users of a world for each seed.

    Args:
        world: The world.
        split: Its split.
        users: Number of users of each sample.
        seeds: The seed of each sample.
        advance: Called after each user.

    Raises:
        ConfigError: If the world is unknown, or ``users`` is not positive.
        InputError: If the world has no such split.
    """
    if world not in GENERATORS:
        raise ConfigError(f"unknown world {world!r}", field="world", fix=did_you_mean(world, GENERATORS))
    if users < 1:
        raise ConfigError(f"must be positive, not {users}", field="users")
    generate = registry.load(GENERATORS[world])

    def made(seed: int) -> Iterator[PersonalizationExample]:
        for example in generate(split=split, users=users, seed=seed):
            yield example
            advance()

    return [Sample(seed, list(made(seed))) for seed in seeds]


def from_file(path: Path, *, users: int | None, seeds: Sequence[int], bad_rows: BadRows | None = None) -> list[Sample]:
    """Divides the users of a file who have held-out pairs into one sample per seed.

    Args:
        path: The file; see :func:`popi.data.reading.read_examples`.
        users: Number of users per sample; ``None`` uses all users.
        seeds: The seeds of the samples. The first one determines how the users are shuffled.
        bad_rows: Collects the bad rows of the file.

    Raises:
        ConfigError: If ``users`` is not positive.
        InputError: If the file has bad rows that are not to be skipped, or too few users with held-out pairs.
    """
    examples = [example for example in read_examples(path, bad_rows=bad_rows) if example.tests]
    size = len(examples) // len(seeds) if users is None else users
    if users is not None and users < 1:
        raise ConfigError(f"must be positive, not {users}", field="users")
    if not size or size * len(seeds) > len(examples):
        raise InputError(
            f"has {len(examples)} users with held-out pairs, but {max(size, 1) * len(seeds)} are needed",
            file=path,
            fix="lower the number of users or seeds" if examples else "add held-out pairs in the field tests",
        )
    order = np.random.default_rng(seeds[0]).permutation(len(examples))
    # Users of a cluster are neighbours, so that they are in the same sample unless they are at the border of two.
    rank: dict[str, int] = {}
    for place in order:
        rank.setdefault(examples[place].cluster, len(rank))
    dealt = sorted(order, key=lambda place: rank[examples[place].cluster])
    return [
        Sample(seed, [examples[place] for place in dealt[turn * size : (turn + 1) * size]])
        for turn, seed in enumerate(seeds)
    ]
