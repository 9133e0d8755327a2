"""Muon, an optimizer for the matrices inside a model's layers, computed in the precision of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, from https://kellerjordan.github.io/posts/muon/."""

ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, scaled to the size of AdamW's (Moonlight, arXiv 2502.16982).

    Equal to ``torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`` up to rounding. That implementation iterates in
    bfloat16: a processor that has to emulate it takes longer for the update than for the forward and backward pass.

    Args:
        params: The matrices.
        lr: Learning rate.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        momentum: Nesterov momentum.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, *, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient; matrices of the same shape are updated together."""
        if closure is not None:
            raise NotImplementedError("a closure is not supported; call backward() before step()")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for _, same in groupby(sorted(params, key=lambda p: tuple(p.shape)), key=lambda p: tuple(p.shape)):
                self._update(list(same), group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        directions = orthogonal(torch.stack([self._direction(p, group["momentum"]) for p in params]))
        rate = 0.2 * math.sqrt(max(params[0].shape)) * group["lr"]
        for p, direction in zip(params, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=rate)

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def orthogonal(matrices_N_A_B: Tensor) -> Tensor:
    """Orthogonalizes matrices with the Newton-Schulz iteration.

    Args:
        matrices_N_A_B: The matrices: (N, A, B).

    Returns:
        Matrices with the same singular vectors and singular values between about 0.7 and 1.2: (N, A, B).
    """
    a, b, c = COEFFICIENTS
    wide = matrices_N_A_B.shape[1] <= matrices_N_A_B.shape[2]
    x = matrices_N_A_B if wide else matrices_N_A_B.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
