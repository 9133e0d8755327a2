"""Conversations to token ids and back, by a model's own chat template."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from popi.engine.forking import ForkLock
from popi.engine.turns import QUESTIONS, WORDS, read_turn, without_system
from popi.errors import ModelError, one_line
from popi.io import writable
from popi.prompts import Message
from popi.reasoning import MARKERS

log = logging.getLogger(__name__)

# Some templates write today's date into every conversation, so that equal requests would differ from day to day: the
# date is fixed to the one that Llama's templates use by default. Others open a reasoning block unless an argument
# disables it.
PINNED_DATE = date(2024, 7, 26)
TEMPLATE_ARGUMENTS: dict[str, Any] = {
    "date_string": PINNED_DATE.strftime("%d %b %Y"),
    "strftime_now": PINNED_DATE.strftime,
    "enable_thinking": False,
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids.

    Attributes:
        tokens: Token ids.
        error: Why the conversation cannot be used; ``None`` if it can.
    """

    tokens: list[int]
    error: str | None = None


class ChatTokens:
    r"""The tokenizer of a chat model, and how its chat template frames a response.

    The template is checked with a round trip: a question with the generation prompt is compared with the same question
    and its response. A header that only finished turns have becomes part of the prompt, so that a response is generated
    and scored in the same place. Problems that have an evident solution are fixed, with one line in the log; others are
    errors.

    Text from outside is never read as control tokens: the spelling of one inside a message stays text. Calls may come
    from several threads.

    Example:
        >>> from popi.testing import tiny_model
        >>> _, tokenizer = tiny_model()
        >>> tokens = ChatTokens(tokenizer, "tiny")
        >>> [prompt] = tokens.render([[Message("user", "Hello")]])
        >>> [response] = tokens.encode_responses(["Good day"])
        >>> tokenizer.decode([*prompt.tokens, *response])
        '<|begin|><|user|>Hello<|end|>\n<|assistant|>Good day<|end|>'

    Args:
        tokenizer: A tokenizer with a chat template. Its end token and padding token are set if it has none.
        name: Name of the model, for errors.

    Attributes:
        end_of_turn: The tokens with which a model ends its turn: what the template puts after a response, up to the
            first control token; the end token of the tokenizer if the template has no control token there. May be
            empty.
        end_tokens: The tokens at which a response ends.
        added_tokens: The tokens that are not part of plain text: control tokens, and others that were added to the
            vocabulary.
        opens_reasoning: Whether the generation prompt ends inside a reasoning block, so that a response starts with
            reasoning.

    Raises:
        ModelError: If the tokenizer has no chat template, or if its template cannot render a question and a response or
            omits the question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {name} has no chat template",
                fix="use an instruction-tuned model, or put a chat_template.jinja in its folder",
            )
        self._tokenizer, self._name = tokenizer, name
        # A fast tokenizer raises when two threads use it at the same time.
        self._lock = ForkLock()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._control_ids = {tokenizer.convert_tokens_to_ids(token): token for token in special}
        spelled = [re.escape(token) for token in sorted(special, reverse=True) if len(token) > 1]
        self._control = re.compile("|".join(spelled) or "(?!)")
        markers = [*MARKERS, *MARKERS.values()]
        self.added_tokens = frozenset([*self._control_ids, *tokenizer.added_tokens_decoder])
        self._in_markers = {
            number: token for number, token in self._control_ids.items() if any(token in marker for marker in markers)
        }
        self._turn = read_turn(self._apply_template, name)
        self.opens_reasoning = self._turn.opens_reasoning
        self._trims, self._lead = False, ""
        self.end_of_turn = self._check_end(self._check_frame())
        ends = {tokenizer.eos_token_id, *self.end_of_turn[-1:]}
        self.end_tokens = frozenset(token for token in ends if token in self._control_ids)

    def render(self, conversations: Sequence[Sequence[Message]], *, answered: bool = False) -> list[Rendered]:
        """Renders each conversation up to the start of the response; equal ones are rendered once.

        Args:
            conversations: Conversations that end with a message of the user.
            answered: Whether a given response without reasoning follows, see :meth:`encode_responses`. It matters only
                if the generation prompt opens a reasoning block.
        """
        texts: dict[tuple[Message, ...], str] = {}
        refused: dict[tuple[Message, ...], Rendered] = {}
        for conversation in dict.fromkeys(tuple(conversation) for conversation in conversations):
            try:
                texts[conversation] = self._prompt(conversation, answered=answered)
            # A template is a program and can raise any exception.
            except Exception as error:
                refused[conversation] = Rendered(
                    [], f"the chat template rejects the conversation: {one_line(str(error))}"
                )
        # Without special tokens: the template has written the begin token.
        encoded = map(Rendered, self._encode(list(texts.values())))
        rendered = refused | dict(zip(texts, encoded, strict=True))
        return [rendered[tuple(conversation)] for conversation in conversations]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of plain texts, without special tokens."""
        return self._encode([self._escaped(text) for text in texts])

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of finished responses, with the end of the turn, as they follow a rendered conversation."""
        encoded = self._encode([self._lead + self._escaped(text) for text in texts])
        return [[*tokens, *self.end_of_turn] for tokens in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens of a response, without control tokens and the spaces that the template puts before it.

        Control tokens that are part of the markers of reasoning blocks (``<|channel|>`` and ``<|message|>`` of gpt-oss,
        ``[THINK]``) are kept, so that :mod:`popi.reasoning` can remove the reasoning from the text.
        """
        runs = groupby(tokens, key=self._in_markers.get) if self._in_markers else [(None, tokens)]
        text = "".join(marker * len(list(run)) if marker else self._decode(list(run)) for marker, run in runs)
        return text.removeprefix(self._lead)

    def _decode(self, tokens: Sequence[int]) -> str:
        with self._lock:
            # Cleaning up spaces would change text that a stream has already emitted.
            text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # Most requests have an empty response prefix, and calling the tokenizer for it takes time.
        full = [text for text in texts if text]
        if not full:
            return [[] for _ in texts]
        with self._lock:
            ids = iter(self._tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"])
        return [next(ids) if text else [] for text in texts]

    def _prompt(self, conversation: Sequence[Message], *, answered: bool) -> str:
        turn = self._turn
        text = self._apply_template(conversation if turn.has_system else without_system(conversation), True)
        if answered or not turn.opens_reasoning:
            text += turn.header
        if answered and turn.opens_reasoning:
            text = text.removesuffix(turn.opening)
        return text.rstrip(" ") if self._trims and (answered or not turn.opens_reasoning) else text

    def _apply_template(self, conversation: Sequence[Message], add_generation_prompt: bool) -> str:
        messages: list[dict[str, Any]] = [
            {"role": message.role, "content": self._escaped(message.content)} for message in conversation
        ]
        with self._lock:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_ARGUMENTS
                )
            )

    def _escaped(self, text: str) -> str:
        """Breaks the spelling of control tokens with a space, and replaces what UTF-8 cannot encode."""
        return self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", writable(text))

    def _check_frame(self) -> list[int]:
        """Compares the tokens of a finished turn with those of its parts. Returns the tokens after the response."""
        turn = self._turn
        if not turn.has_system:
            self._log("has no system role; system messages are put into the first message of the user")
        if turn.words is None:
            self._log("leaves out the messages of the assistant; they are missing in conversations of several turns")
            return []
        if turn.words != WORDS[0]:
            self._log(f"changes the response {WORDS[0]!r} to {turn.words!r}; responses are scored without the change")
        if not turn.agrees:
            self._log(
                "starts finished and generated turns differently; responses are scored after the generation prompt"
            )
        base = self._prompt(QUESTIONS[:1], answered=True)
        spaces = base[len(base.rstrip(" ")) :]
        [whole] = self._encode([base + turn.words + turn.after])
        # Spaces before a response may be part of its first token, and some tokenizers add one by themselves.
        for trims, lead in ((True, spaces), (True, ""), (False, "")):
            frame, words = self._encode([base.rstrip(" ") if trims else base, lead + turn.words])
            if whole[: len(frame) + len(words)] == [*frame, *words]:
                self._trims, self._lead = trims, lead
                return whole[len(frame) + len(words) :]
        self._log(
            "merges a response and the text around it into common tokens; responses are scored by their own tokens"
        )
        return self._encode([turn.after])[0]

    def _check_end(self, after: list[int]) -> tuple[int, ...]:
        """Finds the end of a turn in the tokens after a response, and completes the tokenizer."""
        tokenizer = self._tokenizer
        place = next((place for place, token in enumerate(after) if token in self._control_ids), None)
        end = None if place is None else self._control_ids[after[place]]
        no_ends = {tokenizer.bos_token, tokenizer.unk_token} - {tokenizer.eos_token}
        found = end is not None and end not in no_ends
        if found and tokenizer.eos_token_id is None:
            tokenizer.eos_token = end
            self._log(f"ends a response with {end!r}, which is used as the end token; the tokenizer has none")
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
            tokenizer.pad_token = tokenizer.eos_token
        if found and place is not None:
            return tuple(after[: place + 1])
        problem = f"puts {end!r} after a response" if end else "puts no control token after a response"
        if tokenizer.eos_token_id is None:
            self._log(f"{problem}, and the tokenizer has no end token; responses end at their maximum length")
            return ()
        self._log(f"{problem}; the end token {tokenizer.eos_token!r} is used to end it")
        return (tokenizer.eos_token_id,)

    def _log(self, what: str) -> None:
        log.warning("the chat template of %s %s", self._name, what)
