"""How summaries are requested and replies are read: every way in which a reply is not a summary."""

from __future__ import annotations

import pytest

from popi.prompts import DEFAULT, INSTRUCT
from popi.roles import Failure, SummaryPrompt
from popi.signals import Comment, Conversation, PreferencePair, Signal, Speaker, Statement, Turn, UserSignals
from popi.summary import NO_EVIDENCE, PreferenceSummary
from popi_inference.degenerate import repeats_itself
from popi_inference.format import PromptedSummary

LONG_ANSWER = "You can fix the shelf at 20 inches, then test it twice before you use it."

SIGNALS: tuple[Signal, ...] = (
    Statement(id="short", text="I like short answers that come to the point at once."),
    PreferencePair(id="pair", prompt="Shelf?", chosen="At 50 cm.", rejected=LONG_ANSWER),
    Comment(id="inches", text="I cannot read inches.", about=LONG_ANSWER),
    Statement(id="poems", text="I love long poems about the sea.", said_by=Speaker.ASSISTANT),
    Conversation(
        id="chat",
        turns=(
            Turn(speaker=Speaker.USER, text="And for the bathroom?"),
            Turn(speaker=Speaker.ASSISTANT, text="The bathroom wants tiles, tiles, and more tiles."),
        ),
    ),
)
ANN = UserSignals(user_id="ann", signals=SIGNALS)


def words(text: str) -> int:
    return len(text.split())


def make(**options: object) -> PromptedSummary:
    return PromptedSummary(words, **{"budget": 500, "max_tokens": 200, **options})  # type: ignore[arg-type]


def prompt_for(user: UserSignals = ANN) -> SummaryPrompt:
    prompt = make().render(user)
    assert prompt is not None
    return prompt


def read(reply: str, *, truncated: bool = False) -> PreferenceSummary | Failure:
    return make().parse(prompt_for(), reply, truncated=truncated)


def claims_of(reply: str) -> list[tuple[str, tuple[str, ...]]]:
    summary = read(reply)
    assert isinstance(summary, PreferenceSummary), summary
    return [(claim.text, claim.evidence) for claim in summary.claims]


@pytest.mark.parametrize("reply", ["", " \n", "---", "...", "🙂", "- \n- "])
def test_a_reply_without_words_is_not_a_summary(reply: str) -> None:
    failure = read(reply)
    assert isinstance(failure, Failure)
    assert failure.error in ("the reply is empty", "the reply contains no claim")


@pytest.mark.parametrize(
    "reply",
    [
        NO_EVIDENCE,
        "not enough evidence",
        "- **Not enough evidence.**",
        "Not enough evidence to determine this user's preferences.",
        "There is not enough information about this user.",
        "Insufficient evidence in the signals.",
        "Summary: Not enough evidence!",
        "“Not enough evidence.”",
        "Not enough evidence (there is only one signal).",
        "There isn't enough evidence to infer anything.",
        "The signals do not provide sufficient information about preferences.",
        "Based on these signals, I don't have enough information.",
        "No preferences can be inferred from the signals.",
        "Unable to determine the user's preferences.",
        "Nicht genügend Hinweise.",
        "No hay suficiente información sobre el usuario.",
        "证据不足。",
        "情報が不十分です。",
    ],
)
def test_only_the_sentinel_means_that_nothing_is_known(reply: str) -> None:
    summary = read(reply)
    assert isinstance(summary, PreferenceSummary)
    assert (summary.status, summary.text, summary.claims) == ("not_enough_evidence", NO_EVIDENCE, ())


@pytest.mark.parametrize(
    "claim",
    [
        "dislikes answers that say there is not enough evidence",
        "no information about calories",
        "enough information to decide alone",
        "can't stand preferences that are assumed",
    ],
)
def test_claims_with_the_words_of_the_sentinel_are_claims(claim: str) -> None:
    assert claims_of(f"- {claim} [1]") == [(claim, ("short",))]


def test_a_claim_about_evidence_is_a_claim() -> None:
    assert claims_of("- Not enough evidence in answers annoys them [1]") == [
        ("Not enough evidence in answers annoys them", ("short",))
    ]


@pytest.mark.parametrize(
    "reply",
    [
        prompt_for().messages[-1].content[-600:],
        prompt_for().messages[-1].content[:300],
        "Signals of one user:\n- short answers",
        "List what this user prefers in an answer, one short line each.",
        "- asked: Shelf?\n- preferred: At 50 cm.",
        "[1] said: I like short answers that come to the point at once.",
        f"- {LONG_ANSWER}",
        "- The bathroom wants tiles, tiles, and more tiles. [5]",
        "- I love long poems about the sea. [4]",
        "<<<\n- short answers\n>>>",
    ],
)
def test_an_echo_of_the_request_is_not_a_summary(reply: str) -> None:
    assert read(reply) == Failure("ann", "the reply echoes the request")


