from __future__ import annotations

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.errors import BackendError, ConfigError, ModelError
from popi.prompts import DEFAULT
from popi.roles import Failure
from popi.signals import Comment, Speaker, Statement, UserSignals
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary
from popi.testing import ScriptedBackend
from popi_inference import LLMSummarizer


def user(user_id: str, *texts: str, said_by: Speaker = Speaker.USER) -> UserSignals:
    return UserSignals(
        user_id=user_id,
        signals=tuple(Statement(id=f"{user_id}-{n}", text=text, said_by=said_by) for n, text in enumerate(texts, 1)),
    )


ANN = user("ann", "short please", "no emoji")
BOB = user("bob", "tell me more")


def says(text: str, finish_reason: str = "stop") -> ScriptedBackend:
    return ScriptedBackend(lambda request: ChatResult(text, finish_reason))  # type: ignore[arg-type]


async def summary_of(reply: str, finish_reason: str = "stop", max_tokens: int = 256) -> PreferenceSummary:
    [summary] = await LLMSummarizer(says(reply, finish_reason), max_tokens=max_tokens).infer([ANN])
    return summary


async def test_a_list_becomes_claims_with_their_evidence_and_a_whole_provenance() -> None:
    summary = await summary_of("- Short answers [1]\n- No emoji [2, 1]")
    assert summary.user_id == "ann"
    assert summary.text == "- Short answers\n- No emoji"
    assert [(claim.text, claim.evidence) for claim in summary.claims] == [
        ("Short answers", ("ann-1",)),
        ("No emoji", ("ann-2", "ann-1")),
    ]
    made = summary.provenance
    assert (made.author, made.model, made.template_hash) == (Author.INFERRED, "scripted", DEFAULT.hash)
    assert (made.signals_digest, made.tokens) == (ANN.digest(), 6)
    assert summary.status == "ok"


async def test_free_text_keeps_its_words_without_citations_and_is_read_line_by_line() -> None:
    summary = await summary_of("**What they like:**\nThey want short answers. [1]\n\nThey dislike emoji. [2]")
    assert summary.text == "**What they like:**\nThey want short answers.\nThey dislike emoji."
    assert [claim.text for claim in summary.claims] == ["They want short answers.", "They dislike emoji."]
    assert [claim.evidence for claim in summary.claims] == [("ann-1",), ("ann-2",)]


async def test_a_claim_that_cites_only_others_words_is_dropped_and_so_is_a_citation_of_nothing() -> None:
    mixed = UserSignals(
        user_id="eve",
        signals=(
            Comment(id="hers", text="too long"),
            Statement(id="not-hers", text="I adore emoji", said_by=Speaker.ASSISTANT),
        ),
    )
    [summary] = await LLMSummarizer(says("- Short [1, 2, 9]\n- Emoji [2]\n- Tables [9]")).infer([mixed])
    assert [(claim.text, claim.evidence) for claim in summary.claims] == [("Short", ("hers",)), ("Tables", ())]
    assert summary.text == "- Short\n- Tables"


@pytest.mark.parametrize("signals", [user("cy"), user("cy", "I like rhyme", said_by=Speaker.ASSISTANT)])
async def test_without_a_word_of_the_user_the_model_is_not_asked(signals: UserSignals) -> None:
    backend = says("- Rhyme [1]")
    [summary] = await LLMSummarizer(backend).infer([signals])
    assert backend.chats == []
    assert (summary.text, summary.status, summary.claims) == (NO_EVIDENCE, "not_enough_evidence", ())
    assert summary.provenance.signals_digest == signals.digest()


async def test_a_model_that_sees_no_preference_says_so() -> None:
    summary = await summary_of("Not enough evidence.")
    assert (summary.text, summary.status) == (NO_EVIDENCE, "not_enough_evidence")


async def test_summaries_come_in_the_order_of_the_users_whoever_is_asked() -> None:
    backend = ScriptedBackend(lambda request: "- Long" if "tell me more" in request.messages[0].content else "- Short")
    summaries = await LLMSummarizer(backend).infer([user("cy"), BOB, ANN])
    assert [(summary.user_id, summary.text) for summary in summaries] == [
        ("cy", NO_EVIDENCE),
        ("bob", "- Long"),
        ("ann", "- Short"),
    ]


def fails_for_bob(request: ChatRequest) -> str | ChatResult:
    if "tell me more" in request.messages[0].content:
        return ChatResult("", "error", error="too long")
    return "- Short [1]"


async def test_one_failed_user_is_data_or_an_error_that_names_them() -> None:
    summarizer = LLMSummarizer(ScriptedBackend(fails_for_bob))
    ann, bob = await summarizer.try_infer([ANN, BOB])
    assert isinstance(ann, PreferenceSummary)
    assert bob == Failure("bob", "too long")
    with pytest.raises(BackendError, match="no summary of user 'bob': too long"):
        await summarizer.infer([ANN, BOB])


