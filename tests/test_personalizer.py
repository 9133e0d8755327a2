from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from popi import registry
from popi.backends.base import Capabilities, ChatRequest, ChatResult, FailureKind, FinishReason
from popi.backends.ledger import Ledger, Price
from popi.backends.wrappers import Cost, Limit
from popi.errors import BackendError, ConfigError, InputError, ModelError, PopiError
from popi.interface import UserEmbedding
from popi.personalizer import Personalizer
from popi.response import Response
from popi.roles import Conditioned, Failure, PreferenceInference
from popi.signals import Statement, UserSignals
from popi.store import InMemoryStore
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary
from popi.testing import ScriptedBackend, tiny_model
from popi_generators import PromptedGenerator
from popi_inference import Empty, LLMSummarizer
from tests.forks import needs_fork, succeeds_in_child

SHORT, LONG = Statement(text="short please"), Statement(text="longer please")


def wants_summary(request: ChatRequest) -> bool:
    return request.messages[-1].content.startswith("Signals of one user")


def script(request: ChatRequest) -> str | ChatResult:
    """Summarizes by counting what the user said, and answers with what it was shown."""
    content = request.messages[-1].content
    if wants_summary(request):
        return f"- Said {content.count('said:')} things [1]"
    if "fail" in content:
        return ChatResult.failed("cannot", "request", model="scripted")
    return f"Answered under {content.partition('<<<')[2].partition('>>>')[0].strip()}".strip()


class Gate(ScriptedBackend):
    """Holds requests back until it is opened, from any thread.

    Attributes:
        running: Number of requests that wait.
        most: Maximum of that number.
    """

    def __init__(self, answers: Callable[[ChatRequest], str | ChatResult] = script) -> None:
        super().__init__(answers)
        self.opened = threading.Event()
        self.arrived = threading.Event()
        self.running = self.most = 0

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.arrived.set()
        try:
            while not self.opened.is_set():
                await asyncio.sleep(0.001)
        finally:
            self.running -= 1
        return await super().chat(requests)


def personalizer_on(backend: ScriptedBackend, **options: Any) -> Personalizer:
    return Personalizer(LLMSummarizer(backend), PromptedGenerator(backend), backends=(backend,), **options)


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(script)


@pytest.fixture
def personalizer(backend: ScriptedBackend) -> Iterator[Personalizer]:
    made = personalizer_on(backend)
    yield made
    made.close_sync()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> Iterator[Personalizer]:
    """A personalizer whose model responds when its gate is opened."""
    made = personalizer_on(gate)
    yield made
    gate.opened.set()
    made.close_sync()


async def eventually(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.001)


def summary_of(personalizer: Personalizer, user_id: str = "ann") -> str:
    summary = personalizer.infer_sync(user_id)
    assert isinstance(summary, PreferenceSummary)
    return summary.text