@pytest.mark.parametrize(
    ("reply", "is_echo"),
    [
        ("- A kind and encouraging tone [1]", False),
        (INSTRUCT.examples[0][1], True),
        ("- Short sentences and easy words, as for a child [3]", True),
        ("What does this user like in answers?\n- likes tea [1]", True),
    ],
)
def test_a_reply_that_repeats_an_example_is_an_echo_unless_it_is_short(reply: str, is_echo: bool) -> None:
    format = make(prompts=INSTRUCT)
    prompt = format.render(ANN)
    assert prompt is not None
    assert (format.parse(prompt, reply) == Failure("ann", "the reply echoes the request")) is is_echo


def test_words_of_the_user_are_no_echo() -> None:
    assert claims_of("- I like short answers that come to the point at once. [1]\n- I cannot read inches. [3]") == [
        ("I like short answers that come to the point at once.", ("short",)),
        ("I cannot read inches.", ("inches",)),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "The user likes short answers. " * 60,
        "- short answers\n" * 5,
        "- short " + "answers " * 60,
        "- likes tea and then " + "likes tea and also coffee and " * 8,
        "用户喜欢简短的回答。" * 20,
        "用户喜欢茶" * 20,
    ],
)
def test_a_loop_is_not_a_summary(reply: str) -> None:
    for truncated in (False, True):
        failure = read(reply, truncated=truncated)
        assert isinstance(failure, Failure)
        assert failure.error in (
            "the reply repeats itself",
            "the reply has no complete claim within 200 tokens; raise max_tokens",
        )


@pytest.mark.parametrize(
    "text",
    [
        "- likes tea\n- likes coffee\n- likes water\n- likes juice\n- likes milk",
        "- short answers\n- short answers",
        "They want it short, short, short, and they want it now. They want no emoji.",
        "- no emoji\n" * 3 + "\n".join(f"- likes thing {n}" for n in range(5)),
    ],
)
def test_lists_of_similar_claims_are_no_loop(text: str) -> None:
    assert not repeats_itself(text)


@pytest.mark.parametrize(
    ("reply", "claims"),
    [
        (
            "该用户的偏好如下：\n1、喜欢简短的回答【1】\n2、不喜欢英寸［3］\n3、喜欢表格[1，3]",  # noqa: RUF001
            [("喜欢简短的回答", ("short",)), ("不喜欢英寸", ("inches",)), ("喜欢表格", ("short", "inches"))],
        ),
        ("・短い回答が好き［１、３］", [("短い回答が好き", ("short", "inches"))]),  # noqa: RUF001
        ("（1）喜欢简短 〔1〕\n①喜欢表格", [("喜欢简短", ("short",)), ("喜欢表格", ())]),  # noqa: RUF001
        ("١. يفضل الإجابات القصيرة [١، ٣]", [("يفضل الإجابات القصيرة", ("short", "inches"))]),  # noqa: RUF001
        ("१. छोटे उत्तर पसंद हैं [१]।", [("छोटे उत्तर पसंद हैं", ("short",))]),
        ("- kurze Antworten [1 und 3]", [("kurze Antworten", ("short", "inches"))]),
        ("— короткие ответы [1–3]", [("короткие ответы", ("short", "pair", "inches"))]),  # noqa: RUF001
    ],
)
def test_lists_and_citations_of_the_major_scripts(reply: str, claims: list[tuple[str, tuple[str, ...]]]) -> None:
    assert claims_of(reply) == claims


def test_a_claim_that_cites_only_somebody_else_is_dropped_from_list_and_prose() -> None:
    assert claims_of("- short answers [1]\n- long poems [4]\n- both [1, 4]") == [
        ("short answers", ("short",)),
        ("both", ("short",)),
    ]
    summary = read("What they like:\nShort answers, please. [1]\nLong poems of any kind. [4]")
    assert isinstance(summary, PreferenceSummary)
    assert summary.text == "What they like:\nShort answers, please."


def test_if_every_claim_cites_somebody_else_nothing_is_known() -> None:
    summary = read("- long poems [4]")
    assert isinstance(summary, PreferenceSummary)
    assert (summary.status, summary.text) == ("not_enough_evidence", NO_EVIDENCE)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Short answers, please. 🙂", None),
        ("Bitte kurze Antworten, ohne Umschweife und für Anfänger.", "the language of the user's own words"),
        ("简短的回答", "the language of the user's own words"),
    ],
)
def test_the_language_is_that_of_the_users_own_words(text: str, language: str | None) -> None:
    user = UserSignals(
        user_id="u",
        signals=(Statement(text=text), Statement(text="他喜欢茶", said_by=Speaker.QUOTED)),
    )
    content = prompt_for(user).messages[-1].content
    assert content.endswith("if they show no preference." if language is None else f" Write the list in {language}.")


def test_a_language_can_be_chosen() -> None:
    prompt = make(language="French").render(ANN)
    assert prompt is not None
    assert prompt.messages[-1].content.endswith(" Write the list in French.")


def test_the_hash_is_that_of_the_prompt_set() -> None:
    assert make().template_hash == DEFAULT.hash
