"""The scorer: margins of preference pairs under summaries, in few forward passes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.packing import Row, Scored, pack, tokens_of
from popi.errors import InputError
from popi.io import read_json, write_text
from popi.prompts import DEFAULT
from popi.training.likelihood import in_memory_for, response_logps
from popi.training.objective import Over, margin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair under a summary.

    Attributes:
        context: What the generator is told of the user; ``None`` is the bare prompt.
        pair: The pair.
        reference: log pi_ref(y_w|x) - log pi_ref(y_l|x) on the bare prompt, in nats.
    """

    context: str | None
    pair: HeldOutPair
    reference: float


class PairScorer:
    """Scores pairs under summaries with one generator; gradients flow where they are on.

    A prompt is computed once for its chosen and its rejected answer, and so is what prompts have in common in front.

    Args:
        model: The generator.
        tokens: Its tokenizer.
        batch_tokens: The most tokens of one forward pass, prefixes included.
        over: Whether the tokens of a response are summed or averaged.

    Attributes:
        over: As given.
        tokens: How many tokens the generator has read so far.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: ChatTokens, *, batch_tokens: int = 8192, over: Over = "sum"
    ) -> None:
        self._model, self._tokens = model, tokens
        self._batch_tokens = batch_tokens
        self._layout = verify(model, tokens, str(model.config.name_or_path)).layout
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.over, self.tokens = over, 0

    def check(self, users: Sequence[PersonalizationExample], told: Sequence[str | None], *, longest: int = 0) -> None:
        """Refuses users with a pair that would not fit the model's context under what the generator is told.

        Args:
            users: The users.
            told: What it is told of each; empty where a summary, of which only the frame is known, is still to come.
            longest: The most tokens of a summary that is still to come.

        Raises:
            InputError: If there is one.
        """
        room = math.inf if self._context is None else self._context - longest
        beside = f"with a summary of {longest}" if longest else "with what the generator is told"
        shorter = "lower writer.max_tokens, " if longest else ""
        for user, context in zip(users, told, strict=True):
            encoded = self._encode([Judged(context, pair, 0.0) for pair in user.tests], within=math.inf)
            for place, answer in enumerate(encoded):
                length = len(answer.prompt) + len(answer.response)
                if length > room:
                    raise InputError(
                        f"user {user.user.user_id!r}: {_named(user.tests[place // 2])} takes {length} tokens, "
                        f"which {beside} do not fit the context of {self._context}",
                        fix=f"leave the pair out, {shorter}or take a model with a longer context",
                    )

    def passes(self, items: Sequence[Judged]) -> Iterator[tuple[list[int], Tensor]]:
        """Margins pass by pass, so that the gradient of one can be taken before the next is computed.

        Args:
            items: What to score.

        Yields:
            Which of the items, and their margins h: (items of the pass,), in nats.

        Raises:
            InputError: If a conversation cannot be rendered or has no room in the model's context.
        """
        answers, passes = self._packed(items)
        for rows in passes:
            yield self._of_pass(items, answers, rows)

    def margins_for_gradient(self, items: Sequence[Judged]) -> Tensor:
        """Margins whose gradient is taken together, in memory for ``batch_tokens``: (items,), in nats, in any order.

        Raises:
            InputError: As :meth:`passes`.
        """
        answers, passes = self._packed(items)
        found = in_memory_for(self._batch_tokens, partial(self._of_pass, items, answers), passes)
        return torch.cat([margins for _, margins in found])

    @torch.no_grad()
    def margins(self, items: Sequence[Judged]) -> Tensor:
        """Margins without gradients: (items,), in nats."""
        found = torch.zeros(len(items), dtype=torch.float64)
        for chosen, margins in self.passes(items):
            found[chosen] = margins.cpu()
        return found

    def _packed(self, items: Sequence[Judged]) -> tuple[list[Scored], list[list[Row]]]:
        answers = self._encode(items, within=math.inf if self._context is None else self._context)
        passes = list(pack(self._model, answers, batch_tokens=self._batch_tokens, layout=self._layout, together=2))
        self.tokens += sum(map(tokens_of, passes))
        return answers, passes

    def _of_pass(self, items: Sequence[Judged], answers: list[Scored], rows: list[Row]) -> tuple[list[int], Tensor]:
        logps = response_logps(self._model, answers, rows, over=self.over)
        chosen = sorted({place // 2 for row in rows for place in row.items})
        reference = logps.new_tensor([items[index].reference for index in chosen])
        found = logps.view(-1, 2)[chosen]
        return chosen, margin(found[:, 0], found[:, 1], reference)

    def _encode(self, items: Sequence[Judged], *, within: float) -> list[Scored]:
        """The chosen and the rejected answer of each item, one after the other."""
        conversations = [DEFAULT.answer_messages(item.pair.prompt, item.context) for item in items]
        prompts = self._tokens.render(conversations, answered=True)
        texts = list(dict.fromkeys(text for item in items for text in (item.pair.chosen, item.pair.rejected)))
        responses = dict(zip(texts, self._tokens.encode_responses(texts), strict=True))
        made = []
        for item, prompt in zip(items, prompts, strict=True):
            answers = responses[item.pair.chosen], responses[item.pair.rejected]
            length = len(prompt.tokens) + max(map(len, answers))
            if prompt.error is not None:
                raise InputError(f"{_named(item.pair)} cannot be scored: {prompt.error}", fix="leave it out")
            if length > within:
                raise InputError(
                    f"{_named(item.pair)} takes {length} tokens with its context, and the model holds {within}",
                    fix="leave it out, or take a model with a longer context",
                )
            made += [Scored(prompt.tokens, answer) for answer in answers]
        return made


def _named(pair: HeldOutPair) -> str:
    return f"the pair of the prompt {pair.prompt[:60]!r}"


def reference_key(pair: HeldOutPair) -> str:
    """Names a pair by its content."""
    return hashlib.sha256(json.dumps([pair.prompt, pair.chosen, pair.rejected]).encode()).hexdigest()[:20]


class Reference:
    """log pi_ref(y_w|x) - log pi_ref(y_l|x) of every pair, computed once and kept in a file.

    The reference answers the bare prompt, so nothing that is trained changes it.

    Args:
        differences: By :func:`reference_key`, in nats.
    """

    def __init__(self, differences: dict[str, float]) -> None:
        self._differences = differences

    def __getitem__(self, pair: HeldOutPair) -> float:
        """The difference of a pair."""
        return self._differences[reference_key(pair)]

    @classmethod
    def of(
        cls, pairs: Sequence[HeldOutPair], scorer: PairScorer, *, fingerprint: str, file: Path, batch: int = 512
    ) -> Reference:
        """Reads the file, or scores every pair and writes it.

        Args:
            pairs: All pairs that will be asked for.
            scorer: Scores with the reference model.
            fingerprint: Of the model's weights.
            file: Where the differences are kept.
            batch: Pairs at once.

        Raises:
            InputError: If the file was made by another model, with other templates or of other pairs, or a pair
                cannot be scored.
        """
        wanted = {reference_key(pair): pair for pair in pairs}
        made_of = {
            "model": fingerprint,
            "template_hash": DEFAULT.hash,
            "over": scorer.over,
            "pairs": hashlib.sha256("".join(sorted(wanted)).encode()).hexdigest()[:16],
        }
        if file.exists():
            kept = read_json(file)
            for name, value in made_of.items():
                if not isinstance(kept, dict) or kept.get("made_of", {}).get(name) != value:
                    back = "put the model back, or choose another folder"
                    fix = back if name == "model" else "remove it"
                    raise InputError(f"was made with another {name.replace('_', ' ')}", file=file, fix=fix)
            return cls(kept["differences"])
        differences: dict[str, float] = {}
        names = list(wanted)
        for start in range(0, len(names), batch):
            part = names[start : start + batch]
            bare = [Judged(None, wanted[name], 0.0) for name in part]
            differences |= zip(part, scorer.margins(bare).tolist(), strict=True)
            log.info("reference: %d of %d pairs scored", start + len(part), len(names))
        write_text(file, json.dumps({"made_of": made_of, "differences": differences}) + "\n")
        return cls(differences)