class TestStateAndInference:
    async def test_observes_infers_and_responds(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        personalizer.observe("ann", LONG, SHORT)
        assert personalizer.signals("ann").signals == (SHORT, LONG)
        assert (await personalizer.infer("ann")).text == "- Said 2 things"
        response = await personalizer.respond("ann", "How?")
        assert str(response) == response.text == "Answered under - Said 2 things"
        assert (response.finish_reason, response.model, response.route) == ("stop", "scripted", "")
        assert response.prompt_tokens > 10 and response.completion_tokens == 6

    async def test_infers_again_only_when_the_signals_changed(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        personalizer.observe("ann", SHORT)
        first = await personalizer.infer("ann")
        personalizer.observe("ann", SHORT)
        personalizer.observe("bob", LONG)
        assert await personalizer.infer(" ann ") is first
        assert len(backend.chats) == 1
        personalizer.observe("ann", LONG)
        assert (await personalizer.infer("ann")).provenance.signals_digest != first.provenance.signals_digest
        assert len(backend.chats) == 2

    async def test_infers_again_when_the_templates_or_the_writer_changed(
        self, personalizer: Personalizer, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        personalizer.observe("ann", SHORT)
        await personalizer.infer("ann")
        monkeypatch.setattr("popi_inference.format.PromptedSummary.template_hash", "other")
        await personalizer.infer("ann")
        assert len(backend.chats) == 2
        other = Personalizer(LLMSummarizer(ScriptedBackend(script, model="other")), None, store=personalizer.store)
        assert (await other.infer("ann")).provenance.model == "other"
        assert [version.key.writer for version in personalizer.history("ann")] == ["scripted", "scripted", "other"]

    async def test_a_failure_is_not_remembered(self, personalizer: Personalizer, backend: ScriptedBackend) -> None:
        personalizer.observe("ann", SHORT)
        backend.dead = "gone"
        with pytest.raises(BackendError, match="gone"):
            await personalizer.infer("ann")
        backend.dead = None
        assert (await personalizer.infer("ann")).text == "- Said 1 things"

    async def test_a_reply_that_is_not_a_summary_names_the_user_and_the_reason(self) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: "the the the " * 30))
        personalizer.observe("ann", SHORT)
        with pytest.raises(BackendError, match="no summary of user 'ann': the reply repeats itself"):
            await personalizer.infer("ann")
        with pytest.raises(BackendError, match="no response for user 'ann': no summary: the reply repeats itself"):
            await personalizer.respond("ann", "How?")
        with pytest.raises(BackendError, match="no response for user 'ann': no summary: the reply repeats itself"):
            await anext(personalizer.stream("ann", "How?"))

    async def test_a_persons_edit_holds_until_it_is_withdrawn(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        personalizer.observe("ann", SHORT)
        await personalizer.infer("ann")
        edited = personalizer.edit("ann", "- Said 1 things\n- Loves rhyme").interface
        assert edited.provenance.author is Author.EDITED
        assert [claim.evidence for claim in edited.claims] == [(SHORT.id,), ()]
        personalizer.observe("ann", LONG)
        assert str(await personalizer.respond("ann", "How?")) == "Answered under - Said 1 things\n- Loves rhyme"
        assert personalizer.withdraw_edit("ann")
        assert not personalizer.withdraw_edit("ann")
        assert (await personalizer.infer("ann")).text == "- Said 2 things"
        assert [version.withdrawn for version in personalizer.history("ann")] == [False, True, False]

    async def test_a_stranger_gets_a_response_without_a_preference(self, personalizer: Personalizer) -> None:
        assert str(await personalizer.respond("stranger", "How?")) == f"Answered under {NO_EVIDENCE}"
        assert personalizer.users() == []

    async def test_an_empty_user_id_is_an_error(self, personalizer: Personalizer) -> None:
        for call in (personalizer.infer(" "), personalizer.respond(" ", "How?")):
            with pytest.raises(InputError, match="the id of the user is empty"):
                await call

    async def test_a_deleted_user_is_gone(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        personalizer.observe("bob", SHORT)
        await personalizer.infer("ann")
        personalizer.edit("ann", "- mine")
        assert personalizer.users() == ["ann", "bob"]
        assert personalizer.delete("ann")
        assert not personalizer.delete("ann")
        assert (personalizer.users(), personalizer.history("ann")) == (["bob"], ())
        assert (await personalizer.infer("ann")).text == NO_EVIDENCE

    async def test_another_users_summary_is_never_stored(self) -> None:
        class Confused(Empty):
            async def infer(self, users: Sequence[UserSignals]) -> list[PreferenceSummary]:
                return await super().infer([UserSignals(user_id="bob")])

        personalizer = Personalizer(Confused(), None)
        personalizer.observe("ann", SHORT)
        with pytest.raises(PopiError, match="inferred 'bob' from the signals of 'ann'"):
            await personalizer.infer("ann")
        assert personalizer.history("ann") == ()


class TestConcurrentInference:
    async def test_many_callers_share_one_inference(self, gated: Personalizer, gate: Gate) -> None:
        gated.observe("ann", SHORT)
        waiting = [asyncio.create_task(gated.infer("ann")) for _ in range(5)]
        threads = [asyncio.create_task(asyncio.to_thread(gated.infer_sync, "ann")) for _ in range(5)]
        loops = [asyncio.create_task(asyncio.to_thread(asyncio.run, gated.infer("ann"))) for _ in range(5)]
        await eventually(lambda: gate.running)
        gate.opened.set()
        summaries = await asyncio.gather(*waiting, *threads, *loops)
        assert len(set(map(id, summaries))) == 1
        assert (len(gate.chats), gate.most) == (1, 1)

    async def test_users_do_not_wait_for_each_other(self, gated: Personalizer, gate: Gate) -> None:
        for name in "abc":
            gated.observe(name, SHORT)
        waiting = [asyncio.create_task(gated.infer(name)) for name in "abc"]
        await eventually(lambda: gate.running == 3)
        gate.opened.set()
        await asyncio.gather(*waiting)

    async def test_callers_share_a_failure(self, gated: Personalizer, gate: Gate) -> None:
        gated.observe("ann", SHORT)
        waiting = [asyncio.create_task(gated.infer("ann")) for _ in range(5)]
        await eventually(lambda: gate.running)
        gate.dead = "gone"
        gate.opened.set()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in errors] == ["gone"] * 5
        assert gate.most == 1

    async def test_a_caller_that_is_cancelled_takes_no_other_with_it(self, gated: Personalizer, gate: Gate) -> None:
        gated.observe("ann", SHORT)
        first, second = asyncio.create_task(gated.infer("ann")), asyncio.create_task(gated.infer("ann"))
        await eventually(lambda: gate.running)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.opened.set()
        assert (await second).text == "- Said 1 things"
        third = asyncio.create_task(gated.infer("ann"))
        third.cancel()
        assert len(gate.chats) == 1

    async def test_a_waiting_caller_that_is_cancelled_leaves_the_inference(
        self, gated: Personalizer, gate: Gate
    ) -> None:
        gated.observe("ann", SHORT)
        first = asyncio.create_task(gated.infer("ann"))
        await eventually(lambda: gate.running)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await gated.infer("ann")
        gate.opened.set()
        assert (await first).text == "- Said 1 things"
        assert len(gate.chats) == 1

    async def test_an_edit_during_an_inference_holds(self, gated: Personalizer, gate: Gate) -> None:
        gated.observe("ann", SHORT)
        waiting = asyncio.create_task(gated.infer("ann"))
        await eventually(lambda: gate.running)
        gated.edit("ann", "- mine")
        gate.opened.set()
        assert (await waiting).text == "- mine"
        assert (await gated.infer("ann")).text == "- mine"
        assert [version.is_edit for version in gated.history("ann")] == [True, False]

    async def test_signals_that_come_during_an_inference_are_read_by_the_next(
        self, gated: Personalizer, gate: Gate
    ) -> None:
        gated.observe("ann", SHORT)
        first = asyncio.create_task(gated.infer("ann"))
        await eventually(lambda: gate.running)
        gated.observe("ann", LONG)
        second = asyncio.create_task(gated.infer("ann"))
        gate.opened.set()
        assert [(await task).text for task in (first, second)] == ["- Said 1 things", "- Said 2 things"]
        assert gate.most == 1

    async def test_nothing_comes_back_when_a_user_is_deleted_during_an_inference(
        self, gated: Personalizer, gate: Gate
    ) -> None:
        gated.observe("ann", SHORT)
        waiting = asyncio.create_task(gated.respond("ann", "How?"))
        await eventually(lambda: gate.running)
        gated.delete("ann")
        gate.opened.set()
        await waiting
        assert (gated.users(), gated.history("ann")) == ([], ())

    def test_threads_lose_no_signals(self, personalizer: Personalizer) -> None:
        def observe(thread: int) -> None:
            for number in range(200):
                personalizer.observe("ann", Statement(text=f"I like the number {number} of {thread}."))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(observe, range(4)))
        assert len(personalizer.signals("ann").signals) == 800


def result(text: str, reason: FinishReason, error: str | None = None, kind: FailureKind | None = None) -> ChatResult:
    return ChatResult(text, reason, 10, 5, "m", error, kind, route="r")


class TestResponses:
    async def test_an_item_that_fails_names_the_user(self, personalizer: Personalizer) -> None:
        with pytest.raises(BackendError, match=r"^no response for user 'ann': cannot$") as caught:
            await personalizer.respond("ann", "fail")
        assert caught.value.failure == "request"
        with pytest.raises(BackendError, match=r"^no response: cannot$"):
            await personalizer.respond(None, "fail")

    @pytest.mark.parametrize(
        ("answer", "says", "kind"),
        [
            ("", "the response is empty: the model wrote no text", "empty"),
            (" \n", "the response is empty", "empty"),
            ("<think>hmm", "the model wrote reasoning and no response", "empty"),
            (result("", "stop"), "the response is empty", "empty"),
            (result(" \n ", "length"), "the response is empty", "empty"),
            (result("", "refused", "the model refused: I cannot"), "the model refused: I cannot", "empty"),
            (result("", "filtered", "a filter removed it"), "a filter removed it", "empty"),
            (result("half", "error", "broke off", "unreachable"), "broke off", "unreachable"),
        ],
    )
    async def test_what_is_no_response_is_never_returned(
        self, answer: str | ChatResult, says: str, kind: FailureKind
    ) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: answer))
        for respond in (personalizer.respond("ann", "How?"), collect(personalizer.stream("ann", "How?"))):
            with pytest.raises(BackendError, match=says):
                await respond
        [(_, outcome)] = await collect(personalizer.respond_many([("ann", "How?")]))
        assert isinstance(outcome, Failure)
        assert (outcome.user_id, outcome.failure) == ("ann", kind)
        assert says in outcome.error

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            (result("one two", "length"), "it was truncated after 5 tokens; raise max_tokens"),
            (result("I cannot.", "refused", "the model refused: I cannot."), "the model refused"),
            (result("one two", "filtered", "a filter"), "a content filter removed a part of it"),
        ],
    )
    async def test_an_incomplete_response_is_an_error_where_it_must_be_complete(
        self, answer: ChatResult, says: str
    ) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: answer))
        assert await personalizer.respond("ann", "How?") == Response(answer.text, answer.finish_reason, 10, 5, "m", "r")
        with pytest.raises(BackendError, match=f"the response for user 'ann' is incomplete: {says}"):
            await personalizer.respond("ann", "How?", require_complete=True)
        with pytest.raises(BackendError, match="is incomplete"):
            personalizer.respond_sync("ann", "How?", require_complete=True)

    async def test_a_truncated_stream_is_an_error_after_its_last_piece_where_it_must_be_complete(self) -> None:
        personalizer = personalizer_on(ScriptedBackend(lambda request: result("one two", "length")))
        responses, pieces = list[Response](), list[str]()
        assert await collect(personalizer.stream("ann", "How?", responses.append)) == ["one", " two"]
        assert [response.finish_reason for response in responses] == ["length"]
        with pytest.raises(BackendError, match="raise max_tokens"):
            async for piece in personalizer.stream("ann", "How?", responses.append, require_complete=True):
                pieces.append(piece)
        assert (pieces, len(responses)) == (["one", " two"], 1)

    async def test_a_stream_ends_with_the_whole_response(self, personalizer: Personalizer) -> None:
        personalizer.observe("ann", SHORT)
        whole = list[Response]()
        threads = set[int]()

        def on_complete(response: Response) -> None:
            whole.append(response)
            threads.add(threading.get_ident())

        pieces = await collect(personalizer.stream("ann", "How?", on_complete))
        assert "".join(pieces) == whole[0].text == "Answered under - Said 1 things"
        assert whole == [await personalizer.respond("ann", "How?")]
        assert threads == {threading.get_ident()}

    @pytest.mark.parametrize("leave", ["close", "cancel"])
    async def test_a_stream_that_is_left_is_closed_down_to_the_backend(self, leave: str) -> None:
        class Slow(ScriptedBackend):
            async def stream(self, request: ChatRequest, *args: Any) -> AsyncIterator[str]:
                self.streams += 1
                try:
                    yield "one"
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.01)
                    self.streams -= 1

        backend = Slow(script)
        pieces = personalizer_on(backend).stream("ann", "How?")
        assert await anext(pieces) == "one"
        assert backend.streams == 1
        if leave == "close":
            await pieces.aclose()
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(pieces)
        assert backend.streams == 0

    async def test_a_stream_without_a_result_is_an_error(self) -> None:
        class Silent(ScriptedBackend):
            async def stream(self, request: ChatRequest, *args: Any) -> AsyncIterator[str]:
                yield "one"

        with pytest.raises(BackendError, match="the stream ended without a result"):
            await collect(personalizer_on(Silent(script)).stream(None, "How?"))

    async def test_responds_to_a_plain_prompt_and_under_a_given_summary(
        self, personalizer: Personalizer, backend: ScriptedBackend
    ) -> None:
        personalizer.observe("ann", SHORT)
        given = personalizer_on(backend).edit("bob", "- given").interface
        assert str(await personalizer.respond(None, "How?")) == "Answered under"
        assert str(await personalizer.respond("ann", "How?", interface=given)) == "Answered under - given"
        assert await collect(personalizer.stream(None, "How?", interface=given)) == [
            "Answered",
            " under",
            " -",
            " given",
        ]
        assert not any(map(wants_summary, backend.chats))


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


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


