"""The objective, with numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popi.training.objective import LOSSES, LogRatios, accuracy, dpo_loss, ipo_loss, rewards

NATS = st.floats(-200, 200)
BETA = st.floats(1e-3, 2)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_margin_is_the_difference_of_the_ratios():
    # chosen: -10 - (-12) = 2; rejected: -14 - (-13) = -1
    assert LogRatios(tensor(-10.0 + 12.0), tensor(-14.0 + 13.0)).margins_N.item() == 3.0


def test_dpo_by_hand():
    # sigmoid(0.1 * 0) = 1/2: log 2 / 0.1; sigmoid(0.5 * 2 ln 3) = 3/4: log(4/3) / 0.5
    assert dpo_loss(tensor(0.0), 0.1).item() == pytest.approx(10 * math.log(2))
    assert dpo_loss(tensor(2 * math.log(3)), 0.5).item() == pytest.approx(2 * math.log(4 / 3))


def test_with_the_beta_of_popi_the_reward_is_nearly_linear():
    # For |beta h| << 1: -loss ~ -69.3 + h / 2 at beta = 0.01.
    assert -dpo_loss(tensor(4.0), 0.01).item() == pytest.approx(-69.31 + 2.0, abs=0.03)


def test_ipo_by_hand():
    # (0.1 / 2) (h - 5)^2: 1.25 at 0, 0 at 5, 0.2 at 7
    assert ipo_loss(tensor(0.0, 5.0, 7.0), 0.1).tolist() == pytest.approx([1.25, 0.0, 0.2])


@given(NATS, BETA)
def test_the_losses_fall_towards_their_optimum(h, beta):
    value = tensor(h).requires_grad_()
    dpo_loss(value, beta).sum().backward()
    assert -1 <= value.grad.item() <= 0
    assert ipo_loss(tensor(1 / (2 * beta)), beta).item() == pytest.approx(0, abs=1e-9)
    assert all(loss(tensor(h), beta).item() >= 0 for loss in LOSSES.values())


def test_rewards_by_hand():
    losses_G_P = tensor([1.0, 3.0], [2.0, 2.0])
    assert rewards(losses_G_P, tensor(10.0, 4.0)).tolist() == [-2.0, -2.0]
    assert rewards(losses_G_P, tensor(10.0, 4.0), length_penalty=0.5).tolist() == [-7.0, -4.0]


def test_accuracy_by_hand():
    assert accuracy(tensor(2.0, -1.0, 0.0, 3.0)) == 0.625
