"""The usual implementation of scoring, for the benchmarks: whole sequences in padded batches, all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popi.engine.chat_tokens import ChatTokens
from popi.prompts import DEFAULT
from popi.summary import Author, PreferenceSummary, Provenance
from popi.training.scoring import ConditionedPair

SEQUENCES = 8
"""Number of sequences in a batch."""


def differences(model: Any, tokens: ChatTokens, items: list[ConditionedPair], *, plain: bool = False) -> Tensor:
    """Log pi(y_w|x,z) - log pi(y_l|x,z) of each item ``[items]``, in nats, batch by batch.

    Args:
        model: The generator, or its reference.
        tokens: Its tokenizer.
        items: Pairs under summaries.
        plain: Whether to leave the summaries out.
    """
    rows = encode(tokens, items, plain=plain)
    parts = [rows[start : start + SEQUENCES] for start in range(0, len(rows), SEQUENCES)]
    sums = torch.cat([sequence_logps(model, part) for part in parts])
    return sums[0::2] - sums[1::2]


def encode(tokens: ChatTokens, items: list[ConditionedPair], *, plain: bool) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every sequence: the chosen and the rejected response of each item."""
    conversations = [DEFAULT.answer_messages(item.pair.prompt, None if plain else text_of(item)) for item in items]
    prompts = tokens.render(conversations)
    return [
        (prompt.tokens, [*response, *tokens.end_of_turn])
        for prompt, item in zip(prompts, items, strict=True)
        for response in tokens.encode([item.pair.chosen, item.pair.rejected])
    ]


def text_of(item: ConditionedPair) -> str | None:
    """The summary that the generator reads."""
    return item.interface.text if isinstance(item.interface, PreferenceSummary) else None


def summary_of(text: str) -> PreferenceSummary:
    """A summary with this text."""
    return PreferenceSummary(user_id="", text=text, provenance=Provenance(author=Author.INFERRED))


def sequence_logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probabilities of responses given their prompts ``[rows]``, in nats."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    width = max(lengths)
    ids = torch.tensor(
        [[*p, *r, *[0] * (width - n)] for (p, r), n in zip(rows, lengths, strict=True)], device=model.device
    )
    places = torch.arange(width, device=model.device)
    mask = (places < torch.tensor(lengths, device=model.device)[:, None]).long()
    scored = mask * (places >= torch.tensor([len(prompt) for prompt, _ in rows], device=model.device)[:, None])
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    return (logps.gather(2, ids[:, 1:, None])[:, :, 0] * scored[:, 1:]).double().sum(dim=1)
