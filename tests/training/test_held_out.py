"""Evaluation on held-out users."""

import pytest
import torch

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import PopiError
from popi.roles import Failure, PreferenceInference
from popi.signals import UserSignals
from popi.training.held_out import evaluate_held_out
from popi.training.objective import LogRatios
from popi.training.scoring import NO_REFERENCE

PAIR = HeldOutPair(prompt="How?", chosen="So.", rejected="No.")
USERS = [PersonalizationExample(user=UserSignals(user_id="Ada"), tests=(PAIR,))]


class Scorer:
    """Finds the same margin for every pair, and remembers the items."""

    def __init__(self, margin):
        self.margin, self.items = margin, []

    def ratios(self, items):
        self.items += items
        return LogRatios(torch.full((len(items),), self.margin), torch.zeros(len(items)))


class Failing(PreferenceInference):
    """A writer whose replies fail for a reason."""

    name = "failing"

    def __init__(self, failure):
        self.failure = failure

    async def infer(self, users):
        raise AssertionError

    async def try_infer(self, users):
        return [Failure(user.user_id, "it failed", self.failure) for user in users]


def evaluated(inference=None, margin=1.0):
    scorer = Scorer(margin)
    return scorer, evaluate_held_out(inference, scorer, USERS, {PAIR: NO_REFERENCE}, step=7)


def test_margins_that_are_not_finite_are_an_error():
    _, found = evaluated()
    assert (found.accuracy, found.margin, found.failed) == (1.0, 1.0, 0.0)
    with pytest.raises(
        PopiError, match="the mean margin of held-out users became nan after 7 steps; lower the learning"
    ):
        evaluated(margin=float("nan"))


def test_a_writer_whose_logits_are_not_finite_has_diverged():
    with pytest.raises(PopiError, match="a logit of the writer became nan after 7 steps; lower the learning rate"):
        evaluated(Failing("malformed"))


def test_a_reply_that_is_not_a_summary_counts_as_one_without_a_claim():
    scorer, found = evaluated(Failing("empty"))
    assert (found.failed, found.not_enough_evidence) == (1.0, 1.0)
    assert [item.interface.status for item in scorer.items] == ["not_enough_evidence"]
