"""Callers of other threads, event loops and forked processes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from popi.backends.base import ChatRequest, ChatResult
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers import Cost, Limit
from popi.errors import BackendError
from popi.personalizer import Personalizer
from popi.response import Response
from popi.roles import Conditioned
from popi.testing import ScriptedBackend, tiny_model
from popi_generators import PromptedGenerator
from popi_inference import Empty, LLMSummarizer
from tests.forks import needs_fork, succeeds_in_child

from .conftest import LONG, SHORT, Gate, collect, eventually, personalizer_on, script, summary_of, wants_summary


class TestThreadsAndLoops:
    def test_works_without_an_event_loop(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        assert summary_of(personalizer) == "- Said 1 things"
        assert str(personalizer.respond_sync("ann", "How?")) == "Answered under - Said 1 things"

    def test_many_threads_and_loops_at_the_same_time(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        personalizer.observe("ann", SHORT)
        with ThreadPoolExecutor(8) as threads:
            summaries = list(threads.map(lambda _: personalizer.infer_sync("ann"), range(40)))
            blocking = threads.map(lambda _: personalizer.respond_sync("ann", "How?").text, range(40))
            loops = threads.map(lambda _: asyncio.run(personalizer.respond("ann", "How?")).text, range(40))
            assert {*blocking, *loops} == {"Answered under - Said 1 things"}
        assert len(set(map(id, summaries))) == 1
        assert sum(map(wants_summary, backend.chats)) == 1

    async def test_a_blocking_call_inside_an_event_loop_returns(self, gate: Gate) -> None:
        limited = Limit(gate, max_concurrency=1)
        personalizer = Personalizer(LLMSummarizer(limited), PromptedGenerator(limited))
        personalizer.observe("ann", SHORT)
        waiting = asyncio.create_task(personalizer.respond("ann", "How?"))
        await eventually(lambda: gate.running)
        gate.opened.set()
        # The task above holds the only place, and is inside the inference that this call waits for.
        assert str(personalizer.respond_sync("ann", "How?")) == "Answered under - Said 1 things"
        assert str(await waiting) == "Answered under - Said 1 things"
        personalizer.close_sync()

    def test_a_budget_for_one_request_is_passed_on_between_a_task_and_a_thread(self) -> None:
        class Slow(ScriptedBackend):
            async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
                await asyncio.sleep(0.05)
                return await super().chat(requests)

        price = Price(prompt=0, completion=1_000_000)
        backend = Cost(Slow(script), price=price, ledger=Ledger(300))
        personalizer = Personalizer(Empty(), PromptedGenerator(backend, max_tokens=256))

        async def both() -> list[Response]:
            thread = asyncio.to_thread(personalizer.respond_sync, "ann", "How?")
            async with asyncio.timeout(10):
                return await asyncio.gather(personalizer.respond("ann", "How?"), thread)

        assert [str(response) for response in asyncio.run(both())] == ["Answered under"] * 2

    async def test_a_blocking_call_from_the_background_thread_is_an_error(self) -> None:
        class Blocking(PromptedGenerator):
            async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
                personalizer.respond_sync("bob", "How?")
                return await super().respond(items)

        personalizer = Personalizer(Empty(), Blocking(ScriptedBackend(script)))
        with pytest.raises(RuntimeError, match="use await"):
            await personalizer.respond("ann", "How?")

    async def test_closing_ends_what_is_running(self, gate: Gate) -> None:
        personalizer = personalizer_on(gate)
        loop = asyncio.create_task(personalizer.respond(None, "How?"))
        thread = asyncio.create_task(asyncio.to_thread(personalizer.respond_sync, None, "How?"))
        stream = asyncio.create_task(collect(personalizer.stream(None, "How?")))
        many = asyncio.create_task(collect(personalizer.respond_many([(None, "How?")])))
        await eventually(lambda: gate.running == 4)
        await personalizer.close()
        for task in (loop, thread, stream, many):
            with pytest.raises(BackendError, match="closed while the request was running"):
                await task
        assert gate.running == 0

    async def test_closing_twice_is_harmless_and_what_is_known_stays(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        summary = await personalizer.infer("ann")
        await personalizer.close()
        await personalizer.close()
        assert personalizer.infer_sync("ann") is summary

    def test_no_thread_is_left_when_nobody_uses_it_any_more(self) -> None:
        def threads() -> int:
            return sum(thread.name == "popi-loop" for thread in threading.enumerate())

        before = threads()
        personalizer = personalizer_on(ScriptedBackend(script))
        personalizer.respond_sync("ann", "How?")
        assert threads() == before + 1
        del personalizer
        deadline = time.monotonic() + 10
        while threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads() == before


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
class TestForks:
    def test_a_child_goes_on(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        before = personalizer.respond_sync("ann", "How?")

        def works() -> bool:
            personalizer.observe("ann", LONG)
            return (
                str(personalizer.respond_sync("ann", "How?")) == "Answered under - Said 2 things"
                and asyncio.run(collect(personalizer.respond_many([("ann", "How?")] * 3)))[0][1].is_complete
            )

        assert succeeds_in_child(works)
        assert personalizer.respond_sync("ann", "How?") == before
        assert succeeds_in_child(works)

    def test_a_child_goes_on_while_the_parent_is_working(self, gated: Personalizer, gate: Gate) -> None:
        gated.observe("ann", SHORT)
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(gated.respond_sync, "ann", "How?") for _ in range(4)]
            assert gate.arrived.wait(10)

            def works() -> bool:
                gate.opened.set()
                return str(gated.respond_sync("ann", "How?")) == "Answered under - Said 1 things"

            assert succeeds_in_child(works)
            gate.opened.set()
            assert {str(response.result(10)) for response in waiting} == {"Answered under - Said 1 things"}

    def test_a_child_of_a_running_event_loop_goes_on(self, personalizer: Personalizer) -> None:
        async def main() -> bool:
            before = str(await personalizer.respond("ann", "How?"))
            return succeeds_in_child(lambda: str(personalizer.respond_sync("ann", "How?")) == before)

        assert asyncio.run(main())

    @pytest.mark.slow
    def test_a_child_goes_on_with_a_model_in_this_process(self, tmp_path: Path) -> None:
        model, tokenizer = tiny_model()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        personalizer = Personalizer.load(str(tmp_path), inference="empty", generator_options={"max_tokens": 8})
        before = str(personalizer.respond_sync("ann", "How do magnets work?"))
        assert succeeds_in_child(lambda: str(personalizer.respond_sync("ann", "How do magnets work?")) == before)
        assert str(personalizer.respond_sync("ann", "How do magnets work?")) == before
        personalizer.close_sync()
