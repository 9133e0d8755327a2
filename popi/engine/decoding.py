"""Decoding: prompts in, new tokens out, in a batch that drafts join and leave at any step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from popi.engine.cache import Layout, fixed_length
from popi.engine.padded import PaddedSlots, SingleSlot
from popi.engine.sampling import Sampler
from popi.engine.slots import SharedSlots


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt to continue.

    Attributes:
        prompt: Token ids, at least one.
        limit: Maximum number of new tokens, at least one.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling threshold.
        seed: Seed for sampling. The result does not depend on the batch.
        watch: Called after each token with all new tokens so far; returns whether the draft ends here.
    """

    prompt: list[int]
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    watch: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        token_ids: The new tokens, including the end token.
        logprobs: Log-probability of each token in nats, under the distribution at the temperature of the draft, without
            the nucleus threshold; at temperature 1 if the draft is greedy. Empty if not requested.
        finish_reason: ``stop`` after an end token or if the draft's ``watch`` ended it, ``length`` at its limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


Outcome = Completion | ArithmeticError
"""A completion, or the error that the logits of its draft are not finite."""


class Slots(Protocol):
    """The drafts that are running, in a layout of the model's cache."""

    def plan(self, candidates: Iterable[tuple[list[int], int]]) -> int:
        """Adds the first of these prompts and limits, as many as can join now, and returns their number."""

    def prefill(self, waiting: int) -> None:
        """Computes the prompts that :meth:`plan` added. This many drafts still wait."""

    def step(self, last_N: Tensor) -> Tensor:
        """Reads the last token of each draft, and returns the logits of the next one, ``[N, V]``."""

    def keep(self, places: Sequence[int]) -> None:
        """Keeps these drafts, and drops all others."""

    def erase(self, places: Sequence[int]) -> None:
        """Removes values that are not finite, before drafts that have them are dropped."""


class Job:
    """A draft in a decoder.

    Args:
        draft: The draft.
        on_complete: Called with the outcome as soon as the draft has ended.
        owner: The caller's object that the draft belongs to.

    Attributes:
        cancelled: Set it to true, from any thread, to end the draft at the next step without a call of ``on_complete``.
    """

    __slots__ = ("cancelled", "draft", "generator", "logprobs", "on_complete", "owner", "token_ids")

    def __init__(self, draft: Draft, on_complete: Callable[[Outcome], None], owner: Any = None) -> None:
        self.draft, self.on_complete, self.owner, self.cancelled = draft, on_complete, owner, False
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.generator: torch.Generator | None = None


