"""Who serves when the first one does not, and when it is asked again."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence

import pytest

from popi.backends.base import Capabilities, ChatRequest, ChatResult, OnComplete, ScoreRequest, ignore_result
from popi.backends.ledger import FREE, Price
from popi.backends.wrappers import Breaker, Fallback, Route
from popi.errors import BackendError, ConfigError
from popi.prompts import Message
from popi.testing import ScriptedBackend
from tests.backends.test_breaker import Clock, opened


def ask(text: str = "rice", **options: int) -> ChatRequest:
    return ChatRequest([Message("user", text)], **options)


class Pair:
    """A local backend that may be down, and a dear one that is not, with a clock."""

    def __init__(self) -> None:
        self.clock, self.local, self.remote = Clock(), ScriptedBackend(model="small"), ScriptedBackend(model="large")
        self.breaker = Breaker(failures=2, cooldown=10, clock=self.clock)
        self.backend = Fallback(
            [
                Route("api", self.remote, Price(1.0, 2.0)),
                Route("local", self.local, FREE, self.breaker),
            ]
        )

    async def asked(self, *requests: ChatRequest) -> list[str]:
        return [result.route for result in await self.backend.chat(requests or [ask()])]


@pytest.fixture
def pair() -> Pair:
    return Pair()


async def test_the_cheapest_serves_and_the_answer_says_so(pair: Pair) -> None:
    [result] = await pair.backend.chat([ask()])
    assert (result.route, result.model, result.text) == ("local", "small", "Noted: rice")
    assert pair.backend.model == "small | large"
    assert not pair.remote.chats
    assert await pair.backend.chat([]) == []


async def test_one_that_is_down_is_left_alone_until_a_probe_finds_it_up(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pair.local.dead = "connection refused"
    assert [await pair.asked() for _ in range(2)] == [["api"]] * 2
    assert caplog.messages == ["route local: circuit open, requests go to other routes: connection refused"]
    pair.local.dead = None
    pair.clock.now = 9
    assert await pair.asked() == ["api"]
    pair.clock.now = 11
    # One of three is the probe; the next ones find the backend up.
    assert await pair.asked(ask("a"), ask("b"), ask("c")) == ["local", "api", "api"]
    assert await pair.asked(ask("a"), ask("b")) == ["local", "local"]
    assert caplog.messages[1:] == ["route local: circuit closed"]


async def test_a_probe_that_fails_costs_one_request_and_another_rest(pair: Pair) -> None:
    pair.local.dead = "down"
    await pair.asked()
    await pair.asked()
    pair.clock.now = 11
    assert await pair.asked() == ["api"]
    pair.local.dead = None
    pair.clock.now = 20
    assert await pair.asked() == ["api"]
    pair.clock.now = 22
    assert await pair.asked() == ["local"]


async def test_items_that_fail_go_on_and_the_others_stay() -> None:
    def answer(request: ChatRequest) -> str | ChatResult:
        text = request.messages[0].content
        return ChatResult.failed("no", "server", model="small") if text == "bad" else "local"

    both = Fallback([Route("local", ScriptedBackend(answer)), Route("api", ScriptedBackend(lambda _: "remote"))])
    results = await both.chat([ask("good"), ask("bad"), ask("fine")])
    assert [(result.text, result.route) for result in results] == [
        ("local", "local"),
        ("remote", "api"),
        ("local", "local"),
    ]


async def test_what_is_too_long_for_one_goes_to_one_with_room_and_harms_no_health() -> None:
    small = ScriptedBackend(context_length=4)
    route = Route("small", small, breaker=Breaker(failures=1))
    both = Fallback([route, Route("large", ScriptedBackend())])
    [long, short] = await both.chat([ask("one two three four five"), ask("one", max_tokens=2)])
    assert (long.route, short.route) == ("large", "small")
    assert route.breaker.closed
    assert both.capabilities.context_length == 4


async def test_an_answer_that_was_withheld_is_an_answer() -> None:
    refusal = ChatResult("", "refused", model="small", error="the model refuses: no")
    both = Fallback([Route("local", ScriptedBackend(lambda _: refusal)), Route("api", api := ScriptedBackend())])
    [result] = await both.chat([ask()])
    assert (result.finish_reason, result.route) == ("refused", "local") and not api.chats


async def test_where_all_fail_the_last_failure_counts_and_where_all_are_dead_it_is_raised(pair: Pair) -> None:
    pair.local.dead, pair.remote.dead = "no route", "no money"
    with pytest.raises(BackendError, match="no route is available: local: no route; api: no money"):
        await pair.asked()
    failing = ScriptedBackend(lambda _: ChatResult.failed("overloaded", "server", model="large"))
    both = Fallback([Route("local", pair.local), Route("api", failing)])
    [result] = await both.chat([ask()])
    assert (result.failure, result.error, result.route) == ("server", "overloaded", "api")


async def test_scores_come_from_those_that_give_them(pair: Pair) -> None:
    pair.local.capabilities = Capabilities(score=False)
    [score] = await pair.backend.score([ScoreRequest([Message("user", "rice")], "yes")])
    assert (score.logprob, score.route) == (-2.0, "api")
    pair.remote.capabilities = Capabilities(score=False)
    with pytest.raises(BackendError, match="no route returns log-probabilities"):
        await pair.backend.score([ScoreRequest([Message("user", "rice")], "yes")])


async def test_scores_of_which_none_could_be_had_are_no_numbers(pair: Pair) -> None:
    pair.local.dead, pair.breaker._failed = "down", 0
    short = ScriptedBackend(context_length=1)
    both = Fallback([Route("local", pair.local), Route("short", short)])
    [score] = await both.score([ScoreRequest([Message("user", "rice is")], "yes")])
    assert math.isnan(score.logprob) and score.failure == "request"


class Breaking(ScriptedBackend):
    """Breaks off behind its first piece."""

    async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
        yield "One"
        raise BackendError("broke off", failure="unreachable")


async def test_a_stream_may_begin_elsewhere_but_not_go_on_there(pair: Pair) -> None:
    pair.local.dead = "down"
    whole = list[ChatResult]()
    assert "".join([piece async for piece in pair.backend.stream(ask(), whole.append)]) == "Noted: rice"
    assert [result.route for result in whole] == ["api"]
    both = Fallback([Route("local", Breaking()), Route("api", api := ScriptedBackend())])
    stream = both.stream(ask())
    assert await anext(stream) == "One"
    with pytest.raises(BackendError, match="broke off"):
        await anext(stream)
    assert not api.chats
    pair.remote.dead = "down too"
    with pytest.raises(BackendError, match="no route is available: local: down; api: down too"):
        await anext(pair.backend.stream(ask()))


@pytest.mark.parametrize("names", [[], ["local", "local"]])
def test_routes_need_names_of_their_own(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="field routes: routes must have different names"):
        Fallback([Route(name, ScriptedBackend()) for name in names])


async def test_time_outs_among_many_that_succeed_leave_a_route_open(caplog: pytest.LogCaptureFixture) -> None:
    def answer(request: ChatRequest) -> str | ChatResult:
        late = request.messages[0].content in ("0", "31", "63")
        return ChatResult.failed("no response within 1 s", "timeout", model="small") if late else "local"

    route = Route("local", ScriptedBackend(answer), breaker=Breaker(failures=3))
    both = Fallback([route, Route("api", ScriptedBackend(lambda _: "remote"))])
    for _ in range(3):
        results = await both.chat([ask(f"{n}") for n in range(64)])
        assert [result.route for result in results].count("api") == 3
    assert route.breaker.closed and not caplog.messages
    dead = Route("local", ScriptedBackend(lambda _: ChatResult.failed("no", "timeout", model="small")))
    both = Fallback([dead, Route("api", ScriptedBackend(lambda _: "remote"))])
    assert {result.route for result in await both.chat([ask(f"{n}") for n in range(64)])} == {"api"}
    assert not dead.breaker.closed


async def test_an_empty_response_goes_on_and_harms_no_health() -> None:
    route = Route("local", ScriptedBackend(lambda _: ""), breaker=Breaker(failures=1))
    both = Fallback([route, Route("api", ScriptedBackend(lambda _: "remote"))])
    [result] = await both.chat([ask()])
    assert (result.text, result.route) == ("remote", "api") and route.breaker.closed
    assert [piece async for piece in both.stream(ask())] == ["remote"] and route.breaker.closed


def test_routes_are_tried_in_their_order_unless_all_have_a_price() -> None:
    def first(*prices: Price | None) -> str:
        routes = [Route(f"{n}", ScriptedBackend(), price) for n, price in enumerate(prices)]
        return asyncio.run(Fallback(routes).chat([ask()]))[0].route

    assert first(Price(2, 2), Price(1, 1)) == "1"
    assert first(Price(1, 1), FREE) == "1"
    assert first(Price(1, 1), Price(1, 1)) == "0"
    assert first(Price(2, 2), None) == first(None, FREE) == first(None, None) == "0"


def test_what_every_route_supports_is_supported() -> None:
    one, two = ScriptedBackend(model="one"), ScriptedBackend(model="two")
    one.capabilities = Capabilities(response_prefix=True, interfaces=frozenset({"summary", "embedding"}))
    two.capabilities = Capabilities(response_prefix=False, interfaces=frozenset({"summary"}))
    both = Fallback([Route("one", one), Route("two", two)]).capabilities
    assert not both.response_prefix and both.interfaces == {"summary"}
    alone = Fallback([Route("one", one)]).capabilities
    assert alone.response_prefix and alone.interfaces == {"summary", "embedding"}


async def test_a_probe_that_hangs_holds_up_no_other_request() -> None:
    class Hanging(ScriptedBackend):
        async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
            await hangs.wait()
            return await super().chat(requests)

    hangs = asyncio.Event()
    clock = Clock()
    both = Fallback([Route("local", Hanging(), breaker=opened(clock)), Route("api", api := ScriptedBackend())])
    call = asyncio.create_task(both.chat([ask(f"{n}") for n in range(5)]))
    async with asyncio.timeout(5):
        while len(api.chats) < 4:
            await asyncio.sleep(0.01)
    assert not call.done()
    hangs.set()
    assert [result.route for result in await call] == ["local", "api", "api", "api", "api"]


async def test_a_stream_that_was_withheld_is_an_answer() -> None:
    class Withholding(ScriptedBackend):
        async def stream(self, request: ChatRequest, on_complete: OnComplete = ignore_result) -> AsyncIterator[str]:
            raise BackendError("the model refuses: no", failure="withheld")
            yield ""

    route = Route("local", Withholding(), breaker=Breaker(failures=1))
    both = Fallback([route, Route("api", api := ScriptedBackend())])
    with pytest.raises(BackendError, match="the model refuses: no"):
        await anext(both.stream(ask()))
    assert route.breaker.closed and not api.chats
