"""The tokens of a joint run, and its time at a given speed."""

from __future__ import annotations

from dataclasses import dataclass

from popi.config import JointRecipe
from popi.planning.lengths import Lengths

BACKWARD = 2
"""Passes that a backward pass is worth: it multiplies with the weights twice as often as a forward pass."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a run, on all ranks.

    Attributes:
        written: Tokens of summaries that are sampled.
        read: Tokens that are read without a gradient.
        updated: Tokens that are read with a gradient.
    """

    written: int = 0
    read: int = 0
    updated: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.written + other.written, self.read + other.read, self.updated + other.updated)

    def times(self, count: int) -> Tokens:
        """The tokens of several steps."""
        return Tokens(self.written * count, self.read * count, self.updated * count)


def tokens_of(recipe: JointRecipe, lengths: Lengths) -> tuple[Tokens, Tokens]:
    """The tokens of a step of the writer, and of a step that updates only the generator.

    Evaluations, and the reference of the pairs, are not counted.

    Args:
        recipe: The recipe.
        lengths: Mean lengths.
    """
    users, samples = recipe.users_per_step, recipe.writer.num_generations
    group = lengths.signals + samples * lengths.summary
    pair = lengths.prompt + lengths.summary + 2 * lengths.answer
    joint = recipe.schedule == "interleaved" and recipe.train == "both"
    trained = users * samples * pair if joint else 0
    read = users * lengths.signals + users * samples * recipe.pairs_per_summary * pair - trained
    if recipe.writer.kl_coef:
        read += users * group
    writer = Tokens(users * samples * lengths.summary, read, users * group + trained)
    sampled = samples * users if recipe.generator.context == "summary" else 0
    # A user is read once for all summaries of a round.
    generator = Tokens(0, 0, sampled * pair if sampled else users * samples * pair)
    return writer, generator


def tokens_of_run(recipe: JointRecipe, lengths: Lengths) -> Tokens:
    """The tokens of all steps, and of the summaries that a generator trained apart reads."""
    writer, generator = tokens_of(recipe, lengths)
    total = writer.times(recipe.steps if recipe.train != "generator" else 0)
    if recipe.train == "generator" or (recipe.train == "both" and recipe.schedule != "interleaved"):
        sampled = sum(
            min(steps * recipe.users_per_step * recipe.writer.num_generations, recipe.data.users or steps)
            for steps in recipe.steps_of_rounds()
        )
        total += generator.times(recipe.steps)
        if recipe.generator.context == "summary":
            total += Tokens(sampled * lengths.summary, sampled * lengths.signals)
    return total


def seconds(tokens: Tokens, recipe: JointRecipe, *, ranks: int, reading: float, writing: float | None) -> float:
    """The time of these tokens.

    Args:
        tokens: The tokens.
        recipe: The recipe.
        ranks: Number of ranks.
        reading: Tokens that a rank reads per second, without a gradient.
        writing: Tokens that a rank samples per second; ``None`` leaves sampling out.
    """
    passes = 1 + BACKWARD + recipe.gradient_checkpointing
    sampling = 0.0 if writing is None else tokens.written / writing
    return ((tokens.read + passes * tokens.updated) / reading + sampling) / ranks
