"""A model that is trained from scratch, its optimizers, and one training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from popi.data.miniworld.curriculum import Lesson
from popi.errors import ConfigError, PopiError
from popi.pretraining.attention import use_float32_attention
from popi.pretraining.lessons import SignalHeads, batches, encode, losses
from popi.pretraining.muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_GRAD_NORM = 1.0

WEIGHTS = {"response": 1.0, "styles": 0.2, "shown": 0.3, "beliefs": 0.3}
"""Weight of each loss of :class:`popi.pretraining.lessons.Losses`, which is a mean over tokens, answers or signals."""


@dataclass(slots=True)
class Learner:
    """Everything that a training step changes and a checkpoint contains.

    Attributes:
        model: A causal language model of transformers.
        heads: Auxiliary heads. They are not part of the result.
        optimizers: Muon for the matrices inside the layers, AdamW for all other parameters.
        step: Number of completed steps.
    """

    model: PreTrainedModel
    heads: SignalHeads
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on. The lessons depend on the number of the step only."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def build(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> Learner:
    """Makes a model with random weights, and its optimizers.

    Args:
        architecture: Arguments of the transformers config, including ``model_type``.
        tokenizer: Determines the size of the vocabulary and the special tokens.
        seed: Seed of the weights.

    Raises:
        ConfigError: If transformers cannot make a causal language model with layers from the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(
            **architecture,
            vocab_size=len(tokenizer),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config)
        use_float32_attention(model)
        heads = SignalHeads(config.hidden_size)
        layers = model.base_model.layers
    # Each model family reports invalid arguments with its own exceptions.
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make a model of it ({error})", field="architecture", fix="see the family's config"
        ) from error
    inside = {id(p) for p in layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in inside]
    muon = Muon(matrices, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    return Learner(model, heads, [muon, adam])


def learn(
    learner: Learner,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Sequence[Lesson],
    *,
    lr: float,
    bf16: bool,
    batch_tokens: int,
) -> dict[str, float]:
    """Does one step on the weighted sum of the mean losses.

    Args:
        learner: The model and its optimizers.
        tokenizer: Its tokenizer.
        lessons: The lessons of the step.
        lr: Learning rate of both optimizers.
        bf16: Whether to compute in bfloat16 under autocast.
        batch_tokens: Maximum number of tokens of a forward pass, including padding.

    Returns:
        Metrics of the step: losses in nats, shares, and the number of tokens.

    Raises:
        PopiError: If the training diverged. The weights are unchanged.
    """
    encoded = encode(tokenizer, lessons)
    signals = sum(len(item.signal_ends) for item in encoded)
    counts = {
        "response": sum(len(item.ids) - item.prompt for item in encoded),
        "styles": sum(len(item.answer_ends) for item in encoded),
        "shown": signals,
        "beliefs": signals,
    }
    metrics = dict.fromkeys(counts, 0.0)
    correct, labels = 0, 0
    for batch in batches(encoded, int(tokenizer.pad_token_id), batch_tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            part = losses(learner.model, learner.heads, batch)
        means = {name: getattr(part, name).sum() / max(1, count) for name, count in counts.items()}
        torch.stack([WEIGHTS[name] * mean for name, mean in means.items()]).sum().backward()
        for name, mean in means.items():
            metrics[name] += mean.item()
        correct, labels = correct + int(part.correct.sum()), labels + len(part.correct)
    norm = float(nn.utils.clip_grad_norm_((*learner.model.parameters(), *learner.heads.parameters()), MAX_GRAD_NORM))
    if not math.isfinite(norm):
        raise PopiError(
            f"training diverged: the gradient norm became {norm} at step {learner.step + 1}; "
            "lower the learning rate and start again in another folder"
        )
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.step += 1
    tokens = sum(len(item.ids) for item in encoded)
    return {**metrics, "reading": correct / max(1, labels), "grad_norm": norm, "lr": lr, "tokens": tokens}
