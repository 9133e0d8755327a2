"""Choosing tokens, and batches that lose their rows one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popi.engine.decoding import Draft, choose, decode
from popi.testing import tiny_model


def pick(probs: list[float], noise: list[float], temperature: float = 1.0, top_p: float = 1.0) -> int:
    one = [torch.tensor([value]) for value in (temperature, top_p)]
    return int(choose(torch.tensor([probs]).log(), *one, torch.tensor([noise])))


@pytest.mark.parametrize(
    ("noise", "top_p", "token"),
    [
        ([1.0, 1.0, 1.0], 1.0, 1),
        # .2 / .3 = .67, .5 / 1 = .5, .3 / .6 = .5
        ([0.3, 1.0, 0.6], 1.0, 0),
        # The first is outside the nucleus of .7, which takes .5 and .3.
        ([0.3, 1.0, 0.7], 0.7, 1),
        ([0.3, 1.0, 0.5], 0.7, 2),
        # The likeliest token is in every nucleus, and alone in one of .5.
        ([0.3, 9.0, 0.1], 0.5, 1),
        ([0.3, 9.0, 0.1], 0.0, 1),
    ],
)
def test_the_largest_ratio_within_the_nucleus_wins(noise: list[float], top_p: float, token: int) -> None:
    assert pick([0.2, 0.5, 0.3], noise, top_p=top_p) == token


def test_temperature_bends_the_distribution() -> None:
    # At temperature 1/2, .2 and .8 become .04 / .68 and .64 / .68: sixteen to one.
    assert pick([0.2, 0.8], [1.0, 15.0], temperature=0.5) == 1
    assert pick([0.2, 0.8], [1.0, 17.0], temperature=0.5) == 0
    assert pick([0.2, 0.8], [1.0, 17.0], temperature=0.0) == 1


def test_samples_come_as_often_as_they_should() -> None:
    count, probs = 100_000, torch.tensor([0.05, 0.45, 0.3, 0.2])
    noise = torch.empty(count, 4).exponential_(generator=torch.Generator().manual_seed(0))
    ones = torch.ones(count)
    found = choose(probs.log().expand(count, 4), ones, ones, noise).bincount(minlength=4) / count
    # Five standard deviations of the likeliest.
    assert found.tolist() == pytest.approx(probs.tolist(), abs=5 * (0.25 / count) ** 0.5)


def test_each_row_has_its_own_way() -> None:
    logits, noise = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(3, 3), torch.tensor([[0.1, 1.0, 0.3]])
    temperature, top_p = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.7])
    assert choose(logits, temperature, top_p, noise.expand(3, 3)).tolist() == [1, 0, 2]


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=8),
    st.floats(0.0625, 1, width=32),
    st.floats(0.125, 3, width=32),
    st.integers(0, 99),
)
def test_what_is_chosen_is_in_the_nucleus(logits: list[float], top_p: float, temperature: float, seed: int) -> None:
    row = torch.tensor([logits])
    noise = torch.empty_like(row).exponential_(generator=torch.Generator().manual_seed(seed))
    token = int(choose(row, torch.tensor([temperature]), torch.tensor([top_p]), noise))
    probs = (row / temperature).softmax(dim=-1)[0]
    assert probs[token] > 0
    assert float(probs[probs > probs[token]].sum()) < top_p + 1e-6


def test_rows_that_end_early_leave_the_others_as_they_were() -> None:
    model, tokenizer = tiny_model("qwen3")
    prompts = tokenizer(["the user", "what is the best way to answer", "tone"] * 3)["input_ids"]
    drafts = [
        Draft(prompt, limit=1 + 4 * place, temperature=place % 2, seed=place) for place, prompt in enumerate(prompts)
    ]
    options = {"end_tokens": frozenset(), "share": True, "check": lambda: None}
    with torch.inference_mode():
        together = decode(model, drafts, batch_tokens=10_000, **options)
        apart = [decode(model, [draft], batch_tokens=10_000, **options)[0] for draft in drafts]
    assert together == apart
    assert [len(answer) for answer in together] == [draft.limit for draft in drafts]


def test_a_watcher_ends_an_answer() -> None:
    model, tokenizer = tiny_model()
    seen: list[int] = []

    def watch(tokens: list[int]) -> bool:
        seen.append(len(tokens))
        return len(tokens) == 3

    prompt = tokenizer("the user")["input_ids"]
    with torch.inference_mode():
        watched, free = decode(
            model,
            [Draft(prompt, limit=9, watch=watch), Draft(prompt, limit=9)],
            end_tokens=frozenset(),
            batch_tokens=1000,
            share=True,
            check=lambda: None,
        )
    assert seen == [1, 2, 3]
    assert watched == free[:3] and len(free) == 9


def test_a_prompt_of_one_token_needs_no_prefix() -> None:
    model, _ = tiny_model()
    options = {"end_tokens": frozenset(), "batch_tokens": 1000, "check": lambda: None}
    drafts = [Draft([1], limit=4), Draft([3], limit=6), Draft([3], limit=6)]
    with torch.inference_mode():
        assert decode(model, drafts, share=True, **options) == decode(model, drafts, share=False, **options)
