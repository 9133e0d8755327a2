"""The parts of a training step, computed without numbers: rollouts, scoring, and the updates of both roles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from popi.data.example import HeldOutPair
from popi.engine.cache import layout_of
from popi.engine.checks import Abilities
from popi.engine.packing import Scored
from popi.engine.slots import SharedSlots
from popi.planning.lengths import Lengths
from popi.planning.tracing import Footprint, LiveBytes, Zone, along, blank_model, forget_numbers, without_numbers
from popi.training.adapters import Adapter
from popi.training.likelihood import Within, token_likelihood
from popi.training.models import LoraOptions, computing_as
from popi.training.rollouts import largest_group
from popi.training.scoring import NO_REFERENCE, ConditionedPair, PairScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = 3, 6
"""Numbers of layers that are computed. All that a step keeps grows by the same amount with each further layer."""

PASSES = 3
"""Number of passes that are computed if a step has more of them: later ones need the same memory."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A model without numbers, and how it computes.

    Attributes:
        config: Its configuration.
        dtype: Type of its weights.
        adapter_dtype: Type of the weights of its adapter.
        lora: Options of its adapter.
        autocast: Whether it computes in bfloat16 with weights in float32.
        recompute: Whether backward passes recompute its layers.
        trained: Whether it is trained.
        gpu: Whether it is planned for a GPU.
    """

    config: Any
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    lora: LoraOptions | None
    autocast: bool
    recompute: bool
    trained: bool
    gpu: bool

    def made(self, layers: int) -> tuple[PreTrainedModel, Within]:
        """The model with this number of layers, and its context."""
        model = blank_model(self.config, self.dtype, layers=layers)
        active: Within = nullcontext
        if self.lora is not None:
            adapter = Adapter(model, "planned", **self.lora._asdict(), dtype=self.adapter_dtype, seed=0)
            active = adapter.active
        elif not self.trained:
            model.requires_grad_(False)
        return model, computing_as(model, active, autocast=self.autocast, recompute=self.recompute)

    def peaks(self, compute: Callable[[PreTrainedModel, Within], int]) -> tuple[list[Footprint], int]:
        """The footprints of a computation at its peaks, and its result.

        Args:
            compute: The computation. Its result must grow by the same amount with each layer.
        """
        layers = self.config.get_text_config().num_hidden_layers
        shorter, longer = LAYERS if layers > LAYERS[1] else (layers, layers)
        found = [self._peaks(compute, count) for count in dict.fromkeys((shorter, longer))]
        if len(found) == 1:
            return list(found[0][0].values()), found[0][1]
        steps = (layers - shorter) / (longer - shorter)
        (first, less), (second, more) = found
        ends = [along(first[zone], peak, steps) for zone, peak in second.items() if zone in first]
        return ends, round(less + steps * (more - less))

    def _peaks(
        self, compute: Callable[[PreTrainedModel, Within], int], layers: int
    ) -> tuple[dict[Zone, Footprint], int]:
        model, within = self.made(layers)
        with without_numbers(gpu=self.gpu):
            forget_numbers(model)
            live = LiveBytes(model)
            try:
                with live:
                    result = compute(model, within)
            finally:
                live.close()
            return live.peaks, result


@dataclass(frozen=True, slots=True)
class Sizes:
    """The size of a step on one rank.

    Attributes:
        users: Number of users.
        samples: Number of summaries of each user.
        pairs: Number of pairs that score a summary.
        batch_tokens: As in the recipe.
    """

    users: int
    samples: int
    pairs: int
    batch_tokens: int

    def summaries(self, tokens: int) -> int:
        """Number of summaries of a step, or fewer if they fill several passes.

        Args:
            tokens: Number of tokens for each of them.
        """
        return min(self.users * self.samples, max(self.samples, PASSES * -(-self.batch_tokens // tokens)))


def rollouts(sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within) -> int:
    """Samples summaries until they have their maximum length.

    Returns:
        The size of the keys and values in bytes.
    """
    prompts = [_tokens(user, lengths.signals) for user in range(sizes.users) for _ in range(sizes.samples)]
    budget = max(sizes.batch_tokens, largest_group(prompts, lengths.summary))
    if layout_of(model) != "shared":
        return budget * _cell(model)
    slots, waiting, done = SharedSlots(model, budget), prompts, 0
    with within(), torch.no_grad():
        while waiting and (count := slots.plan((prompt, lengths.summary) for prompt in waiting)):
            waiting = waiting[count:]
            slots.prefill(len(waiting))
            drafts = len(prompts) - len(waiting)
            slots.step(torch.zeros(drafts, dtype=torch.long))
            done += 1
        while done < lengths.summary:
            slots.step(torch.zeros(drafts, dtype=torch.long))
            done += 1 + slots.skip(lengths.summary - done - 1)
    return slots.nbytes


def _cell(model: PreTrainedModel) -> int:
    """The size of the keys and values of a token in bytes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def writer_update(sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within) -> int:
    """Computes the gradient of the writer.

    Returns:
        The number of tokens that it reads.
    """
    users = -(-sizes.summaries(lengths.signals // sizes.samples + lengths.summary) // sizes.samples)
    prompts = [_tokens(user, lengths.signals) for user in range(users)]
    items = [Scored(prompt, _tokens(number, lengths.summary)) for prompt in prompts for number in range(sizes.samples)]
    found = token_likelihood(model, items, batch_tokens=sizes.batch_tokens, layout=layout_of(model), within=within)
    loss = found.logps_R_T.sum()
    tokens = found.tokens
    del found
    loss.backward()
    return tokens


class _BlankScorer(PairScorer):
    """Scores pairs without texts."""

    def __init__(self, model: PreTrainedModel, within: Within, lengths: Lengths, batch_tokens: int) -> None:
        nothing: Any = None
        abilities = Abilities(layout_of(model), frozenset())
        super().__init__(model, nothing, nothing, abilities=abilities, batch_tokens=batch_tokens, within=within)
        self._lengths = lengths

    def _encode(self, items: Sequence[ConditionedPair]) -> list[Scored]:
        prompts = [_tokens(number, self._lengths.prompt + self._lengths.summary) for number in range(len(items))]
        answers = [_tokens(number, self._lengths.answer) for number in range(2)]
        return [Scored(prompt, answer) for prompt in prompts for answer in answers]


def scoring(sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within) -> int:
    """Scores pairs without gradients.

    Returns:
        The number of tokens that it reads.
    """
    scorer, items = _pairs(sizes, lengths, model, within, per_summary=sizes.pairs)
    with torch.no_grad():
        for compute in scorer.passes(items):
            compute()
    return scorer.tokens_read


def joint_update(sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within) -> int:
    """Computes the gradient of the generator in a step of the writer, pass by pass.

    Returns:
        The number of tokens that it reads.
    """
    scorer, items = _pairs(sizes, lengths, model, within, per_summary=1)
    for compute in scorer.passes(items):
        _, ratios = compute()
        loss = ratios.margins_N.sum()
        del ratios
        loss.backward()
    return scorer.tokens_read


def generator_update(sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within) -> int:
    """Computes the gradient of the generator in a phase of its own, in batches of as many pairs as users.

    Returns:
        The number of tokens that two batches read.
    """
    scorer, items = _pairs(sizes, lengths, model, within, per_summary=1)
    for _ in range(2):
        loss = scorer.ratios_for_gradient(items[: sizes.users]).margins_N.sum()
        loss.backward()
    return scorer.tokens_read


def _pairs(
    sizes: Sizes, lengths: Lengths, model: PreTrainedModel, within: Within, *, per_summary: int
) -> tuple[_BlankScorer, list[ConditionedPair]]:
    count = sizes.summaries(lengths.prompt + lengths.summary + 2 * lengths.answer) * per_summary
    pair = HeldOutPair(prompt="-", chosen="-", rejected="+")
    scorer = _BlankScorer(model, within, lengths, sizes.batch_tokens)
    return scorer, [ConditionedPair(None, pair, NO_REFERENCE)] * count


def _tokens(first: int, count: int) -> list[int]:
    """Tokens that differ from those of another ``first``."""
    return [first + 2, *[1] * (count - 1)]


PARTS: dict[str, Callable[..., int]] = {
    "rollouts": rollouts,
    "scoring": scoring,
    "writer update": writer_update,
    "joint update": joint_update,
    "generator update": generator_update,
}
"""The parts of a step, by name."""


def trace(part: str, blank: Blank, sizes: Sizes, lengths: Lengths) -> tuple[list[Footprint], int]:
    """The footprints of a part of a step at its peaks, and what the part returns."""
    return blank.peaks(partial(PARTS[part], sizes, lengths))
