"""Many users and prompts at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest

from popi.backends.base import ChatRequest, ChatResult, FailureKind
from popi.errors import BackendError, ConfigError, InputError
from popi.personalizer import Personalizer
from popi.response import Response
from popi.roles import Conditioned, Failure
from popi.signals import Statement, UserSignals
from popi.summary import PreferenceSummary
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator
from popi_inference import Empty

from .conftest import SHORT, Gate, collect, eventually, personalizer_on, script


class TestMany:
    async def test_each_summary_comes_as_soon_as_it_is_there(self) -> None:
        first = threading.Event()

        def answer(request: ChatRequest) -> str:
            return "- likes tea [1]"

        class Uneven(ScriptedBackend):
            async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
                while "slow" in requests[0].messages[0].content and not first.is_set():
                    await asyncio.sleep(0.001)
                return await super().chat(requests)

        personalizer = personalizer_on(Uneven(answer))
        users = [UserSignals(user_id=name, signals=(Statement(text=f"I am {name}"),)) for name in ("slow", *"abcd")]
        order = []
        async for user, summary in personalizer.summarize(users, max_concurrency=2):
            assert isinstance(summary, PreferenceSummary)
            order.append(user.user_id)
            if len(order) == 4:
                first.set()
        assert order == ["a", "b", "c", "d", "slow"]
        assert personalizer.users() == []

    async def test_stored_users_are_summarized_by_id(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        for name in ("ann", "bob", "eve"):
            personalizer.observe(name, SHORT)
        await personalizer.infer("ann")
        personalizer.edit("eve", "- mine")
        outcomes = dict(await collect(personalizer.summarize(personalizer.users())))
        assert {name: summary.text for name, summary in outcomes.items()} == {
            "ann": "- Said 1 things",
            "bob": "- Said 1 things",
            "eve": "- mine",
        }
        assert len(backend.chats) == 2
        assert await personalizer.infer("bob") is outcomes["bob"]

    async def test_items_are_read_when_there_is_room(self, gated: Personalizer, gate: Gate) -> None:
        read = []

        def prompts() -> Iterator[tuple[None, str]]:
            for number in range(100):
                read.append(number)
                yield None, f"How {number}?"

        waiting = asyncio.create_task(collect(gated.respond_many(prompts(), max_concurrency=3)))
        await eventually(lambda: gate.running == 3)
        assert len(read) == 3
        gate.opened.set()
        outcomes = await waiting
        assert sorted(prompt for (_, prompt), _ in outcomes) == sorted(f"How {number}?" for number in range(100))
        assert gate.most == 3

    async def test_a_slow_reader_is_not_buried(self, personalizer: Personalizer) -> None:
        read = []

        def prompts() -> Iterator[tuple[None, str]]:
            for number in range(1000):
                read.append(number)
                yield None, "How?"

        outcomes = personalizer.respond_many(prompts(), max_concurrency=4)
        await anext(outcomes)
        await asyncio.sleep(0.1)
        assert len(read) < 100
        assert len(await collect(outcomes)) == 999

    async def test_one_item_that_fails_is_data(self, personalizer: Personalizer) -> None:
        items = [("ann", "How?"), ("bob", "fail"), Conditioned("fail"), Conditioned("How?")]
        outcomes = await collect(personalizer.respond_many(items))
        assert {item: isinstance(outcome, Response) for item, outcome in outcomes} == dict(
            zip(items, (True, False, False, True), strict=True)
        )
        assert {outcome for _, outcome in outcomes if isinstance(outcome, Failure)} == {
            Failure("bob", "cannot", "request"),
            Failure("", "cannot", "request"),
        }

    @pytest.mark.parametrize("kind", [None, "denied"])
    async def test_an_error_of_the_backend_ends_the_work_and_loses_nothing(self, kind: FailureKind | None) -> None:
        class Dying(ScriptedBackend):
            async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
                content = requests[0].messages[0].content
                await asyncio.sleep(60 if "never" in content else 0.02)
                if "die" in content:
                    raise BackendError("gone", failure=kind)
                return await super().chat(requests)

        personalizer = personalizer_on(Dying(script))
        prompts = [(None, prompt) for prompt in ("a", "die", "b", "never", "c", "d")]
        done = []
        with pytest.raises(BackendError, match="gone"):
            async for (_, prompt), _ in personalizer.respond_many(prompts, max_concurrency=5):
                done.append(prompt)
        assert sorted(done) == ["a", "b", "c"]

    async def test_a_request_that_does_not_reach_the_server_is_data_while_others_do(self) -> None:
        class Shaky(ScriptedBackend):
            async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
                if "lost" in requests[0].messages[0].content:
                    raise BackendError("connection reset", failure="unreachable")
                return await super().chat(requests)

        prompts = [("ann", "lost"), *[("ann", f"How {number}?") for number in range(30)], ("bob", "lost")]
        personalizer = Personalizer(Empty(), PromptedGenerator(Shaky(script)))
        outcomes = dict(await collect(personalizer.respond_many(prompts, max_concurrency=4)))
        lost = {item: outcome for item, outcome in outcomes.items() if isinstance(outcome, Failure)}
        assert lost == {
            ("ann", "lost"): Failure("ann", "connection reset", "unreachable"),
            ("bob", "lost"): Failure("bob", "connection reset", "unreachable"),
        }
        assert len(outcomes) == 32

    @pytest.mark.parametrize("prompts", [1, 3, 1000])
    async def test_a_server_that_nothing_reaches_is_an_error(self, prompts: int) -> None:
        tried = 0

        class Down(ScriptedBackend):
            async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
                nonlocal tried
                tried += 1
                raise BackendError("connection refused", failure="unreachable")

        personalizer = personalizer_on(Down(script))
        with pytest.raises(BackendError, match="connection refused"):
            await collect(personalizer.respond_many(((None, "How?") for _ in range(prompts)), max_concurrency=10))
        assert tried <= 20

    async def test_an_error_of_the_items_comes_after_the_results(self, personalizer: Personalizer) -> None:
        def prompts() -> Iterator[tuple[None, str]]:
            yield None, "a"
            yield None, "b"
            raise InputError("is not JSON", file="prompts.jsonl", line=3)

        done = []
        with pytest.raises(InputError, match=r"prompts\.jsonl:3: is not JSON"):
            async for (_, prompt), _ in personalizer.respond_many(prompts()):
                done.append(prompt)
        assert done == ["a", "b"]

    async def test_leaving_cancels_what_is_running(self, gated: Personalizer, gate: Gate) -> None:
        outcomes = gated.respond_many([(None, "How?")] * 10, max_concurrency=4)
        waiting = asyncio.create_task(anext(outcomes))
        await eventually(lambda: gate.running == 4)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await outcomes.aclose()
        assert gate.running == 0
        assert gate.chats == []

    async def test_a_concurrency_of_nothing_is_refused(self, personalizer: Personalizer) -> None:
        with pytest.raises(ConfigError, match="field max_concurrency: must be positive, got 0"):
            await collect(personalizer.summarize(["ann"], max_concurrency=0))
