"""What a rank holds for a model from step to step: its weights, gradients, optimizer and buffers, by engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch

BUCKET = 5 * 10**8
"""Numbers in DeepSpeed's buffer for the reduction of gradients (``reduce_bucket_size``), its default."""

MAX_LIVE = 10**9
"""Maximum number of weights that ZeRO-3 keeps gathered (``stage3_max_live_parameters``), its default."""

SUB_GROUP = 10**9
"""Number of weights that ZeRO-3 updates at a time (``sub_group_size``), its default."""

Parts = Counter[str]
"""Bytes by part."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How a rank holds what is trained.

    Attributes:
        stage: The stage of ZeRO, 0 for none.
        ranks: Number of ranks.
        offload: What is kept in the memory of the host.
        gpu: Whether the ranks are GPUs.
    """

    stage: int
    ranks: int
    offload: Literal["none", "optimizer", "parameters"]
    gpu: bool


@dataclass(frozen=True, slots=True)
class Held:
    """A model in the memory of a rank.

    Attributes:
        base: Number of weights of the model.
        adapter: Number of weights of its adapter, 0 without one.
        dtype: Type of the weights of the model.
        adapter_dtype: Type of the weights of the adapter.
    """

    base: int
    adapter: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype

    @property
    def whole(self) -> int:
        """Bytes of all weights."""
        return self.base * self.dtype.itemsize + self.adapter * self.adapter_dtype.itemsize

    @property
    def trained(self) -> int:
        """Number of weights that are trained."""
        return self.adapter or self.base

    @property
    def gradient_bytes(self) -> int:
        """Bytes of their gradients, in their type."""
        return self.trained * (self.adapter_dtype if self.adapter else self.dtype).itemsize


def in_training(model: Held, engine: Engine, *, by_trainer: bool) -> tuple[Parts, Parts, Parts]:
    """What a rank holds for a model that is trained.

    Args:
        model: The model.
        engine: The engine.
        by_trainer: Whether a trainer of transformers updates it, and not :class:`popi.training.updates.AdamWUpdate`.

    Returns:
        What it holds always, what is added in a backward pass, and what is added in the step of the optimizer.
    """
    if engine.stage == 0:
        return _whole(model, engine, by_trainer=by_trainer)
    always, backward, step = _divided(model, engine)
    if engine.offload != "none":
        _move(always, "optimizer state", "master weights")
        step = Parts()
    if engine.offload == "parameters":
        _move(always, "weights")
    return always, backward, step


def _move(parts: Parts, *names: str) -> None:
    for name in names:
        parts["host memory"] += parts.pop(name, 0)


def _whole(model: Held, engine: Engine, *, by_trainer: bool) -> tuple[Parts, Parts, Parts]:
    always = Parts({"weights": model.whole, "optimizer state": 2 * model.gradient_bytes})
    if by_trainer and engine.ranks > 1:
        # DDP copies the gradients into buckets.
        always["gradient buffers"] = model.gradient_bytes
    step = Parts({"gradients": model.gradient_bytes})
    if engine.gpu and not by_trainer:
        # Without a fused kernel, AdamW computes all denominators at once.
        step["optimizer temporaries"] = model.gradient_bytes
    return always, Parts(), step


def _divided(model: Held, engine: Engine) -> tuple[Parts, Parts, Parts]:
    own = -(-model.trained // engine.ranks)
    always = Parts({"optimizer state": 8 * own, "master weights": 4 * own})
    # On a CPU only the part of a buffer that is used takes memory.
    bucket = BUCKET if engine.gpu else min(BUCKET, model.trained)
    number = model.gradient_bytes // model.trained
    # Between two reductions, gradients wait in the type of the weights.
    # ZeRO-3 copies those of a bucket once more, in the order of the ranks.
    waiting = min(BUCKET, model.trained) * (2 if engine.stage == 3 else 1)
    backward = Parts({"gradient buffers": (bucket + waiting) * number})
    temporary = 1 if engine.gpu else 2
    if engine.stage == 3:
        always["weights"] = model.whole // engine.ranks
        always["gradients"] = 4 * own
        backward["gathered weights"] = min(model.base, MAX_LIVE) * model.dtype.itemsize
        return always, backward, Parts({"optimizer temporaries": 4 * min(own, SUB_GROUP) * (1 + temporary)})
    always["weights"] = model.whole
    kept = own if engine.stage == 2 else model.trained
    backward["gradients"] = 4 * kept
    return always, backward, Parts({"gradients": 4 * kept, "optimizer temporaries": 4 * own * temporary})


def reference(model: Held, engine: Engine) -> Parts:
    """The initial writer, which the KL divergence is measured from. An adapter needs no copy."""
    if model.adapter:
        return Parts()
    return Parts({"KL reference": model.whole // (engine.ranks if engine.stage == 3 else 1)})


def sizes_of(config: Any, lora: Any) -> tuple[int, int]:
    """Numbers of weights of a model and of its adapter."""
    from popi.planning.tracing import blank_model
    from popi.training.adapters import Adapter

    model = blank_model(config, torch.float32, layers=config.get_text_config().num_hidden_layers)
    base = sum(weight.numel() for weight in model.parameters())
    if lora is None:
        return base, 0
    adapter = Adapter(model, "planned", **lora._asdict(), seed=0)
    return base, sum(weight.numel() for weight in adapter.parameters().values())
