"""Checks of a loaded model: the layouts in which batches have the results of single sequences, and the end tokens."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from popi.engine.cache import Layout, fixed_length, layout_of, reset_positions
from popi.engine.chat_tokens import ChatTokens
from popi.engine.decoding import Draft, decode
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.engine.service import evaluating, reason
from popi.errors import ModelError
from popi.prompts import Message

log = logging.getLogger(__name__)

CHECKS: dict[Layout, tuple[str, str]] = {
    "shared": ("sharing prefixes", "requests are batched with left padding instead"),
    "padded": ("left padding", "requests run one at a time instead"),
    "single": ("the cache", "requests run one at a time without a cache instead"),
}
"""The requirement of each layout, and the fallback if its check fails, in the order of the attempts."""

TOLERANCE = 1e-3
"""Maximum difference of a score in float32, in nats."""

ROUNDING_STEPS = 32
"""Maximum difference of a score in half precision, in units of the dtype's epsilon: logits of 16 to 32 are rounded to
16 epsilon, and the tolerance is two such steps."""

ATTEMPTS = 3
"""Attempts in half precision, each with other tokens: rounding can occasionally route a token to another expert."""

LENGTH = 40
"""Usual length of a probe: long enough that its start is copied from another row."""

MAX_NEW = 4
"""Maximum number of tokens that are decoded."""

BEYOND = 6
"""Number of tokens by which a probe exceeds a window."""

SHORTEST, LONGEST = 12, 1100
"""Minimum and maximum length of a probe, regardless of its cost."""

BUDGET = {"cpu": 2e11, "cuda": 2e14}
"""Maximum number of floating-point operations of the longest probes, by device type: a few seconds of one core."""

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention")
"""Names of configuration values: the number of tokens after which attention does not see the first one."""

TEXT = """The museum opens at nine, and the last tour starts at four. Please bring your own lunch; there is a quiet
garden behind the main hall. (Tickets cost 12.50 euros, or less for groups of five.) "Is it far?" he asked. Not at all!
1. Take the bus. 2. Get off at the bridge. 3. Walk past the old mill until you see a red door."""
"""Source of the tokens of the probes."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """The verified properties of a loaded model.

    Attributes:
        layout: The fastest layout of a batch that has the results of single sequences without a cache.
        end_tokens: The token ids that end a response.
    """

    layout: Layout
    end_tokens: frozenset[int]


def verify(model: PreTrainedModel, tokens: ChatTokens, name: str) -> Abilities:
    """Checks a model: decoding and scoring of a batch are compared with single sequences without a cache.

    The batch has branches after a shared prefix, prompts that start with the same tokens, and prompts of several
    lengths. If attention has a window, one prompt is longer, unless that costs too much; a window that is not checked
    and not known to the cache prevents sharing. Sequences that are so long that their length changes the encoding of
    all positions (longrope, dynamic NTK) never share a batch, see :func:`popi.engine.cache.fixed_length`.

    A layout that fails, with another score or an exception, is replaced by a slower one, with one line in the log. The
    model and the random state are left unchanged.

    Args:
        model: The model.
        tokens: Its tokenizer.
        name: Name of the model, for errors and the log.

    Raises:
        ModelError: If the model cannot compute, or its tokenizer has tokens that it does not have.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=devices):
        try:
            return Abilities(_verified_layout(model, tokens, name), _end_tokens(model, tokens, name))
        finally:
            reset_positions(model)


