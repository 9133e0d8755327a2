"""The users of a joint run: those to learn from, and held-out ones to look at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from popi import registry
from popi.backends.base import Backend
from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import ConfigError, InputError
from popi.prompts import Message

OF_NO_USE = "for want of evidence or of pairs"
BESIDE_HELD_OUT = "since they share their pairs with held-out users"


@dataclass(frozen=True, slots=True)
class People:
    """Users of a run.

    Attributes:
        train: Whom to learn from.
        held_out: Whom to look at.
        left_out: How many are neither, by the reason.
    """

    train: Sequence[PersonalizationExample]
    held_out: Sequence[PersonalizationExample]
    left_out: dict[str, int]

    def pairs(self) -> list[HeldOutPair]:
        """All pairs of all users."""
        return [pair for example in (*self.train, *self.held_out) for pair in example.tests]

    def digest(self) -> str:
        """Names the users by all that is known of them, 16 hex digits."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(example.model_dump_json().encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def make_people(users: int, *, pairs: int, held_out: int, seed: int) -> People:
    """Makes the users of a run in the mini world.

    Args:
        users: How many there are to learn from.
        pairs: Of each user.
        held_out: How many are kept back.
        seed: Decides who they are.
    """
    from popi.data.miniworld import generate

    made = list(generate(split="train", users=users, seed=seed, tests=pairs))
    kept_back = list(generate(split="validation", users=held_out, seed=seed, tests=pairs))
    return People(_useful(made), _useful(kept_back), _reasons(made, _useful(made)))


def read_people(file: Path, *, users: int | None, held_out: int, seed: int) -> People:
    """Reads the users of a run.

    Args:
        file: JSON lines of examples.
        users: How many to learn from; ``None`` takes all that are left.
        held_out: How many are kept back.
        seed: Decides who is kept back.

    Raises:
        InputError: If the file is broken, or has too few users with evidence and pairs.
        ConfigError: If more users are asked for than it has.
    """
    read = list(read_examples(file))
    useful = _useful(read)
    # Users of one cluster share what they are tested on: all of them learn or none does.
    clusters = list(dict.fromkeys(example.cluster for example in useful))
    rank = dict(zip(clusters, np.random.default_rng(seed).permutation(len(clusters)).tolist(), strict=True))
    dealt = sorted(useful, key=lambda example: rank[example.cluster])
    ends = (place for place in range(held_out, len(dealt)) if dealt[place].cluster != dealt[place - 1].cluster)
    first = next(ends, None)
    if first is None:
        raise InputError(
            f"{len(useful)} of {len(read)} users have evidence and pairs; {held_out} are held out, and none is left",
            file=file,
            fix="give more users, or hold out fewer with evaluate_users",
        )
    train = dealt[first:]
    if users is not None and users > len(train):
        raise ConfigError(f"{len(train)} users are left to learn from, not {users}", field="data.users")
    parted = _reasons(read, useful) | {BESIDE_HELD_OUT: first - held_out}
    return People(train[:users], dealt[:held_out], {why: count for why, count in parted.items() if count})


def conversations(users: Sequence[PersonalizationExample], backend: Backend, max_tokens: int) -> list[list[Message]]:
    """What the writer reads of each user: the same as when it is asked for a summary to be used.

    Args:
        users: The users.
        backend: The writer.
        max_tokens: The most tokens of a summary.

    Raises:
        ModelError: If the writer's context has no room for any signal.
    """
    writer = registry.make_inference("llm", backend, max_tokens=max_tokens)
    assert writer.format is not None, "a language model writes by a format"
    prompts = [writer.format.render(example.user) for example in users]
    return [list(prompt.messages) for prompt in prompts if prompt is not None]


def in_turn(users: int, count: int, *, seed: int) -> list[int]:
    """Whom a run learns from, step after step: everybody once in random order, then again in another one.

    The order of the whole run is drawn at once, so that a resumed run has nothing to remember of it.

    Args:
        users: How many there are.
        count: How many are wanted.
        seed: Of the order.

    Returns:
        Places of users, ``count`` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(users, generator=generator) for _ in range(-(-count // users))]
    return torch.cat(rounds)[:count].tolist()


def _reasons(given: Sequence[PersonalizationExample], useful: Sequence[PersonalizationExample]) -> dict[str, int]:
    return {OF_NO_USE: len(given) - len(useful)} if len(given) > len(useful) else {}


def _useful(examples: Iterable[PersonalizationExample]) -> list[PersonalizationExample]:
    return [
        example for example in examples if example.tests and any(signal.is_evidence for signal in example.user.signals)
    ]
