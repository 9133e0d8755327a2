"""Lessons as tensors, and the losses over them.

Shapes: B lessons, T tokens, R response tokens, S signals, A answers inside signals, D dimensions of the mini world.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from popi.data.miniworld.curriculum import Lesson
from popi.data.miniworld.tastes import DIMENSIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Encoded:
    """One lesson in tokens.

    Attributes:
        ids: Tokens of the conversation, the response and its end of turn.
        prompt: Number of tokens of the conversation.
        signal_ends: Index of the last token of each signal.
        answer_ends: Index of the last token of each answer inside a signal.
        lesson: The lesson.
    """

    ids: list[int]
    prompt: int
    signal_ends: list[int]
    answer_ends: list[int]
    lesson: Lesson


def encode(tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson]) -> list[Encoded]:
    """Renders lessons with the chat template and locates the ends of signals and answers."""
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in lesson.messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        for lesson in lessons
    ]
    responses = [lesson.response + str(tokenizer.eos_token) for lesson in lessons]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)
    response_ids = tokenizer(responses, add_special_tokens=False)
    encoded = []
    for row, lesson in enumerate(lessons):
        start = prompts[row].index(lesson.messages[-1].content)
        signal_ends, answer_ends = (
            [prompt_ids.char_to_token(row, start + end) for end in ends] for ends in (lesson.ends, lesson.answer_ends)
        )
        prompt = prompt_ids["input_ids"][row]
        encoded.append(Encoded(prompt + response_ids["input_ids"][row], len(prompt), signal_ends, answer_ends, lesson))
    return encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons of similar length, padded on the right. Positions are indices into the flattened ``ids``.

    Attributes:
        ids: Tokens: (B, T).
        at: Positions of the tokens that predict a response token: (R,).
        targets: The response tokens: (R,).
        signal_ends: Positions of the last token of each signal: (S,).
        shown: The side that each signal shows by itself, as a class: 0 first side, 1 second side, 2 nothing: (S, D).
        beliefs: The posterior after each signal: (S, D, 3).
        answer_ends: Positions of the last token of each answer: (A,).
        styles: Whether each answer takes the first side, as floats: (A, D).
    """

    ids: Tensor
    at: Tensor
    targets: Tensor
    signal_ends: Tensor
    shown: Tensor
    beliefs: Tensor
    answer_ends: Tensor
    styles: Tensor


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Pads lessons on the right. No mask is needed, because only positions inside a lesson are read."""
    width = max(len(item.ids) for item in items)
    ids = torch.tensor([item.ids + [pad] * (width - len(item.ids)) for item in items])
    at = torch.cat([torch.arange(item.prompt, len(item.ids)) + row * width for row, item in enumerate(items)]) - 1
    shown = _stack([item.lesson.shown for item in items], np.zeros((0, len(DIMENSIONS)), np.int8))
    beliefs = _stack([item.lesson.beliefs for item in items], np.zeros((0, len(DIMENSIONS), 3), np.float32))
    styles = _stack([item.lesson.styles for item in items], np.zeros((0, len(DIMENSIONS)), np.int8))
    return Batch(
        ids=ids,
        at=at,
        targets=ids.flatten()[at + 1],
        signal_ends=_flat([item.signal_ends for item in items], width),
        shown=torch.from_numpy(np.array([2, 0, 1])[shown]),
        beliefs=torch.from_numpy(beliefs),
        answer_ends=_flat([item.answer_ends for item in items], width),
        styles=torch.from_numpy((styles > 0).astype(np.float32)),
    )


def _stack(parts: Sequence[NDArray[Any] | None], empty: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([empty, *(part for part in parts if part is not None)])


def _flat(ends: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([row * width + end for row, part in enumerate(ends) for end in part], dtype=torch.long)


def batches(items: Sequence[Encoded], pad: int, batch_tokens: int) -> Iterator[Batch]:
    """Packs lessons by length into batches of at most ``batch_tokens`` tokens, including padding.

    A longer lesson has its own batch.
    """
    chosen: list[Encoded] = []
    for item in sorted(items, key=lambda item: len(item.ids)):
        if chosen and len(item.ids) * (len(chosen) + 1) > batch_tokens:
            yield collate(chosen, pad)
            chosen = []
        chosen.append(item)
    if chosen:
        yield collate(chosen, pad)


class SignalHeads(nn.Module):
    """Linear auxiliary heads on hidden states, used in training only.

    ``styles`` predicts the style of an answer at a third of the layers, ``shown`` the sides that a signal shows at two
    thirds, and ``beliefs`` the posterior after the signal below the top layer. Each prediction builds on the one
    before, and later tokens can attend to all three.

    Args:
        width: Size of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.styles = nn.Linear(width, len(DIMENSIONS))
        self.shown = nn.Linear(width, len(DIMENSIONS) * 3)
        self.beliefs = nn.Linear(width, len(DIMENSIONS) * 3)


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of one batch in nats. Those of the heads are summed over the dimensions.

    Attributes:
        response: Cross-entropy of each response token: (R,).
        styles: Cross-entropy of the style of each answer: (A,).
        shown: Cross-entropy of the sides that each signal shows: (S,).
        beliefs: Kullback-Leibler divergence from the exact posterior: (S,).
        correct: Whether the head predicts each side that a signal shows: (labels,).
    """

    response: Tensor
    styles: Tensor
    shown: Tensor
    beliefs: Tensor
    correct: Tensor


def losses(model: PreTrainedModel, heads: SignalHeads, batch: Batch) -> Losses:
    """Runs a batch in one forward pass. Logits are computed only where they predict a response token."""
    low, middle, high, top = _states(model, batch.ids)
    logits = model.get_output_embeddings()(top[batch.at]).float()
    styles = heads.styles(low[batch.answer_ends]).float()
    shown = heads.shown(middle[batch.signal_ends]).float().view(-1, len(DIMENSIONS), 3)
    beliefs = heads.beliefs(high[batch.signal_ends]).float().view(-1, len(DIMENSIONS), 3).log_softmax(-1)
    labelled = batch.shown != 2
    return Losses(
        response=F.cross_entropy(logits, batch.targets, reduction="none"),
        styles=F.binary_cross_entropy_with_logits(styles, batch.styles, reduction="none").sum(-1),
        shown=F.cross_entropy(shown.flatten(0, 1), batch.shown.flatten(), reduction="none").view_as(labelled).sum(-1),
        beliefs=F.kl_div(beliefs, batch.beliefs, reduction="none").sum((-1, -2)),
        correct=(shown.argmax(-1) == batch.shown)[labelled],
    )


def _states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Hidden states at a third, at two thirds, below the top layer and at the top: (B * T, width) each."""
    layers = cast(nn.ModuleList, model.base_model.layers)
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    indices = (len(layers) // 3 - 1, 2 * len(layers) // 3 - 1, len(layers) - 2)
    hooks = [layers[index].register_forward_hook(keep) for index in indices]
    try:
        states.append(model.base_model(ids, use_cache=False).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return [state.flatten(0, 1) for state in states]
