"""Choosing tokens: greedy and sampled, with their log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popi.engine.sampling import Sampler, choose


def pick(probs: list[float], noise: list[float], temperature: float = 1.0, top_p: float = 1.0) -> int:
    one = [torch.tensor([value]) for value in (temperature, top_p)]
    return int(choose(torch.tensor([probs]).log(), *one, torch.tensor([noise])))


@pytest.mark.parametrize(
    ("noise", "top_p", "token"),
    [
        ([1.0, 1.0, 1.0], 1.0, 1),
        # .2 / .3 = .67, .5 / 1 = .5, .3 / .6 = .5
        ([0.3, 1.0, 0.6], 1.0, 0),
        # The first token is outside the nucleus of .7, which consists of .5 and .3.
        ([0.3, 1.0, 0.7], 0.7, 1),
        ([0.3, 1.0, 0.5], 0.7, 2),
        # The most likely token is in every nucleus, and is the only one in that of .5.
        ([0.3, 9.0, 0.1], 0.5, 1),
        ([0.3, 9.0, 0.1], 0.0, 1),
    ],
)
def test_the_largest_ratio_within_the_nucleus_wins(noise: list[float], top_p: float, token: int) -> None:
    assert pick([0.2, 0.5, 0.3], noise, top_p=top_p) == token


def test_temperature_changes_the_distribution() -> None:
    # At temperature 1/2, .2 and .8 become .04 / .68 and .64 / .68: sixteen to one.
    assert pick([0.2, 0.8], [1.0, 15.0], temperature=0.5) == 1
    assert pick([0.2, 0.8], [1.0, 17.0], temperature=0.5) == 0
    assert pick([0.2, 0.8], [1.0, 17.0], temperature=0.0) == 1


def test_sampled_frequencies_are_the_probabilities() -> None:
    count, probs = 100_000, torch.tensor([0.05, 0.45, 0.3, 0.2])
    noise = torch.empty(count, 4).exponential_(generator=torch.Generator().manual_seed(0))
    ones = torch.ones(count)
    frequencies = choose(probs.log().expand(count, 4), ones, ones, noise).bincount(minlength=4) / count
    # Five standard deviations of the most likely token.
    assert frequencies.tolist() == pytest.approx(probs.tolist(), abs=5 * (0.25 / count) ** 0.5)


def test_rows_have_their_own_temperature_and_nucleus() -> None:
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


def sample(logits: torch.Tensor, temperatures: list[float], top_ps: list[float], *, logprobs: bool = True):
    generators = [
        torch.Generator().manual_seed(place) if temperature > 0 else None
        for place, temperature in enumerate(temperatures)
    ]
    return Sampler(temperatures, top_ps, generators, torch.device("cpu"), logprobs=logprobs)(logits)


def test_a_sample_does_not_depend_on_the_other_rows() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = sample(logits, [0.0, 0.8, 1.2], [1.0, 1.0, 0.5])
    assert together.tokens_N[0] == logits[0].argmax()
    # A whole distribution stays whole beside one that is cut.
    assert together.tokens_N[1] == sample(logits[:2], [0.0, 0.8], [1.0, 1.0]).tokens_N[1]


def test_log_probabilities_are_those_at_the_temperature_before_the_nucleus() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    chosen = sample(logits, [0.0, 0.5], [1.0, 0.1])
    assert chosen.tokens_N.tolist() == [1, 1]
    expected = [logits[0].log_softmax(0)[1].item(), (logits[1] / 0.5).log_softmax(0)[1].item()]
    assert chosen.logprobs_N is not None
    assert chosen.logprobs_N.tolist() == pytest.approx(expected, abs=1e-6)
    assert sample(logits, [0.0, 0.0], [1.0, 1.0], logprobs=False).logprobs_N is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_named(value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    logits[2, :3] = -math.inf
    assert sample(logits, [1.0, 1.0, 1.0], [0.9, 0.9, 1.0]).finite_N.tolist() == [True, False, True]
