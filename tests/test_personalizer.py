from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import pytest

from popi import registry
from popi.backends.base import ChatRequest, ChatResult
from popi.errors import BackendError
from popi.personalizer import Personalizer
from popi.signals import Statement
from popi.summary import NO_EVIDENCE, Author
from popi.testing import ScriptedBackend
from popi_generators import PromptedGenerator
from popi_inference import LLMSummarizer

SHORT, LONG = Statement(text="short please"), Statement(text="longer please")


def script(request: ChatRequest) -> str | ChatResult:
    """Summarizes by counting what the user said, and answers with what it was shown."""
    content = request.messages[-1].content
    if content.startswith("Signals of one user"):
        return f"- Said {content.count('said:')} things [1]"
    if "fail" in content:
        return ChatResult("", "error", error="cannot")
    return f"Answered under {content.partition('<<<')[2].partition('>>>')[0].strip()}"


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(script)


@pytest.fixture
def personalizer(backend: ScriptedBackend) -> Personalizer:
    return Personalizer(LLMSummarizer(backend), PromptedGenerator(backend), backends=(backend,))


async def test_observes_infers_and_responds(personalizer: Personalizer) -> None:
    personalizer.observe("ann", SHORT)
    personalizer.observe("ann", LONG, SHORT)
    assert personalizer.signals("ann").signals == (SHORT, LONG)
    assert (await personalizer.infer("ann")).text == "- Said 2 things"
    assert await personalizer.respond("ann", "How?") == "Answered under - Said 2 things"
    whole = list[ChatResult]()
    pieces = [piece async for piece in personalizer.stream("ann", "How?", whole.append)]
    assert "".join(pieces) == whole[0].text == "Answered under - Said 2 things"
    assert (len(whole), whole[0].finish_reason) == (1, "stop")


async def test_a_stream_that_is_left_is_closed_down_to_the_backend(
    personalizer: Personalizer, backend: ScriptedBackend
) -> None:
    pieces = personalizer.stream("ann", "How?")
    assert await anext(pieces) and backend.streams == 1
    await pieces.aclose()
    assert backend.streams == 0


async def test_infers_again_only_when_the_signals_changed(personalizer: Personalizer, backend: ScriptedBackend) -> None:
    personalizer.observe("ann", SHORT)
    first = await personalizer.infer("ann")
    personalizer.observe("ann", SHORT)
    personalizer.observe("bob", LONG)
    assert await personalizer.infer("ann") is first
    assert len(backend.chats) == 1
    personalizer.observe("ann", LONG)
    assert (await personalizer.infer("ann")).provenance.signals_digest != first.provenance.signals_digest
    assert len(backend.chats) == 2


async def test_infers_again_when_the_templates_changed(
    personalizer: Personalizer, backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    personalizer.observe("ann", SHORT)
    await personalizer.infer("ann")
    monkeypatch.setattr("popi_inference.format.PromptedSummary.template_hash", "other")
    await personalizer.infer("ann")
    assert len(backend.chats) == 2


async def test_many_at_once_infer_once(personalizer: Personalizer, backend: ScriptedBackend) -> None:
    asked = asyncio.Event()
    chat = backend.chat

    async def slow(requests: list[ChatRequest]) -> list[ChatResult]:
        await asked.wait()
        return await chat(requests)

    backend.chat = slow  # type: ignore[assignment, method-assign]
    personalizer.observe("ann", SHORT)
    waiting = [asyncio.create_task(personalizer.infer("ann")) for _ in range(5)]
    await asyncio.sleep(0)
    asked.set()
    assert len({id(summary) for summary in await asyncio.gather(*waiting)}) == 1
    assert len(backend.chats) == 1


async def test_a_failure_is_not_remembered(personalizer: Personalizer, backend: ScriptedBackend) -> None:
    personalizer.observe("ann", SHORT)
    backend.dead = "gone"
    with pytest.raises(BackendError, match="gone"):
        await personalizer.infer("ann")
    backend.dead = None
    assert (await personalizer.infer("ann")).text == "- Said 1 things"


async def test_a_persons_edit_holds_until_it_is_withdrawn(personalizer: Personalizer) -> None:
    personalizer.observe("ann", SHORT)
    edited = await personalizer.edit("ann", "- Said 1 things\n- Loves rhyme")
    assert edited.provenance.author is Author.EDITED
    assert [claim.evidence for claim in edited.claims] == [(SHORT.id,), ()]
    personalizer.observe("ann", LONG)
    assert await personalizer.respond("ann", "How?") == "Answered under - Said 1 things\n- Loves rhyme"
    personalizer.withdraw_edit("ann")
    assert (await personalizer.infer("ann")).text == "- Said 2 things"


async def test_a_stranger_is_answered_without_a_preference(personalizer: Personalizer) -> None:
    assert await personalizer.respond("stranger", "How?") == f"Answered under {NO_EVIDENCE}"


async def test_an_answer_that_fails_names_the_user(personalizer: Personalizer) -> None:
    with pytest.raises(BackendError, match="no answer for user 'ann': cannot"):
        await personalizer.respond("ann", "fail")


def test_works_without_an_event_loop(personalizer: Personalizer) -> None:
    personalizer.observe("ann", SHORT)
    assert personalizer.infer_sync("ann").text == "- Said 1 things"
    assert personalizer.respond_sync("ann", "How?") == "Answered under - Said 1 things"


async def test_load_makes_both_roles_from_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Named] = []

    class Named(ScriptedBackend):
        closed = 0

        def __init__(self, model: str) -> None:
            super().__init__(script, model=model)
            made.append(self)

        async def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr(registry, "load", lambda target: Named if "transformers" in target else _load(target))
    async with Personalizer.load("one") as personalizer:
        personalizer.observe("ann", SHORT)
        assert (await personalizer.infer("ann")).provenance.model == "one"
    assert [backend.model for backend in made] == ["one"]
    assert made[0].closed

    async with Personalizer.load("one", generator="two") as personalizer:
        await personalizer.respond("ann", "How?")
    assert [len(backend.chats) for backend in made] == [1, 0, 1]
    assert all(backend.closed for backend in made)


