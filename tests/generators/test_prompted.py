from __future__ import annotations

import logging

import pytest

from popi.backends.base import ScoreRequest
from popi.errors import BackendError, ConfigError
from popi.prompts import DEFAULT
from popi.roles import Candidate, Conditioned
from popi.summary import Author, PreferenceSummary, Provenance
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator


def summary(text: str, user_id: str = "ann") -> PreferenceSummary:
    return PreferenceSummary(user_id=user_id, text=text, provenance=Provenance(author=Author.INFERRED))


async def test_answers_under_the_frame_of_the_templates() -> None:
    backend = ScriptedBackend(lambda request: "Fine.")
    generator = PromptedGenerator(backend, max_tokens=7, temperature=0.5, seed=3)
    items = [Conditioned("How?", summary("- Short")), Conditioned("How?"), Conditioned("How?", summary(""))]
    results = await generator.respond(items)
    assert [result.text for result in results] == ["Fine."] * 3
    assert [request.messages for request in backend.chats] == [
        DEFAULT.answer_messages("How?", "- Short"),
        DEFAULT.answer_messages("How?"),
        DEFAULT.answer_messages("How?", ""),
    ]
    assert {(request.max_tokens, request.temperature, request.seed) for request in backend.chats} == {(7, 0.5, 3)}


async def test_streams_what_it_would_answer() -> None:
    generator = PromptedGenerator(ScriptedBackend(lambda request: "One two three."))
    item = Conditioned("How?", summary("- Short"))
    pieces = [piece async for piece in generator.stream(item)]
    assert len(pieces) == 3
    assert "".join(pieces) == (await generator.respond([item]))[0].text


async def test_scores_the_response_given_prompt_and_summary() -> None:
    backend = ScriptedBackend(scores=lambda request: -1.5 if request.response == "yes" else -2.5)
    generator = PromptedGenerator(backend)
    given = Conditioned("Well?", summary("- Short"))
    results = await generator.score([Candidate(given, "yes"), Candidate(Conditioned("Well?"), "no")])
    assert [result.logprob for result in results] == [-1.5, -2.5]
    assert backend.scored == [
        ScoreRequest(DEFAULT.answer_messages("Well?", "- Short"), "yes"),
        ScoreRequest(DEFAULT.answer_messages("Well?"), "no"),
    ]


async def test_a_summary_is_capped_by_the_tokenizer_and_not_silently(caplog: pytest.LogCaptureFixture) -> None:
    backend = ScriptedBackend()
    generator = PromptedGenerator(backend, summary_tokens=6)
    with caplog.at_level(logging.WARNING):
        await generator.respond([Conditioned("How?", summary("- one two\n- three four\n- five six"))] * 2)
        await generator.score([Candidate(Conditioned("How?", summary("word " * 20)), "yes")])
    assert backend.chats[0].messages == DEFAULT.answer_messages("How?", "- one two\n- three four")
    assert backend.scored[0].messages == DEFAULT.answer_messages("How?", "word " * 6)
    assert [record.getMessage() for record in caplog.records] == ["the summary of user 'ann' was cut to 6 tokens"] * 2


async def test_a_summary_counts_its_tokens_once_however_many_candidates() -> None:
    class Counting(ScriptedBackend):
        counted = 0

        def count_tokens(self, text: str) -> int:
            self.counted += 1
            return 1

    backend = Counting()
    generator = PromptedGenerator(backend)
    backend.counted = 0
    given = Conditioned("How?", summary("- Short"))
    await generator.score([Candidate(given, f"answer {n}") for n in range(50)])
    assert backend.counted <= 2 + 50 * 2  # the double itself counts prompt and response of each


async def test_leaves_room_for_the_answer() -> None:
    backend = ScriptedBackend(context_length=300)
    generator = PromptedGenerator(backend, max_tokens=100)
    [result] = await generator.respond([Conditioned("How?", summary("word " * 1000))])
    assert result.error is None
    assert result.prompt_tokens <= 200
    with pytest.raises(ConfigError):
        PromptedGenerator(backend, max_tokens=100, summary_tokens=280)


async def test_failures_pass_through() -> None:
    backend = ScriptedBackend({})
    generator = PromptedGenerator(backend)
    [result] = await generator.respond([Conditioned("How?")])
    assert result.error is not None
    with pytest.raises(BackendError):
        _ = [piece async for piece in generator.stream(Conditioned("How?"))]
    backend.dead = "gone"
    with pytest.raises(BackendError, match="gone"):
        await generator.respond([Conditioned("How?")])
