"""Scoring: the log-probability of given responses, with what their prompts have in common computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from popi.engine.cache import Layout, Prefixes, head_at, pad, reset_positions
from popi.engine.packing import Row, Scored, pack


@torch.inference_mode()
def score(model: PreTrainedModel, items: Sequence[Scored], *, batch_tokens: int, layout: Layout) -> list[float]:
    """Sums the log-probabilities of the tokens of each response given its prompt, in nats.

    Args:
        model: The model, in evaluation mode.
        items: Prompts and responses.
        batch_tokens: Maximum number of tokens in the rows of a pass.
        layout: Layout of the batch.

    Returns:
        One sum for each item, in order. It is not finite where the logits of the model are not.
    """
    sums: dict[int, float] = {}
    for rows in pack(model, items, batch_tokens=batch_tokens, layout=layout):
        sums |= score_pass(model, items, rows)
    return [sums[index] for index in range(len(items))]


@torch.inference_mode()
def score_pass(model: PreTrainedModel, items: Sequence[Scored], rows: Sequence[Row]) -> dict[int, float]:
    """Runs one pass of :func:`popi.engine.packing.pack`, and gives the score of each of its items by its index."""
    reset_positions(model)
    computed = response_logits(model, items, rows)
    logprobs_N = -cross_entropy(computed.logits_N_V.float(), computed.targets_N, reduction="none")
    sums_I = torch.zeros(len(items), dtype=torch.float64)
    sums_I.index_add_(0, computed.items_N.cpu(), logprobs_N.double().cpu())
    return {index: float(sums_I[index]) for row in rows for index in row.items}


@dataclass(frozen=True, slots=True)
class ResponseLogits:
    """The predictions of the N tokens of all responses of a pass; those of one response are in order.

    Attributes:
        logits_N_V: Logits that predict each token, ``[N, V]``.
        targets_N: Token ids, ``[N]``.
        items_N: Index of the item that each token belongs to, ``[N]``.
        offsets_N: Place of each token in its response, ``[N]``.
    """

    logits_N_V: Tensor
    targets_N: Tensor
    items_N: Tensor
    offsets_N: Tensor


def response_logits(model: PreTrainedModel, items: Sequence[Scored], rows: Sequence[Row]) -> ResponseLogits:
    """Computes the predictions of one pass of :func:`popi.engine.packing.pack`.

    Gradients flow through it, and through shared prefixes, if they are enabled. A pass without items predicts nothing.
    """
    scored: list[tuple[int, int, int, int, int]] = []
    for place, row in enumerate(rows):
        for index, path in zip(row.items, row.tree.paths, strict=True):
            prompt, response = items[index].prompt, items[index].response
            # The logits of a token predict the next one.
            columns = path[len(prompt) - len(row.prefix) - 1 :]
            scored += [(place, columns[n], token, index, n) for n, token in enumerate(response)]
    fields_5_N = torch.tensor(scored, dtype=torch.long, device=model.device).view(-1, 5).T
    rows_N, columns_N, targets_N, items_N, offsets_N = fields_5_N
    with head_at(model, rows_N, columns_N):
        logits_N_V = _run(model, rows)[0]
    return ResponseLogits(logits_N_V, targets_N, items_N, offsets_N)


def _run(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """The logits of the tokens of each row's tree, where :func:`head_at` selects them."""
    tokens_R_T = pad([row.tree.tokens for row in rows], model.device)
    if not any(row.prefix or row.tree.branches for row in rows):
        # Right padding needs no mask: a causal model sees only what comes before.
        logits: Tensor = model(input_ids=tokens_R_T, use_cache=False).logits
        return logits
    width = tokens_R_T.shape[1]
    ends_R_T = pad([row.tree.ends for row in rows], model.device, width)
    places_T = torch.arange(width, device=model.device)
    seen_R_T_T = (places_T <= places_T[:, None]) & (places_T[:, None] < ends_R_T[:, None])
    depths_R_T = pad([row.tree.depths for row in rows], model.device)
    return Prefixes(model, [row.prefix for row in rows])(tokens_R_T, seen_R_T_T, depths_R_T)
