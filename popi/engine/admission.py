"""Which conversations a model can be given."""

from __future__ import annotations

from collections.abc import Sequence

from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.prompts import Message


def admitted(
    tokens: ChatTokens, conversations: Sequence[Sequence[Message]], needed: Sequence[int], context: int | None
) -> list[Rendered]:
    """Renders conversations, and refuses those behind which there is too little room.

    Args:
        tokens: The model's tokenizer.
        conversations: What it is to read.
        needed: The fewest tokens that must have room behind each.
        context: The most tokens that the model holds, if that is known.

    Returns:
        The conversations in their order, a refused one with its error.
    """
    rendered = tokens.render(conversations)
    return [_admit(prompt, more, context) for prompt, more in zip(rendered, needed, strict=True)]


def _admit(prompt: Rendered, needed: int, context: int | None) -> Rendered:
    length = len(prompt.tokens)
    if prompt.error is not None:
        return prompt
    if needed < 1:
        return Rendered(prompt.tokens, "not a single token is asked for")
    if context is not None and length + needed > context:
        return Rendered(
            prompt.tokens,
            f"too long: {length} tokens and {needed} behind them, and the model's context holds {context}",
        )
    return prompt
