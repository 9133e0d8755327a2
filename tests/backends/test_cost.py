"""Accounts that add up, and a line that is not passed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.backends.base import ChatRequest, ChatResult, ScoreRequest
from popi.backends.ledger import FREE, Ledger, Price, Spent
from popi.backends.wrappers import Cost
from popi.errors import BackendError, ConfigError
from popi.io import writable
from popi.prompts import Message
from popi.testing import ScriptedBackend

PRICE = Price(prompt=2.0, completion=10.0)


def ask(text: str, *, user: str = "", max_tokens: int = 10) -> ChatRequest:
    return ChatRequest([Message("user", text)], max_tokens=max_tokens, user=user)


def failing(kind: str) -> ScriptedBackend:
    return ScriptedBackend(lambda _: ChatResult.failed("no", kind, model="scripted"))  # type: ignore[arg-type]


def most(request: ChatRequest) -> float:
    """What a request of one ASCII turn can cost at most."""
    return PRICE.of(64 + 16 + len(request.messages[0].content), request.max_tokens)


async def test_tokens_and_money_by_role_and_user() -> None:
    ledger, inner = Ledger(), ScriptedBackend()
    writer = Cost(inner, price=PRICE, ledger=ledger, role="writer")
    reader = Cost(inner, price=FREE, ledger=ledger, role="generator")
    # "Noted: " and the words that are asked: three tokens for two, two for one.
    await writer.chat([ask("two words", user="ann"), ask("one", user="bob"), ask("one", user="ann")])
    await reader.chat([ask("one", user="ann")])
    assert ledger.by_role() == {
        "writer": Spent(3, 4, 7, pytest.approx((4 * 2 + 7 * 10) / 1e6)),
        "generator": Spent(1, 1, 2),
    }
    assert ledger.by_user() == {
        "ann": Spent(3, 4, 7, pytest.approx((3 * 2 + 5 * 10) / 1e6)),
        "bob": Spent(1, 1, 2, pytest.approx((1 * 2 + 2 * 10) / 1e6)),
    }
    assert ledger.total.money == pytest.approx(78 / 1e6)
    await writer.score([ScoreRequest([Message("user", "two words")], "three of them", "bob")])
    # Two words in front, three and the end of the turn behind: read, not written.
    assert ledger.by_user()["bob"] == Spent(2, 1 + 2 + 4, 2, pytest.approx((7 * 2 + 2 * 10) / 1e6))
    total = ledger.total
    ledger.forget_users()
    assert ledger.by_user() == ledger.by_role() == {} and ledger.total == total


async def test_what_is_affordable_goes_on_together() -> None:
    class Batches(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            sizes.append(len(requests))
            return await super().chat(requests)

    sizes: list[int] = []
    requests = [ask(f"number {n}") for n in range(8)]
    free = await Cost(Batches(), price=PRICE, ledger=Ledger()).chat(requests)
    assert sizes == [8]
    # Room for three at their most, of which each costs less in the end: the others follow, and in the same order.
    tight = Ledger(3.5 * most(requests[0]))
    assert await Cost(Batches(), price=PRICE, ledger=tight).chat(requests) == free
    assert sizes[1] == 3 and sum(sizes[1:]) == 8


@pytest.mark.parametrize("kind", ["timeout", "unreachable", "server", "malformed"])
async def test_what_failed_on_its_way_may_have_cost_all_that_it_could(kind: str) -> None:
    ledger, request = Ledger(), ask("rice")
    [result] = await Cost(failing(kind), price=PRICE, ledger=ledger).chat([request])
    assert result.failure == kind
    assert ledger.total == Spent(1, unsure=pytest.approx(most(request)))


async def test_an_empty_response_costs_what_its_reasoning_did() -> None:
    ledger = Ledger()
    backend = Cost(ScriptedBackend(lambda _: "<think>so I will"), price=PRICE, ledger=ledger)
    [result] = await backend.chat([ask("rice")])
    assert result.failure == "empty"
    assert ledger.total == Spent(1, 1, 3, pytest.approx(PRICE.of(1, 3)))


async def test_two_calls_never_wait_for_what_the_other_one_reserved() -> None:
    class Slow(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            await asyncio.sleep(0.001)
            return await super().chat(requests)

    ledger = Ledger(cap=3 * most(ask("rice")))
    backend = Cost(Slow(), price=PRICE, ledger=ledger)
    async with asyncio.timeout(10):
        batches = await asyncio.gather(*(backend.chat([ask("rice")] * 4) for _ in range(4)))
    assert {result.error for batch in batches for result in batch} == {None}


@pytest.mark.parametrize("kind", ["request", "rate_limit"])
async def test_what_no_model_has_read_costs_nothing(kind: str) -> None:
    ledger = Ledger()
    await Cost(failing(kind), price=PRICE, ledger=ledger).chat([ask("rice")])
    assert ledger.total == Spent(1)


async def test_a_dead_backend_settles_its_account() -> None:
    ledger, inner = Ledger(cap=1.0), ScriptedBackend()
    inner.dead = "switched off"
    with pytest.raises(BackendError, match="switched off"):
        await Cost(inner, price=PRICE, ledger=ledger).chat([ask("rice")])
    assert ledger.total == Spent(1, unsure=pytest.approx(most(ask("rice"))))
    assert await ledger.reserve(0.9)


async def test_a_stream_counts_as_an_answer_and_one_that_is_left_as_the_most_that_it_could_cost() -> None:
    ledger, request = Ledger(), ask("rice", user="ann")
    backend = Cost(ScriptedBackend(), price=PRICE, ledger=ledger, role="generator")
    assert "".join([piece async for piece in backend.stream(request)]) == "Noted: rice"
    assert ledger.by_user() == {"ann": Spent(1, 1, 2, pytest.approx(PRICE.of(1, 2)))}
    stream = backend.stream(request)
    await anext(stream)
    await stream.aclose()
    assert ledger.total.unsure == pytest.approx(most(request))


async def test_a_batch_that_is_broken_off_may_have_cost_all_that_it_could() -> None:
    class Denying(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            raise BackendError("no such key", failure="denied")

    for requests, unsure in ([ask("rice")], 0.0), ([ask("rice")] * 2, 2 * most(ask("rice"))):
        ledger = Ledger()
        with pytest.raises(BackendError, match="no such key"):
            await Cost(Denying(), price=PRICE, ledger=ledger).chat(requests)
        assert ledger.total == Spent(len(requests), unsure=pytest.approx(unsure))


async def test_what_is_sent_in_place_of_half_a_character_counts() -> None:
    ledger, request = Ledger(), ask("\ud800" * 100)
    [result] = await Cost(failing("server"), price=PRICE, ledger=ledger).chat([request])
    assert result.failure == "server"
    assert ledger.total.unsure == pytest.approx(PRICE.of(64 + 16 + len(writable("\ud800" * 100).encode()), 10))


async def test_what_might_pass_the_cap_is_not_sent() -> None:
    inner, request = ScriptedBackend(), ask("rice")
    ledger = Ledger(cap=1.5 * most(request))
    backend = Cost(inner, price=PRICE, ledger=ledger)
    fine, refused = [(await backend.chat([ask("rice", max_tokens=length)]))[0] for length in (10, 40)]
    assert fine.error is None and refused.failure == "budget" and len(inner.chats) == 1
    assert refused.error == "not sent: the request might cost 0.000568, and 0.000022 of the budget of 0.000402 is spent"
    with pytest.raises(BackendError, match="not sent: the request might cost") as caught:
        await anext(backend.stream(ask("rice", max_tokens=40)))
    assert caught.value.failure == "budget"


async def test_requests_wait_for_others_that_may_cost_less_than_was_set_aside() -> None:
    class Slow(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            await asyncio.sleep(0.01)
            return await super().chat(requests)

    ledger = Ledger(cap=2 * most(ask("rice")))
    results = await Cost(Slow(), price=PRICE, ledger=ledger).chat([ask("rice")] * 6)
    # Each sets 268 millionths aside and costs 22.
    assert [result.error for result in results] == [None] * 6
    assert ledger.total.money == pytest.approx(6 * 22 / 1e6)


async def test_what_can_never_fit_does_not_wait_for_others() -> None:
    ledger = Ledger(cap=2 * most(ask("rice")))
    backend = Cost(ScriptedBackend(), price=PRICE, ledger=ledger)
    stream = backend.stream(ask("rice"))
    await anext(stream)
    async with asyncio.timeout(5):
        [refused] = await backend.chat([ask("rice", max_tokens=1000)])
    assert refused.failure == "budget" and ledger.refused == 1
    await stream.aclose()


@given(
    cap=st.floats(0, 3e-3),
    words=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40), st.sampled_from(["", "server", "request"]))),
)
def test_no_cap_is_ever_passed(cap: float, words: list[tuple[int, int, str]]) -> None:
    ways = {f"{n} " + "word " * count: way for n, (count, _, way) in enumerate(words)}

    def answer(request: ChatRequest) -> str | ChatResult:
        way = ways[request.messages[0].content]
        return ChatResult.failed("no", way, model="x") if way else "word " * 100  # type: ignore[arg-type]

    ledger = Ledger(cap)
    backend = Cost(ScriptedBackend(answer), price=PRICE, ledger=ledger)
    requests = [ask(text, max_tokens=length) for text, (_, length, _) in zip(ways, words, strict=True)]
    results = asyncio.run(backend.chat(requests))
    assert len(results) == len(requests)
    assert ledger.total.money + ledger.total.unsure <= cap
    assert ledger.total.requests == sum(result.failure != "budget" for result in results)


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_must_be_a_number_that_is_not_negative(price: float) -> None:
    with pytest.raises(ConfigError, match="field completion: a price must be zero or positive, got"):
        Price(0.0, price)


def test_a_budget_below_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="field budget: a budget must be zero or positive, got -1"):
        Ledger(-1)
