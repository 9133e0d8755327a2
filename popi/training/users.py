"""The users of a joint run: training users and held-out users."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.data.reading import read_examples
from popi.errors import ConfigError, InputError
from popi.roles import SummaryFormat, SummaryPrompt

UNUSABLE = "users without evidence or without pairs"
SHARED_PAIRS = "users who share their pairs with held-out users"


@dataclass(frozen=True, slots=True)
class UserSplit:
    """The users of a run.

    Attributes:
        train: Training users.
        held_out: Held-out users.
        left_out: Number of other users, by reason.
    """

    train: Sequence[PersonalizationExample]
    held_out: Sequence[PersonalizationExample]
    left_out: dict[str, int]

    def pairs(self, visited: Iterable[int]) -> list[HeldOutPair]:
        """The pairs of the held-out users, and of the training users at these places."""
        users = [*(self.train[place] for place in sorted(visited)), *self.held_out]
        return [pair for example in users for pair in example.tests]

    def digest(self) -> str:
        """Identifies the users by all of their data, 16 hex digits."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(example.model_dump_json().encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def generate_users(users: int, *, pairs: int, held_out: int, seed: int) -> UserSplit:
    """Generates the users of a run in the mini world.

    Args:
        users: Number of training users.
        pairs: Number of pairs of each user.
        held_out: Number of held-out users.
        seed: Seed of the users.
    """
    from popi.data.miniworld import generate

    train = list(generate(split="train", users=users, seed=seed, tests=pairs))
    validation = list(generate(split="validation", users=held_out, seed=seed, tests=pairs))
    return UserSplit(_usable(train), _usable(validation), _left_out(train, _usable(train)))


def read_users(file: Path, *, users: int | None, held_out: int, seed: int) -> UserSplit:
    """Reads the users of a run.

    Args:
        file: JSON lines of examples.
        users: Number of training users. ``None`` takes all that are not held out.
        held_out: Number of held-out users.
        seed: Seed of the split.

    Raises:
        InputError: If the file is malformed, or has too few usable users.
        ConfigError: If the file has fewer training users than requested.
    """
    read = list(read_examples(file))
    usable = _usable(read)
    # Users of one cluster share their pairs, so a cluster is never split between training and evaluation.
    clusters = list(dict.fromkeys(example.cluster for example in usable))
    rank = dict(zip(clusters, np.random.default_rng(seed).permutation(len(clusters)).tolist(), strict=True))
    shuffled = sorted(usable, key=lambda example: rank[example.cluster])
    ends = (place for place in range(held_out, len(shuffled)) if shuffled[place].cluster != shuffled[place - 1].cluster)
    first = next(ends, None)
    if first is None:
        raise InputError(
            f"{len(usable)} of {len(read)} users have evidence and pairs, {held_out} are held out, and none is left "
            "for training",
            file=file,
            fix="add users, or lower evaluate_users",
        )
    train = shuffled[first:]
    if users is not None and users > len(train):
        raise ConfigError(f"only {len(train)} training users are available, not {users}", field="data.users")
    left_out = _left_out(read, usable) | {SHARED_PAIRS: first - held_out}
    return UserSplit(train[:users], shuffled[:held_out], {reason: count for reason, count in left_out.items() if count})


def summary_prompts(users: Sequence[PersonalizationExample], format: SummaryFormat) -> list[SummaryPrompt]:
    """Renders the writer's prompt of each user, as in serving. Every user must have evidence.

    Args:
        users: The users.
        format: Renders the prompts.
    """
    prompts = [format.render(example.user) for example in users]
    return [prompt for prompt in prompts if prompt is not None]


def epoch_order(users: int, count: int, *, seed: int) -> list[int]:
    """The order of the users of a run: epochs in which each user occurs once, each in another random order.

    The order of the whole run depends on the seed only, so a resumed run has no state to restore.

    Args:
        users: Number of users.
        count: Length of the order.
        seed: Seed of the order.

    Returns:
        ``count`` places of users.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(users, generator=generator) for _ in range(-(-count // users))]
    return torch.cat(epochs)[:count].tolist()


def _left_out(read: Sequence[PersonalizationExample], usable: Sequence[PersonalizationExample]) -> dict[str, int]:
    return {UNUSABLE: len(read) - len(usable)} if len(read) > len(usable) else {}


def _usable(examples: Iterable[PersonalizationExample]) -> list[PersonalizationExample]:
    return [
        example for example in examples if example.tests and any(signal.is_evidence for signal in example.user.signals)
    ]
