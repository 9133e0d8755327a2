"""Claims: the lines of a summary, with their citations, parsed from the text of a model.

Punctuation of the major scripts is understood: full-width and CJK, Arabic, Devanagari.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, field_validator

from popi.signals import FROZEN

NO_EVIDENCE = "Not enough evidence."
"""The text of a summary when the signals show no preference."""

# Between two numbers stands a separator, a short word ("and" in any language), or both.
_AND = r"(?:[,;&\u060c\uff0c\u3001\uff1b]\s*[^\W\d_]{0,4}|[^\W\d_]{1,4})"
_SIGNAL = r"(?:(?:signals?|信号|シグナル|no\.?|#|\^)\s*)?"
_DASH = r"[-\u2013\uff0d~\uff5e]"
_NUMBERS = re.compile(rf"(\d{{1,6}})(?:\s*{_DASH}\s*(\d{{1,6}}))?")
_OPENING, _CLOSING = "[\uff3b\u3010\u3014", "]\uff3d\u3011\u3015"
_CITATION = re.compile(
    rf"[{re.escape(_OPENING)}]{_SIGNAL}"
    rf"(?P<numbers>\d{{1,6}}(?:\s*(?:{_AND}|{_DASH})\s*{_SIGNAL}\d{{1,6}})*)(?:†[^{re.escape(_CLOSING)}]*)?"
    rf"[{re.escape(_CLOSING)}][\s.,;\u3002\uff0c\u3001\uff1b\uff0e\u060c\u061b\u06d4\u0964]*",
    re.IGNORECASE,
)
# An abbreviation or the number of a list does not end a sentence. The full stops of other scripts always do.
_SENTENCE_END = re.compile(
    r"(?<=\w\w)[.!?]['\")\]]*(?=\s+[^\sa-z])|[\u3002\uff01\uff1f\uff0e\uff61\u0964\u0965\u06d4\u061f\u1362\u104b\u17d4][\u300d\u300f\u201d\uff09\u3011'\")]*"
)
_BULLET = re.compile(
    r"^\s*(?:(?:[-*+\u2022\u2023\u2043\u25b6\u25b8\u25ba\u25e6\u25aa\u25cf\u25cb\u2013\u2014\u2192\u2713\u2714\u27a4]"
    r"|\d{1,3}[.)])\s+(?:\[[ xX]\]\s+)?"
    r"|[\u30fb\u00b7\u25cf\u25cb\u2022]\s*"
    r"|(?:\d{1,3}[\u3001\uff0e\uff09]|[一二三四五六七八九十]{1,3}\u3001)\s*|[(\uff08]\d{1,3}[)\uff09]\s*|[\u2460-\u2473]\s*)"
)
_HEADING = re.compile(r"\s*#{1,6}\s.*")
_FRAME = re.compile(r"\s*(?:```.*|</?\w+>)\s*")
_KNOWLEDGE = r"(?:evidence|information|data|signals)"
_PREFERENCES = r"(?:\S+\s+){0,3}preferences?"
_NOTHING = re.compile(
    r"(?:(?:answer|summary|preferences|summary of preferences)\s*:\s*)?(?:(?:based on|from|given)\s[^,]{1,60},\s*)?"
    rf"(?:(?:there\s+(?:is|was|are)\s+)?(?:not\s+enough|insufficient)\s+{_KNOWLEDGE}"
    rf"|(?:there|(?:I|we|the\s+(?:user|signals?|data|evidence))(?:\s+\w+)?)\s*(?:\w+n['\u2019]t|(?:\w+\s+)?not)\s+(?:\w+\s+)?"
    rf"(?:enough|sufficient)\s+{_KNOWLEDGE}"
    r"|(?:there\s+is\s+)?no\s+(?:clear\s+)?evidence"
    rf"|(?:(?:it\s+is\s+)?(?:impossible|not\s+possible|unable)\s+to|(?:I\s+)?(?:can\s?not|can['\u2019]t))"
    rf"\s+(?:determine|infer|identify)\s+{_PREFERENCES}"
    rf"|no\s+{_PREFERENCES}\s+(?:can|could)\s+be\s+(?:determined|inferred|identified)"
    r"|nicht\s+gen(?:ug|ügend)\s+(?:hinweise|belege|informationen|daten)"
    r"|(?:il\s+n['\u2019]y\s+a\s+)?pas\s+assez\s+d['\u2019](?:informations?|éléments|indices)"
    r"|(?:evidencia|información|pruebas)\s+insuficientes?|no\s+hay\s+suficientes?\s+(?:evidencia|información|pruebas)"
    r"|(?:证据|信息|證據|資訊)不足|没有足够的?(?:证据|信息)|(?:証拠|情報|根拠)が(?:不十分|足り).*)"
    r"(?:\s+(?:to|for|about|of|from|in\s+the\s+signals|that|based\s+on|für|über|zu|pour|sur|para|sobre)\b.*|\s*[(,:;\u2013\u2014].*)?",
    re.IGNORECASE,
)


class Claim(BaseModel):
    """One line of a summary.

    Example:
        >>> Claim(text="short answers", evidence=("2f1a", "9c0d")).evidence
        ('2f1a', '9c0d')

    Attributes:
        text: The claim on one line, without list mark and citation.
        evidence: Ids of the signals that the writer cited.
    """

    model_config = FROZEN

    text: str
    evidence: tuple[str, ...] = ()

    @field_validator("text")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if not (line := " ".join(text.split())):
            raise ValueError("a claim must not be empty")
        return line


def parse_claims(text: str, shown: Sequence[str] = ()) -> tuple[Claim, ...]:
    """Reads the lines of a summary, each with optional citations such as ``[1, 3]`` or ``[2-4]`` at its end.

    Example:
        >>> parse_claims("- short answers [2]", ["a", "b"])
        (Claim(text='short answers', evidence=('b',)),)

    Args:
        text: The summary, or the reply of a writer.
        shown: The signal id of each number (``RenderedSignals.shown``). Larger numbers are ignored: a writer may cite
            signals that do not exist.

    Returns:
        The claims. Equal claims are merged with the evidence of all. A line that says "not enough evidence" is not a
        claim.
    """
    evidence: dict[str, dict[str, None]] = {}
    for line in text.splitlines():
        words, numbers = split_citations(line, len(shown))
        claim = _BULLET.sub("", words).strip()
        if not says_nothing(claim) and any(char.isalnum() for char in claim):
            evidence.setdefault(" ".join(claim.split()), {}).update((shown[number - 1], None) for number in numbers)
    return tuple(Claim(text=claim, evidence=tuple(ids)) for claim, ids in evidence.items())


def claims_in(text: str, shown: Sequence[str] = ()) -> tuple[Claim, ...]:
    """:func:`parse_claims` of free text, without headings."""
    return parse_claims("\n".join(line for line in text.splitlines() if not is_heading(line)), shown)


def says_nothing(claim: str) -> bool:
    """Whether a line says that there is not enough evidence for a preference."""
    return _NOTHING.fullmatch(claim.strip(" -.!*_\"'\u201c\u201d\u3002")) is not None


def split_citations(line: str, count: int) -> tuple[str, list[int]]:
    """Splits a line from the citations at its end.

    Args:
        line: The line.
        count: The number of signals that can be cited.

    Returns:
        The line without citations, and those of the cited numbers that are from 1 to ``count``.
    """
    cited: list[str] = []
    end, marks = len(line), _OPENING[:1] if line.isascii() else _OPENING
    while found := _CITATION.fullmatch(line, max(line.rfind(mark, 0, end) for mark in marks), end):
        cited.append(found["numbers"])
        end = found.start()
    numbers: list[int] = []
    for first, last in _NUMBERS.findall(", ".join(reversed(cited))):
        numbers += range(max(int(first), 1), min(int(last or first), count) + 1)
    return line[:end].rstrip(), numbers


def as_text(claims: Sequence[Claim]) -> str:
    """The text that a generator reads: one claim a line, or :data:`NO_EVIDENCE`."""
    return "\n".join(f"- {claim.text}" for claim in claims) if claims else NO_EVIDENCE


def with_citations(claims: Sequence[Claim], shown: Sequence[str]) -> str:
    """The text as a writer writes it; inverse of :func:`parse_claims`.

    Raises:
        KeyError: If a claim cites a signal that is not shown.
    """
    number = {signal_id: place for place, signal_id in enumerate(shown, start=1)}
    lines = []
    for claim in claims:
        cited = ", ".join(str(number[signal_id]) for signal_id in claim.evidence)
        lines.append(f"- {claim.text} [{cited}]" if cited else f"- {claim.text}")
    return "\n".join(lines) if lines else NO_EVIDENCE


def finished_part(text: str) -> str:
    """Removes the unfinished last line or sentence of a truncated text; returns "" if no claim is left."""
    lines, _, last = text.rpartition("\n")
    ends = [found.end() for found in _SENTENCE_END.finditer(last)]
    sentences = last[: ends[-1]] if ends and not lines.strip() else ""
    return next((whole for whole in (lines, sentences) if claims_in(whole)), "")


def sentences_of(text: str) -> list[str]:
    """Splits text into sentences and lines, without list marks and citations."""
    parts: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in [found.end() for found in _SENTENCE_END.finditer(line)] + [len(line)]:
            words = _BULLET.sub("", split_citations(line[start:end], 0)[0]).strip()
            start = end
            if any(char.isalnum() for char in words):
                parts.append(words)
    return parts


def is_heading(line: str) -> bool:
    """Whether a line announces others: it ends in a colon, is a heading of Markdown, or only frames others."""
    ends_in_colon = line.rstrip(" \t*_").endswith((":", "\uff1a")) and not _BULLET.match(line)
    return ends_in_colon or _HEADING.fullmatch(line) is not None or is_frame(line)


def is_frame(line: str) -> bool:
    """Whether a line is only a code fence or a tag. Such lines are not part of a summary."""
    return _FRAME.fullmatch(line) is not None


def is_list(text: str) -> bool:
    """Whether every line of a text has a list mark."""
    return all(_BULLET.match(line) for line in text.splitlines() if line.strip())
