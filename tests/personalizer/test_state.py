"""Signals, summaries and edits of users, and inferences at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from popi.errors import BackendError, InputError, PopiError
from popi.personalizer import Personalizer
from popi.signals import Statement, UserSignals
from popi.summary import NO_EVIDENCE, Author, PreferenceSummary
from popi.testing import ScriptedBackend
from popi_inference import Empty, LLMSummarizer

from .conftest import LONG, SHORT, Gate, eventually, personalizer_on, script


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