class Decoder:
    """Continues drafts token by token; drafts may be added and cancelled between two steps.

    Args:
        model: The model, in evaluation mode.
        end_tokens: Token ids that end a draft.
        batch_tokens: Maximum number of tokens in the batch: the prompts of all rows and room for their new tokens. A
            longer draft runs in its own batch.
        layout: Layout of the batch.
        logprobs: Whether to compute log-probabilities.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        end_tokens: Set[int],
        batch_tokens: int,
        layout: Layout,
        logprobs: bool = False,
    ) -> None:
        self._layout, self._fixed = layout, fixed_length(model)
        # Drafts that the layout does not support run one at a time.
        slots = [_slots(model, layout, batch_tokens), SingleSlot(model, cached=layout != "plain")]
        self._lanes = [_Lane(model, each, end_tokens, logprobs) for each in slots]

    def add(self, jobs: Sequence[Job]) -> None:
        """Appends drafts to the queue, in order."""
        for job in jobs:
            length = len(job.draft.prompt)
            long = self._fixed is not None and length + job.draft.limit > self._fixed
            alone = long or (length == 1 and self._layout == "padded")
            self._lanes[alone].waiting.append(job)

    @property
    def busy(self) -> bool:
        """Whether any draft is waiting or running."""
        return any(lane.waiting or lane.running for lane in self._lanes)

    @torch.inference_mode()
    def step(self) -> None:
        """Starts waiting drafts that have room, in at most one prefill pass, and adds a token to each running draft."""
        for lane in self._lanes:
            lane.step()

    def abandon(self) -> list[Job]:
        """Drops the drafts that are running, after a step that failed, and returns them. Waiting ones stay."""
        return [job for lane in self._lanes for job in lane.abandon()]


class _Lane:
    """The running and the waiting drafts of one batch."""

    def __init__(self, model: PreTrainedModel, slots: Slots, end_tokens: Set[int], logprobs: bool) -> None:
        self._slots, self._end_tokens, self._device, self._logprobs = slots, end_tokens, model.device, logprobs
        self.waiting = deque[Job]()
        self.running: list[Job] = []
        self._last_N = torch.empty(0, dtype=torch.long, device=self._device)

    def step(self) -> None:
        """See :meth:`Decoder.step`."""
        self._drop_cancelled()
        self._admit()
        if not self.running:
            return
        chosen = self._sampler(self._slots.step(self._last_N))
        self._last_N = chosen.tokens_N
        logprobs = [None] * len(self.running) if chosen.logprobs_N is None else chosen.logprobs_N.tolist()
        results = zip(self.running, chosen.tokens_N.tolist(), chosen.finite_N.tolist(), logprobs, strict=True)
        outcomes = [self._advance(job, token, finite, logprob) for job, token, finite, logprob in results]
        failed = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, ArithmeticError)]
        if failed:
            self._slots.erase(failed)
        ended = [(job, outcome) for job, outcome in zip(self.running, outcomes, strict=True) if outcome is not None]
        if ended:
            self._keep([place for place, outcome in enumerate(outcomes) if outcome is None])
        for job, outcome in ended:
            job.on_complete(outcome)

    def _advance(self, job: Job, token: int, finite: bool, logprob: float | None) -> Outcome | None:
        """Adds a token to a draft, and returns the outcome if it has ended."""
        if not finite:
            return ArithmeticError("the logits of the model are not finite")
        job.token_ids.append(token)
        if logprob is not None:
            job.logprobs.append(logprob)
        draft = job.draft
        if token in self._end_tokens or (draft.watch is not None and draft.watch(job.token_ids)):
            return Completion(job.token_ids, job.logprobs, "stop")
        if len(job.token_ids) == draft.limit:
            return Completion(job.token_ids, job.logprobs, "length")
        return None

    def _admit(self) -> None:
        if not self.waiting:
            return
        count = self._slots.plan((job.draft.prompt, job.draft.limit) for job in self.waiting)
        if not count:
            return
        new = [self.waiting.popleft() for _ in range(count)]
        self.running += new
        self._slots.prefill(len(self.waiting))
        for job in new:
            if job.draft.temperature > 0:
                job.generator = torch.Generator(self._device).manual_seed(job.draft.seed)
        last_M = torch.tensor([job.draft.prompt[-1] for job in new], device=self._device)
        self._last_N = torch.cat((self._last_N, last_M))
        self._set_sampler()

    def _drop_cancelled(self) -> None:
        if any(job.cancelled for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        if any(job.cancelled for job in self.running):
            self._keep([place for place, job in enumerate(self.running) if not job.cancelled])

    def _keep(self, places: Sequence[int]) -> None:
        self._slots.keep(places)
        self.running = [self.running[place] for place in places]
        self._last_N = self._last_N[list(places)]
        self._set_sampler()

    def _set_sampler(self) -> None:
        drafts = [job.draft for job in self.running]
        self._sampler = Sampler(
            [draft.temperature for draft in drafts],
            [draft.top_p for draft in drafts],
            [job.generator for job in self.running],
            self._device,
            logprobs=self._logprobs,
        )

    def abandon(self) -> list[Job]:
        """See :meth:`Decoder.abandon`."""
        abandoned, self.running = self.running, []
        self._slots.keep([])
        self._last_N = self._last_N[:0]
        return abandoned


def decode(
    model: PreTrainedModel,
    drafts: Sequence[Draft],
    *,
    end_tokens: Set[int],
    batch_tokens: int,
    layout: Layout,
    logprobs: bool = False,
    on_complete: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Continues every prompt until an end token, its limit, or until its ``watch`` ends it.

    Identical prompts that run at the same time are computed once. A completion does not depend on the batch.

    Args:
        model: The model, in evaluation mode.
        drafts: The prompts.
        end_tokens: Token ids that end a draft.
        batch_tokens: As in :class:`Decoder`.
        layout: Layout of the batch.
        logprobs: Whether to compute log-probabilities.
        on_complete: Called with the place and the completion of each draft as soon as it has ended.

    Returns:
        The completion of each draft, in order.

    Raises:
        ArithmeticError: If the logits of a draft are not finite.
    """
    decoder = Decoder(model, end_tokens=end_tokens, batch_tokens=batch_tokens, layout=layout, logprobs=logprobs)
    completions: dict[int, Completion] = {}

    def job(place: int) -> Job:
        def keep(outcome: Outcome) -> None:
            if isinstance(outcome, ArithmeticError):
                raise outcome
            completions[place] = outcome
            if on_complete is not None:
                on_complete(place, outcome)

        return Job(drafts[place], keep)

    decoder.add([job(place) for place in in_order(drafts)])
    while decoder.busy:
        decoder.step()
    return [completions[place] for place in range(len(drafts))]


def in_order(drafts: Sequence[Draft]) -> list[int]:
    """An efficient order of the drafts: equal prompts and prompts of similar length next to each other."""
    counts = Counter(tuple(draft.prompt) for draft in drafts)
    ranks = [(counts[tuple(draft.prompt)], len(draft.prompt), draft.prompt) for draft in drafts]
    return sorted(range(len(drafts)), key=ranks.__getitem__)


def _slots(model: PreTrainedModel, layout: Layout, batch_tokens: int) -> Slots:
    if layout == "shared":
        return SharedSlots(model, batch_tokens)
    return PaddedSlots(model, batch_tokens) if layout == "padded" else SingleSlot(model, cached=layout != "plain")
