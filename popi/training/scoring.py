"""The scorer: log-probability ratios of preference pairs under summaries, in few forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.engine.checks import Abilities
from popi.engine.packing import Row, Scored, pack, tokens_of
from popi.errors import InputError
from popi.interface import Interface
from popi.roles import AnswerFormat
from popi.summary import PreferenceSummary, cap_tokens
from popi.training.likelihood import Within, in_memory_for, response_logps
from popi.training.objective import LogRatios, Reduction
from popi.training.ranks import ONE_RANK, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PairLogps(NamedTuple):
    """Log-probabilities of the two responses of a pair, in nats."""

    chosen: float
    rejected: float


NO_REFERENCE = PairLogps(0.0, 0.0)
"""With it, the ratios of a pair are its log-probabilities."""


@dataclass(frozen=True, slots=True)
class ConditionedPair:
    """A pair under a context.

    Attributes:
        interface: The context; ``None`` gives the plain prompt.
        pair: The pair.
        reference: log pi_ref(y_w|x) and log pi_ref(y_l|x) on the plain prompt.
    """

    interface: Interface | None
    pair: HeldOutPair
    reference: PairLogps


class Scorer(Protocol):
    """Scores pairs with a generator.

    Attributes:
        format: Renders the prompts.
        reduction: How the log-probabilities of a response's tokens are reduced.
        tokens_read: Number of tokens that passed through the generator so far.
    """

    format: AnswerFormat
    reduction: Reduction
    tokens_read: int

    def check(
        self, users: Sequence[PersonalizationExample], interfaces: Sequence[Interface | None], *, reserve: int = 0
    ) -> None:
        """Checks that every pair fits the model's context; see :meth:`PairScorer.check`."""

    def ratios(self, items: Sequence[ConditionedPair]) -> LogRatios:
        """Scores all items without gradients, in order; double precision, on the CPU."""

    def try_ratios(self, items: Sequence[ConditionedPair]) -> tuple[LogRatios, list[bool]]:
        """Scores the items, some of which may fail. Also returns which of them were scored."""

    def close(self) -> None:
        """Frees what the scorer holds."""


