"""Decoding in one batch that drafts join and leave, and that is never larger than it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from popi.engine import slots
from popi.engine.decoding import Completion, Decoder, Draft, Job, Outcome, decode
from popi.engine.slot_cache import SlotLayer
from popi.engine.slots import SharedSlots
from popi.testing import tiny_model

NO_END = frozenset[int]()


def token_ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def prompts_of(tokenizer) -> list[list[int]]:
    return tokenizer(["the user", "what is the best way to answer", "tone"] * 3)["input_ids"]


def inputs_of(model) -> list[torch.Tensor]:
    """Collects the tokens of each forward pass."""
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_a_completion_does_not_depend_on_the_batch(batch_tokens: int) -> None:
    model, tokenizer = tiny_model("qwen3")
    drafts = [
        Draft(prompt, limit=1 + 4 * place, temperature=place % 2, seed=place)
        for place, prompt in enumerate(prompts_of(tokenizer))
    ]
    options = {"end_tokens": NO_END, "layout": "shared", "batch_tokens": batch_tokens}
    together = decode(model, drafts, **options)
    assert together == [decode(model, [draft], **options)[0] for draft in drafts]
    assert [len(completion.token_ids) for completion in together] == [draft.limit for draft in drafts]
    assert {completion.finish_reason for completion in together} == {"length"}


lengths = st.tuples(st.integers(0, 5), st.integers(1, 60), st.integers(1, 20))


@settings(max_examples=25)
@given(st.lists(lengths, min_size=1, max_size=30), st.integers(60, 400))
def test_the_batch_is_never_larger_than_it_may_be(drawn: list[tuple[int, int, int]], batch_tokens: int) -> None:
    model, _ = tiny_model()
    # The same prompts are requested a different number of times, at different limits.
    drafts = [Draft([7 + kind] * length, limit=limit) for kind, length, limit in drawn]
    sizes: list[int] = []
    resize = SlotLayer.resize

    def watched(layer: SlotLayer) -> None:
        rows, columns = layer._cursor.capacity
        sizes.append(rows * columns)
        resize(layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotLayer, "resize", watched)
        completions = decode(model, drafts, end_tokens=NO_END, batch_tokens=batch_tokens, layout="shared")
    assert [len(completion.token_ids) for completion in completions] == [draft.limit for draft in drafts]
    # A draft that is larger runs alone.
    assert max(sizes) <= max(batch_tokens, *(len(draft.prompt) + draft.limit for draft in drafts))


@pytest.mark.parametrize("layout", ["shared", "padded", "single"])
def test_a_draft_that_ends_makes_room_for_the_next_before_the_last_prompt_is_read(layout: str) -> None:
    model, _ = tiny_model()
    drafts = [Draft([10 + place, 5, 6, 7], limit=3 + 20 * (place == 0)) for place in range(8)]
    seen, order = inputs_of(model), list[int]()
    read: list[int] = []

    def note(place: int, completion: Completion) -> None:
        order.append(place)
        read.append(len({int(token) for tokens in seen for token in tokens.flatten()} & set(range(10, 18))))

    decode(model, drafts, end_tokens=NO_END, batch_tokens=60, layout=layout, on_complete=note)
    assert sorted(order) == list(range(8))
    assert read[0] < 8
    if layout != "single":
        assert order.index(0) > 3


@settings(max_examples=15)
@given(st.lists(lengths, min_size=1, max_size=20), st.integers(60, 400))
def test_a_padded_batch_is_never_larger_than_it_may_be(drawn: list[tuple[int, int, int]], batch_tokens: int) -> None:
    model, _ = tiny_model()
    drafts = [Draft([7 + kind] * (length + 1), limit=limit) for kind, length, limit in drawn]
    sizes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, options: sizes.append(tuple(options["attention_mask"].shape)), with_kwargs=True
    )
    decode(model, drafts, end_tokens=NO_END, batch_tokens=batch_tokens, layout="padded")
    assert all(rows == 1 or rows * columns <= batch_tokens for rows, columns in sizes)


def test_a_buffer_grows_with_what_is_written(monkeypatch) -> None:
    monkeypatch.setattr(slots, "ROOM", 4)
    model, _ = tiny_model()
    drafts = [Draft([5, 6, 7 + place % 3], limit=60, temperature=1.0, seed=place) for place in range(6)]
    options = {"end_tokens": NO_END, "batch_tokens": 10_000}
    columns: list[int] = []
    resize = SlotLayer.resize

    def watched(layer: SlotLayer) -> None:
        columns.append(layer._cursor.capacity[1])
        resize(layer)

    monkeypatch.setattr(SlotLayer, "resize", watched)
    assert decode(model, drafts, layout="shared", **options) == decode(model, drafts, layout="padded", **options)
    assert min(columns) < 32 and max(columns) < 150


def test_identical_prompts_are_read_once_and_long_common_starts_are_copied() -> None:
    model, _ = tiny_model()
    start = [*range(20, 80)]
    drafts = [Draft([*start, 100 + place // 2, 6, 7], limit=4, temperature=1.0, seed=place) for place in range(12)]
    seen = inputs_of(model)
    together = decode(model, drafts, end_tokens=NO_END, batch_tokens=10_000, layout="shared")
    prefill = [tokens for tokens in seen if tokens.shape[1] > slots.MAX_CELLS]
    # The start once, and what follows it once for each prompt, without its last token.
    assert sum(tokens.numel() for tokens in prefill) <= len(start) + 6 * 3
    assert together == [
        decode(model, [draft], end_tokens=NO_END, batch_tokens=10_000, layout="shared")[0] for draft in drafts
    ]


def test_drafts_with_a_prompt_that_is_running_join_its_row() -> None:
    model, _ = tiny_model()
    seen = inputs_of(model)
    decoder, outcomes = Decoder(model, end_tokens=NO_END, batch_tokens=1000, layout="shared"), list[Outcome]()
    prompt = [*range(20, 60)]
    decoder.add([Job(Draft(prompt, limit=6), outcomes.append)])
    decoder.step()
    decoder.add([Job(Draft(prompt, limit=6), outcomes.append)])
    while decoder.busy:
        decoder.step()
    assert [tokens.shape for tokens in seen if tokens.shape[1] > 2] == [(1, len(prompt) - 1)]
    assert outcomes[0] == outcomes[1]


def test_the_watch_ends_a_draft() -> None:
    model, tokenizer = tiny_model()
    seen: list[int] = []

    def watch(tokens: list[int]) -> bool:
        seen.append(len(tokens))
        return len(tokens) == 3

    prompt = tokenizer("the user")["input_ids"]
    watched, free = decode(
        model,
        [Draft(prompt, limit=9, watch=watch), Draft(prompt, limit=9)],
        end_tokens=NO_END,
        batch_tokens=1000,
        layout="shared",
    )
    assert seen == [1, 2, 3]
    assert watched.token_ids == free.token_ids[:3] and len(free.token_ids) == 9
    assert (watched.finish_reason, free.finish_reason) == ("stop", "length")


def test_an_end_token_ends_a_draft() -> None:
    model, _ = tiny_model()
    draft, options = Draft([4, 5, 6], limit=9), {"batch_tokens": 1000, "layout": "shared"}
    [whole] = decode(model, [draft], end_tokens=NO_END, **options)
    [ended] = decode(model, [draft], end_tokens={whole.token_ids[3]}, **options)
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[3]) + 1]
    assert ended.finish_reason == "stop"


@pytest.mark.parametrize("layout", ["shared", "padded", "single"])
def test_a_prompt_of_one_token_has_no_prefix(layout: str) -> None:
    model, _ = tiny_model()
    drafts = [Draft([1], limit=4), Draft([3], limit=6), Draft([3], limit=6), Draft([3, 4, 5], limit=6)]
    options = {"end_tokens": NO_END, "batch_tokens": 1000}
    assert decode(model, drafts, layout=layout, **options) == decode(model, drafts, layout="single", **options)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_log_probabilities_are_those_of_the_model(layout: str) -> None:
    model, _ = tiny_model()
    drafts = [Draft([4, 5, 6 + place], limit=5, temperature=[0.0, 0.7][place], seed=3) for place in range(2)]
    options = {"end_tokens": NO_END, "batch_tokens": 1000, "layout": layout}
    for draft, completion in zip(drafts, decode(model, drafts, logprobs=True, **options), strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([draft.prompt + completion.token_ids])).logits[0, 2:-1]
        logprobs = (logits / (draft.temperature or 1.0)).log_softmax(dim=-1)
        expected = [logprobs[place, token].item() for place, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert decode(model, drafts, **options)[0].logprobs == []


@pytest.fixture
def poisoned(tiny) -> Iterator[tuple[object, int]]:
    """A model that computes no numbers from a token on."""
    model, _ = tiny
    with torch.no_grad():
        model.get_input_embeddings().weight[300].fill_(math.nan)
    yield model, 300


@pytest.mark.parametrize("layout", ["shared", "padded", "single"])
def test_a_draft_without_finite_logits_fails_and_leaves_the_others_as_they_are(poisoned, layout: str) -> None:
    model, token = poisoned
    drafts = [Draft([5, 6, 7 + place], limit=4) for place in range(6)]
    drafts[2] = Draft([5, token, 6], limit=4)
    # The row of the draft that fails is used again.
    decoder = Decoder(model, end_tokens=NO_END, batch_tokens=24, layout=layout)
    outcomes: dict[int, Outcome] = {}
    decoder.add(
        [Job(draft, lambda out, place=place: outcomes.__setitem__(place, out)) for place, draft in enumerate(drafts)]
    )
    while decoder.busy:
        decoder.step()
    assert isinstance(outcomes.pop(2), ArithmeticError)
    expected = [
        decode(model, [drafts[place]], end_tokens=NO_END, batch_tokens=24, layout="single")[0] for place in outcomes
    ]
    assert list(outcomes.values()) == expected
    with pytest.raises(ArithmeticError, match="not finite"):
        decode(model, drafts, end_tokens=NO_END, batch_tokens=24, layout=layout)


@pytest.mark.parametrize("layout", ["shared", "padded", "single"])
def test_cancelled_drafts_leave_at_the_next_step(layout: str) -> None:
    model, _ = tiny_model()
    decoder, outcomes = Decoder(model, end_tokens=NO_END, batch_tokens=1000, layout=layout), list[Outcome]()
    jobs = [Job(Draft([4, 5, 6 + place], limit=20), outcomes.append) for place in range(3)]
    decoder.add(jobs)
    decoder.step()
    seen = inputs_of(model)
    jobs[0].cancelled = jobs[2].cancelled = True
    while decoder.busy:
        decoder.step()
    assert max(len(tokens) for tokens in seen) == 1
    assert outcomes == decode(model, [jobs[1].draft], end_tokens=NO_END, batch_tokens=1000, layout=layout)


def test_an_empty_batch_keeps_no_memory() -> None:
    model, _ = tiny_model()
    batch = SharedSlots(model, 1000)
    with torch.inference_mode():
        assert batch.plan([([1, 2, 3], 2)]) == 1
        batch.prefill(0)
        batch.step(torch.tensor([3]))
    assert batch._layers[0]._buffers_S_H_L_D
    batch.keep([])
    assert not batch._layers[0]._buffers_S_H_L_D
