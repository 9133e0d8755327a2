from __future__ import annotations

import time
from datetime import UTC

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from popi.claims import as_text, parse_claims, with_citations
from popi.io import as_line
from popi.signals import UserSignals
from popi.summary import (
    NO_EVIDENCE,
    Author,
    Claim,
    PreferenceSummary,
    Provenance,
    cap_tokens,
    read_reply,
    summarize_claims,
)
from tests.strategies import users, words

BY_MODEL = Provenance(author=Author.INFERRED, model="test", signals_digest="d", template_hash="t", tokens=5)

ids = st.lists(st.text("abcdef", min_size=1), min_size=1, max_size=6, unique=True)
likes = (
    st.builds("likes {}".format, words)
    .map(lambda text: " ".join(text.split()))
    .filter(lambda text: text[-1] not in "].,;")
)


@st.composite
def claims_and_shown(draw: st.DrawFn) -> tuple[list[Claim], list[str]]:
    shown = draw(ids)
    texts = draw(st.lists(likes, max_size=5, unique=True))
    evidence = st.lists(st.sampled_from(shown), max_size=3, unique=True).map(tuple)
    return [Claim(text=text, evidence=draw(evidence)) for text in texts], shown


@given(claims_and_shown())
def test_parsing_is_the_inverse_of_writing(made: tuple[list[Claim], list[str]]) -> None:
    claims, shown = made
    assert parse_claims(with_citations(claims, shown), shown) == tuple(claims)
    assert [claim.text for claim in parse_claims(as_text(claims))] == [claim.text for claim in claims]


@given(
    st.text() | st.lists(st.sampled_from(["- likes lists", "[1]", " [2, 9]", "[1-3]", "\n", ".", "["])).map("".join),
    ids,
)
def test_whatever_is_written_gives_single_lines_with_evidence_that_was_shown(text: str, shown: list[str]) -> None:
    claims = parse_claims(text, shown)
    assert len({claim.text for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.text.splitlines() == [claim.text] == [claim.text.strip()]
        assert set(claim.evidence) <= set(shown)
        assert len(set(claim.evidence)) == len(claim.evidence)


@pytest.mark.parametrize(
    ("line", "text", "evidence"),
    [
        ("- likes lists [1, 3]", "likes lists", "ac"),
        ("* likes lists.", "likes lists.", ""),
        ("\u2022 likes lists [2].", "likes lists", "b"),
        ("2) likes lists [3][1]", "likes lists", "ca"),
        ("10. likes lists [1], [2]", "likes lists", "ab"),
        ("likes lists [1-3]", "likes lists", "abc"),
        ("likes lists [2\u20133, 2]", "likes lists", "bc"),
        ("likes lists [Signals 1 and 2]", "likes lists", "ab"),
        ("likes lists [0, 4, 99]", "likes lists", ""),
        ("likes lists [2-999999]", "likes lists", "bc"),
        ("likes lists [3-1]", "likes lists", ""),
        ("likes [1] lists", "likes [1] lists", ""),
        ("likes lists [briefly]", "likes lists [briefly]", ""),
        ("likes lists [1234567]", "likes lists [1234567]", ""),
        ("-5 degrees", "-5 degrees", ""),
        ("**likes**   lists", "**likes** lists", ""),
    ],
)
def test_reads_the_ways_in_which_models_cite(line: str, text: str, evidence: str) -> None:
    assert parse_claims(line, "abc") == (Claim(text=text, evidence=tuple(evidence)),)


def test_a_claim_made_twice_has_the_evidence_of_both() -> None:
    claims = parse_claims("- likes lists [1]\n- likes tea\n- likes lists [2, 1]", "ab")
    assert claims == (Claim(text="likes lists", evidence=("a", "b")), Claim(text="likes tea"))


@pytest.mark.parametrize(
    "text", ["", " \n", NO_EVIDENCE, "not enough evidence", "- **Not enough evidence.**", "---\n-"]
)
def test_no_claims_where_nothing_is_said(text: str) -> None:
    assert parse_claims(text) == ()
    assert summarize_claims("ada", parse_claims(text), BY_MODEL).status == "not_enough_evidence"


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        " " * 100_000 + "x",
        "[1] " * 25_000 + "x",
        "[1]" * 30_000,
        "[1" * 50_000,
        "[1]" + " " * 100_000 + "x",
    ],
)
def test_hostile_lines_are_read_in_no_time(line: str) -> None:
    start = time.process_time()
    read_reply("ada", line, "a", BY_MODEL)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "reply",
    [
        "```markdown\n- short [1]\n- tables [1, 2, and 3]\n```",
        "<answer>\n- short [1]\n- tables [1, signal 2, no. 3]\n</answer>",
        "► short [#1]\n► tables [1 و 2 و 3]",
        "- [ ] short [^1]\n- [x] tables【1†a】【2†b】【3†c】",
        "一、short\uff3b1\uff3d\n二、tables\uff3b1、2、3\uff3d。",
    ],
)
def test_the_frame_and_the_marks_of_a_list_are_no_claims(reply: str) -> None:
    summary = read_reply("ada", reply, ("a", "b", "c"), BY_MODEL)
    assert summary.text == "- short\n- tables"
    assert [claim.evidence for claim in summary.claims] == [("a",), ("a", "b", "c")]