class PairScorer:
    """Scores pairs with one generator. Gradients flow if they are enabled.

    A prompt is computed once for its chosen and its rejected response, and so is a prefix that prompts share.

    Args:
        model: The generator.
        tokens: Its tokenizer.
        format: Renders the prompts, as in serving.
        abilities: The layout of a batch.
        batch_tokens: Maximum number of tokens of a forward pass, including prefixes.
        reduction: How the log-probabilities of a response's tokens are reduced.
        ranks: The ranks of the run. In lockstep, all of them make the same passes.
        within: Makes the context that the model computes in, by default :func:`popi.training.likelihood.computing`.

    Attributes:
        format: Renders the prompts.
        reduction: As given.
        tokens_read: Number of tokens that passed through the generator so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: ChatTokens,
        format: AnswerFormat,
        *,
        abilities: Abilities,
        batch_tokens: int = 8192,
        reduction: Reduction = "sum",
        ranks: Ranks = ONE_RANK,
        within: Within | None = None,
    ) -> None:
        self._model, self._tokens, self._ranks, self._within = model, tokens, ranks, within
        self._batch_tokens, self._layout = batch_tokens, abilities.layout
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.format, self.reduction, self.tokens_read = format, reduction, 0

    def check(
        self, users: Sequence[PersonalizationExample], interfaces: Sequence[Interface | None], *, reserve: int = 0
    ) -> None:
        """Checks that every pair fits the model's context.

        Args:
            users: The users.
            interfaces: The context of each user. It is an empty summary if the summary is still to be inferred.
            reserve: Maximum number of tokens of a summary that is still to be inferred.

        Raises:
            InputError: If a pair does not fit. The error names the user and the pair.
        """
        if self._context is None:
            return
        for user, interface in zip(users, interfaces, strict=True):
            items = [ConditionedPair(interface, pair, NO_REFERENCE) for pair in user.tests]
            prompts = self._render(items)
            responses = self._encode_responses(items)
            for item, prompt in zip(items, prompts, strict=True):
                needed = len(prompt.tokens) + _longest(item, responses) + reserve
                if needed > self._context:
                    shorter = "lower writer.max_tokens, " if reserve else ""
                    raise InputError(
                        f"user {user.user.user_id!r}: {_name(item.pair)} needs {needed} tokens with its context, but "
                        f"the model has a context of {self._context}",
                        fix=f"remove the pair, {shorter}or use a model with a longer context",
                    )

    def passes(self, items: Sequence[ConditionedPair]) -> list[Callable[[], tuple[list[int], LogRatios]]]:
        """The passes that score the items, so that the gradient of each can be taken before the next one is computed.

        Args:
            items: The pairs.

        Returns:
            Functions that each compute a pass. They return the places of its items, and their ratios.

        Raises:
            InputError: If a conversation cannot be rendered, or does not fit the model's context.
        """
        sequences, passes = self._pack(items)
        return [partial(self._of_pass, items, sequences, rows) for rows in passes]

    def ratios_for_gradient(self, items: Sequence[ConditionedPair]) -> LogRatios:
        """Scores all items for one gradient, in any order, within the memory for ``batch_tokens``.

        Raises:
            InputError: As :meth:`passes`.
        """
        sequences, passes = self._pack(items)
        found = in_memory_for(self._batch_tokens, partial(self._of_pass, items, sequences), passes, self._ranks)
        ratios = [ratios for _, ratios in found]
        return LogRatios(torch.cat([each.chosen_N for each in ratios]), torch.cat([each.rejected_N for each in ratios]))

    @torch.no_grad()
    def ratios(self, items: Sequence[ConditionedPair]) -> LogRatios:
        """Scores all items without gradients, in order; double precision, on the CPU.

        Raises:
            InputError: As :meth:`passes`.
        """
        chosen, rejected = (torch.zeros(len(items), dtype=torch.float64) for _ in range(2))
        for compute in self.passes(items):
            places, ratios = compute()
            chosen[places], rejected[places] = ratios.chosen_N.cpu(), ratios.rejected_N.cpu()
        return LogRatios(chosen, rejected)

    def try_ratios(self, items: Sequence[ConditionedPair]) -> tuple[LogRatios, list[bool]]:
        """See :class:`Scorer`. All items are scored."""
        return self.ratios(items), [True] * len(items)

    def close(self) -> None:
        """Does nothing: the model belongs to the run."""

    def _pack(self, items: Sequence[ConditionedPair]) -> tuple[list[Scored], list[list[Row]]]:
        sequences = self._encode(items)
        passes = list(pack(self._model, sequences, batch_tokens=self._batch_tokens, layout=self._layout, together=2))
        self.tokens_read += sum(map(tokens_of, passes))
        return sequences, self._ranks.same_passes(passes)

    def _of_pass(
        self, items: Sequence[ConditionedPair], sequences: list[Scored], rows: list[Row]
    ) -> tuple[list[int], LogRatios]:
        logps = response_logps(self._model, sequences, rows, reduction=self.reduction, within=self._within)
        places = sorted({place // 2 for row in rows for place in row.items})
        ratios_N_2 = logps.view(-1, 2)[places] - logps.new_tensor([items[place].reference for place in places]).view(
            -1, 2
        )
        return places, LogRatios(*ratios_N_2.unbind(dim=1))

    def _encode(self, items: Sequence[ConditionedPair]) -> list[Scored]:
        """The chosen and the rejected response of each item, one after the other."""
        responses = self._encode_responses(items)
        prompts = self._fitting(items, responses)
        for item, prompt in zip(items, prompts, strict=True):
            if prompt.error is not None:
                raise InputError(f"{_name(item.pair)} cannot be rendered: {prompt.error}", fix="remove the pair")
            needed = len(prompt.tokens) + _longest(item, responses)
            if self._context is not None and needed > self._context:
                raise InputError(
                    f"{_name(item.pair)} needs {needed} tokens with its context, but the model has a context of "
                    f"{self._context}",
                    fix="remove the pair, or use a model with a longer context",
                )
        return [
            Scored(prompt.tokens, responses[text])
            for item, prompt in zip(items, prompts, strict=True)
            for text in (item.pair.chosen, item.pair.rejected)
        ]

    def _fitting(self, items: Sequence[ConditionedPair], responses: dict[str, list[int]]) -> list[Rendered]:
        """Renders the prompts. A summary that does not fit the context with its pair is cut after a line.

        Its length was limited in tokens of the writer, which may be fewer than those of the generator.
        """
        prompts = self._render(items)
        for place, item in enumerate(items):
            room = math.inf if self._context is None else self._context - _longest(item, responses)
            if len(prompts[place].tokens) > room and isinstance(item.interface, PreferenceSummary):
                prompts[place] = self._cut(item, item.interface, int(room))
        return prompts

    def _cut(self, item: ConditionedPair, summary: PreferenceSummary, room: int) -> Rendered:
        def rendered(text: str) -> Rendered:
            [prompt] = self._render([replace(item, interface=summary.model_copy(update={"text": text}))])
            return prompt

        return rendered(cap_tokens(summary.text, lambda text: len(rendered(text).tokens), room))

    def _render(self, items: Sequence[ConditionedPair]) -> list[Rendered]:
        conversations = [self.format.render(item.pair.prompt, item.interface) for item in items]
        return self._tokens.render(conversations, answered=True)

    def _encode_responses(self, items: Sequence[ConditionedPair]) -> dict[str, list[int]]:
        texts = list(dict.fromkeys(text for item in items for text in (item.pair.chosen, item.pair.rejected)))
        return dict(zip(texts, self._tokens.encode_responses(texts), strict=True))


def _longest(item: ConditionedPair, responses: dict[str, list[int]]) -> int:
    return max(len(responses[item.pair.chosen]), len(responses[item.pair.rejected]))


def _name(pair: HeldOutPair) -> str:
    return f"the pair with the prompt {pair.prompt[:60]!r}"
