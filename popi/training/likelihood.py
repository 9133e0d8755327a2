"""Log-probabilities of given responses, with gradients where they are on.

What responses share in front, a user's signals or a prompt, is computed once for all of them, forwards and backwards:
of G responses of S tokens behind a prompt of T, T + G S tokens pass through the model instead of G (T + S). Logits are
computed where a response's token is predicted and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from popi.engine.cache import Layout
from popi.engine.packing import Row, Scored, pack, tokens_of
from popi.engine.scoring import ResponseLogits, response_logits
from popi.training.objective import Over

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """Of each token of each response, padded on the right with zeros.

    Attributes:
        logps_R_T: Log-probabilities, in nats.
        entropies_R_T: Entropies of what could have stood there, in nats, without gradients.
        tokens: How many tokens the model has read for them.
    """

    logps_R_T: Tensor
    entropies_R_T: Tensor
    tokens: int


@contextmanager
def computing(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model computes as everywhere in joint training: without dropout, and on a GPU in bfloat16."""
    training, on_gpu = model.training, model.device.type == "cuda"
    model.train(False)
    try:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            yield
    finally:
        # TRL tells training from evaluation by it.
        model.train(training)


def in_memory_for(batch_tokens: int, compute: Callable[[list[Row]], Found], passes: Sequence[list[Row]]) -> list[Found]:
    """Computes passes whose gradient is taken together, in memory for so many tokens or for the largest pass.

    The gradient runs through the last passes first, whose activations are kept; those of the others are computed again.

    Args:
        batch_tokens: The most tokens whose activations are kept.
        compute: Computes a pass; the same each time.
        passes: What to compute.
    """
    read = accumulate(tokens_of(rows) for rows in reversed(passes))
    kept = max(1, sum(tokens <= batch_tokens for tokens in read))
    again = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [*map(again, passes[:-kept]), *map(compute, passes[-kept:])]


def token_likelihood(
    model: PreTrainedModel,
    items: Sequence[Scored],
    *,
    batch_tokens: int,
    layout: Layout,
    temperature: float = 1.0,
) -> TokenLikelihood:
    """Log-probabilities token by token, for the writer's update.

    Args:
        model: The writer.
        items: Prompts and what was sampled behind them.
        batch_tokens: The most tokens of the rows of one forward pass, and of those that a gradient keeps in memory.
        layout: Layout of the batch.
        temperature: Divides the logits, as it did when the responses were sampled.
    """
    width = max(len(item.response) for item in items)
    passes = list(pack(model, items, batch_tokens=batch_tokens, layout=layout))

    def of_pass(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        with computing(model):
            predicted = response_logits(model, items, rows)
        return (predicted.items_N * width + predicted.offsets_N, *_of_logits(predicted, temperature))

    found = in_memory_for(batch_tokens, of_pass, passes)
    places_N, logps_N, entropies_N = map(torch.cat, zip(*found, strict=True))
    blank = logps_N.new_zeros(len(items) * width)
    return TokenLikelihood(
        blank.index_put((places_N,), logps_N).view(len(items), width),
        blank.index_put((places_N,), entropies_N).view(len(items), width),
        sum(map(tokens_of, passes)),
    )


def response_logps(
    model: PreTrainedModel, items: Sequence[Scored], rows: Sequence[Row], *, over: Over = "sum"
) -> Tensor:
    """The log-probability of each response, in one forward pass: (items,), in nats; 0 for what is in no row.

    Args:
        model: The model that scores.
        items: Prompts and responses.
        rows: The pass.
        over: Whether a response's tokens are summed or averaged.
    """
    with computing(model):
        found = response_logits(model, items, rows)
    # Margins are small differences of large sums.
    logps_N = -cross_entropy(found.logits_N_V.float(), found.targets_N, reduction="none").double()
    sums_I = logps_N.new_zeros(len(items)).index_add(0, found.items_N, logps_N)
    if over == "sum":
        return sums_I
    return sums_I / torch.tensor([len(item.response) for item in items], device=sums_I.device)


def _of_logits(found: ResponseLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the tokens, (N,) each."""
    all_N_V = (found.logits_N_V.float() / temperature).log_softmax(dim=-1)
    logps_N = all_N_V.gather(1, found.targets_N[:, None])[:, 0]
    with torch.no_grad():
        entropies_N = -(all_N_V.exp() * all_N_V).sum(dim=-1)
    return logps_N, entropies_N
