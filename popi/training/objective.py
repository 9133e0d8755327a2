"""The joint preference objective: pure functions of tensors.

Shapes: U users, G summaries of each (a group), P preference pairs of each, R rows, T tokens.

One objective joins writer q_phi and generator pi_theta (POPI, arXiv 2510.17881):

    min over theta, phi of  E_{s, x, y_w, y_l} E_{z ~ q_phi(.|s)} [ loss(h) ]  +  kl * KL(q_phi || q_base)

theta follows the gradient of the loss; phi is taught by reinforcement with the reward ``-loss``. The writer's trainer
is TRL's; what it does with rewards is written out here too, and tests hold it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = Literal["dpo", "ipo"]
Over = Literal["sum", "mean"]
"""How the log-probabilities of a response's tokens make one number: DPO sums them; SimPO (arXiv 2405.14734) takes the
mean, so that a longer response is no less likely by its length alone."""


def margin(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    """The implicit reward margin h of a pair under a summary, before beta, in nats.

        h = [log pi_theta(y_w|x,z) - log pi_theta(y_l|x,z)] - [log pi_ref(y_w|x) - log pi_ref(y_l|x)]

    The reference answers the bare prompt: it never sees a summary (POPI, as released).

    Args:
        chosen: log pi_theta(y_w|x,z), any shape.
        rejected: log pi_theta(y_l|x,z), alike.
        reference: log pi_ref(y_w|x) - log pi_ref(y_l|x), broadcastable.
    """
    return chosen - rejected - reference


def dpo_loss(h: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta h) / beta, elementwise (DPO, arXiv 2305.18290; the division is POPI's).

    Its gradient with respect to h lies in (-1, 0) whatever beta is, so that rewards of different beta compare.
    """
    return -logsigmoid(beta * h) / beta


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(beta / 2) (h - 1 / (2 beta))^2, elementwise (IPO, arXiv 2310.12036, in POPI's scale)."""
    return beta / 2 * (h - 1 / (2 * beta)) ** 2


LOSSES: dict[Loss, Callable[[Tensor, float], Tensor]] = {"dpo": dpo_loss, "ipo": ipo_loss}


def rewards(losses_U_G_P: Tensor, tokens_U_G: Tensor | None = None, token_price: float = 0.0) -> Tensor:
    """What each summary earns: minus the loss of the held-out pairs under it, in the mean over them.

    Args:
        losses_U_G_P: The loss of each pair under each summary; leading dimensions may be missing.
        tokens_U_G: Lengths of the summaries.
        token_price: What one token of a summary costs.

    Returns:
        (U, G), or what is left of it.
    """
    earned_U_G = -losses_U_G_P.mean(dim=-1)
    return earned_U_G if tokens_U_G is None else earned_U_G - token_price * tokens_U_G


def advantages(rewards_U_G: Tensor, *, scale_by_std: bool = False) -> Tensor:
    """Rewards against the mean of their group: (U, G).

    Args:
        rewards_U_G: Rewards.
        scale_by_std: Divide by the standard deviation of the group, as GRPO does (arXiv 2402.03300). POPI does not:
            it would make much of groups whose summaries differ by little.
    """
    centred_U_G = rewards_U_G - rewards_U_G.mean(dim=-1, keepdim=True)
    if not scale_by_std:
        return centred_U_G
    return centred_U_G / (rewards_U_G.std(dim=-1, keepdim=True) + 1e-4)


def kl_penalty(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """An estimate of KL(q || q_ref) for each token drawn from q, never negative ("k3", joschu.net/blog/kl-approx.html).

    k3 = r - log r - 1,   r = q_ref / q
    """
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def policy_loss(
    logps_R_T: Tensor,
    ref_logps_R_T: Tensor,
    advantages_R: Tensor,
    mask_R_T: Tensor,
    *,
    kl: float,
    room: int | None = None,
) -> Tensor:
    """GRPO's loss of summaries that the present writer has sampled, in the mean over them.

    Right after sampling the ratio of new to old probabilities is one and no clipping acts; only its gradient counts.

    Args:
        logps_R_T: log q_phi of each token.
        ref_logps_R_T: log q_base of it.
        advantages_R: Of each summary.
        mask_R_T: 1 where a token is, 0 behind the end.
        kl: Weight of the KL divergence.
        room: The most tokens of a summary. GRPO takes the mean over the tokens of each (arXiv 2402.03300), so that what
            is bad weighs less by the token where it is longer, and summaries grow; with ``room``, their sum is divided
            by this constant instead (Dr. GRPO, arXiv 2503.20783).

    Returns:
        A scalar.
    """
    ratio_R_T = (logps_R_T - logps_R_T.detach()).exp()
    loss_R_T = -ratio_R_T * advantages_R[:, None] + kl * kl_penalty(logps_R_T, ref_logps_R_T)
    lengths_R = mask_R_T.sum(dim=1).clamp(min=1) if room is None else room
    return ((loss_R_T * mask_R_T).sum(dim=1) / lengths_R).mean()


def accuracy(h: Tensor) -> float:
    """Share of the pairs whose margin is positive; a tie counts half.

    Args:
        h: Margins, (pairs,), in nats.
    """
    return ((h > 0).double() + (h == 0).double() / 2).mean().item()
