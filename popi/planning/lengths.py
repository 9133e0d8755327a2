"""Numbers of tokens in the data of a recipe, as far as its file and the tokenizers are on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from popi.backends.base import Backend, Capabilities, ChatRequest, ChatResult, OnComplete, ScoreRequest, ScoreResult
from popi.config import JointRecipe
from popi.data.example import PersonalizationExample
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load_tokenizer
from popi.errors import ModelError
from popi.models import folder_of
from popi.summary import Author, PreferenceSummary, Provenance
from popi.training.formats import answer_format, summary_format
from popi.training.models import is_served
from popi.training.users import generate_users, read_users, summary_prompts

USERS = 1000
"""Maximum number of users that are measured."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens.

    Attributes:
        signals: The prompt of the writer: the signals of a user, and the request for a summary.
        prompt: The prompt of a pair, and what surrounds the summary.
        summary: A summary.
        answer: A response of a pair.
    """

    signals: int = 1500
    prompt: int = 100
    summary: int = 256
    answer: int = 300


@dataclass(frozen=True, slots=True)
class Measured:
    """The lengths in the data.

    Attributes:
        longest: The longest of each kind, which decide about the memory.
        mean: The means, which decide about the time.
    """

    longest: Lengths
    mean: Lengths


class _Tokenizer(Backend):
    """Counts tokens, and nothing else."""

    def __init__(self, name: str) -> None:
        self.model, self.chat_tokens = name, ChatTokens(load_tokenizer(name), name)
        self.capabilities = Capabilities()

    async def chat(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Not supported."""
        raise NotImplementedError

    def stream(self, request: ChatRequest, on_complete: OnComplete = lambda result: None) -> AsyncIterator[str]:
        """Not supported."""
        raise NotImplementedError

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Not supported."""
        raise NotImplementedError

    def count_tokens(self, text: str) -> int:
        """See :class:`Backend`."""
        return len(self.chat_tokens.encode([text])[0])


def measure(recipe: JointRecipe) -> Measured | None:
    """Measures the lengths in the data; ``None`` without the file or a tokenizer.

    Raises:
        InputError: If the file is malformed.
    """
    users = _users(recipe)
    # The tokenizer of a generator on servers may be there only.
    reads = recipe.writer.model if is_served(recipe.generator.model) else recipe.generator.model
    if users is None or not all(map(folder_of, (recipe.writer.model, reads))):
        return None
    try:
        writer, reader = _Tokenizer(recipe.writer.model), _Tokenizer(reads)
    except ModelError:
        return None
    frame = summary_format(
        recipe.writer.inference, writer, max_tokens=recipe.writer.max_tokens, options=recipe.writer.options
    )
    answers = answer_format(recipe.generator.generation, reader, options=recipe.generator.options)
    empty = PreferenceSummary(user_id="", text="", provenance=Provenance(author=Author.BASELINE))
    pairs = [pair for example in users for pair in example.tests]
    asked = writer.chat_tokens.render([prompt.messages for prompt in summary_prompts(users, frame)])
    rendered = reader.chat_tokens.render([answers.render(pair.prompt, empty) for pair in pairs], answered=True)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    found = (
        [len(each.tokens) for each in asked],
        [len(each.tokens) for each in rendered],
        [recipe.writer.max_tokens],
        list(map(len, reader.chat_tokens.encode_responses(texts))),
    )
    means = [max(1, round(sum(lengths) / len(lengths))) for lengths in found]
    return Measured(Lengths(*map(max, found)), Lengths(*means))


def _users(recipe: JointRecipe) -> Sequence[PersonalizationExample] | None:
    data = recipe.data
    if data.file is None:
        count = min(data.users or USERS, USERS)
        return generate_users(count, pairs=data.pairs, held_out=0, seed=recipe.seed).train
    if not data.file.exists():
        return None
    return read_users(data.file, users=data.users, held_out=recipe.evaluate_users, seed=recipe.seed).train[:USERS]


def given(lengths: Lengths, **values: int | None) -> Lengths:
    """Replaces the lengths that are given."""
    return replace(lengths, **{name: value for name, value in values.items() if value is not None})
