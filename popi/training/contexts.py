"""What a generator is told of users in training: summaries by the writer, their raw signals, or nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from popi import registry
from popi.backends.base import Backend
from popi.backends.ledger import FREE, Ledger
from popi.backends.wrappers.cost import Cost
from popi.data.example import PersonalizationExample
from popi.io import read_json, write_text
from popi.roles import PreferenceInference, infer_or_nothing
from popi.seeds import seed_of
from popi.training.pair import Pair
from popi.training.scoring import Judged, Reference
from popi.training.users import in_turn

log = logging.getLogger(__name__)

Kind = Literal["summary", "raw-signals", "none"]
SUMMARIES = "summaries"
CHUNK = 1024
"""Users whose summaries are sampled and kept together: a run that is stopped loses no more."""


class Contexts:
    """Tells a generator of users.

    Args:
        kind: What it is told.
        pair: The writer of the summaries, and the generator.
        max_tokens: The most tokens of a summary.
        seed: Of the run.
    """

    def __init__(self, kind: Kind, pair: Pair, *, max_tokens: int, seed: int) -> None:
        self._kind, self._pair = kind, pair
        self._max_tokens, self._seed = max_tokens, seed

    def check(self, users: Sequence[PersonalizationExample]) -> None:
        """Refuses a pair that is too long now, and not at the first look or in the middle of a run.

        Raises:
            InputError: If there is one.
        """
        if self._kind == "summary":
            self._pair.scorer.check(users, [""] * len(users), longest=self._max_tokens)
        else:
            self._pair.scorer.check(users, _told(users, self.inference()))

    def inference(self) -> PreferenceInference | None:
        """What tells the generator of users who are not learned from, or ``None`` if nothing does."""
        return self._inference(self._pair.writer_backend, temperature=0.0, purpose="look")

    def lessons(
        self,
        users: Sequence[PersonalizationExample],
        count: int,
        reference: Reference,
        *,
        temperature: float,
        phase: str,
        folder: Path,
    ) -> tuple[list[Judged], dict[str, float]]:
        """Pairs under contexts that stay as they are, for a phase of the generator: one of each user in turn.

        Args:
            users: The users.
            count: How many pairs.
            reference: Of these pairs.
            temperature: Of the sampling of summaries.
            phase: Its name decides what is drawn.
            folder: Keeps summaries that are sampled; the same call reads them there.

        Returns:
            The pairs, and what sampling took: ``tokens/rollout`` and ``seconds/rollout``.
        """
        seed = seed_of(self._seed, "items", phase)
        rng, order = np.random.default_rng(seed), in_turn(len(users), count, seed=seed)
        places = sorted(set(order))
        contexts, spent = self._fixed(
            [users[place] for place in places], temperature=temperature, phase=phase, folder=folder
        )
        told = dict(zip(places, contexts, strict=True))
        items = []
        for place in order:
            pairs = users[place].tests
            pair = pairs[int(rng.integers(len(pairs)))]
            items.append(Judged(told[place], pair, reference[pair]))
        return items, spent

    def _fixed(
        self, users: Sequence[PersonalizationExample], *, temperature: float, phase: str, folder: Path
    ) -> tuple[list[str | None], dict[str, float]]:
        if self._kind != "summary":
            return _told(users, self.inference()), {}
        told: list[str | None] = []
        spent: Counter[str] = Counter()
        for start in range(0, len(users), CHUNK):
            file = folder / f"{SUMMARIES}-{start:06d}.json"
            if file.exists():
                chunk = read_json(file)
            else:
                chunk = self._chunk(users[start : start + CHUNK], temperature=temperature, phase=phase)
                write_text(file, json.dumps(chunk, ensure_ascii=False) + "\n")
            told += chunk["told"]
            spent.update(chunk["spent"])
            log.info("summaries for the generator: %d of %d users", len(told), len(users))
        return told, dict(spent)

    def _chunk(self, users: Sequence[PersonalizationExample], *, temperature: float, phase: str) -> dict[str, Any]:
        ledger, began = Ledger(), time.perf_counter()
        writer = Cost(self._pair.writer_backend, price=FREE, ledger=ledger)
        told = _told(users, self._inference(writer, temperature=temperature, purpose=phase))
        seconds = time.perf_counter() - began
        spent = {"tokens/rollout": float(ledger.total.completion_tokens), "seconds/rollout": seconds}
        return {"told": told, "spent": spent}

    def _inference(self, writer: Backend, *, temperature: float, purpose: str) -> PreferenceInference | None:
        if self._kind == "none":
            return None
        if self._kind == "raw-signals":
            return registry.make_inference("raw", self._pair.generator_backend)
        options = {"max_tokens": self._max_tokens, "temperature": temperature, "attempts": 1}
        return registry.make_inference("llm", writer, **options, seed=seed_of(self._seed, purpose))


def _told(users: Sequence[PersonalizationExample], inference: PreferenceInference | None) -> list[str | None]:
    if inference is None:
        return [None] * len(users)
    summaries, _ = asyncio.run(infer_or_nothing(inference, [example.user for example in users]))
    return [summary.text for summary in summaries]
