"""Renders the request for a summary, and parses the reply of a language model."""

from __future__ import annotations

import re
from collections.abc import Callable

from popi.claims import Claim, finished_part
from popi.prompts import DEFAULT, PromptSet
from popi.render import render_signals
from popi.roles import Failure, SummaryFormat, SummaryPrompt
from popi.signals import Signal, Speaker, UserSignals
from popi.summary import Author, PreferenceSummary, Provenance, cap_tokens, read_reply
from popi_inference.degenerate import Degenerate

AUTO = "auto"
"""Requests a summary in the language of the user's own words."""

SAME_LANGUAGE = "the language of the user's own words"
FOREIGN_SHARE = 0.005
"""Share of non-ASCII letters above which the user's own words do not count as English."""

_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


class PromptedSummary(SummaryFormat):
    """Quotes the signals as data and requests a list of claims with citations.

    Example:
        >>> from popi import Statement
        >>> user = UserSignals(user_id="ann", signals=(Statement(text="I like short answers."),))
        >>> format = PromptedSummary(len, budget=1000, max_tokens=1000)
        >>> prompt = format.render(user)
        >>> prompt.messages[0].content.splitlines()[2]
        '[1] said: I like short answers.'
        >>> format.parse(prompt, "- short answers [1]").text
        '- short answers'

    Args:
        count_tokens: Counts the tokens of a text with the writer's tokenizer.
        budget: Maximum number of tokens of the rendered signals.
        max_tokens: Maximum number of tokens of a summary. A claim that is cut off there is dropped, because an
            incomplete claim can mean the opposite.
        language: The language of the summary, by its English name. ``auto`` requests the language of the user's own
            words if they do not look like English; ``None`` requests no language.
        prompts: The templates.
    """

    prompts: PromptSet

    def __init__(
        self,
        count_tokens: Callable[[str], int],
        *,
        budget: int,
        max_tokens: int,
        language: str | None = AUTO,
        prompts: PromptSet = DEFAULT,
    ) -> None:
        self._count_tokens, self._budget, self._max_tokens = count_tokens, budget, max_tokens
        self._language, self.prompts = language, prompts
        self._degenerate = Degenerate(prompts)

    @property
    def template_hash(self) -> str:
        """The hash of the prompt set."""
        return self.prompts.hash

    def render(self, user: UserSignals) -> SummaryPrompt | None:
        """See :meth:`SummaryFormat.render`."""
        if not any(signal.is_evidence for signal in user.signals):
            return None
        rendered = render_signals(user.chronological(), self._count_tokens, self._budget, self.prompts)
        language = language_of(user) if self._language == AUTO else self._language
        messages = self.prompts.inference_messages(rendered.text, language=language)
        return SummaryPrompt(user, tuple(messages), rendered.shown)

    def parse(self, prompt: SummaryPrompt, reply: str, *, truncated: bool = False) -> PreferenceSummary | Failure:
        """See :meth:`SummaryFormat.parse`.

        Claims that cite only text by other people are dropped. A reply that repeats itself, or that echoes the request
        or text by other people, is a failure. So is a reply that contains no claim and does not say "not enough
        evidence".
        """
        text = finished_part(reply) if truncated else reply
        if truncated and not text:
            return Failure(
                prompt.user.user_id,
                f"the reply has no complete claim within {self._max_tokens} tokens; raise max_tokens",
            )
        text = cap_tokens(text, self._count_tokens, self._max_tokens)
        if (reason := self._degenerate.reason(prompt, text)) is not None:
            return Failure(prompt.user.user_id, reason)
        evidence = {signal.id for signal in prompt.user.signals if signal.is_evidence}
        summary = read_reply(
            prompt.user.user_id,
            text,
            prompt.shown,
            Provenance(author=Author.INFERRED, template_hash=self.template_hash, signals_digest=prompt.user.digest()),
            keep=lambda claim: not claim.evidence or not evidence.isdisjoint(claim.evidence),
        )
        if all(evidence.issuperset(claim.evidence) for claim in summary.claims):
            return summary
        return summary.model_copy(update={"claims": tuple(_own_evidence(claim, evidence) for claim in summary.claims)})


def _own_evidence(claim: Claim, evidence: set[str]) -> Claim:
    return claim.model_copy(update={"evidence": tuple(cited for cited in claim.evidence if cited in evidence)})


def language_of(user: UserSignals) -> str | None:
    """The language to request for a user: that of their own words, or ``None`` if these look like English."""
    text = "".join(text for signal in user.signals for text in own_words(signal))
    foreign = sum(map(str.isalpha, "".join(_NOT_ASCII.findall(text))))
    return SAME_LANGUAGE if foreign and foreign > FOREIGN_SHARE * sum(map(str.isalpha, text)) else None


def own_words(signal: Signal) -> list[str]:
    """The texts of a signal that the user wrote."""
    if signal.said_by is not Speaker.USER:
        return []
    match signal.kind:
        case "statement":
            return [signal.text]
        case "comment":
            return [signal.text]
        case "edit":
            return [signal.prompt, signal.edited]
        case "pair" | "rating":
            return [signal.prompt]
        case "conversation":
            return [turn.text for turn in signal.turns if turn.speaker is Speaker.USER]
        case _:
            return list(signal.facts.values())