def test_a_heading_is_no_claim() -> None:
    summary = read_reply("ada", "## Preferences\n- short [1]", "a", BY_MODEL)
    assert [claim.text for claim in summary.claims] == ["short"]


def test_citing_what_is_not_shown_is_an_error() -> None:
    with pytest.raises(KeyError):
        with_citations([Claim(text="likes lists", evidence=("b",))], ["a"])


def test_a_claim_is_one_line_of_words() -> None:
    assert Claim(text=" likes\n lists\u2028only ").text == "likes lists only"
    with pytest.raises(ValidationError, match="a claim must not be empty"):
        Claim(text=" \n ")


def test_summarizing_claims() -> None:
    summary = summarize_claims("ada", [Claim(text="likes lists", evidence=("a",)), Claim(text="hates emoji")], BY_MODEL)
    assert (summary.text, summary.status) == ("- likes lists\n- hates emoji", "ok")
    nothing = summarize_claims("ada", [], BY_MODEL)
    assert (nothing.text, nothing.claims, nothing.status) == (NO_EVIDENCE, (), "not_enough_evidence")


@given(users(max_size=3))
def test_provenance_is_kept_by_a_round_trip(user: UserSignals) -> None:
    made = Provenance(author=Author.ORACLE, signals_digest=user.digest())
    summary = summarize_claims(user.user_id, [Claim(text="likes tea", evidence=("a",))], made)
    again = PreferenceSummary.model_validate_json(as_line(summary))
    assert again == summary
    assert again.provenance.time.tzinfo == UTC


def test_the_user_of_a_summary_is_the_same_however_the_id_is_written() -> None:
    made = {"text": "- x", "provenance": BY_MODEL}
    ids = [PreferenceSummary.model_validate({"user_id": name, **made}).user_id for name in (7, 7.0, "7 ", "e\u0301")]
    assert ids == ["7", "7", "7", "\u00e9"]


def test_editing_keeps_the_evidence_of_what_is_left_alone() -> None:
    summary = summarize_claims("ada", [Claim(text="likes lists", evidence=("a",)), Claim(text="hates emoji")], BY_MODEL)
    edited = summary.edit("- likes lists\n- likes emoji")
    assert edited.claims == (Claim(text="likes lists", evidence=("a",)), Claim(text="likes emoji"))
    assert edited.text == "- likes lists\n- likes emoji"
    assert (edited.provenance.author, edited.provenance.tokens) == (Author.EDITED, 0)
    assert (edited.provenance.model, edited.provenance.signals_digest) == ("test", "d")
    assert summary.edit("  ").status == "not_enough_evidence"


def test_a_reply_that_is_a_list_becomes_its_claims() -> None:
    summary = read_reply("ada", "* likes lists [1]\n\n* hates emoji [7]", "a", BY_MODEL)
    assert summary.text == "- likes lists\n- hates emoji"
    assert summary.claims[0].evidence == ("a",)


def test_a_free_reply_keeps_its_words_without_the_citations() -> None:
    reply = "What I found:\n- likes lists [1]\n  - of three\nShort answers, please [1]."
    summary = read_reply("ada", reply, "a", BY_MODEL)
    assert summary.text == "What I found:\n- likes lists\n  - of three\nShort answers, please"
    assert [claim.text for claim in summary.claims] == ["likes lists", "of three", "Short answers, please"]
    assert [claim.evidence for claim in summary.claims] == [("a",), (), ("a",)]


@given(st.text("ab \n"), st.integers(0, 20))
def test_capped_text_is_a_beginning_within_the_limit(text: str, limit: int) -> None:
    capped = cap_tokens(text, len, limit)
    assert len(capped) <= limit
    assert text.startswith(capped)
    assert (capped == text) == (len(text) <= limit)


def test_capping_keeps_whole_lines_and_cuts_only_a_first_that_is_too_long() -> None:
    assert cap_tokens("one\ntwo\nthree", len, 9) == "one\ntwo"
    assert cap_tokens("one\ntwo", len, 2) == "on"


@pytest.mark.parametrize("text", ["🙂🙂🙂", "I work in area [51].", "What I want:\n\n- lists\nand no more"])
def test_an_edit_is_in_the_words_of_the_person(text: str) -> None:
    edited = summarize_claims("ada", [Claim(text="likes lists")], BY_MODEL).edit(f" {text}\n")
    assert (edited.text, edited.status) == (text, "ok")
    again = edited.edit(edited.text)
    assert (again.text, again.claims, again.status) == (edited.text, edited.claims, edited.status)


@pytest.mark.parametrize("text", ["", " \n", NO_EVIDENCE, "- not enough evidence"])
def test_an_edit_that_says_nothing_is_not_enough_evidence(text: str) -> None:
    edited = summarize_claims("ada", [Claim(text="likes lists")], BY_MODEL).edit(text)
    assert (edited.text, edited.claims, edited.status) == (NO_EVIDENCE, (), "not_enough_evidence")
