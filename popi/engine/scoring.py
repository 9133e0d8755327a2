"""Scoring: the log-probability of given responses, with what they share in front computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from popi.engine.cache import Prefixes, pad
from popi.engine.packing import Row, Scored, pack


def score(
    model: PreTrainedModel,
    items: Sequence[Scored],
    *,
    batch_tokens: int,
    share: bool,
    check: Callable[[], None],
) -> list[float]:
    """Sums the log-probabilities of each response's tokens given its prompt, in nats.

    Args:
        model: The model, in evaluation mode.
        items: What to score.
        batch_tokens: The most tokens of the rows of a pass.
        share: Whether the model has a plain cache.
        check: Called before every pass; stops the work by raising.
    """
    sums_I = torch.zeros(len(items), dtype=torch.float64)
    for rows in pack(model, items, batch_tokens=batch_tokens, share=share):
        check()
        found = response_logits(model, items, rows)
        logprobs_N = -cross_entropy(found.logits_N_V.float(), found.targets_N, reduction="none")
        sums_I.index_add_(0, found.items_N.cpu(), logprobs_N.double().cpu())
    if bool(sums_I.isnan().any()):
        raise ArithmeticError("the model's logits are not numbers")
    return sums_I.tolist()


@dataclass(frozen=True, slots=True)
class ResponseLogits:
    """What a model predicts in the places of the tokens of responses, the tokens of one in order.

    Attributes:
        logits_N_V: Logits, ``[N, V]``.
        targets_N: The tokens that stand there, ``[N]``.
        items_N: Which item each belongs to, ``[N]``.
        offsets_N: Which token of its response each is, ``[N]``.
    """

    logits_N_V: Tensor
    targets_N: Tensor
    items_N: Tensor
    offsets_N: Tensor


def response_logits(model: PreTrainedModel, items: Sequence[Scored], rows: Sequence[Row]) -> ResponseLogits:
    """Runs one pass of :func:`pack`. Gradients flow through it where they are on, through the shared prefixes too."""
    scored: list[tuple[int, int, int, int, int]] = []
    for place, row in enumerate(rows):
        for index, path in zip(row.items, row.tree.paths, strict=True):
            response = items[index].response
            # The logits behind a token are those of the next one.
            columns = path[-len(response) :]
            scored += [(place, columns[n], token, index, n) for n, token in enumerate(response)]
    rows_N, columns_N, targets_N, items_N, offsets_N = torch.tensor(scored, device=model.device).unbind(dim=1)
    with _head_at(model, rows_N, columns_N):
        logits_N_V = _run(model, rows)[0]
    return ResponseLogits(logits_N_V, targets_N, items_N, offsets_N)


def _run(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """The model's logits behind the tokens of each row's tree."""
    tokens_R_T = pad([row.tree.tokens for row in rows], model.device)
    if not any(row.prefix or row.tree.branches for row in rows):
        # Right padding needs no mask, as a causal model looks only back.
        logits: Tensor = model(input_ids=tokens_R_T, use_cache=False).logits
        return logits
    width = tokens_R_T.shape[1]
    ends_R_T = pad([row.tree.ends for row in rows], model.device, width)
    places_T = torch.arange(width, device=model.device)
    seen_R_T_T = (places_T <= places_T[:, None]) & (places_T[:, None] < ends_R_T[:, None])
    depths_R_T = pad([row.tree.depths for row in rows], model.device)
    return Prefixes(model, [row.prefix for row in rows])(tokens_R_T, seen_R_T_T, depths_R_T)


@contextmanager
def _head_at(model: PreTrainedModel, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Within it, the model gives logits at these places alone, ``[1, N, V]``.

    The hidden states are picked in front of the head, inside the model's own forward pass: what a family does to its
    logits afterwards (scales, soft caps) still happens.
    """

    def pick(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows_N, columns_N][None], *args[1:])

    head: torch.nn.Module = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