async def test_a_dead_backend_raises_for_all() -> None:
    backend = says("")
    backend.dead = "out of memory"
    with pytest.raises(BackendError, match="out of memory"):
        await LLMSummarizer(backend).try_infer([ANN])


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("- Short answers\n- Answers without", "- Short answers"),
        ("They like it short. They want answers without", "They like it short."),
        ("他喜欢简短的回答。他不希望看到表情符号", "他喜欢简短的回答。"),
    ],
)
async def test_a_claim_that_was_cut_off_is_left_out(reply: str, text: str) -> None:
    assert (await summary_of(reply, "length")).text == text
    assert (await summary_of(reply, "stop")).text == reply


@pytest.mark.parametrize(
    "reply",
    [
        "They want answers without",
        "1. They want answers without",
        "Prefers short answers, e.g. bullet",
        "What they prefer:\n- short ans",
    ],
)
async def test_half_a_claim_alone_is_no_summary(reply: str) -> None:
    [failure] = await LLMSummarizer(says(reply, "length"), max_tokens=99).try_infer([ANN])
    assert failure == Failure("ann", "the reply has no complete claim within 99 tokens; raise max_tokens")


async def test_a_runaway_reply_is_capped_by_the_tokenizer() -> None:
    summary = await summary_of("\n".join(f"- likes thing {n}" for n in range(100)), max_tokens=9)
    assert summary.text == "- likes thing 0\n- likes thing 1"
    assert (await summary_of("word " * 50, max_tokens=5)).provenance.tokens == 5


async def test_the_prompt_keeps_to_the_budget_and_to_the_context() -> None:
    many = user("ann", *(f"signal number {n}" for n in range(500)))
    backend = says("- Short")
    await LLMSummarizer(backend, budget=40).infer([many])
    shown = backend.chats[0].messages[0].content.partition("<<<")[2].partition(">>>")[0]
    assert 0 < backend.count_tokens(shown) <= 40

    narrow = ScriptedBackend(lambda request: "- Short", context_length=400)
    await LLMSummarizer(narrow, max_tokens=100).infer([many])
    assert sum(narrow.count_tokens(message.content) for message in narrow.chats[0].messages) <= 300


def test_a_budget_that_cannot_be_is_refused() -> None:
    narrow = ScriptedBackend(context_length=300)
    with pytest.raises(
        ConfigError, match="field budget: 250 tokens do not fit the context of scripted, which has room for"
    ):
        LLMSummarizer(narrow, max_tokens=100, budget=250)
    with pytest.raises(ConfigError, match="positive"):
        LLMSummarizer(narrow, max_tokens=100, budget=0)
    with pytest.raises(ModelError, match="no room"):
        LLMSummarizer(narrow, max_tokens=300)


async def test_a_users_seed_depends_on_the_user_and_the_seed_alone() -> None:
    async def seeds(seed: int, *users: UserSignals) -> list[int | None]:
        backend = says("- Short")
        await LLMSummarizer(backend, seed=seed, temperature=0.6).infer(users)
        assert all(request.temperature == 0.6 for request in backend.chats)
        return [request.seed for request in backend.chats]

    ann, bob = await seeds(0, ANN, BOB)
    assert ann != bob
    assert await seeds(0, BOB) == [bob]
    assert await seeds(1, ANN) != [ann]


async def test_a_reply_that_is_no_summary_is_requested_again_with_another_seed() -> None:
    replies = iter(["The user likes short answers. " * 9, "- Short [1]"])
    backend = ScriptedBackend(lambda request: next(replies))
    [summary] = await LLMSummarizer(backend).infer([ANN])
    assert summary.text == "- Short"
    first, second = backend.chats
    assert first.messages == second.messages and first.seed != second.seed
    assert (first.temperature, second.temperature) == (0.0, 0.7)


async def test_after_the_last_attempt_the_user_has_failed_with_the_reason() -> None:
    backend = ScriptedBackend(lambda request: "- Long [1]" if "tell me more" in request.messages[0].content else "...")
    ann, bob = await LLMSummarizer(backend, attempts=3).try_infer([ANN, BOB])
    assert ann == Failure("ann", "the reply contains no claim")
    assert isinstance(bob, PreferenceSummary)
    assert len(backend.chats) == 4


async def test_a_failed_request_is_not_repeated_here() -> None:
    backend = ScriptedBackend(fails_for_bob)
    await LLMSummarizer(backend).try_infer([BOB])
    assert len(backend.chats) == 1
