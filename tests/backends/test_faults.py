"""Bad networks, full servers and broken gateways in front of a real server, and a real server that dies."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import get_args

import pytest

from popi.backends.base import Backend, ChatRequest, ChatResult, FailureKind, ScoreRequest, ScoreResult
from popi.backends.ledger import FREE, Ledger, Price
from popi.backends.openai import OpenAIBackend
from popi.backends.wrappers import Breaker, Cost, Fallback, Limit, Retry, Route
from popi.errors import BackendError
from popi.prompts import Message
from popi.testing import VLLMServer, free_port
from tests.faults import FAULTS, Fault, FaultyServer
from tests.servers import KEY, SERVED, mini_server

pytestmark = pytest.mark.slow

TIMEOUT, DEADLINE, AT_ONCE = 3.0, 12.0, 32

SHARES: dict[Fault, float] = dict.fromkeys(FAULTS, 0.03) | {"503 burst": 0.01}
"""A burst is of four."""

PRICE = Price(prompt=1.0, completion=4.0)


def ask(number: int) -> ChatRequest:
    """A request whose answer is its own: sampled, by its own seed."""
    return ChatRequest([Message("user", f"What is {number}?")], max_tokens=6, temperature=1.0, seed=number)


def rate(number: int) -> ScoreRequest:
    return ScoreRequest([Message("user", f"What is {number}?")], f"It is {number * number}.")


def backend(url: str, **options: object) -> OpenAIBackend:
    return OpenAIBackend(SERVED, base_url=url, key=KEY, **options)


@dataclass
class Outcome:
    """What became of a request: an answer or the kind of its failure, and after how long."""

    answer: ChatResult | ScoreResult | str | None
    failure: str | None
    seconds: float


Job = tuple[str, Sequence[int]]
"""Numbers of requests that are sent in one call."""


async def done(backend: Backend, job: Job) -> list[Outcome]:
    """Does a job; an error of the call is one of each of its requests."""
    way, numbers = job
    began = time.monotonic()
    try:
        if way == "stream":
            told = ["".join([piece async for piece in backend.stream(ask(number))]) for number in numbers]
            return [Outcome(text, None, time.monotonic() - began) for text in told]
        if way == "score":
            results = await backend.score([rate(number) for number in numbers])
        else:
            results = await backend.chat([ask(number) for number in numbers])
        return [Outcome(result, result.failure, time.monotonic() - began) for result in results]
    except BackendError as error:
        return [Outcome(None, error.failure or "untyped", time.monotonic() - began)] * len(numbers)


async def all_done(backend: Backend, jobs: Sequence[Job]) -> dict[int, Outcome]:
    """Does all jobs, eight at a time."""
    waiting, found = iter(jobs), {}

    async def work() -> None:
        for job in waiting:
            outcomes = await done(backend, job)
            assert len(outcomes) == len(job[1]) and not found.keys() & {*job[1]}
            found.update(zip(job[1], outcomes, strict=True))

    await asyncio.gather(*(work() for _ in range(8)))
    return found


def thousand() -> list[Job]:
    """Seven hundred chats and a hundred scores in batches, and two hundred streams, in a mixed order."""
    jobs: list[Job] = [("chat", range(start, start + 20)) for start in range(0, 700, 20)]
    jobs += [("score", range(start, start + 10)) for start in range(700, 800, 10)]
    jobs += [("stream", [number]) for number in range(800, 1000)]
    random.Random(0).shuffle(jobs)
    return jobs


def is_same(told: ChatResult | ScoreResult | str | None, expected: ChatResult | ScoreResult | str | None) -> bool:
    if isinstance(told, ScoreResult) and isinstance(expected, ScoreResult):
        sizes = (told.tokens, told.prompt_tokens) == (expected.tokens, expected.prompt_tokens)
        return sizes and abs(told.logprob - expected.logprob) < 1e-3 * told.tokens
    return told == expected


async def test_a_thousand_requests_under_all_faults_end_well_in_time_and_within_the_budget(
    vllm_url: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    jobs = thousand()
    tasks, threads, children = asyncio.all_tasks(), {*threading.enumerate()}, {*active_children()}
    async with backend(vllm_url, tokenizer=SERVED, max_concurrency=AT_ONCE) as known:
        expected = await all_done(known, jobs)
    # About nine tenths of what all of them cost: the last ones are not sent.
    ledger = Ledger(cap=0.053)
    with FaultyServer(vllm_url, SHARES, stall=TIMEOUT + 1).running() as faulty:
        counted = Cost(backend(faulty.url, tokenizer=SERVED, timeout=TIMEOUT), price=PRICE, ledger=ledger)
        async with Retry(
            Limit(counted, max_concurrency=AT_ONCE), attempts=4, deadline=DEADLINE, first=0.05, longest=0.5
        ) as full:
            found = await all_done(full, jobs)
    # The loop's own pool, in which the SDK looks up its platform, ends with the loop.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert asyncio.all_tasks() == tasks and {*threading.enumerate()} == threads and {*active_children()} == children
    outcomes = Counter(outcome.failure or "answered" for outcome in found.values())
    slowest = max(outcome.seconds for outcome in found.values())
    told = {"planted": {**faulty.planted}, "passed on": faulty.passed, "outcomes": {**outcomes}}
    for name, figure in {**told, "spent": ledger.total, "slowest": f"{slowest:.2f} s"}.items():
        record_testsuite_property(f"faults: {name}", figure)

    assert all(faulty.planted[fault] > 0 for fault in FAULTS)
    assert sorted(found) == [*range(1000)]
    assert {*outcomes} <= {"answered", *get_args(FailureKind)} and outcomes["answered"] > 700
    assert slowest < DEADLINE + TIMEOUT
    # Nothing is sent behind the accounts' back, and nothing above the cap; all that was set aside is free again.
    assert faulty.planted.total() + faulty.passed <= ledger.total.requests
    left = ledger.cap - ledger.total.money - ledger.total.unsure
    assert left >= 0 and outcomes["budget"] == ledger.refused > 0
    async with asyncio.timeout(1):
        assert await ledger.reserve(0.999 * left)
    # Every answer is the one of its own request.
    wrong = [n for n in found if found[n].failure is None and not is_same(found[n].answer, expected[n].answer)]
    assert wrong == []
    assert len({repr(outcome.answer) for outcome in expected.values()}) > 800


BY = pytest.mark.parametrize("tokenizer", [None, SERVED], ids=["by messages", "by token ids"])

ALONE: list[tuple[Fault, FailureKind, float | None]] = [
    ("429 until", "rate_limit", 1.0),
    ("429", "rate_limit", None),
    ("500", "server", None),
    ("503 burst", "server", None),
    ("refused", "unreachable", None),
    ("reset", "unreachable", None),
    ("half a body", "malformed", None),
    ("stall", "timeout", None),
    ("html", "malformed", None),
]


@BY
@pytest.mark.parametrize(("fault", "kind", "later"), ALONE, ids=[fault for fault, _, _ in ALONE])
async def test_a_fault_alone_is_a_failure_of_its_kind(
    vllm_url: str, tokenizer: str | None, fault: Fault, kind: FailureKind, later: float | None
) -> None:
    with FaultyServer(vllm_url, {fault: 1.0}, stall=TIMEOUT + 1, later=1.0).running() as faulty:
        async with backend(faulty.url, tokenizer=tokenizer, timeout=TIMEOUT) as bare:
            assert await failure(bare.chat([ask(1)])) == (kind, later)
            if tokenizer is not None:
                assert await failure(bare.score([rate(1)])) == (kind, later)
            pieces = []
            with pytest.raises(BackendError) as caught:
                async for piece in bare.stream(ask(1)):
                    pieces.append(piece)
            assert (caught.value.failure, caught.value.retry_after) == (kind, later)
            assert bool(pieces) == (fault in ("reset", "half a body", "stall"))
    assert [*faulty.planted] == [fault] and faulty.passed == 0


async def failure(asked: Awaitable[list[ChatResult] | list[ScoreResult]]) -> tuple[str | None, float | None]:
    """Of what kind the failure of a call of one request is, whether told or raised; and when to ask again."""
    try:
        [result] = await asked
    except BackendError as error:
        return error.failure, error.retry_after
    return result.failure, result.retry_after


async def test_the_same_seed_deals_the_same_faults() -> None:
    async def dealt(seed: int) -> list[str | None]:
        shares: dict[Fault, float] = {"429": 0.4, "500": 0.4, "503 burst": 0.2}
        with FaultyServer("http://nobody/v1", shares, seed=seed).running() as faulty:
            async with OpenAIBackend(SERVED, base_url=faulty.url, key=None, max_concurrency=1) as bare:
                return [result.error for result in await bare.chat([ask(n) for n in range(40)])]

    first, again, other = await dealt(1), await dealt(1), await dealt(2)
    assert first == again != other
    assert "503 503 503 503" in " ".join(str(error).removeprefix("HTTP ")[:3] for error in first)


@asynccontextmanager
async def loaded(backend: Backend) -> AsyncIterator[list[tuple[int, ChatResult]]]:
    """Asks as long as it is held; gives the numbers of what was asked, and the answers."""
    found: list[tuple[int, ChatResult]] = []
    over = asyncio.Event()

    async def work(first: int) -> None:
        while not over.is_set():
            numbers = [first, first + 1]
            found.extend(zip(numbers, await backend.chat([ask(number) for number in numbers]), strict=True))
            await asyncio.sleep(0.3)

    async with asyncio.TaskGroup() as group:
        for worker in range(4):
            group.create_task(work(2 * worker))
        yield found
        over.set()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.05)


async def test_a_server_that_is_killed_under_load_is_replaced_at_once_and_taken_back(
    vllm_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="popi")
    port = free_port()
    local = Route("local", backend(f"http://127.0.0.1:{port}/v1"), FREE, breaker=Breaker(cooldown=1.0))
    api = Route("api", backend(vllm_url), PRICE)

    def said(words: str) -> bool:
        return any(words in message for message in caplog.messages)

    with ExitStack() as servers:

        async def started(log: str) -> VLLMServer:
            return await asyncio.to_thread(servers.enter_context, mini_server(tmp_path / log, port=port))

        server = await started("first")
        async with Fallback([api, local]) as both, loaded(both) as found:
            await until(lambda: len(found) >= 20)
            before = len(found)
            server.kill()
            await until(lambda: said("route local: circuit open"))
            out = len(found)
            await until(lambda: len(found) >= out + 20)
            without = len(found)
            await started("second")
            await until(lambda: said("route local: circuit closed"))
            back = len(found)
            # What was under way when it came back is not more than eight.
            await until(lambda: len(found) >= back + 8 + 20)
    assert {result.failure for _, result in found} == {None}
    routes = [result.route for _, result in found]
    assert {*routes[:before]} == {"local"} and {*routes[out:without]} == {"api"} and {*routes[back + 8 :]} == {"local"}
    assert len({(number, result.text) for number, result in found}) == 8
    first, *rest = [record.getMessage() for record in caplog.records if record.name.startswith("popi")]
    assert first.startswith("route local: circuit open, requests go to other routes: ")
    assert rest == ["route local: circuit closed"]