_load = registry.load


def test_code_that_is_not_asynchronous_may_call_from_many_threads(
    personalizer: Personalizer, backend: ScriptedBackend
) -> None:
    personalizer.observe("ann", SHORT)
    with ThreadPoolExecutor(8) as threads:
        summaries = list(threads.map(lambda _: personalizer.infer_sync("ann"), range(40)))
        answers = set(threads.map(lambda _: personalizer.respond_sync("ann", "How?"), range(40)))
    assert len(set(map(id, summaries))) == 1
    assert answers == {"Answered under - Said 1 things"}
    asyncio.run(personalizer.close())
    assert personalizer.infer_sync("ann") is summaries[0]


async def test_both_ways_of_calling_may_be_mixed(personalizer: Personalizer) -> None:
    personalizer.observe("ann", SHORT)
    here, there = await asyncio.gather(personalizer.infer("ann"), asyncio.to_thread(personalizer.infer_sync, "ann"))
    assert here.text == there.text


async def test_an_edit_holds_for_those_who_wait(personalizer: Personalizer, backend: ScriptedBackend) -> None:
    personalizer.observe("ann", SHORT)
    await personalizer.infer("ann")
    personalizer.observe("ann", LONG)
    edited, later = await asyncio.gather(personalizer.edit("ann", "- mine"), personalizer.infer("ann"))
    assert edited.text == "- mine"
    assert (await personalizer.infer("ann")).text == "- mine"
    assert later.text in ("- mine", "- Said 2 things")


def test_what_was_spent_is_told_by_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ScriptedBackend] = []

    def make(model: str) -> ScriptedBackend:
        made.append(ScriptedBackend(script, model=model))
        return made[-1]

    monkeypatch.setattr(registry, "backend", lambda name: make)
    file = tmp_path / "api.yaml"
    file.write_text("{backend: scripted, model: m, price: {prompt: 0, completion: 1000000}}")
    personalizer = Personalizer.load(str(file), generator=str(file))
    assert len(made) == 1
    for name in ("ann", "bob"):
        personalizer.observe(name, SHORT)
        personalizer.infer_sync(name)
    personalizer.respond_sync("ann", "hello?")
    # "- Said 1 things [1]", a coin a word.
    assert personalizer.spent("bob").money == 5
    assert personalizer.spent().requests == 3 and personalizer.spent("eve").requests == 0
    assert personalizer.spent().money == personalizer.spent("ann").money + personalizer.spent("bob").money
    asyncio.run(personalizer.close())


def test_signals_of_several_threads_are_all_kept(personalizer: Personalizer) -> None:
    def observe(thread: int) -> None:
        for number in range(200):
            personalizer.observe("ann", Statement(text=f"I like the number {number} of {thread}."))

    threads = [Thread(target=observe, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(personalizer.signals("ann").signals) == 800


def test_an_id_is_the_same_user_with_and_without_white_space(personalizer: Personalizer) -> None:
    personalizer.observe(" ann ", SHORT)
    assert personalizer.signals("ann").signals == (SHORT,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_goes_on(personalizer: Personalizer) -> None:
    personalizer.observe("ann", SHORT)
    before = personalizer.respond_sync("ann", "What is rain?")
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if personalizer.respond_sync("ann", "What is rain?") == before else 1)
    assert os.waitpid(child, 0)[1] == 0
