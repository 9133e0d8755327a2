"""The recipe of a mini model that is trained from nothing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from popi.config.section import Name, Section


class Tokenizer(Section):
    """The tokenizer that is trained for a mini model.

    Attributes:
        kind: ``byte-level`` or ``metaspace``.
        vocab_size: The number of tokens.
    """

    kind: Literal["byte-level", "metaspace"]
    vocab_size: int = Field(ge=300)


Dimension = Literal["opening", "emoji", "format", "stance", "tone", "level", "units", "length", "examples", "closing"]
"""Of the mini world, see :data:`popi.data.miniworld.tastes.SIDES`."""


class Dilution(Section):
    """How the writer falls short; see :class:`popi.data.miniworld.curriculum.Dilution`.

    Attributes:
        blurred: Dimensions of which it does not say the side.
        overlooked: Dimensions that it leaves out.
        slip: The chance that it does otherwise with a claim.
    """

    blurred: tuple[Dimension, ...]
    overlooked: tuple[Dimension, ...]
    slip: float = Field(ge=0, le=1)


class Phase(Section):
    """A stretch of training with one mixture of lessons.

    Attributes:
        name: The model at its end is saved under this name.
        steps: How many.
        lessons: Lessons of each task in one step.
        signals: The fewest and the most signals of a user.
        learning_rate: At its first and at its last step, linear between.
        dilution: Teach the writer to fall short of the evidence.
    """

    name: Name
    steps: int = Field(ge=1)
    lessons: dict[Literal["write", "raw", "summary", "bare"], PositiveInt] = Field(min_length=1)
    signals: tuple[PositiveInt, PositiveInt] = (8, 8)
    learning_rate: tuple[NonNegativeFloat, NonNegativeFloat]
    dilution: Dilution | None = None

    @field_validator("signals")
    @classmethod
    def _fewest_first(cls, signals: tuple[int, int]) -> tuple[int, int]:
        if signals[0] > signals[1]:
            raise ValueError("the fewest signals come first, then the most")
        return signals


class PretrainRecipe(Section):
    """Trains a mini model from nothing on the mini world.

    Attributes:
        task: Tells recipes apart.
        name: What the model is called.
        seed: Decides the weights at the start and all lessons.
        architecture: Arguments of the transformers config, ``model_type`` among them.
        tokenizer: How text becomes tokens.
        phases: One after the other.
        batch_tokens: The most tokens of one forward pass, padding included.
        evaluate_every: Steps between two looks at held-out users.
        checkpoint_every: Steps between two checkpoints.
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
    def _names_apart(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        names = [phase.name for phase in phases]
        for name in names:
            if names.count(name) > 1 or name == "tokenizer":
                raise ValueError(f"each phase leaves a folder, and another one is called {name!r}")
        return phases

    def cost(self) -> dict[str, int]:
        """How many steps and lessons it takes."""
        lessons = sum(phase.steps * sum(phase.lessons.values()) for phase in self.phases)
        return {"steps": sum(phase.steps for phase in self.phases), "lessons": lessons}

    def results(self) -> tuple[str, ...]:
        """The models in its run folder."""
        return (self.phases[-1].name,)
