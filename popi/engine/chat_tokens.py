"""Conversations to token ids and back, by a model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from popi.engine.forking import ForkLock
from popi.errors import ModelError
from popi.io import writable
from popi.prompts import Message

# Some templates write today's date into every conversation, so that the same request would differ from day to day:
# the date is pinned to the one that Llama's templates fall back to. Others open a block of thinking unless told not
# to: a summary, or a response that is scored, would then stand where thoughts are expected.
PINNED_DATE = date(2024, 7, 26)
TEMPLATE_ARGUMENTS: dict[str, Any] = {
    "date_string": PINNED_DATE.strftime("%d %b %Y"),
    "strftime_now": PINNED_DATE.strftime,
    "enable_thinking": False,
}

PLACEHOLDER = "POPI-RESPONSE"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids, or why it cannot be one."""

    tokens: list[int]
    error: str | None = None


class ChatTokens:
    """The tokenizer of a chat model.

    Text that comes from outside is never read as control tokens: the spelling of one inside a message stays text.
    Calls may come from several threads.

    Args:
        tokenizer: A tokenizer with a chat template.
        name: The model's name, for errors.

    Attributes:
        end_of_turn: The tokens that a model writes to end its turn: what the template puts behind an assistant's
            words, up to its first control token; the end token alone where the template has no control token there.
        end_tokens: The tokens at which an answer ends.

    Raises:
        ModelError: If the tokenizer has no chat template, or one that cannot render a user's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {name} has no chat template",
                fix="use the model's instruction-tuned sibling, or put a chat_template.jinja in its folder",
            )
        self._tokenizer = tokenizer
        # A fast tokenizer refuses a second borrower while it encodes.
        self._lock = ForkLock()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._control_ids = {tokenizer.convert_tokens_to_ids(token) for token in special}
        spelled = [re.escape(token) for token in sorted(special, reverse=True) if len(token) > 1]
        self._control = re.compile("|".join(spelled) or "(?!)")
        self.end_of_turn = self._find_end_of_turn(name)
        ends = {tokenizer.eos_token_id, *self.end_of_turn[-1:]}
        self.end_tokens = frozenset(token for token in ends if token in self._control_ids)

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Renders each conversation up to where the assistant's answer begins; equal ones are rendered once."""
        texts: dict[tuple[Message, ...], str] = {}
        refused: dict[tuple[Message, ...], Rendered] = {}
        for conversation in dict.fromkeys(tuple(conversation) for conversation in conversations):
            try:
                texts[conversation] = self._apply_template(conversation, add_generation_prompt=True)
            # A template is a program: what it raises is its own affair.
            except Exception as error:
                refused[conversation] = Rendered([], f"the chat template refuses the conversation: {error}")
        # Without special tokens: the template has written the one that opens a text.
        encoded = map(Rendered, self._encode(list(texts.values())))
        rendered = refused | dict(zip(texts, encoded, strict=True))
        return [rendered[tuple(conversation)] for conversation in conversations]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of bare texts, without special tokens."""
        return self._encode([self._harmless(text) for text in texts])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without control tokens."""
        with self._lock:
            # Tidied spaces would change words already given to a stream.
            text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with self._lock:
            ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _apply_template(self, conversation: Sequence[Message], *, add_generation_prompt: bool) -> str:
        messages: list[dict[str, Any]] = [
            {"role": message.role, "content": self._harmless(message.content)} for message in conversation
        ]
        with self._lock:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_ARGUMENTS
                )
            )

    def _harmless(self, text: str) -> str:
        """Breaks the spelling of control tokens with a space, and replaces what UTF-8 cannot write."""
        return self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", writable(text))

    def _find_end_of_turn(self, name: str) -> tuple[int, ...]:
        turns = [Message("user", "Hello"), Message("assistant", PLACEHOLDER)]
        try:
            rendered = self._apply_template(turns, add_generation_prompt=False)
        # As above.
        except Exception as error:
            raise ModelError(
                f"the chat template of {name} cannot be used: {error}", fix="mend its chat template"
            ) from error
        (after,) = self._encode([rendered.rpartition(PLACEHOLDER)[2]])
        control = next((place for place, token in enumerate(after) if token in self._control_ids), None)
        if control is not None:
            return tuple(after[: control + 1])
        end = self._tokenizer.eos_token_id
        return () if end is None else (end,)
