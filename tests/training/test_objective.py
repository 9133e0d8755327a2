"""The objective, with numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from popi.training.objective import (
    LOSSES,
    accuracy,
    advantages,
    dpo_loss,
    ipo_loss,
    kl_penalty,
    margin,
    policy_loss,
    rewards,
)

NATS = st.floats(-200, 200)
BETA = st.floats(1e-3, 2)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_margin_is_what_the_summary_adds_to_the_bare_reference():
    # (-10 + 14) - (-12 + 13) = 3
    assert margin(tensor(-10.0), tensor(-14.0), tensor(1.0)).item() == 3.0


def test_dpo_by_hand():
    # sigmoid(0.1 * 0) = 1/2: log 2 / 0.1; sigmoid(0.5 * 2 ln 3) = 3/4: log(4/3) / 0.5
    assert dpo_loss(tensor(0.0), 0.1).item() == pytest.approx(10 * math.log(2))
    assert dpo_loss(tensor(2 * math.log(3)), 0.5).item() == pytest.approx(2 * math.log(4 / 3))


def test_at_popi_s_scale_the_reward_is_close_to_a_line():
    # For |beta h| << 1: -loss ~ -69.3 + h / 2 at beta = 0.01.
    assert -dpo_loss(tensor(4.0), 0.01).item() == pytest.approx(-69.31 + 2.0, abs=0.03)


def test_ipo_by_hand():
    # (0.1 / 2) (h - 5)^2: 1.25 at 0, 0 at 5, 0.2 at 7
    assert ipo_loss(tensor(0.0, 5.0, 7.0), 0.1).tolist() == pytest.approx([1.25, 0.0, 0.2])


@given(NATS, BETA)
def test_the_losses_fall_towards_what_they_ask_for(h, beta):
    value = tensor(h).requires_grad_()
    dpo_loss(value, beta).sum().backward()
    assert -1 <= value.grad.item() <= 0
    assert ipo_loss(tensor(1 / (2 * beta)), beta).item() == pytest.approx(0, abs=1e-9)
    assert all(loss(tensor(h), beta).item() >= 0 for loss in LOSSES.values())


def test_rewards_by_hand():
    losses_U_G_P = tensor([[1.0, 3.0], [2.0, 2.0]])[None]
    assert rewards(losses_U_G_P[0]).tolist() == [[-2.0, -2.0]]
    priced = rewards(losses_U_G_P[0], tensor([10.0, 4.0]), token_price=0.5)
    assert priced.tolist() == [[-7.0, -4.0]]


def test_advantages_by_hand():
    # mean 3, standard deviation (n - 1) 2
    given = tensor([1.0, 3.0, 5.0])
    assert advantages(given).tolist() == [[-2.0, 0.0, 2.0]]
    assert advantages(given, scale_by_std=True).tolist()[0] == pytest.approx([-1, 0, 1], abs=1e-4)


@given(st.lists(NATS, min_size=2, max_size=8), NATS)
def test_advantages_sum_to_nothing_and_forget_what_all_share(values, shift):
    given = tensor(values)
    assert advantages(given).sum().item() == pytest.approx(0, abs=1e-9)
    assert advantages(given + shift).tolist()[0] == pytest.approx(advantages(given).tolist()[0], abs=1e-9)


def test_a_group_that_agrees_teaches_nothing():
    assert advantages(tensor([4.0, 4.0]), scale_by_std=True).tolist() == [[0.0, 0.0]]


def test_kl_by_hand():
    # r = 1/2: 1/2 - log(1/2) - 1
    assert kl_penalty(tensor(0.0), tensor(-math.log(2))).item() == pytest.approx(math.log(2) - 0.5)
    assert kl_penalty(tensor(-1.5), tensor(-1.5)).item() == 0


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=6), st.lists(st.floats(0.05, 1), min_size=6, max_size=6))
def test_the_expectation_of_k3_is_the_divergence(p, q):
    p = torch.tensor(p, dtype=torch.float64)
    q = torch.tensor(q[: len(p)], dtype=torch.float64)
    p, q = p / p.sum(), q / q.sum()
    penalty = kl_penalty(p.log(), q.log())
    assert (penalty >= -1e-12).all()
    assert (p * penalty).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-9)


def test_the_policy_loss_by_hand():
    # No divergence: minus the mean advantage, here (-(2) - (-1)) / 2 = -1/2, and its gradient is -A / (R * T).
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    loss = policy_loss(logps, logps.detach(), torch.tensor([2.0, -1.0]), mask, kl=0.1)
    assert loss.item() == pytest.approx(-0.5)
    loss.backward()
    expected = torch.tensor([[-1 / 3, -1 / 3, -1 / 3], [0.25, 0.25, 0.0]])
    torch.testing.assert_close(logps.grad, expected)


def test_the_policy_loss_of_a_sum_by_hand():
    # The gradient of every token is -A / (R * room), however long its summary is.
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    loss = policy_loss(logps, logps.detach(), torch.tensor([2.0, -1.0]), mask, kl=0.1, room=4)
    assert loss.item() == pytest.approx((-2 * 3 + 1 * 2) / 4 / 2)
    loss.backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.25, -0.25, -0.25], [0.125, 0.125, 0.0]]))


def test_accuracy_by_hand():
    assert accuracy(tensor(2.0, -1.0, 0.0, 3.0)) == 0.625
