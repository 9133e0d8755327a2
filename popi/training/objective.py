"""The joint preference objective, as pure functions of tensors.

One objective joins the writer q_phi and the generator pi_theta (POPI, arXiv 2510.17881):

    min over theta, phi of  E_{s, x, y_w, y_l} E_{z ~ q_phi(.|s)} [ loss(h) ]  +  kl_coef * KL(q_phi || q_base)

theta follows the gradient of the loss. phi is trained by GRPO with the reward ``-loss``; the advantages, the KL
divergence and the policy loss are those of TRL's ``GRPOTrainer``.

Shapes: N pairs, G summaries, P pairs of each summary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = Literal["dpo", "ipo"]

Reduction = Literal["sum", "mean"]
"""How the log-probabilities of a response's tokens are reduced to one number. DPO takes the sum. SimPO
(arXiv 2405.14734) takes the mean, so that a response is not less likely only because it is longer."""


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Log-probability ratios of preference pairs under summaries, against the reference without a summary.

    Attributes:
        chosen_N: log pi_theta(y_w|x,z) - log pi_ref(y_w|x), in nats.
        rejected_N: log pi_theta(y_l|x,z) - log pi_ref(y_l|x), in nats.
    """

    chosen_N: Tensor
    rejected_N: Tensor

    @property
    def margins_N(self) -> Tensor:
        """The margin h of each pair before beta, in nats: the ratio of the chosen response minus that of the rejected.

        The reference answers the plain prompt and never sees a summary (POPI, as released).
        """
        return self.chosen_N - self.rejected_N


def dpo_loss(h: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta h) / beta, elementwise (DPO, arXiv 2305.18290; POPI divides by beta).

    Its gradient with respect to h is in (-1, 0) for every beta, so rewards with different beta are comparable.
    """
    return -logsigmoid(beta * h) / beta


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(beta / 2) (h - 1 / (2 beta))^2, elementwise (IPO, arXiv 2310.12036, in the scale of POPI)."""
    return beta / 2 * (h - 1 / (2 * beta)) ** 2


LOSSES: dict[Loss, Callable[[Tensor, float], Tensor]] = {"dpo": dpo_loss, "ipo": ipo_loss}


def rewards(losses_G_P: Tensor, tokens_G: Tensor, length_penalty: float = 0.0) -> Tensor:
    """The reward of each summary: minus the mean loss of its pairs, minus the penalty for its length.

    Args:
        losses_G_P: The loss of each pair under each summary.
        tokens_G: Lengths of the summaries, in tokens.
        length_penalty: Cost of a token.

    Returns:
        Rewards ``[G]``, in nats.
    """
    return -losses_G_P.mean(dim=-1) - length_penalty * tokens_G


def accuracy(h: Tensor) -> float:
    """Share of pairs with a positive margin. A tie counts one half.

    Args:
        h: Margins ``[N]``, in nats.
    """
    return ((h > 0).double() + (h == 0).double() / 2).mean().item()
