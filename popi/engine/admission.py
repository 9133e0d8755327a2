"""Which conversations fit the context of a model."""

from __future__ import annotations

from collections.abc import Sequence

from popi.engine.chat_tokens import ChatTokens, Rendered
from popi.prompts import Message


def admitted(
    tokens: ChatTokens,
    conversations: Sequence[Sequence[Message]],
    needed: Sequence[int],
    context: int | None,
    *,
    answered: bool = False,
) -> list[Rendered]:
    """Renders conversations, and rejects those that leave too little room in the context.

    Args:
        tokens: The model's tokenizer.
        conversations: Conversations that end with a message of the user.
        needed: Minimum number of tokens that must fit after each conversation.
        context: Maximum number of tokens of a sequence; ``None`` if unknown.
        answered: Whether given responses follow, see :meth:`popi.engine.chat_tokens.ChatTokens.render`.

    Returns:
        The conversations in order; a rejected one has an error.
    """
    rendered = tokens.render(conversations, answered=answered)
    return [_admit(prompt, more, context) for prompt, more in zip(rendered, needed, strict=True)]


def _admit(prompt: Rendered, needed: int, context: int | None) -> Rendered:
    length = len(prompt.tokens)
    if prompt.error is not None:
        return prompt
    if needed < 1:
        return Rendered(prompt.tokens, "max_tokens must be positive")
    if context is not None and length + needed > context:
        why = f"too long: the prompt has {length} tokens, {needed} more are needed, and the context holds {context}"
        return Rendered(prompt.tokens, why)
    return prompt