class Named(ScriptedBackend):
    """Remembers all that were made, and whether they were closed."""

    made: list[Named]

    def __init__(self, model: str) -> None:
        super().__init__(script, model=model)
        if model == "missing":
            raise ModelError("no model 'missing'")
        self.closed = 0
        self.made.append(self)

    async def close(self) -> None:
        self.closed += 1


class Embedder(PreferenceInference[UserEmbedding]):
    name, kind = "embedder", "embedding"

    async def infer(self, users: Sequence[UserSignals]) -> list[UserEmbedding]:
        return [UserEmbedding(user_id=user.user_id, vectors=((1.0,),), model_fingerprint="f") for user in users]


class Repeating(PromptedGenerator):
    """Takes an option of its own."""

    def __init__(self, backend: ScriptedBackend, *, times: int = 1, **options: Any) -> None:
        super().__init__(backend, **options)
        self.times = times

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return [replace(result, text=result.text * self.times) for result in await super().respond(items)]


class Vectors(PromptedGenerator):
    """Reads embeddings."""

    def __init__(self, backend: ScriptedBackend) -> None:
        super().__init__(backend)
        self.interfaces = frozenset({"embedding"})

    async def respond(self, items: Sequence[Conditioned]) -> list[ChatResult]:
        return [ChatResult(repr(item.interface.vectors), "stop") for item in items]


