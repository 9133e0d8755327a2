"""A look at held-out users that finds no numbers."""

import pytest
import torch

from popi.data.example import HeldOutPair, PersonalizationExample
from popi.errors import BackendError, PopiError
from popi.roles import PreferenceInference
from popi.signals import UserSignals
from popi.training.look import look

PAIR = HeldOutPair(prompt="How?", chosen="So.", rejected="No.")
USERS = [PersonalizationExample(user=UserSignals(user_id="Ada"), tests=(PAIR,))]


class Scorer:
    """Finds the same margin of every pair."""

    def __init__(self, margin):
        self.margin = margin

    def margins(self, items):
        return torch.full((len(items),), self.margin)


class Broken(PreferenceInference):
    """A writer whose backend fails for a reason."""

    name = "broken"

    def __init__(self, reason):
        self.reason = reason

    async def infer(self, users):
        raise BackendError("the model failed") from self.reason


async def seen(inference=None, margin=1.0):
    return await look(inference, Scorer(margin), USERS, {PAIR: 0.0}, step=7)


async def test_margins_that_are_no_numbers_are_an_error_and_no_accuracy():
    assert (await seen()).accuracy == 1.0
    with pytest.raises(
        PopiError, match="the mean margin of held-out users became nan after 7 steps; lower the learning"
    ):
        await seen(margin=float("nan"))


async def test_a_writer_whose_logits_are_no_numbers_has_diverged_and_another_failure_stays_what_it_is():
    with pytest.raises(PopiError, match="a logit of the writer became nan after 7 steps; lower the learning rate"):
        await seen(Broken(ArithmeticError("the model's logits are not numbers")))
    with pytest.raises(BackendError, match="the model failed"):
        await seen(Broken(OSError("a lost device")))
