"""The contexts of the generator in training: summaries of the writer, raw signals, or nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
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
from popi.summary import Author, PreferenceSummary, Provenance
from popi.training.formats import summarizer
from popi.training.models import JointModels
from popi.training.ranks import ONE_RANK, Ranks
from popi.training.reference import Reference
from popi.training.scoring import ConditionedPair

log = logging.getLogger(__name__)

Kind = Literal["summary", "raw-signals", "none"]
SUMMARIES, ITEMS = "summaries", "items"
CHUNK = 1024
"""Number of users whose summaries are sampled and stored together: an interrupted run loses at most one chunk."""


class Contexts:
    """Provides the contexts of users.

    Args:
        kind: Summaries, raw signals, or nothing.
        models: The writer of the summaries, and the generator.
        max_tokens: Maximum number of tokens of a summary.
        seed: Seed of the run.
        ranks: The ranks of the run.
    """

    def __init__(self, kind: Kind, models: JointModels, *, max_tokens: int, seed: int, ranks: Ranks = ONE_RANK) -> None:
        self._kind, self._models, self._ranks = kind, models, ranks
        self._max_tokens, self._seed = max_tokens, seed

    def check(self, users: Sequence[PersonalizationExample]) -> None:
        """Checks before the first step that every pair fits the generator's context.

        Raises:
            InputError: If a pair does not fit.
        """
        if self._kind == "summary":
            empty = PreferenceSummary(user_id="", text="", provenance=Provenance(author=Author.BASELINE))
            self._models.scorer.check(users, [empty] * len(users), reserve=self._max_tokens)
        else:
            self._models.scorer.check(users, _infer(users, self.inference()))

    def inference(self) -> PreferenceInference | None:
        """The inference for held-out users: greedy. ``None`` if the generator reads plain prompts."""
        return self._inference(self._models.writer_backend, temperature=0.0, purpose="held-out")

    def training_pairs(
        self,
        users: Sequence[PersonalizationExample],
        order: Sequence[int],
        reference: Reference,
        *,
        temperature: float,
        phase: str,
        folder: Path,
    ) -> tuple[list[ConditionedPair], dict[str, float]]:
        """Conditioned pairs for a phase that trains only the generator.

        Args:
            users: The training users.
            order: The place of the user of each pair.
            reference: The reference of these pairs.
            temperature: Sampling temperature of the summaries.
            phase: Name of the phase. The samples depend on it.
            folder: Folder that stores the sampled summaries. A repeated call reads them.

        Returns:
            The pairs, and the cost of sampling: ``tokens/rollout`` and ``seconds/rollout``.
        """
        rng = np.random.default_rng(seed_of(self._seed, ITEMS, phase))
        places = sorted(set(order))
        summaries, spent = self._summaries(
            [users[place] for place in places], temperature=temperature, phase=phase, folder=folder
        )
        by_place = dict(zip(places, summaries, strict=True))
        items = []
        for place in order:
            pairs = users[place].tests
            pair = pairs[int(rng.integers(len(pairs)))]
            items.append(ConditionedPair(by_place[place], pair, reference[pair]))
        return items, spent

    def _summaries(
        self, users: Sequence[PersonalizationExample], *, temperature: float, phase: str, folder: Path
    ) -> tuple[list[PreferenceSummary | None], dict[str, float]]:
        if self._kind != "summary":
            return _infer(users, self.inference()), {}
        summaries: list[PreferenceSummary | None] = []
        spent: Counter[str] = Counter()
        for start in range(0, len(users), CHUNK):
            file = folder / f"{SUMMARIES}-{start:06d}.json"
            if not self._ranks.from_first(file.exists):
                sampled = self._sample(users[start : start + CHUNK], temperature=temperature, phase=phase)
                text = json.dumps(sampled, ensure_ascii=False) + "\n"
                self._ranks.on_first(partial(write_text, file, text))
            chunk = self._ranks.from_first(partial(read_json, file))
            summaries += map(PreferenceSummary.model_validate, chunk["summaries"])
            spent.update(chunk["spent"])
            log.info("sampled summaries for the generator: %d of %d users", len(summaries), len(users))
        return summaries, dict(spent)

    def _sample(self, users: Sequence[PersonalizationExample], *, temperature: float, phase: str) -> dict[str, Any]:
        ledger, began = Ledger(), time.perf_counter()
        writer = Cost(self._models.writer_backend, price=FREE, ledger=ledger)
        own = _infer(self._ranks.share(users), self._inference(writer, temperature=temperature, purpose=phase))
        summaries = self._ranks.gather(own)
        spent = {
            "tokens/rollout": self._ranks.total(ledger.total.completion_tokens),
            "seconds/rollout": time.perf_counter() - began,
        }
        return {"summaries": [each.model_dump(mode="json") for each in summaries if each], "spent": spent}

    def _inference(self, writer: Backend, *, temperature: float, purpose: str) -> PreferenceInference | None:
        if self._kind == "none":
            return None
        if self._kind == "raw-signals":
            return registry.make_inference("raw", self._models.generator_backend)
        return summarizer(
            self._models.summary_format,
            writer,
            max_tokens=self._max_tokens,
            temperature=temperature,
            seed=seed_of(self._seed, purpose),
        )


def _infer(
    users: Sequence[PersonalizationExample], inference: PreferenceInference | None
) -> list[PreferenceSummary | None]:
    if inference is None:
        return [None] * len(users)
    summaries, _ = asyncio.run(infer_or_nothing(inference, [example.user for example in users]))
    return list(summaries)