def _end_tokens(model: PreTrainedModel, tokens: ChatTokens, name: str) -> frozenset[int]:
    """The end tokens of the chat template, and those of the generation config unless they are plain text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    configured = frozenset([ends] if isinstance(ends, int) else ends or [])
    if configured and configured.isdisjoint(tokens.added_tokens):
        # The default of a configuration class, or of another tokenizer.
        texts = " and ".join(repr(tokens.decode([token])) for token in sorted(configured))
        log.warning("%s: the generation config ends responses at the text %s; it is ignored", name, texts)
        return tokens.end_tokens
    return tokens.end_tokens | configured


def _verified_layout(model: PreTrainedModel, tokens: ChatTokens, name: str) -> Layout:
    probes, layout = _Probes(model, tokens, name), layout_of(model)
    if layout != "shared":
        log.info("%s: its cache does not support shared prefixes", name)
    elif window := probes.unchecked_window():
        log.warning("%s: a window of %d tokens is too long to check; %s", name, window, CHECKS["shared"][1])
        layout = "padded"
    for tried, (what, instead) in list(CHECKS.items())[list(CHECKS).index(layout) :]:
        problem = probes.problem(tried)
        if problem is None:
            return tried
        log.warning("%s: %s %s; %s", name, what, problem, instead)
    return "plain"


class _Probes:
    """Prompts whose results in a layout are compared with those of single sequences."""

    def __init__(self, model: PreTrainedModel, tokens: ChatTokens, name: str) -> None:
        self._model, self._name, self._fixed = model, name, fixed_length(model)
        config = model.config.get_text_config()
        # Two operations for each weight and token, in at most four of the longest probes.
        affordable = BUDGET.get(model.device.type, BUDGET["cuda"]) / (8 * sum(map(torch.numel, model.parameters())))
        context = getattr(config, "max_position_embeddings", None) or LONGEST
        self._longest = min(max(SHORTEST, int(affordable)), LONGEST, context - MAX_NEW - 1)
        sizes = [getattr(config, key, None) for key in WINDOWS]
        self._windows = [size for size in sizes if isinstance(size, int) and size > 0]
        self._epsilon = torch.finfo(model.dtype).eps
        self._pool = tokens.encode([TEXT])[0]
        [conversation] = tokens.render([[Message("user", "Hello")]])
        self._conversation = conversation.tokens
        self._check_vocabulary({*self._pool, *self._conversation, *tokens.end_of_turn})

    def _check_vocabulary(self, used: set[int]) -> None:
        known = self._model.config.get_text_config().vocab_size
        if max(used) >= known:
            raise ModelError(
                f"the tokenizer of {self._name} has the token {max(used)}, and the model has only {known} embeddings",
                fix="use the tokenizer that belongs to the model",
            )

    def unchecked_window(self) -> int | None:
        """Size of a window that no probe exceeds and that the cache does not know; ``None`` without such a window."""
        by_layer = getattr(self._model.config.get_text_config(), "layer_types", None)
        return next((size for size in self._windows if size + BEYOND > self._longest and not by_layer), None)

    def problem(self, layout: Layout) -> str | None:
        """The problem with the results in a layout; ``None`` if they are correct."""
        half = self._epsilon > torch.finfo(torch.float32).eps
        tolerance = max(TOLERANCE, ROUNDING_STEPS * self._epsilon)
        differences: list[float] = []
        for seed in range(ATTEMPTS if half else 1):
            prompts = self._prompts(seed)
            try:
                differences.append(self._difference(layout, prompts))
            except ModelError:
                raise
            # A model can raise any exception when it is used in an unsupported way.
            except Exception as error:
                # Logits that are not finite in any layout are not a problem of the layout.
                finite = all(map(math.isfinite, self._plain_scores([Scored(p[:-1], p[-1:]) for p in prompts])))
                return f"fails ({reason(error)})" if finite or not isinstance(error, ArithmeticError) else None
            if differences[-1] <= tolerance:
                return None
        return f"changes scores by {min(differences):.2g} nats"

    def _prompts(self, seed: int) -> list[list[int]]:
        """Two equal prompts, one with the same start, a conversation, a repeated token, and longer prompts."""
        source = random.Random(seed)
        switches = [size + BEYOND for size in (*self._windows, self._fixed or 0) if size]
        longer = [length for length in switches if length <= self._longest]
        length = max(2, min(LENGTH, self._longest))
        other = length // 8
        stream = source.choices(self._pool, k=max([length, *longer]))
        similar = stream[: length - other] + source.choices(self._pool, k=other)
        repeated = source.choices(self._pool) * (length // 4 + 1)
        usual = [stream[:length], stream[:length], similar, self._conversation[-length:], repeated]
        return [*usual, *(stream[:length] for length in longer)]

    def _difference(self, layout: Layout, prompts: Sequence[list[int]]) -> float:
        """Maximum difference of a score to that of a single sequence without a cache, in nats."""
        drafts = [Draft(prompt, 2 + place % (MAX_NEW - 1), 1.0, seed=place) for place, prompt in enumerate(prompts)]
        # Beyond this length a token is scored with the encoding of the whole sequence, but decoded with its own.
        fixed = math.inf if self._fixed is None else self._fixed
        short = [draft for draft in drafts if len(draft.prompt) + draft.limit <= fixed]
        long = [draft.prompt for draft in drafts if len(draft.prompt) + draft.limit > fixed]
        # Room for three rows: others wait, and reuse theirs.
        room = 3 * (max(map(len, prompts)) + MAX_NEW)
        done = decode(self._model, short, end_tokens=frozenset(), batch_tokens=room, layout=layout, logprobs=True)
        items = [Scored(draft.prompt, completion.token_ids) for draft, completion in zip(short, done, strict=True)]
        items += [Scored(prompt[:-1], prompt[-1:]) for prompt in long]
        expected = self._plain_scores(items)
        scored = score(self._model, items, batch_tokens=2 * room, layout=layout)
        decoded = [sum(completion.logprobs) for completion in done]
        return max(map(_distance, [*scored, *decoded], [*expected, *expected[: len(decoded)]]))

    def _plain_scores(self, items: Sequence[Scored]) -> list[float]:
        try:
            return score(self._model, items, batch_tokens=1, layout="plain")
        except Exception as error:
            raise ModelError(f"{self._name} cannot compute: {reason(error)}") from error


def _distance(value: float, expected: float) -> float:
    """Difference of two scores; 0 if the expected one is not finite, so that it cannot be compared."""
    if not math.isfinite(expected):
        return 0.0
    return abs(value - expected) if math.isfinite(value) else math.inf
