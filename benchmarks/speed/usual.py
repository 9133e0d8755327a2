"""The usual way to score, for the benchmarks: whole sequences in padded batches, logits at every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popi.engine.chat_tokens import ChatTokens
from popi.prompts import DEFAULT
from popi.training.scoring import Judged

SEQUENCES = 8
"""Number of sequences in a batch."""


def differences(model: Any, tokens: ChatTokens, items: list[Judged], *, bare: bool = False) -> Tensor:
    """Log pi(y_w|x,z) - log pi(y_l|x,z) of each item: (items,), in nats; one batch after the other.

    Args:
        model: The generator, or its reference.
        tokens: Its tokenizer.
        items: Pairs under summaries.
        bare: Whether to leave out the summaries.
    """
    rows = laid_out(tokens, items, bare=bare)
    parts = [rows[start : start + SEQUENCES] for start in range(0, len(rows), SEQUENCES)]
    sums = torch.cat([sequence_logps(model, part) for part in parts])
    return sums[0::2] - sums[1::2]


def laid_out(tokens: ChatTokens, items: list[Judged], *, bare: bool) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every sequence: for each item the chosen one, then the rejected one."""
    prompts = tokens.render(
        [DEFAULT.answer_messages(item.pair.prompt, None if bare else item.context) for item in items]
    )
    return [
        (prompt.tokens, [*answer, *tokens.end_of_turn])
        for prompt, item in zip(prompts, items, strict=True)
        for answer in tokens.encode([item.pair.chosen, item.pair.rejected])
    ]


def sequence_logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probabilities of responses after their prompts: (rows,), in nats."""
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    width = max(lengths)
    ids = torch.tensor(
        [[*p, *a, *[0] * (width - n)] for (p, a), n in zip(rows, lengths, strict=True)], device=model.device
    )
    places = torch.arange(width, device=model.device)
    mask = (places < torch.tensor(lengths, device=model.device)[:, None]).long()
    answered = mask * (places >= torch.tensor([len(prompt) for prompt, _ in rows], device=model.device)[:, None])
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    return (logps.gather(2, ids[:, 1:, None])[:, :, 0] * answered[:, 1:]).double().sum(dim=1)
