"""A preference summary: the interface between inference and generation, a short text that users can read and edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field

from popi.claims import NO_EVIDENCE, Claim, as_text, claims_in, is_frame, is_list, says_nothing, split_citations
from popi.signals import FROZEN, Id

__all__ = [
    "NO_EVIDENCE",
    "Author",
    "Claim",
    "PreferenceSummary",
    "Provenance",
    "cap_tokens",
    "read_reply",
    "summarize_claims",
]


class Author(StrEnum):
    """Who made a summary."""

    INFERRED = "inferred"
    EDITED = "edited"
    ORACLE = "oracle"
    BASELINE = "baseline"


class Provenance(BaseModel):
    """How a summary was made.

    Attributes:
        author: A model, a person, or a baseline.
        model: Name of the model or baseline.
        template_hash: Hash of the prompt templates.
        signals_digest: ``UserSignals.digest()`` of the signals that were read.
        tokens: Length of the text by the tokenizer of ``model``.
        time: Time of creation, in UTC.
    """

    model_config = FROZEN

    author: Author
    model: str = ""
    template_hash: str = ""
    signals_digest: str = ""
    tokens: int = Field(default=0, ge=0)
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))


class PreferenceSummary(BaseModel):
    r"""The preferences of a user in words.

    Example:
        >>> made = Provenance(author=Author.INFERRED, model="popi-mini-writer")
        >>> claims = (Claim(text="short answers", evidence=("2f1a",)),)
        >>> summary = PreferenceSummary(user_id="ann", text="- short answers", claims=claims, provenance=made)
        >>> [claim.evidence for claim in summary.edit("- short answers\n- metric units").claims]
        [('2f1a',), ()]

    Attributes:
        user_id: The user.
        text: The text that a generator reads. Empty only for the control without any text.
        claims: ``text`` line by line, with the evidence of each line.
        status: ``not_enough_evidence`` if the signals show no preference.
        provenance: How it was made.
    """

    model_config = FROZEN

    user_id: Id
    text: str
    claims: tuple[Claim, ...] = ()
    status: Literal["ok", "not_enough_evidence"] = "ok"
    provenance: Provenance

    def edit(self, text: str) -> PreferenceSummary:
        """Returns the summary with a person's text. Unchanged claims keep their evidence.

        An empty text, or the text "not enough evidence", results in a summary with that status.
        """
        known = {claim.text: claim for claim in self.claims}
        words = text.strip()
        nothing = not words or says_nothing(words)
        return PreferenceSummary(
            user_id=self.user_id,
            text=NO_EVIDENCE if nothing else words,
            claims=tuple(known.get(claim.text, claim) for claim in claims_in(words)),
            status="not_enough_evidence" if nothing else "ok",
            provenance=self.provenance.model_copy(
                update={"author": Author.EDITED, "time": datetime.now(UTC), "tokens": 0}
            ),
        )


def summarize_claims(user_id: str, claims: Sequence[Claim], provenance: Provenance) -> PreferenceSummary:
    """Builds the summary that consists of these claims."""
    return PreferenceSummary(
        user_id=user_id,
        text=as_text(claims),
        claims=tuple(claims),
        status="ok" if claims else "not_enough_evidence",
        provenance=provenance,
    )


def read_reply(
    user_id: str,
    reply: str,
    shown: Sequence[str],
    provenance: Provenance,
    *,
    keep: Callable[[Claim], bool] = lambda claim: True,
) -> PreferenceSummary:
    """Builds the summary from a writer's reply.

    A list becomes its claims. Free text keeps its words, without citations, and is read line by line for claims.

    Args:
        user_id: The user.
        reply: The reply.
        shown: The signal id of each number that can be cited.
        provenance: How the reply was made.
        keep: Whether a claim is kept; the line of one that is not is removed from the text too.
    """
    lines = [line for line in reply.splitlines() if line.strip() and not is_frame(line)]
    reply = "\n".join(lines)
    claims = claims_in(reply, shown)
    dropped = {claim.text for claim in claims if not keep(claim)}
    if dropped:
        lines = [line for line in lines if not any(claim.text in dropped for claim in claims_in(line))]
        reply = "\n".join(lines)
        claims = claims_in(reply, shown)
    if not claims or is_list(reply):
        return summarize_claims(user_id, claims, provenance)
    text = "\n".join(split_citations(line, 0)[0] for line in lines)
    return PreferenceSummary(user_id=user_id, text=text, claims=claims, provenance=provenance)


def fits(text: str, limit: int, count_tokens: Callable[[str], int]) -> bool:
    """Whether a text has at most ``limit`` tokens.

    Args:
        text: The text.
        limit: Maximum number of tokens.
        count_tokens: Counts the tokens of a text. It is not called if the text has at most ``limit`` bytes in UTF-8,
            because a token has at least one byte.
    """
    return len(text.encode("utf-8", "surrogatepass")) <= limit or count_tokens(text) <= limit


def cap_tokens(text: str, count_tokens: Callable[[str], int], limit: int) -> str:
    """Returns the leading lines of a text that fit into ``limit`` tokens. A first line that is too long is cut."""
    if fits(text, limit, count_tokens):
        return text
    lines = text.splitlines()
    kept = _largest(len(lines), lambda count: count_tokens("\n".join(lines[:count])) <= limit)
    if kept:
        return "\n".join(lines[:kept])
    return text[: _largest(len(lines[0]), lambda count: count_tokens(lines[0][:count]) <= limit)]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Finds the largest number from 0 to ``limit`` that fits, by bisection."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
