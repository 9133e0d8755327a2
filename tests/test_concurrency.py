from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popi.concurrency import BUFFERED, BackgroundLoop, as_completed, attempts, in_groups
from popi.errors import BackendError


async def thread_name() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


async def count(to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number


class TestBackgroundLoop:
    async def test_all_work_runs_in_one_thread(self) -> None:
        loop = BackgroundLoop()
        names = {
            loop.wait(thread_name()),
            await loop.run(thread_name()),
            await asyncio.to_thread(loop.wait, thread_name()),
        }
        assert names == {"popi-loop"}
        loop.stop()

    async def test_an_error_of_the_work_is_raised_as_it_is(self) -> None:
        async def fail() -> None:
            raise KeyError("x")

        async def fail_midway() -> AsyncIterator[int]:
            yield 1
            raise KeyError("x")

        loop = BackgroundLoop()
        with pytest.raises(KeyError):
            loop.wait(fail())
        with pytest.raises(KeyError):
            await loop.run(fail())
        seen = []
        with pytest.raises(KeyError):
            async for number in loop.iterate(fail_midway()):
                seen.append(number)
        assert seen == [1]
        loop.stop()

    async def test_items_keep_their_order_and_do_not_pile_up(self) -> None:
        read = []

        async def numbers() -> AsyncIterator[int]:
            for number in range(5 * BUFFERED):
                read.append(number)
                yield number

        loop = BackgroundLoop()
        items = loop.iterate(numbers())
        assert await anext(items) == 0
        await asyncio.sleep(0.05)
        assert len(read) <= BUFFERED + 2
        assert [number async for number in items] == list(range(1, 5 * BUFFERED))
        loop.stop()

    def test_stopping_while_others_call_leaves_nobody_waiting(self) -> None:
        loop, stop = BackgroundLoop(), threading.Event()
        ended = {"returned": 0, "stopped": 0}

        async def work() -> int:
            await asyncio.sleep(random.random() / 1000)
            return 1

        def call(_: int) -> None:
            while not stop.is_set():
                try:
                    ended["returned"] += loop.wait(work())
                    assert asyncio.run(loop.run(work())) == 1
                    asyncio.run(iterate())
                except BackendError:
                    ended["stopped"] += 1

        async def iterate() -> None:
            assert [number async for number in loop.iterate(count(3))] == [0, 1, 2]

        with ThreadPoolExecutor(4) as threads:
            calls = [threads.submit(call, number) for number in range(4)]
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                time.sleep(0.002)
                loop.stop()
            stop.set()
            for each in calls:
                each.result(10)
        assert ended["returned"] > 10
        loop.stop()


@pytest.mark.parametrize(("limit", "order"), [(4, [3, 0, 1, 2]), (2, [3, 0, 1, 2]), (1, [0, 1, 2, 3])])
async def test_results_come_as_they_are_finished(limit: int, order: list[int]) -> None:
    """The last item is finished first where there is room for it; then the others, in their order."""
    finished: list[int] = []

    async def work(item: int) -> int:
        waits_for = order[: order.index(item)]
        async with asyncio.timeout(10):
            while finished != waits_for:
                await asyncio.sleep(0)
        return item

    items = [3, 0, 1, 2] if limit == 2 else range(4)
    async for item, result in as_completed(items, work, max_concurrency=limit):
        assert item == result
        finished.append(item)
    assert finished == order


async def test_a_new_item_is_read_before_the_results_of_others() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            read.append(number)
            yield number

    async def work(item: int) -> int:
        return item

    seen = 0
    async for _ in as_completed(items(), work, max_concurrency=4):
        seen += 1
        assert len(read) >= min(seen + 4, 20)


class TestGroups:
    async def test_a_group_has_what_arrived_while_the_reader_was_busy(self) -> None:
        gates = [asyncio.Event() for _ in range(6)]

        async def items() -> AsyncIterator[int]:
            for number, gate in enumerate(gates):
                await gate.wait()
                yield number

        groups = in_groups(items())
        gates[0].set()
        assert await anext(groups) == [0]
        for gate in gates[1:4]:
            gate.set()
        await asyncio.sleep(0.01)
        assert await anext(groups) == [1, 2, 3]
        for gate in gates[4:]:
            gate.set()
        assert [group async for group in groups] == [[4, 5]]

    @given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.booleans())
    def test_every_item_is_yielded_once_in_order(self, pauses: list[int], busy: list[int], fails: bool) -> None:
        async def items() -> AsyncIterator[int]:
            for number, pause in enumerate(pauses):
                for _ in range(pause):
                    await asyncio.sleep(0)
                yield number
            if fails:
                raise KeyError("x")

        async def run() -> list[int]:
            found: list[int] = []
            slow = iter(busy)
            with pytest.raises(KeyError) if fails else nullcontext():
                async for group in in_groups(items()):
                    assert 1 <= len(group) <= BUFFERED
                    found += group
                    for _ in range(next(slow, 0)):
                        await asyncio.sleep(0)
            return found

        assert asyncio.run(run()) == list(range(len(pauses)))

    async def test_a_slow_reader_holds_the_items_back(self) -> None:
        read: list[int] = []

        async def items() -> AsyncIterator[int]:
            for number in range(5 * BUFFERED):
                read.append(number)
                yield number

        groups = in_groups(items())
        await anext(groups)
        await asyncio.sleep(0.01)
        assert len(read) <= 2 * BUFFERED + 1
        await groups.aclose()

    async def test_closing_it_closes_the_items(self) -> None:
        closed = []

        async def items() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.sleep(100)
            finally:
                closed.append(True)

        groups = in_groups(items())
        assert await anext(groups) == [1]
        await groups.aclose()
        assert closed == [True]


async def test_no_items_have_no_results() -> None:
    assert [pair async for pair in as_completed([], asyncio.sleep, max_concurrency=3)] == []
    assert [group async for group in in_groups(count(0))] == []


@given(
    st.lists(st.sampled_from(["good", "lost", "slow"]), max_size=30),
    st.integers(1, 5),
)
def test_every_item_has_one_outcome_unless_nothing_responds(kinds: list[str], limit: int) -> None:
    """A backend that does not respond in a row of eight counts as dead; fewer errors are data."""

    async def work(item: tuple[int, str]) -> str:
        await asyncio.sleep(0)
        if item[1] == "slow":
            await asyncio.sleep(0)
        if item[1] == "lost":
            raise BackendError(f"lost {item[0]}", failure="unreachable")
        return f"done {item[0]}"

    async def run() -> dict[tuple[int, str], str]:
        found = {}
        pairs = attempts(enumerate(kinds), work, lambda item, error: str(error), max_concurrency=limit)
        async for item, result in pairs:
            assert item not in found
            found[item] = result
        return found

    longest = max((len(row) for row in "".join(kind[0] for kind in kinds).replace("s", "g").split("g")), default=0)
    if kinds and all(kind == "lost" for kind in kinds):
        with pytest.raises(BackendError, match="lost"):
            asyncio.run(run())
    elif longest < 4:
        found = asyncio.run(run())
        assert found == {
            (place, kind): f"{'lost' if kind == 'lost' else 'done'} {place}" for place, kind in enumerate(kinds)
        }
