"""Lessons as tensors, and the losses of one step over them."""

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
        ids: The conversation, the response and the end of its turn.
        prompt: How many of them the model is given.
        marks: The last token of each signal.
        answer_marks: The last token of each answer inside a signal.
        lesson: Where it came from.
    """

    ids: list[int]
    prompt: int
    marks: list[int]
    answer_marks: list[int]
    lesson: Lesson


def encode(tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson]) -> list[Encoded]:
    """Renders lessons by the chat template and finds where each signal ends."""
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
    answers = [lesson.response + str(tokenizer.eos_token) for lesson in lessons]
    given = tokenizer(prompts, add_special_tokens=False)
    said = tokenizer(answers, add_special_tokens=False)
    encoded = []
    for place, lesson in enumerate(lessons):
        start = prompts[place].index(lesson.messages[-1].content)
        marks, answer_marks = (
            [given.char_to_token(place, start + end) for end in ends] for ends in (lesson.ends, lesson.answer_ends)
        )
        prompt = given["input_ids"][place]
        encoded.append(Encoded(prompt + said["input_ids"][place], len(prompt), marks, answer_marks, lesson))
    return encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """Lessons of similar length, padded on the right.

    B lessons, T tokens, R response tokens, S signals and A answers inside signals in all.

    Attributes:
        ids: (B, T).
        at: Flat places in (B, T) of the tokens that predict a response token: (R,).
        targets: The tokens they predict: (R,).
        owner: Which lesson each belongs to: (R,).
        marks: Flat places of the last token of each signal: (S,).
        shown: What each signal shows by itself, as a class in {0, 1, 2}: first side, second side, nothing: (S, D).
        beliefs: The posterior after it: (S, D, 3).
        answer_marks: Flat places of the last token of each answer: (A,).
        styles: Whether the answer takes the first side: (A, D), as floats.
    """

    ids: Tensor
    at: Tensor
    targets: Tensor
    owner: Tensor
    marks: Tensor
    shown: Tensor
    beliefs: Tensor
    answer_marks: Tensor
    styles: Tensor


def collate(items: Sequence[Encoded], pad: int) -> Batch:
    """Pads lessons on the right; no mask is needed where only places inside a lesson are read."""
    width = max(len(item.ids) for item in items)
    ids = torch.tensor([item.ids + [pad] * (width - len(item.ids)) for item in items])
    rows = [torch.arange(item.prompt, len(item.ids)) + row * width for row, item in enumerate(items)]
    at = torch.cat(rows) - 1
    shown = _stack([item.lesson.shown for item in items], np.zeros((0, len(DIMENSIONS)), np.int8))
    beliefs = _stack([item.lesson.beliefs for item in items], np.zeros((0, len(DIMENSIONS), 3), np.float32))
    styles = _stack([item.lesson.styles for item in items], np.zeros((0, len(DIMENSIONS)), np.int8))
    return Batch(
        ids=ids,
        at=at,
        targets=ids.flatten()[at + 1],
        owner=torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(row) for row in rows])),
        marks=_flat([item.marks for item in items], width),
        shown=torch.from_numpy(np.array([2, 0, 1])[shown]),
        beliefs=torch.from_numpy(beliefs),
        answer_marks=_flat([item.answer_marks for item in items], width),
        styles=torch.from_numpy((styles > 0).astype(np.float32)),
    )


def _stack(parts: Sequence[NDArray[Any] | None], empty: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([empty, *(part for part in parts if part is not None)])


def _flat(places: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([row * width + place for row, part in enumerate(places) for place in part], dtype=torch.long)


def batches(items: Sequence[Encoded], pad: int, tokens: int) -> Iterator[Batch]:
    """Packs lessons by length into batches of at most ``tokens`` tokens, padding included."""
    chosen: list[Encoded] = []
    for item in sorted(items, key=lambda item: len(item.ids)):
        if chosen and len(item.ids) * (len(chosen) + 1) > tokens:
            yield collate(chosen, pad)
            chosen = []
        chosen.append(item)
    if chosen:
        yield collate(chosen, pad)


class SignalHeads(nn.Module):
    """Linear readers of hidden states, used in training and then thrown away.

    One reads, at a third of the height, the style of an answer; one, at two thirds, what a signal shows; one, below the
    top layer, the posterior after it. Each is what the next one is made of, and later tokens can attend to all three.

    Args:
        width: Size of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.styles = nn.Linear(width, len(DIMENSIONS))
        self.shows = nn.Linear(width, len(DIMENSIONS) * 3)
        self.believes = nn.Linear(width, len(DIMENSIONS) * 3)


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one batch, in nats; those of the heads are summed over dimensions.

    Attributes:
        response: Of each response token: (R,).
        styles: Cross-entropy of the style of each answer: (A,).
        shows: Cross-entropy of what each signal shows: (S,).
        believes: Kullback-Leibler divergence from the exact posterior: (S,).
        reading: Whether each cell of ``shown`` that is not "nothing" was read right: (cells,).
    """

    response: Tensor
    styles: Tensor
    shows: Tensor
    believes: Tensor
    reading: Tensor


def losses(model: PreTrainedModel, heads: SignalHeads, batch: Batch) -> Losses:
    """Runs a batch once. Logits are computed only where a response token is predicted."""
    low, middle, high, top = _states(model, batch.ids)
    logits = model.get_output_embeddings()(top[batch.at]).float()
    styles = heads.styles(low[batch.answer_marks]).float()
    shows = heads.shows(middle[batch.marks]).float().view(-1, len(DIMENSIONS), 3)
    believes = heads.believes(high[batch.marks]).float().view(-1, len(DIMENSIONS), 3).log_softmax(-1)
    said = batch.shown != 2
    return Losses(
        response=F.cross_entropy(logits, batch.targets, reduction="none"),
        styles=F.binary_cross_entropy_with_logits(styles, batch.styles, reduction="none").sum(-1),
        shows=F.cross_entropy(shows.flatten(0, 1), batch.shown.flatten(), reduction="none").view_as(said).sum(-1),
        believes=F.kl_div(believes, batch.beliefs, reduction="none").sum((-1, -2)),
        reading=(shows.argmax(-1) == batch.shown)[said],
    )


def _states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Hidden states at a third, at two thirds, below the top layer and at the top: (B * T, width) each."""
    layers = cast(nn.ModuleList, model.base_model.layers)
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    places = (len(layers) // 3 - 1, 2 * len(layers) // 3 - 1, len(layers) - 2)
    hooks = [layers[place].register_forward_hook(keep) for place in places]
    try:
        states.append(model.base_model(ids, use_cache=False).last_hidden_state)
    finally:
        for hook in hooks:
            hook.remove()
    return [state.flatten(0, 1) for state in states]
