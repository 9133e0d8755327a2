"""The recipe of a mini model that is trained from scratch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from popi.config.section import Name, Section

MAX_LESSONS = 4096
"""Maximum number of lessons of a step."""


class Tokenizer(Section):
    """The tokenizer that is trained for a mini model.

    Attributes:
        kind: ``byte-level`` or ``metaspace``.
        vocab_size: Number of tokens.
    """

    kind: Literal["byte-level", "metaspace"]
    vocab_size: int = Field(ge=300)


Dimension = Literal["opening", "emoji", "format", "stance", "tone", "level", "units", "length", "examples", "closing"]
"""A dimension of the mini world, see :data:`popi.data.miniworld.tastes.SIDES`."""


class Dilution(Section):
    """The errors of a mediocre writer; see :class:`popi.data.miniworld.curriculum.Dilution`.

    Attributes:
        blurred: Dimensions that it names without saying which side the user likes.
        overlooked: Dimensions that it leaves out.
        slip: Probability that a claim deviates from these habits.
    """

    blurred: tuple[Dimension, ...]
    overlooked: tuple[Dimension, ...]
    slip: float = Field(ge=0, le=1)


class Phase(Section):
    """A part of the training with one mixture of lessons.

    Attributes:
        name: Name of the phase and of the folder of the model at its end.
        steps: Number of steps.
        lessons: Number of lessons of each task in a step.
        signals: Minimum and maximum number of signals of a user.
        learning_rate: Learning rate of the first and of the last step, linear between them.
        dilution: Errors in the summaries that the model learns to write; ``None`` for none.
    """

    name: Name
    steps: int = Field(ge=1)
    lessons: dict[Literal["write", "raw", "summary", "bare"], PositiveInt] = Field(min_length=1)
    signals: tuple[PositiveInt, PositiveInt] = (8, 8)
    learning_rate: tuple[NonNegativeFloat, NonNegativeFloat]
    dilution: Dilution | None = None

    @field_validator("signals")
    @classmethod
    def _ordered(cls, signals: tuple[int, int]) -> tuple[int, int]:
        if signals[0] > signals[1]:
            raise ValueError(f"the minimum {signals[0]} is greater than the maximum {signals[1]}")
        return signals

    @field_validator("lessons")
    @classmethod
    def _bounded(cls, lessons: dict[str, int]) -> dict[str, int]:
        if sum(lessons.values()) > MAX_LESSONS:
            raise ValueError(f"a step has at most {MAX_LESSONS} lessons, got {sum(lessons.values())}")
        return lessons


class PretrainRecipe(Section):
    """Trains a mini model from scratch on the mini world.

    Example:
        >>> from pathlib import Path
        >>> from popi.config import load
        >>> load(Path("recipes/mini_base"), {"seed": 2}).cost()
        {'steps': 2000, 'lessons': 77400}

    Attributes:
        task: ``pretrain``.
        name: Name of the model.
        seed: Seed of the initial weights and of all lessons.
        architecture: Arguments of the transformers config, including ``model_type``.
        tokenizer: The tokenizer.
        phases: The phases, in order.
        batch_tokens: Maximum number of tokens of a forward pass, including padding.
        evaluate_every: Number of steps between two evaluations on held-out users.
        checkpoint_every: Number of steps between two checkpoints.
    """

    RUN: ClassVar = "popi.pretraining.pretrain:run"

    task: Literal["pretrain"]
    name: Name
    seed: int = Field(default=0, ge=0, lt=2**32)
    architecture: dict[str, Any]
    tokenizer: Tokenizer
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    batch_tokens: int = Field(default=4096, ge=256)
    evaluate_every: int = Field(default=200, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)

    @field_validator("phases")
    @classmethod
    def _distinct_names(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        names = [phase.name for phase in phases]
        for name in names:
            if name == "tokenizer":
                raise ValueError("a phase cannot be named 'tokenizer': the tokenizer is saved in a folder of this name")
            if names.count(name) > 1:
                raise ValueError(f"two phases are named {name!r}; each needs its own folder")
        return phases

    def cost(self) -> dict[str, int]:
        """The number of steps and of lessons."""
        lessons = sum(phase.steps * sum(phase.lessons.values()) for phase in self.phases)
        return {"steps": sum(phase.steps for phase in self.phases), "lessons": lessons}

    def results(self) -> tuple[str, ...]:
        """Names of the trained models in the run folder."""
        return (self.phases[-1].name,)
