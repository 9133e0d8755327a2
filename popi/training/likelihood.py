"""Log-probabilities of given responses, with gradients if they are enabled.

A prefix that responses share, such as a user's signals, is computed once for all of them, in the forward and the
backward pass: for G responses of S tokens to a prompt of T tokens, T + G S tokens pass through the model instead of
G (T + S). Logits are computed only for the tokens of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from popi.training.objective import Reduction
from popi.training.ranks import ONE_RANK, Ranks

Found = TypeVar("Found")

Within = Callable[[], AbstractContextManager[None]]
"""Makes the context that a model computes in."""


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """Log-probabilities of R responses, padded on the right with zeros to T tokens.

    Attributes:
        logps_R_T: Log-probability of each token, in nats.
        entropies_R_T: Entropy of the distribution of each token, in nats, without gradients.
        tokens: Number of tokens that passed through the model.
    """

    logps_R_T: Tensor
    entropies_R_T: Tensor
    tokens: int


@contextmanager
def computing(model: PreTrainedModel, *, autocast: bool = False) -> Iterator[None]:
    """Puts a model into the mode of joint training: without dropout, and perhaps in bfloat16 autocast."""
    training = model.training
    model.train(False)
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        # TRL distinguishes training from evaluation by this flag.
        model.train(training)


def in_memory_for(
    batch_tokens: int, compute: Callable[[list[Row]], Found], passes: Sequence[list[Row]], ranks: Ranks = ONE_RANK
) -> list[Found]:
    """Computes passes whose gradient is taken together, within a limit of memory.

    The backward pass starts with the last passes. Their activations are kept, those of earlier passes are recomputed.

    Args:
        batch_tokens: Maximum number of tokens whose activations are kept. The last pass is always kept.
        compute: Computes a pass. Its result must depend on the pass only.
        passes: The passes; as many on every rank.
        ranks: The ranks of the run. In lockstep, all of them recompute the same passes.
    """
    read = accumulate(tokens_of(rows) for rows in reversed(passes))
    kept = ranks.smallest(max(1, sum(tokens <= batch_tokens for tokens in read)))
    again = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [*map(again, passes[:-kept]), *map(compute, passes[-kept:])]


def token_likelihood(
    model: PreTrainedModel,
    items: Sequence[Scored],
    *,
    batch_tokens: int,
    layout: Layout,
    temperature: float = 1.0,
    ranks: Ranks = ONE_RANK,
    within: Within | None = None,
) -> TokenLikelihood:
    """Computes the log-probability of each token of each response.

    Args:
        model: The model.
        items: Prompts and responses.
        batch_tokens: Maximum number of tokens of a forward pass, and of those whose activations are kept.
        layout: Layout of the batch.
        temperature: Temperature at which the responses were sampled. It divides the logits.
        ranks: The ranks of the run.
        within: Makes the context that the model computes in, by default :func:`computing`.
    """
    width = max(len(item.response) for item in items)
    passes = ranks.same_passes(list(pack(model, items, batch_tokens=batch_tokens, layout=layout)))

    def of_pass(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        with within() if within else computing(model):
            predicted = response_logits(model, items, rows)
        return (predicted.items_N * width + predicted.offsets_N, *_of_logits(predicted, temperature))

    found = in_memory_for(batch_tokens, of_pass, passes, ranks)
    places_N, logps_N, entropies_N = map(torch.cat, zip(*found, strict=True))
    blank = logps_N.new_zeros(len(items) * width)
    return TokenLikelihood(
        blank.index_put((places_N,), logps_N).view(len(items), width),
        blank.index_put((places_N,), entropies_N).view(len(items), width),
        sum(map(tokens_of, passes)),
    )


def response_logps(
    model: PreTrainedModel,
    items: Sequence[Scored],
    rows: Sequence[Row],
    *,
    reduction: Reduction = "sum",
    within: Within | None = None,
) -> Tensor:
    """Computes the log-probability of each response in one forward pass.

    Args:
        model: The model.
        items: Prompts and responses.
        rows: The rows of the pass.
        reduction: How the tokens of a response are reduced.
        within: Makes the context that the model computes in, by default :func:`computing`.

    Returns:
        Log-probabilities ``[items]``, in nats; 0 for an item that is in no row.
    """
    with within() if within else computing(model):
        found = response_logits(model, items, rows)
    # Margins are small differences of large sums: sum in double precision.
    logps_N = -cross_entropy(found.logits_N_V.float(), found.targets_N, reduction="none").double()
    sums_I = logps_N.new_zeros(len(items)).index_add(0, found.items_N, logps_N)
    if reduction == "sum":
        return sums_I
    return sums_I / torch.tensor([len(item.response) for item in items], device=sums_I.device)


def _of_logits(found: ResponseLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the tokens, ``[N]`` each."""
    all_N_V = (found.logits_N_V.float() / temperature).log_softmax(dim=-1)
    logps_N = all_N_V.gather(1, found.targets_N[:, None])[:, 0]
    with torch.no_grad():
        entropies_N = -(all_N_V.exp() * all_N_V).sum(dim=-1)
    return logps_N, entropies_N
