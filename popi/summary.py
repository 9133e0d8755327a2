"""The interface between inference and generation: a short text to read, edit and move between models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field, field_validator

from popi.signals import FROZEN

NO_EVIDENCE = "Not enough evidence."
"""What a writer says, and what a generator reads, when the signals show no preference."""

_NUMBERS = re.compile(r"(\d{1,6})(?:\s*[-\u2013]\s*(\d{1,6}))?")
_CITATION = re.compile(
    r"\[(?:signals?\s+)?(?P<numbers>\d{1,6}(?:\s*(?:,|;|&|and|-|\u2013)\s*\d{1,6})*)\][\s.,;]*", re.IGNORECASE
)
# Neither an abbreviation nor the number of a list ends a sentence.
_SENTENCE_END = re.compile(r"(?<=\w\w)[.!?]['\")\]]*(?=\s+[^\sa-z])")
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")


class Author(StrEnum):
    """Who made a summary."""

    INFERRED = "inferred"
    EDITED = "edited"
    ORACLE = "oracle"
    BASELINE = "baseline"


class Claim(BaseModel):
    """One line of a summary.

    Attributes:
        text: The claim on one line, without list mark and citation.
        evidence: Ids of the signals that the writer gave as its support.
    """

    model_config = FROZEN

    text: str
    evidence: tuple[str, ...] = ()

    @field_validator("text")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not (line := " ".join(text.split())):
            raise ValueError("a claim needs words")
        return line


class Provenance(BaseModel):
    """Where a summary came from.

    Attributes:
        author: Inferred by a model, edited by a person, or a baseline.
        model: The model that wrote it, or the name of the baseline.
        template_hash: ``prompts.template_hash()`` at the time.
        signals_digest: ``UserSignals.digest()`` of what was read.
        tokens: Length of the text by the tokenizer of ``model``.
        time: When, in UTC.
    """

    model_config = FROZEN

    author: Author
    model: str = ""
    template_hash: str = ""
    signals_digest: str = ""
    tokens: int = Field(default=0, ge=0)
    time: datetime = Field(default_factory=lambda: datetime.now(UTC))


class PreferenceSummary(BaseModel):
    """What a user prefers, in words.

    Attributes:
        user_id: The user.
        text: What a generator reads. Empty only for the control that says nothing at all.
        claims: ``text`` line by line, with the evidence of each.
        status: ``not_enough_evidence`` when the signals show no preference.
        provenance: Where it came from.
    """

    model_config = FROZEN

    user_id: str
    text: str
    claims: tuple[Claim, ...] = ()
    status: Literal["ok", "not_enough_evidence"] = "ok"
    provenance: Provenance

    def edit(self, text: str) -> PreferenceSummary:
        """Returns the summary in a person's words; claims that were left alone keep their evidence.

        A text without words, or one that says that there is not enough evidence, is the summary that says so.
        """
        known = {claim.text: claim for claim in self.claims}
        words = text.strip()
        nothing = not words or _says_nothing(words)
        return PreferenceSummary(
            user_id=self.user_id,
            text=NO_EVIDENCE if nothing else words,
            claims=tuple(known.get(claim.text, claim) for claim in claims_in(words)),
            status="not_enough_evidence" if nothing else "ok",
            provenance=self.provenance.model_copy(
                update={"author": Author.EDITED, "time": datetime.now(UTC), "tokens": 0}
            ),
        )


def parse_claims(text: str, shown: Sequence[str] = ()) -> tuple[Claim, ...]:
    """Reads the lines of a summary, each with optional citations such as ``[1, 3]`` or ``[2-4]`` at its end.

    Args:
        text: What a writer wrote.
        shown: The signal id behind each number (``RenderedSignals.shown``). Numbers beyond it are dropped: a
            writer may cite what does not exist.

    Returns:
        The claims, a repeated one with the evidence of all; none when the text says that there is not enough.
    """
    evidence: dict[str, dict[str, None]] = {}
    for line in text.splitlines():
        words, numbers = _split_citations(line, len(shown))
        claim = _BULLET.sub("", words).strip()
        if not _says_nothing(claim) and any(char.isalnum() for char in claim):
            evidence.setdefault(" ".join(claim.split()), {}).update((shown[number - 1], None) for number in numbers)
    return tuple(Claim(text=claim, evidence=tuple(ids)) for claim, ids in evidence.items())


def _says_nothing(claim: str) -> bool:
    return claim.strip(" -.*_\"'").lower() == NO_EVIDENCE.rstrip(".").lower()


def claims_in(text: str, shown: Sequence[str] = ()) -> tuple[Claim, ...]:
    """:func:`parse_claims` of a text whose lines may also announce others; such a line is no claim."""
    return parse_claims("\n".join(line for line in text.splitlines() if not _is_heading(line)), shown)


def _split_citations(line: str, count: int) -> tuple[str, list[int]]:
    """A line without the citations at its end, and those of their numbers that are from 1 to ``count``."""
    cited: list[str] = []
    end = len(line)
    while found := _CITATION.fullmatch(line, line.rfind("[", 0, end), end):
        cited.append(found["numbers"])
        end = found.start()
    numbers: list[int] = []
    for first, last in _NUMBERS.findall(", ".join(reversed(cited))):
        numbers += range(max(int(first), 1), min(int(last or first), count) + 1)
    return line[:end].rstrip(), numbers


def as_text(claims: Sequence[Claim]) -> str:
    """The text that a generator reads: one claim a line, or that there is not enough evidence."""
    return "\n".join(f"- {claim.text}" for claim in claims) if claims else NO_EVIDENCE


def with_citations(claims: Sequence[Claim], shown: Sequence[str]) -> str:
    """The text as a writer writes it, inverse of :func:`parse_claims`.

    Raises:
        KeyError: If a claim cites a signal that is not shown.
    """
    number = {signal_id: place for place, signal_id in enumerate(shown, start=1)}
    lines = []
    for claim in claims:
        cited = ", ".join(str(number[signal_id]) for signal_id in claim.evidence)
        lines.append(f"- {claim.text} [{cited}]" if cited else f"- {claim.text}")
    return "\n".join(lines) if lines else NO_EVIDENCE


def summarize_claims(user_id: str, claims: Sequence[Claim], provenance: Provenance) -> PreferenceSummary:
    """Builds the summary that consists of these claims."""
    return PreferenceSummary(
        user_id=user_id,
        text=as_text(claims),
        claims=tuple(claims),
        status="ok" if claims else "not_enough_evidence",
        provenance=provenance,
    )


def read_reply(user_id: str, reply: str, shown: Sequence[str], provenance: Provenance) -> PreferenceSummary:
    """Builds the summary that a model wrote.

    A list becomes its claims. Free text keeps its words, without the citations, and is read line by line for
    claims; a line that only announces others is none.

    Args:
        user_id: The user.
        reply: What the model wrote.
        shown: The signal id behind each number that it may cite.
        provenance: Where it came from.
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    claims = claims_in(reply, shown)
    if not claims or all(_BULLET.match(line) for line in lines):
        return summarize_claims(user_id, claims, provenance)
    text = "\n".join(_split_citations(line, 0)[0] for line in lines)
    return PreferenceSummary(user_id=user_id, text=text, claims=claims, provenance=provenance)


def finished_part(text: str) -> str:
    """A text that was cut off, without its unfinished last line or sentence; as it is where no claim would be left."""
    lines, _, last = text.rpartition("\n")
    ends = [found.end() for found in _SENTENCE_END.finditer(last)]
    sentences = last[: ends[-1]] if ends and not lines.strip() else ""
    return next((whole for whole in (lines, sentences) if claims_in(whole)), text)


def _is_heading(line: str) -> bool:
    return line.rstrip(" \t*_").endswith(":") and not _BULLET.match(line)


def cap_tokens(text: str, count_tokens: Callable[[str], int], limit: int) -> str:
    """The leading lines of a text that are within a limit of tokens; a first line that is too long is cut."""
    if count_tokens(text) <= limit:
        return text
    lines = text.splitlines()
    kept = _most(len(lines), lambda count: count_tokens("\n".join(lines[:count])) <= limit)
    if kept:
        return "\n".join(lines[:kept])
    return text[: _most(len(lines[0]), lambda count: count_tokens(lines[0][:count]) <= limit)]


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The greatest number from 0 to ``limit`` that fits, where no greater one fits once one does not."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
