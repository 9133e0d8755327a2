"""What several event loops, threads and forked processes use at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from popi.backends.base import Backend, ChatRequest, ScoreRequest
from popi.backends.ledger import Ledger, Price, Spent
from popi.backends.openai import OpenAIBackend
from popi.backends.sharing import PerLoop, Semaphore
from popi.backends.wrappers import Breaker, Cache, Cost, Fallback, Limit, Retry, Route
from popi.prompts import Message
from tests.faults import Scripted, ScriptedServer, Serve, piece
from tests.forks import needs_fork, succeeds_in_child
from tests.servers import SERVED

Result = TypeVar("Result")

PRICE = Price(1.0, 1.0)


def forking(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that forks."""
    allowed = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    return needs_fork(allowed(test))


def ask(text: str = "Why?") -> ChatRequest:
    return ChatRequest([Message("user", text)], max_tokens=9, temperature=1.0, seed=1)


def in_threads(count: int, work: Callable[[int], Coroutine[Any, Any, Result]]) -> list[Result]:
    """Runs work in as many threads at the same time, each with its own event loop."""
    start = threading.Barrier(count)

    def run(number: int) -> Result:
        start.wait()
        return asyncio.run(asyncio.wait_for(work(number), timeout=20))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def in_child(work: Callable[[], Coroutine[Any, Any, bool]]) -> bool:
    """Runs work in a forked child."""
    return succeeds_in_child(lambda: asyncio.run(asyncio.wait_for(work(), timeout=15)))


def full(server: ScriptedServer, folder: Path, ledger: Ledger, **options: Any) -> Backend:
    """All wrappers around a server."""
    remote = OpenAIBackend("m", base_url=server.url, key=None, **options)
    limited = Limit(
        Cost(remote, price=PRICE, ledger=ledger),
        max_concurrency=2,
        requests_per_minute=10_000,
        tokens_per_minute=1_000_000,
    )
    return Cache(Fallback([Route("one", Retry(limited))]), folder / "cache.sqlite")


def slowly(body: dict[str, Any]) -> Scripted:
    text = f"so {body['messages'][0]['content']}"
    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    return Scripted([piece(text, "stop", usage=usage)], delay=0.01)


async def test_a_semaphore_gives_places_in_order_and_takes_them_back() -> None:
    places, order = Semaphore(2), list[int]()

    async def work(number: int) -> None:
        await places.acquire()
        order.append(number)
        await asyncio.sleep(0.001)
        places.release()

    await asyncio.gather(*(work(number) for number in range(10)))
    assert order == list(range(10))


