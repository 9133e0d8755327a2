"""What each row tells a generator."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from popi.data.example import PersonalizationExample
from popi.errors import BackendError, ConfigError
from popi.evaluation.rows import ROWS, Materials, Row, RowUnavailable, Written, WrittenOnce, choose
from popi.registry import inference
from popi.roles import Failure
from popi.signals import Statement
from popi.testing import ScriptedBackend

Make = Callable[..., PersonalizationExample]
ROW = {row.name: row for row in ROWS}


@pytest.fixture
def users(make_example: Make) -> list[PersonalizationExample]:
    made = [make_example(name, ("good", "bad")) for name in ("ann", "bob", "cho")]
    return [one.model_copy(update={"oracles": {"truth": f"- the truth of {one.user.user_id}"}}) for one in made]


def materials(users: list[PersonalizationExample], backend: ScriptedBackend) -> Materials:
    writer = inference("llm")(backend)
    signals = [example.user for example in users]

    async def have() -> list[Written]:
        return [Written.of(outcome) for outcome in await writer.try_infer(signals)]

    return Materials(WrittenOnce(writer.name, have), None, backend, users)


async def texts(row: Row, given: Materials) -> list[str]:
    assert row.build is not None
    users = [example.user for example in given.examples]
    summaries = await row.build(given).infer(users)
    assert [summary.user_id for summary in summaries] == [user.user_id for user in users]
    return [summary.text for summary in summaries]


def statement_writer() -> ScriptedBackend:
    """Writes down what the user stated."""
    return ScriptedBackend(lambda request: request.messages[-1].content.split("said: ")[1].split("\n")[0])


async def test_the_writer_is_asked_once_for_each_user(users: list[PersonalizationExample]) -> None:
    backend = statement_writer()
    given = materials(users, backend)
    own = await texts(ROW["untrained-summary"], given)
    other = await texts(ROW["another-users-summary"], given)
    assert own == ["I am ann.", "I am bob.", "I am cho."]
    assert sorted(other) == own
    assert all(first != second for first, second in zip(own, other, strict=True))
    assert len(backend.chats) == 3


async def test_rows_that_need_no_writer_ask_none(users: list[PersonalizationExample]) -> None:
    backend = statement_writer()
    given = materials(users, backend)
    assert await texts(ROW["empty-summary"], given) == ["", "", ""]
    assert await texts(ROW["true-taste-oracle"], given) == [f"- the truth of {name}" for name in ("ann", "bob", "cho")]
    assert "said: I am ann." in (await texts(ROW["raw-signals"], given))[0]
    assert backend.chats == []


def test_what_the_data_lack_is_said(users: list[PersonalizationExample]) -> None:
    evidence, another = ROW["evidence-oracle"].build, ROW["another-users-summary"].build
    assert evidence is not None
    assert another is not None
    with pytest.raises(RowUnavailable, match="3 of 3 users have no evidence oracle"):
        evidence(materials(users, statement_writer()))
    with pytest.raises(RowUnavailable, match="the data contain only one user"):
        another(materials(users[:1], statement_writer()))


async def test_summaries_are_had_when_they_are_asked_for(users: list[PersonalizationExample]) -> None:
    asked = []

    async def have() -> list[Written]:
        asked.append("all")
        made = await inference("empty")().infer([example.user for example in users[1:]])
        return [Written.of(Failure("ann", "it echoes")), *map(Written.of, made)]

    writer = WrittenOnce("kept", have)
    assert asked == []
    for example in users[1:]:
        [summary] = await writer.infer([example.user])
        assert summary.user_id == example.user.user_id
    assert await writer.try_infer([users[0].user]) == [Failure("ann", "it echoes")]
    with pytest.raises(BackendError, match="no summary of user 'ann': it echoes"):
        await writer.infer([users[0].user])
    assert asked == ["all"]


def test_rows_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [row.name for row in choose(["true-taste-oracle", "no-context"])] == ["no-context", "true-taste-oracle"]
    assert [row.name for row in ROWS if row not in choose([])] == ["popi-summary"]
    assert choose([], trained=True) == ROWS
    with pytest.raises(
        ConfigError, match="unknown row 'raw-signal'; the rows are: no-context, raw-signals, untrained-"
    ):
        choose(["raw-signal"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_known_by_the_name_that_tables_print(row: Row) -> None:
    words = row.name.replace("-", " ")
    for name in (row.name, words, words.title(), row.name.upper(), f" {row.name.replace('-', '_')} "):
        assert choose([name], trained=True) == (row,)


def test_an_apostrophe_may_be_written() -> None:
    for name in ("another user's summary", "Another user\u2019s summary"):
        assert [row.name for row in choose([name])] == ["another-users-summary"]


async def test_raw_signals_leave_room_for_the_longest_test_pair(make_example: Make) -> None:
    long = make_example("ann", ("word " * 300, "bad"))
    many = [Statement(text=f"I like {n} {'words ' * 40}") for n in range(40)]
    long = long.model_copy(update={"user": long.user.model_copy(update={"signals": tuple(many)})})
    backend = ScriptedBackend(context_length=1000)
    [shown] = await texts(ROW["raw-signals"], materials([long], backend))
    assert 300 < backend.count_tokens(shown) < 1000 - 300


def test_an_untrained_writer_has_no_row_of_a_trained_one(users: list[PersonalizationExample]) -> None:
    build = ROW["popi-summary"].build
    assert build is not None
    with pytest.raises(RowUnavailable, match="the writer is an untrained one"):
        build(materials(users, statement_writer()))
