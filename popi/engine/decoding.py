"""Decoding: prompts in, new tokens out, in batches that change nothing about the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from popi.engine.cache import OwnCache, Prefixes
from popi.engine.chat_tokens import ChatTokens

# Dropping rows copies the rest of the cache, which costs about one step: it pays once a quarter of the rows is done.
COMPACT_BELOW = 0.75


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt to be continued.

    Attributes:
        prompt: Token ids, at least one.
        limit: The most new tokens, at least one.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        seed: Seeds the sampling.
        watch: Shown all new tokens so far after each; ends the answer by saying true.
    """

    prompt: list[int]
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    watch: Callable[[Sequence[int]], bool] | None = None


def decode(
    model: PreTrainedModel,
    drafts: Sequence[Draft],
    *,
    end_tokens: Set[int],
    batch_tokens: int,
    share: bool,
    check: Callable[[], None],
) -> list[list[int]]:
    """Continues every prompt until an end token, its limit, or its watcher's word.

    Identical prompts of a batch are computed once. What a draft becomes does not depend on what it is batched with.

    Args:
        model: The model, in evaluation mode.
        drafts: The prompts.
        end_tokens: Ids that end an answer; they stand at the end of its tokens.
        batch_tokens: The most tokens of the rows of a batch, room for their answers included.
        share: Whether the model has a plain cache; otherwise every draft runs alone.
        check: Called before every step; stops the work by raising.

    Returns:
        The new tokens of each draft, in order.
    """
    answers: list[list[int]] = [[] for _ in drafts]
    for batch in _batches(drafts, batch_tokens if share else 0):
        check()
        chosen = [drafts[index] for index in batch]
        steps = _Steps(model, chosen) if share else _OwnSteps(model, chosen[0])
        _decode_batch(steps, chosen, [answers[index] for index in batch], end_tokens, model.device, check)
    return answers


def end_tokens_of(model: PreTrainedModel, tokens: ChatTokens) -> frozenset[int]:
    """The tokens at which a model's answer ends: those of its chat template, and those of its generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return tokens.end_tokens
    return tokens.end_tokens | ({ends} if isinstance(ends, int) else set(ends))


def choose(logits_R_V: Tensor, temperature_R: Tensor, top_p_R: Tensor, noise_R_V: Tensor) -> Tensor:
    """Chooses a token for each row: the likeliest where the temperature is 0, else a sample.

    A sample is the token with the largest p / noise, an exponential race, which token i wins with probability p_i. Two
    rows whose logits differ by rounding choose alike, as only a photo finish could tell them apart; inverting the
    running sum of p would carry each difference on to every token behind it. The nucleus is the smallest set of
    likeliest tokens whose probability reaches ``top_p`` (Holtzman et al., 2020).

    Args:
        logits_R_V: Logits, ``[R, V]``.
        temperature_R: Temperatures, ``[R]``.
        top_p_R: Nuclei, ``[R]``.
        noise_R_V: Draws from the exponential distribution of rate 1, ``[R, V]``.

    Returns:
        Token ids, ``[R]``.
    """
    heat_R = temperature_R.where(temperature_R > 0, 1.0)
    probs_R_V = (logits_R_V.float() / heat_R[:, None]).softmax(dim=-1)
    if bool((top_p_R < 1).any()):
        sorted_R_V, order_R_V = probs_R_V.sort(dim=-1, descending=True)
        outside_R_V = sorted_R_V.cumsum(dim=-1) - sorted_R_V >= top_p_R[:, None]
        outside_R_V[:, 0] = False
        probs_R_V = probs_R_V.masked_fill(outside_R_V.scatter(-1, order_R_V, outside_R_V), 0.0)
    sampled_R = (probs_R_V / noise_R_V).argmax(dim=-1)
    return sampled_R.where(temperature_R > 0, logits_R_V.argmax(dim=-1))


def _batches(drafts: Sequence[Draft], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of drafts of like length, identical prompts side by side, which take one row.

    A row has room for the answers of all its drafts, and as much as the others: prompts that are asked equally often
    go together.
    """
    often = Counter(tuple(draft.prompt) for draft in drafts)
    ranks = [(often[tuple(draft.prompt)], len(draft.prompt), draft.prompt) for draft in drafts]
    batch: list[int] = []
    rows = columns = run = room = 0
    for index in sorted(range(len(drafts)), key=ranks.__getitem__):
        draft = drafts[index]
        run = run + 1 if batch and draft.prompt == drafts[batch[-1]].prompt else 1
        rows, columns, room = rows + (run == 1), max(columns, run), max(room, draft.limit)
        if batch and rows * (len(draft.prompt) + columns * room) > batch_tokens:
            yield batch
            batch, rows, columns, run, room = [], 1, 1, 1, draft.limit
        batch.append(index)
    if batch:
        yield batch


