from fractions import Fraction
from itertools import pairwise
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popi.data.miniworld import tastes
from popi.data.miniworld.world import draw_user

SIZE = len(tastes.DIMENSIONS)
HYPOTHESES = 180 + 960 + 3360 + 8064  # C(10, k) * 2^k for k = 2..5


def one(dimension, side):
    vector = np.zeros(SIZE, np.int8)
    vector[dimension] = side
    return vector


def last_marginals(*log_likelihoods):
    return tastes.marginals(tastes.posterior(np.stack(log_likelihoods)))[-1]


def test_every_taste_is_a_hypothesis_once():
    table = tastes.hypotheses()
    assert table.shape == (HYPOTHESES, SIZE)
    assert len({row.tobytes() for row in table}) == HYPOTHESES
    assert set(np.abs(table).sum(axis=1)) == {2, 3, 4, 5}


def test_the_prior_is_uniform_over_the_number_of_cares():
    prior = np.exp(tastes.log_prior())
    assert prior.sum() == pytest.approx(1, abs=1e-4)
    for count in (2, 3, 4, 5):
        assert prior[tastes.cared() == count].sum() == pytest.approx(0.25, abs=1e-4)


def test_a_remark_leaves_nineteen_to_one_for_its_side():
    # Liked with k/20 and remarked upon with .95/k, disliked with k/20 and .05/k: k cancels.
    assert last_marginals(tastes.of_remark(3, -1))[3] == pytest.approx([0.05, 0.95, 0], abs=1e-4)


def test_two_remarks_multiply():
    # Twice 19 to 1 would be 361 to 1, were k not told by both: it is the same k for both sides.
    found = last_marginals(tastes.of_remark(0, 1), tastes.of_remark(0, 1))[0]
    assert found == pytest.approx([361 / 362, 1 / 362, 0], abs=1e-4)


def chance_of_states(count, first, second):
    """The prior chance of two given states in two dimensions for a user who cares about ``count``."""
    cares = abs(first) + abs(second)
    return Fraction(comb(SIZE - 2, count - cares) * 2 ** (count - cares), comb(SIZE, count) * 2**count)


def test_a_choice_with_two_differences_worked_out_by_hand():
    weight = {}
    for count in (2, 3, 4, 5):
        single = Fraction(count, SIZE)
        pairs = comb(SIZE, 2)
        double = 1 - Fraction(comb(SIZE - count, 2), pairs) - Fraction(comb(count, 2), 2 * pairs)
        decisive = (single + double) / 2
        for first in (-1, 0, 1):
            for second in (-1, 0, 1):
                gain = first - second
                if gain:
                    chance = Fraction(19, 20) if gain > 0 else Fraction(1, 20)
                    state = weight.setdefault((first, second), Fraction(0))
                    weight[first, second] = state + chance_of_states(count, first, second) * chance / decisive
    total = sum(weight.values())
    expected = [
        float(sum(value for (first, _), value in weight.items() if first == side) / total) for side in (1, -1, 0)
    ]
    found = last_marginals(tastes.of_choice(one(0, 1) - one(1, 1)))
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[1] == pytest.approx([expected[1], expected[0], expected[2]], abs=1e-4)


def test_the_likelihoods_of_all_remarks_sum_to_one():
    total = sum(np.exp(tastes.of_remark(place, side)) for place in range(SIZE) for side in (1, -1))
    assert total == pytest.approx(np.ones(HYPOTHESES), abs=1e-4)


def test_the_likelihoods_of_all_occupations_sum_to_one():
    total = sum(np.exp(tastes.of_trade(place, side)) for place in range(SIZE) for side in (1, -1))
    assert total == pytest.approx(np.ones(HYPOTHESES), abs=1e-4)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([-1, 1]), min_size=SIZE, max_size=SIZE))
def test_the_likelihoods_of_all_scores_sum_to_one(style):
    total = sum(np.exp(tastes.of_rating(np.array(style, np.int8), score)) for score in range(1, 6))
    assert total == pytest.approx(np.ones(HYPOTHESES), abs=1e-4)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([-1, 1]), min_size=SIZE, max_size=SIZE))
def test_the_likelihoods_of_all_edits_of_an_answer_sum_to_its_chance(style):
    style = np.array(style, np.int8)
    total = sum(np.exp(tastes.of_edit(style, place)) for place in range(SIZE))
    missed = (tastes.hypotheses() == -style).any(axis=1)
    assert total == pytest.approx(missed / (1 - 0.5 ** tastes.cared()), abs=1e-4)