class TestLoading:
    @pytest.fixture(autouse=True)
    def named(self, monkeypatch: pytest.MonkeyPatch) -> list[Named]:
        """Every model is a scripted one."""
        Named.made = []
        monkeypatch.setitem(registry.BACKENDS, "transformers", f"{__name__}:Named")
        load = registry.load
        monkeypatch.setattr(registry, "load", lambda target: Named if target.endswith(":Named") else load(target))
        return Named.made

    async def test_one_model_plays_both_roles_or_each_has_its_own(self, named: list[Named]) -> None:
        async with Personalizer.load("one") as personalizer:
            personalizer.observe("ann", SHORT)
            assert (await personalizer.infer("ann")).provenance.model == "one"
        assert [backend.model for backend in named] == ["one"]
        assert named[0].closed

        async with Personalizer.load("one", generator="two") as personalizer:
            assert (await personalizer.respond("ann", "How?")).model == "two"
        assert [len(backend.chats) for backend in named] == [1, 0, 1]
        assert all(backend.closed for backend in named)

    async def test_options_reach_their_role(self, named: list[Named]) -> None:
        personalizer = Personalizer.load(
            "m",
            inference_options={"max_tokens": 30, "temperature": 0.5, "seed": 1, "language": "German"},
            generator_options={"max_tokens": 40, "temperature": 0.7, "seed": 2, "prompts": "default"},
        )
        personalizer.observe("ann", SHORT)
        await personalizer.respond("ann", "How?")
        infers, responds = named[0].chats
        assert (infers.max_tokens, infers.temperature) == (30, 0.5)
        assert "Write the list in German." in infers.messages[0].content
        assert (responds.max_tokens, responds.temperature, responds.seed) == (40, 0.7, 2)

    async def test_classes_of_ones_own_play_the_roles(self) -> None:
        personalizer = Personalizer.load(
            "m",
            inference="popi_inference:Empty",
            generation=f"{__name__}:Repeating",
            generator_options={"times": 2, "max_tokens": 1},
        )
        assert str(await personalizer.respond("ann", "How?")) == "AnsweredAnswered"

    async def test_a_role_may_be_left_out(self, named: list[Named]) -> None:
        writes = Personalizer.load("writer", generator="reader", generation=None)
        reads = Personalizer.load("writer", generator="reader", inference=None)
        assert [backend.model for backend in named] == ["writer", "reader"]
        writes.observe("ann", SHORT)
        assert (await writes.infer("ann")).text == "- Said 1 things"
        assert str(await reads.respond(None, "How?")) == "Answered under"
        reads.edit("ann", "- mine")
        assert str(await reads.respond("ann", "How?")) == "Answered under - mine"
        for call in (writes.respond("ann", "How?"), collect(writes.stream("ann", "How?")), reads.infer("bob")):
            with pytest.raises(ConfigError, match="this personalizer has no"):
                await call

    async def test_a_backend_and_a_store_can_be_given(self) -> None:
        backend, store = Named("mine"), InMemoryStore()
        async with Personalizer.load(backend, store=store) as personalizer:
            personalizer.observe("ann", SHORT)
            assert (await personalizer.respond("ann", "How?")).model == "mine"
        assert store.users() == ["ann"]
        assert backend.closed == 1

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"inference": "lm"}, "unknown inference 'lm'; did you mean llm?"),
            ({"generation": "promted"}, "unknown generator 'promted'; did you mean prompted?"),
            ({"generation": "popi_inference:Empty"}, "is not a subclass of ConditionedGenerator"),
            (
                {"inference_options": {"max_token": 5}},
                "the inference 'llm' has no option 'max_token'; its options: max_tokens, temperature, budget",
            ),
            (
                {"generator_options": {"temprature": 5}},
                "the generator 'prompted' has no option 'temprature'; its options: max_tokens, temperature, seed",
            ),
            ({"generator_options": {"format": None}}, "has no option 'format'"),
            ({"generator_options": {"backend": None}}, "has no option 'backend'"),
            (
                {"generator_options": {"max_tokens": "many"}},
                "field generator_options.max_tokens: input should be a valid integer",
            ),
        ],
    )
    def test_a_wrong_option_is_one_line_before_a_model_is_loaded(
        self, options: dict[str, Any], says: str, named: list[Named]
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            Personalizer.load("m", **options)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert named == []

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"generator_options": {"max_tokens": 0}}, "max_tokens: must be positive"),
            ({"inference_options": {"prompts": "nil"}}, "unknown prompt set 'nil'"),
            ({"generator": "missing"}, "no model 'missing'"),
        ],
    )
    async def test_what_was_opened_is_closed_when_the_rest_fails(
        self, options: dict[str, Any], says: str, named: list[Named]
    ) -> None:
        with pytest.raises(InputError, match=says):
            Personalizer.load("m", **options)
        assert [backend.closed for backend in named] == [1]

    def test_a_generator_that_does_not_accept_what_is_inferred_is_refused(self, named: list[Named]) -> None:
        with pytest.raises(ConfigError) as caught:
            Personalizer.load("m", inference=f"{__name__}:Embedder")
        assert str(caught.value) == (
            "the generator 'm' does not accept the embedding that the inference 'embedder' infers; "
            "it accepts: summary; choose another model or class"
        )
        assert named[0].closed

    def test_a_backend_that_accepts_no_summaries_is_refused(self) -> None:
        backend = ScriptedBackend(script)
        backend.capabilities = Capabilities(interfaces=frozenset({"embedding"}))
        with pytest.raises(ConfigError, match="does not accept the summary"):
            Personalizer.load(backend)

    async def test_an_embedding_reaches_a_generator_that_accepts_it(self) -> None:
        personalizer = Personalizer.load("m", inference=f"{__name__}:Embedder", generation=f"{__name__}:Vectors")
        personalizer.observe("ann", SHORT)
        assert str(await personalizer.respond("ann", "How?")) == "((1.0,),)"
        assert personalizer.history("ann")[0].interface == await personalizer.infer("ann")
        with pytest.raises(ConfigError, match="does not accept summaries"):
            personalizer.edit("ann", "- mine")

    def test_what_was_spent_is_known_by_user(self, tmp_path: Path) -> None:
        file = tmp_path / "api.yaml"
        file.write_text("{backend: transformers, model: m, price: {prompt: 0, completion: 1000000}}")
        personalizer = Personalizer.load(str(file), generator=str(file))
        for name in ("ann", "bob"):
            personalizer.observe(name, SHORT)
            personalizer.infer_sync(name)
        personalizer.respond_sync("ann", "hello?")
        # "- Said 1 things [1]", a coin a word.
        assert personalizer.spent(" bob ").money == 5
        assert personalizer.spent().requests == 3 and personalizer.spent("eve").requests == 0
        assert personalizer.spent().money == personalizer.spent("ann").money + personalizer.spent("bob").money
