"""The turn of an assistant in a chat template: the text around a response, found by rendering two responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from popi.engine.trees import common_prefix
from popi.errors import ModelError
from popi.prompts import Message
from popi.reasoning import ReasoningFilter

Apply = Callable[[Sequence[Message], bool], str]
"""Renders a conversation by a chat template; the second argument is ``add_generation_prompt``."""

SYSTEM = Message("system", "Stay on topic.")
QUESTIONS = Message("user", "Hello there"), Message("user", "What next")
# They have no first and no last character in common, in any case of letters.
WORDS = "Yes, gladly.", "Not today!"


@dataclass(frozen=True, slots=True)
class Turn:
    """How a chat template renders the turn of an assistant.

    Attributes:
        prompt: A question, rendered with the generation prompt.
        stem: The same, up to the words of the response in a finished turn.
        words: The response as the template shows it; ``None`` if the template leaves responses out.
        after: Text after the response.
        opens_reasoning: Whether the generation prompt ends inside a reasoning block.
        has_system: Whether the template shows system messages.
    """

    prompt: str
    stem: str
    words: str | None
    after: str
    opens_reasoning: bool
    has_system: bool

    @property
    def header(self) -> str:
        """The part of a finished turn between the generation prompt and the response."""
        return self.stem.removeprefix(self.prompt) if self.stem.startswith(self.prompt) else ""

    @property
    def opening(self) -> str:
        """The part of the generation prompt that a finished turn does not have."""
        return self.prompt.removeprefix(self.stem) if self.prompt.startswith(self.stem) else ""

    @property
    def agrees(self) -> bool:
        """Whether a finished turn and the generation prompt are equal as far as the shorter one goes."""
        return self.stem.startswith(self.prompt) or self.prompt.startswith(self.stem)


def read_turn(apply: Apply, name: str) -> Turn:
    """Renders probes, and compares them.

    Args:
        apply: The chat template.
        name: Name of the model, for errors.

    Raises:
        ModelError: If the template cannot render a question or a response, or leaves out the question.
    """
    question, other = QUESTIONS
    try:
        prompt = apply([question], True)
        shows_question = prompt != apply([other], True)
        finished, second = (apply([question, Message("assistant", words)], False) for words in WORDS)
    # A template is a program and can raise any exception.
    except Exception as error:
        raise ModelError(
            f"the chat template of {name} cannot be used: {error}", fix="correct its chat template"
        ) from error
    if not shows_question:
        raise ModelError(f"the chat template of {name} leaves out the user's messages", fix="correct its chat template")
    left_out = finished == second
    start = common_prefix(finished, second)
    end = len(finished) - common_prefix(finished[::-1], second[::-1])
    return Turn(
        prompt=prompt,
        stem=prompt if left_out else finished[:start],
        words=None if left_out else finished[start:end],
        after="" if left_out else finished[end:],
        opens_reasoning=_opens_reasoning(prompt.rpartition(question.content)[2]),
        has_system=_has_system(apply, question),
    )


def _opens_reasoning(generation_prompt: str) -> bool:
    reasoning = ReasoningFilter()
    reasoning.feed(generation_prompt)
    return reasoning.inside


def _has_system(apply: Apply, question: Message) -> bool:
    try:
        return SYSTEM.content in apply([SYSTEM, question], True)
    # Some templates reject system messages with an exception.
    except Exception:
        return False


def without_system(conversation: Sequence[Message]) -> list[Message]:
    r"""Moves the system messages at the start of a conversation into the first message of the user.

    Example:
        >>> without_system([Message("system", "Be brief."), Message("user", "Hello")])
        [Message(role='user', content='Be brief.\n\nHello')]
    """
    count = next((place for place, message in enumerate(conversation) if message.role != "system"), len(conversation))
    texts, rest = [message.content for message in conversation[:count]], list(conversation[count:])
    if not texts:
        return rest
    if rest and rest[0].role == "user":
        texts.append(rest.pop(0).content)
    return [Message("user", "\n\n".join(texts)), *rest]