def _decode_batch(
    steps: _Steps | _OwnSteps,
    drafts: Sequence[Draft],
    answers: Sequence[list[int]],
    end_tokens: Set[int],
    device: torch.device,
    check: Callable[[], None],
) -> None:
    running = list(range(len(drafts)))
    live = set(running)
    sampling = _Sampling(drafts, device)
    last_R = torch.tensor([draft.prompt[-1] for draft in drafts], device=device)
    step = 0
    while True:
        logits_R_V = steps(last_R)
        if bool(logits_R_V[:, 0].isnan().any()):
            raise ArithmeticError("the model's logits are not numbers")
        last_R = sampling.next_tokens(logits_R_V)
        step += 1
        for index, token in zip(running, last_R.tolist(), strict=True):
            if index not in live:
                continue
            draft, answer = drafts[index], answers[index]
            answer.append(token)
            if token in end_tokens or step == draft.limit or (draft.watch and draft.watch(answer)):
                live.discard(index)
        if not live:
            return
        check()
        if len(live) < COMPACT_BELOW * len(running):
            kept = [place for place, index in enumerate(running) if index in live]
            steps.keep(kept)
            sampling.keep(kept)
            last_R = last_R[kept]
            running = [running[place] for place in kept]


NOBODY = -1
"""Who owns a place of a row that no draft has."""


class _Steps:
    """One token more for every draft that still runs; drafts of one prompt are branches of one row.

    Args:
        model: A model with a plain cache.
        drafts: What is to be continued, identical prompts side by side.
    """

    def __init__(self, model: PreTrainedModel, drafts: Sequence[Draft]) -> None:
        self._device, self._done = model.device, 0
        groups = [(prompt, len(list(equals))) for prompt, equals in groupby(draft.prompt for draft in drafts)]
        room = max(draft.limit for draft in drafts) * max(count for _, count in groups)
        # The last token of a prompt is the first step's, which gives the first logits.
        self._prefixes = Prefixes(model, [prompt[:-1] for prompt, _ in groups], room=room)
        self._owners_R_L = torch.empty((len(groups), 0), dtype=torch.long, device=self._device)
        self._lay_out([row for row, (_, count) in enumerate(groups) for _ in range(count)], list(range(len(drafts))))

    def __call__(self, last_N: Tensor) -> Tensor:
        """The logits behind the last token of each draft: ``[N, V]``."""
        tokens_R_C = torch.zeros_like(self._owners_R_C)
        tokens_R_C[self._places_N] = last_N
        self._owners_R_L = torch.cat((self._owners_R_L, self._owners_R_C), dim=1)
        # A draft sees its own tokens; there is one new token of each.
        seen_R_C_L = self._owners_R_L[:, None] == self._owners_R_C[:, :, None]
        logits_R_C_V = self._prefixes(tokens_R_C, seen_R_C_L, torch.full_like(tokens_R_C, self._done))
        self._done += 1
        return logits_R_C_V[self._places_N]

    def keep(self, drafts: Sequence[int]) -> None:
        """Drops all drafts but these."""
        rows, owners = [self._rows[place] for place in drafts], [self._owners[place] for place in drafts]
        left = sorted(set(rows))
        if len(left) < len(self._owners_R_C):
            left_K = torch.tensor(left, device=self._device)
            self._owners_R_L = self._owners_R_L[left_K]
            self._prefixes.keep(left_K)
        self._lay_out([left.index(row) for row in rows], owners)

    def _lay_out(self, rows: list[int], owners: list[int]) -> None:
        """Gives each draft a column in the row of its prompt."""
        self._rows, self._owners = rows, owners
        columns = [column for _, equals in groupby(rows) for column, _ in enumerate(equals)]
        self._places_N = torch.tensor(rows, device=self._device), torch.tensor(columns, device=self._device)
        self._owners_R_C = torch.full((rows[-1] + 1, max(columns) + 1), NOBODY, device=self._device)
        self._owners_R_C[self._places_N] = torch.tensor(owners, device=self._device)


class _OwnSteps:
    """The same for a single draft and a model with a cache of its own kind."""

    def __init__(self, model: PreTrainedModel, draft: Draft) -> None:
        self._cache = OwnCache(model, draft.prompt[:-1])

    def __call__(self, last_1: Tensor) -> Tensor:
        return self._cache(last_1[:, None])[:, -1]

    def keep(self, drafts: Sequence[int]) -> None:
        assert list(drafts) == [0], "without its only draft the work is done"


class _Sampling:
    """What the rows of a batch need to choose their tokens; each draws from its own generator, step by step."""

    def __init__(self, drafts: Sequence[Draft], device: torch.device) -> None:
        self._greedy = all(draft.temperature <= 0 for draft in drafts)
        self._generators = [torch.Generator(device).manual_seed(draft.seed) for draft in drafts]
        self._temperature_R = torch.tensor([draft.temperature for draft in drafts], device=device)
        self._top_p_R = torch.tensor([draft.top_p for draft in drafts], device=device)

    def next_tokens(self, logits_R_V: Tensor) -> Tensor:
        if self._greedy:
            return logits_R_V.argmax(dim=-1)
        noise_R_V = torch.empty_like(logits_R_V, dtype=torch.float32)
        for noise_V, generator in zip(noise_R_V, self._generators, strict=True):
            noise_V.exponential_(generator=generator)
        return choose(logits_R_V, self._temperature_R, self._top_p_R, noise_R_V)

    def keep(self, rows: Sequence[int]) -> None:
        self._generators = [self._generators[row] for row in rows]
        self._temperature_R, self._top_p_R = self._temperature_R[rows], self._top_p_R[rows]
