"""One queue for all calls: batched together, from any thread and loop, with failures only where they belong."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import pytest
import torch

from popi.engine.decoding import Draft, decode
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.engine.service import ModelService
from popi.errors import BackendError
from popi.testing import tiny_model
from tests.forks import needs_fork, succeeds_in_child

NO_END = frozenset[int]()


def make(model, *, batch_tokens: int = 10_000, layout: str = "shared") -> ModelService:
    return ModelService(model, "tiny", layout=layout, end_tokens=NO_END, batch_tokens=batch_tokens, within=nullcontext)


def draft(place: int, **options: object) -> Draft:
    return Draft([5, 6, 7 + place], **{"limit": 5 + place % 4, **options})


def item(place: int) -> Scored:
    return Scored([5, 6, 7 + place], [8, 9, 10 + place % 3])


@pytest.fixture
def model() -> Iterator[torch.nn.Module]:
    yield tiny_model()[0]


@pytest.fixture
def held(model) -> Iterator[threading.Event]:
    """Holds the first forward pass back until the event is set, so that calls pile up behind it."""
    event = threading.Event()
    model.register_forward_pre_hook(lambda *_: (event.wait(10), None)[1])
    yield event
    event.set()


def widths(model) -> list[int]:
    """Collects the number of rows of each forward pass."""
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    return rows


def test_calls_of_many_threads_run_in_one_batch(model, held) -> None:
    drafts, rows, service = [draft(place) for place in range(16)], widths(model), make(model)
    with ThreadPoolExecutor(16) as threads:
        futures = list(threads.map(lambda each: service.decode([each]), drafts))
    held.set()
    outcomes = [future.result(10)[0] for future in futures]
    assert outcomes == decode(model, drafts, end_tokens=NO_END, batch_tokens=10_000, layout="shared")
    assert max(rows) >= 15


def test_scores_of_many_calls_run_in_one_pass(model, held) -> None:
    items, service = [item(place) for place in range(16)], make(model)
    futures = [service.score([each]) for each in items]
    rows = widths(model)
    held.set()
    scores = [future.result(10)[0] for future in futures]
    assert scores == pytest.approx(score(model, items, batch_tokens=10_000, layout="shared"), abs=1e-4)
    assert len(rows) < 8


def test_a_call_ends_as_soon_as_its_own_requests_have_ended(model) -> None:
    service = make(model, batch_tokens=100)
    order: list[int] = []
    futures = [service.decode([draft(place, limit=40 if place == 0 else 4)]) for place in range(5)]
    for place, future in enumerate(futures):
        future.add_done_callback(lambda _, place=place: order.append(place))
    wait(futures, 10)
    assert order.index(0) > 0 and sorted(order) == [0, 1, 2, 3, 4]


def test_decoding_goes_on_while_much_is_scored(model) -> None:
    service = make(model, batch_tokens=100)
    scores = service.score([Scored([10 + place % 300, *range(5, 50), place // 300], [6, 7]) for place in range(900)])
    assert service.decode([draft(0)]).result(10)
    assert not scores.done()
    scores.cancel()
    assert service.decode([draft(1)]).result(10)


def test_a_cancelled_call_leaves_the_others_as_they_are(model, held) -> None:
    service = make(model)
    futures = [service.decode([draft(place, limit=200)]) for place in range(3)] + [service.decode([draft(3)])]
    assert futures[0].cancel() and futures[2].cancel()
    scores = [service.score([item(place)]) for place in range(2)]
    assert scores[0].cancel()
    rows = widths(model)
    held.set()
    assert futures[3].result(10) == decode(model, [draft(3)], end_tokens=NO_END, batch_tokens=100, layout="shared")
    assert scores[1].result(10)
    futures[1].cancel()
    # The first step had begun before.
    assert max(rows[2:]) <= 2
    before = len(rows)
    assert service.decode([draft(4)]).result(10)
    assert len(rows) - before < 20


def test_a_failure_of_the_model_reaches_those_who_were_computed(model) -> None:
    def fail(module, args, options):
        if int(options["input_ids"].max()) == 300:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB\nsee the manual")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    # Each runs alone.
    service = make(model, batch_tokens=1)
    futures = [service.decode([Draft([5, 6, token], limit=4)]) for token in (7, 300, 8)]
    assert futures[0].result(10) and futures[2].result(10)
    with pytest.raises(BackendError) as caught:
        futures[1].result(10)
    assert str(caught.value) == "tiny: out of memory; lower batch_tokens or use a smaller model"
    with pytest.raises(BackendError, match="out of memory"):
        service.score([Scored([5, 300], [6, 7])]).result(10)
    assert service.score([item(0)]).result(10)


def test_a_watch_that_raises_fails_its_own_call(model) -> None:
    def watch(tokens: list[int]) -> bool:
        raise RuntimeError("the event loop is closed")

    service = make(model)
    bad, good = service.decode([draft(0, watch=watch)]), service.decode([draft(1)])
    with pytest.raises(BackendError, match="the event loop is closed"):
        bad.result(10)
    assert good.result(10)


def test_closing_fails_all_calls_and_later_ones(model, held) -> None:
    service = make(model, batch_tokens=1)
    futures: list[Future] = [service.decode([draft(place)]) for place in range(3)]
    futures.append(service.score([item(0), Scored([30, 31, 32], [33])]))
    closing = threading.Thread(target=service.close)
    closing.start()
    while not service._closed:
        time.sleep(0.01)
    held.set()
    closing.join(10)
    for future in futures:
        with pytest.raises(BackendError, match="tiny: the backend is closed"):
            future.result(10)
    with pytest.raises(BackendError, match="closed"):
        service.decode([draft(0)])
    service.close()


def test_no_request_no_result(model) -> None:
    service = make(model)
    assert service.decode([]).result(10) == []
    assert service.score([]).result(10) == []


def test_a_fault_in_the_queue_leaves_nobody_waiting(model, monkeypatch) -> None:
    service = make(model)
    monkeypatch.setattr(service, "_step", lambda: 1 / 0)
    with pytest.raises(BackendError, match="ZeroDivisionError"):
        service.decode([draft(0)]).result(10)
    monkeypatch.undo()
    assert service.decode([draft(0)]).result(10)


def test_several_event_loops_share_one_queue(model) -> None:
    service = make(model)

    async def ask(place: int) -> object:
        return (await asyncio.wrap_future(service.decode([draft(place)])))[0]

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda place: asyncio.run(ask(place)), range(8)))
    assert outcomes == decode(
        model, [draft(place) for place in range(8)], end_tokens=NO_END, batch_tokens=1000, layout="shared"
    )


def test_a_model_in_training_goes_back_to_it_before_the_result_arrives(model) -> None:
    model.train()
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    service = make(model)
    for call in (service.decode([draft(0)]), service.score([item(0)])):
        call.result(10)
        assert all(module.training for module in model.modules())
    assert modes and not any(modes)


@needs_fork
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_a_queue_of_its_own(model, busy: bool) -> None:
    service = make(model)
    expected = service.decode([draft(1)]).result(10)
    running = service.decode([draft(0, limit=500 if busy else 1)])
    assert succeeds_in_child(
        lambda: service.decode([draft(1)]).result(20) == expected and service.score([item(0)]).result(20)[0] < 0
    )
    # The parent goes on.
    assert service.decode([draft(1)]).result(10) == expected
    assert len(running.result(20)[0].token_ids) == (500 if busy else 1)
