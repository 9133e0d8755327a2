from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.errors import ConfigError, InputError
from popi.signals import Speaker, Statement, UserSignals
from popi.summary import NO_EVIDENCE, Author
from popi.testing import ScriptedBackend
from popi_inference import AnotherUsers, Empty, Oracle, RawSignals

ANN = UserSignals(
    user_id="ann",
    signals=(Statement(id="a", text="short please"), Statement(id="b", text="hi", said_by=Speaker.ASSISTANT)),
)
NOBODY = UserSignals(user_id="nobody")


def users(*user_ids: str) -> list[UserSignals]:
    return [UserSignals(user_id=user_id) for user_id in user_ids]


def own_names(people: Sequence[UserSignals]) -> Oracle:
    return Oracle({person.user_id: f"- I am {person.user_id}" for person in people})


async def test_raw_signals_stand_in_the_place_of_a_summary() -> None:
    backend = ScriptedBackend()
    shown, nothing = await RawSignals(backend).infer([ANN, NOBODY])
    assert shown.text.startswith("[1] said: short please\n[2] not by the user")
    assert (shown.status, shown.provenance.author) == ("ok", Author.BASELINE)
    assert shown.provenance.tokens == backend.count_tokens(shown.text)
    assert shown.provenance.signals_digest == ANN.digest()
    assert (nothing.text, nothing.status) == (NO_EVIDENCE, "not_enough_evidence")


async def test_raw_signals_keep_to_the_budget() -> None:
    many = UserSignals(user_id="ann", signals=tuple(Statement(text=f"signal {n}") for n in range(100)))
    [summary] = await RawSignals(ScriptedBackend(), budget=30).infer([many])
    assert 0 < summary.provenance.tokens <= 30
    with pytest.raises(ConfigError):
        RawSignals(ScriptedBackend(context_length=400), budget=400)


async def test_the_empty_summary_has_no_word() -> None:
    [summary] = await Empty().infer([ANN])
    assert (summary.user_id, summary.text, summary.provenance.author) == ("ann", "", Author.BASELINE)


@given(st.sets(st.text(min_size=1, max_size=4), min_size=2, max_size=9).map(sorted), st.integers(0, 5), st.randoms())
async def test_nobody_gets_their_own_summary_and_each_is_used_once(
    user_ids: list[str], seed: int, chance: object
) -> None:
    people = users(*(f"{number}-{user_id}" for number, user_id in enumerate(user_ids)))
    summaries = await AnotherUsers(own_names(people), seed=seed).infer(people)
    assert [summary.user_id for summary in summaries] == [person.user_id for person in people]
    given_out = {summary.user_id: summary.text for summary in summaries}
    assert all(text != f"- I am {user_id}" for user_id, text in given_out.items())
    assert sorted(given_out.values()) == sorted(f"- I am {person.user_id}" for person in people)

    shuffled = list(people)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    again = await AnotherUsers(own_names(people), seed=seed).infer(shuffled)
    assert {summary.user_id: summary.text for summary in again} == given_out


async def test_the_seed_decides_who_gets_whose() -> None:
    people = users(*"abcdefgh")
    texts = {
        tuple(summary.text for summary in await AnotherUsers(own_names(people), seed=seed).infer(people))
        for seed in range(4)
    }
    assert len(texts) > 1


async def test_another_users_summary_tells_whose_signals_were_read() -> None:
    people = [ANN, NOBODY]
    first, _ = await AnotherUsers(own_names(people)).infer(people)
    assert (first.provenance.author, first.provenance.signals_digest) == (Author.BASELINE, NOBODY.digest())
    assert "another user" in first.provenance.model


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 5))
async def test_nobody_gets_the_summary_of_a_user_with_the_same_preferences(groups: list[int], seed: int) -> None:
    people = users(*map(str, range(len(groups))))
    preferences = {str(number): f"taste {group}" for number, group in enumerate(groups)}
    others = AnotherUsers(own_names(people), seed=seed, preferences=preferences)
    donors = [int(summary.text.removeprefix("- I am ")) for summary in await others.infer(people)]
    assert sorted(donors) == list(range(len(groups)))
    assert all(donor != user for user, donor in enumerate(donors))
    alike = [groups[donor] for user, donor in enumerate(donors) if groups[donor] == groups[user]]
    most = max(groups, key=groups.count)
    # Users of a group of more than half cannot all get the summary of somebody else.
    assert alike == [most] * max(2 * groups.count(most) - len(groups), 0)


async def test_a_lone_user_has_no_other() -> None:
    with pytest.raises(InputError, match="got only one user"):
        await AnotherUsers(Empty()).infer([ANN])


async def test_the_oracle_says_what_it_was_given() -> None:
    oracle = Oracle({"ann": "- Short answers\n- No emoji", "nobody": NO_EVIDENCE}, name="truth")
    ann, nobody = await oracle.infer([ANN, NOBODY])
    assert (ann.text, ann.status) == ("- Short answers\n- No emoji", "ok")
    assert [claim.text for claim in ann.claims] == ["Short answers", "No emoji"]
    assert (ann.provenance.author, ann.provenance.model) == (Author.ORACLE, "truth")
    assert nobody.status == "not_enough_evidence"
    with pytest.raises(InputError, match="truth has no summary of user 'bob'"):
        await oracle.infer(users("bob"))