async def test_who_stops_waiting_keeps_no_place() -> None:
    places = Semaphore(1)
    await places.acquire()
    waiting = [asyncio.create_task(places.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    places.release()
    # It has its place, but does not know yet.
    waiting[1].cancel()
    async with asyncio.timeout(5):
        await waiting[2]
    places.release()
    async with asyncio.timeout(5):
        await places.acquire()


def test_a_semaphore_holds_for_all_loops_together() -> None:
    places = Semaphore(3)
    now, most, lock = 0, 0, threading.Lock()

    async def work(number: int) -> None:
        nonlocal now, most
        for _ in range(20):
            await places.acquire()
            with lock:
                now += 1
                most = max(most, now)
            await asyncio.sleep(0.001)
            with lock:
                now -= 1
            places.release()

    in_threads(6, work)
    assert most == 3


def test_a_place_is_not_given_to_a_loop_that_has_ended() -> None:
    places = Semaphore(1)

    async def abandon() -> asyncio.Task[None]:
        await places.acquire()
        task = asyncio.create_task(places.acquire())
        await asyncio.sleep(0)
        return task

    # Unlike ``asyncio.run`` it does not cancel the task that waits.
    loop = asyncio.new_event_loop()
    abandoned = loop.run_until_complete(abandon())
    loop.close()
    places.release()
    assert not abandoned.done()
    asyncio.run(asyncio.wait_for(places.acquire(), timeout=5))


def test_each_loop_has_its_own_value() -> None:
    made = iter(range(100))
    values = PerLoop(lambda: next(made))

    async def get(number: int) -> tuple[int, int]:
        return values.get(), values.get()

    assert len({pair[0] for pair in in_threads(4, get)}) == 4
    assert all(one == two for one, two in in_threads(4, get))


@pytest.mark.parametrize("tokenizer", [None, SERVED], ids=["by messages", "by token ids"])
def test_one_backend_serves_many_loops_at_once(serve: Serve, tmp_path: Path, tokenizer: str | None) -> None:
    server, ledger = serve(lambda body: slowly({"messages": [{"content": "fine"}]})), Ledger(cap=1.0)
    backend = full(server, tmp_path, ledger, tokenizer=tokenizer)

    async def work(number: int) -> list[str]:
        results = await backend.chat([ask(f"{number} {n}") for n in range(8)])
        shown = [each async for each in backend.stream(ask(f"{number} again"))]
        return ["".join(shown), *(result.text for result in results)]

    assert {text for texts in in_threads(4, work) for text in texts} == {"so fine"}
    assert ledger.total.requests == 4 * 9 and not ledger.total.unsure
    asyncio.run(backend.close())


def test_a_budget_for_one_request_is_shared_by_two_loops(serve: Serve) -> None:
    price = Price(0.0, 1e6)
    ledger = Ledger(cap=16.0)
    server = serve(slowly)
    backend = Cost(OpenAIBackend("m", base_url=server.url, key=None), price=price, ledger=ledger)

    async def work(number: int) -> str | None:
        [result] = await backend.chat([ask()])
        return result.error

    # Each reserves nine and costs two: while one is open there is no room for another.
    assert in_threads(4, work) == [None] * 4 and ledger.total.money == 8.0


def test_accounts_add_up_over_threads() -> None:
    ledger = Ledger(cap=3.5)

    async def work(number: int) -> int:
        granted = 0
        for _ in range(200):
            if await ledger.reserve(1.0):
                granted += 1
                await asyncio.sleep(0)
                ledger.settle(1.0, Spent(requests=1), role="r", user=f"{number % 3}")
        return granted

    assert in_threads(5, work) == [200] * 5
    assert ledger.total.requests == sum(spent.requests for spent in ledger.by_user().values()) == 1000
    assert ledger.try_reserve(3.5)


@forking
def test_the_backend_can_be_used_after_a_fork(serve: Serve, tmp_path: Path) -> None:
    server, ledger = serve(slowly), Ledger(cap=1.0)
    backend = full(server, tmp_path, ledger)
    assert asyncio.run(backend.chat([ask("before")]))[0].text == "so before"

    async def child() -> bool:
        [known, new] = await backend.chat([ask("before"), ask("after")])
        await backend.close()
        return (known.text, new.text) == ("so before", "so after")

    assert in_child(child)
    # Neither the connections nor the file of the parent were touched.
    results = asyncio.run(backend.chat([ask("before"), ask("after"), ask("then")]))
    assert [result.text for result in results] == ["so before", "so after", "so then"]
    assert len(server.bodies) == 3


@forking
def test_a_fork_in_the_middle_of_requests_leaves_nothing_locked(serve: Serve, tmp_path: Path) -> None:
    server, ledger = serve(slowly), Ledger(cap=1.0)
    backend = full(server, tmp_path, ledger)
    over = threading.Event()

    async def load() -> None:
        number = 0
        while not over.is_set():
            await backend.chat([ask(f"{number + n}") for n in range(8)])
            number += 8

    busy = threading.Thread(target=asyncio.run, args=(load(),))
    busy.start()
    try:

        async def child() -> bool:
            results = await backend.chat([ask(f"child {n}") for n in range(8)])
            return all(result.error is None for result in results)

        for _ in range(5):
            time.sleep(0.02)
            assert in_child(child)
    finally:
        over.set()
        busy.join()


@forking
def test_a_child_inherits_no_open_file_of_a_cache(serve: Serve, tmp_path: Path) -> None:
    backend = full(serve(slowly), tmp_path, Ledger(cap=1.0))
    [before] = asyncio.run(backend.chat([ask()]))
    assert isinstance(backend, Cache) and backend._open_connection is not None

    async def child() -> bool:
        inherited = backend._open_connection
        return inherited is None and await backend.chat([ask()]) == [before] and backend.hits == 1

    assert in_child(child)
    assert asyncio.run(backend.chat([ask()])) == [before]


@forking
def test_a_fork_forgets_what_the_parent_reserved_and_probes() -> None:
    ledger, breaker = Ledger(cap=1.0), Breaker(failures=1, cooldown=1e-9)
    assert ledger.try_reserve(1.0)
    breaker.failed(breaker.admit(1))
    time.sleep(0.01)
    assert breaker.admit(1).probe and not breaker.admit(1).count

    async def child() -> bool:
        return ledger.try_reserve(1.0) and breaker.admit(1).probe

    assert in_child(child)
    assert not ledger.try_reserve(1.0) and not breaker.admit(1).count


@forking
def test_a_fork_while_a_lock_is_held_does_not_block_the_child() -> None:
    ledger, places = Ledger(cap=1.0), Semaphore(1)
    limited = Limit(OpenAIBackend("m", base_url="http://127.0.0.1:9/v1", key=None), requests_per_minute=5)

    async def child() -> bool:
        await places.acquire()
        assert limited._requests is not None
        await limited._requests.take(1)
        return ledger.try_reserve(0.5)

    assert limited._requests is not None
    with ledger._lock, places._lock, limited._requests._lock:
        assert in_child(child)


async def test_chats_and_streams_share_the_places_of_a_backend(serve: Serve) -> None:
    server = serve(Scripted([piece("fine", "stop")], delay=0.05))
    async with OpenAIBackend("m", base_url=server.url, key=None, max_concurrency=1) as backend:

        async def stream() -> list[str]:
            return [each async for each in backend.stream(ask())]

        began = time.monotonic()
        async with asyncio.timeout(10):
            await asyncio.gather(backend.chat([ask()] * 2), stream())
        assert time.monotonic() - began >= 0.15
    assert len(server.bodies) == 3


async def test_closing_in_one_loop_closes_the_connections_of_all(serve: Serve) -> None:
    server = serve(slowly)
    backend = OpenAIBackend("m", base_url=server.url, key=None)
    opened, closed = threading.Event(), threading.Event()

    async def elsewhere() -> bool:
        await backend.chat([ask()])
        client = backend._client()
        opened.set()
        while not client._openai.is_closed():
            await asyncio.sleep(0.005)
        closed.set()
        return True

    thread = threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(elsewhere(), timeout=10)))
    thread.start()
    await asyncio.to_thread(opened.wait)
    await backend.close()
    await asyncio.to_thread(thread.join)
    assert closed.is_set()


def test_scoring_in_many_loops(serve: Serve) -> None:
    server = serve(Scripted({"choices": [{"text": "", "logprobs": {"token_logprobs": [None, *[-1.0] * 100]}}]}))
    backend = OpenAIBackend("m", base_url=server.url, key=None, tokenizer=SERVED)

    async def work(number: int) -> float:
        [result] = await backend.score([ScoreRequest([Message("user", "Why?")], "So.")])
        return result.logprob

    assert len(set(in_threads(4, work))) == 1