def test_the_likelihoods_of_all_choices_sum_to_one_half_in_either_order():
    table, _ = tastes._questions()
    singles = np.abs(table).sum(axis=1) == 1
    weight = np.where(singles, 0.5 / singles.sum(), 0.5 / (~singles).sum())
    total = sum(
        weight[place] * np.exp(tastes.of_choice(sign * row)) for place, row in enumerate(table) for sign in (1, -1)
    )
    assert total == pytest.approx(np.ones(HYPOTHESES), abs=1e-4)


@given(st.integers(0, 10_000))
def test_a_posterior_is_a_distribution_after_every_signal(place):
    beliefs = draw_user("train", 7, place, signals=4, tests=0).beliefs()
    assert beliefs.shape == (5, HYPOTHESES)
    assert beliefs.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-4)
    table = tastes.marginals(beliefs)
    assert table.min() >= 0
    assert table.sum(axis=-1) == pytest.approx(np.ones((5, SIZE)), abs=1e-4)


def test_the_order_of_signals_does_not_matter():
    rows = np.stack([seen.log_likelihood for seen in draw_user("train", 1, 1).observations])
    assert tastes.posterior(rows)[-1] == pytest.approx(tastes.posterior(rows[::-1])[-1], abs=1e-6)


def test_nothing_is_claimed_of_a_user_without_signals():
    assert not tastes.best_claims(np.exp(tastes.log_prior())).any()


@given(st.integers(0, HYPOTHESES - 1))
def test_the_evidence_oracle_of_a_certain_belief_is_the_truth(place):
    belief = np.zeros(HYPOTHESES, np.float32)
    belief[place] = 1
    assert (tastes.best_claims(belief) == tastes.hypotheses()[place]).all()


def expected_accuracy(claims, belief):
    table, signed = tastes._questions()
    return 0.5 + float(np.sign(table @ claims) @ (belief @ signed)) / 2


@given(st.integers(0, 10_000))
def test_no_single_change_improves_the_evidence_oracle_by_more_than_a_claim_must(place):
    belief = draw_user("train", 3, place).beliefs()[-1]
    claims = tastes.best_claims(belief)
    best = expected_accuracy(claims, belief)
    for dimension in range(SIZE):
        for state in (-1, 0, 1):
            other = claims.copy()
            other[dimension] = state
            more = int(np.abs(other).sum()) - int(np.abs(claims).sum())
            assert expected_accuracy(other, belief) <= best + 0.004 * more + 1e-5


def choices_and_predictions(users):
    """For held-out choices, whether the first-shown answer was taken, and the posterior's chance of it."""
    rng = np.random.default_rng(0)
    taken, predicted = [], []
    weights = np.sign(tastes.hypotheses().astype(np.int64))
    for place in range(users):
        user = draw_user("train", 11, place, tests=1)
        belief = user.beliefs()[-1]
        for choice in user.tests:
            swapped = bool(rng.integers(2))
            difference = -choice.difference if swapped else choice.difference
            gain = np.sign(weights @ difference)
            chance = np.where(gain > 0, 1 - tastes.NOISE, tastes.NOISE) * (gain != 0) / tastes.decisive_rate()
            opposite = np.where(gain < 0, 1 - tastes.NOISE, tastes.NOISE) * (gain != 0) / tastes.decisive_rate()
            here, there = belief @ chance, belief @ opposite
            predicted.append(here / (here + there))
            taken.append(not swapped)
    return np.array(taken, float), np.array(predicted)


def assert_calibrated(users):
    taken, predicted = choices_and_predictions(users)
    edges = np.linspace(0, 1, 11)
    for low, high in pairwise(edges):
        here = (predicted >= low) & (predicted < high)
        if here.sum() < 30:
            continue
        expected = predicted[here].mean()
        error = np.sqrt(expected * (1 - expected) / here.sum())
        assert abs(taken[here].mean() - expected) < 4 * error, (low, high, taken[here].mean(), expected)


def test_the_posterior_is_calibrated():
    assert_calibrated(1000)


@pytest.mark.slow
def test_the_posterior_is_calibrated_on_ten_thousand_users():
    assert_calibrated(10_000)
