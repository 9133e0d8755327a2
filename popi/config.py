"""Recipes: typed, frozen, and strict about what they do not know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from popi.errors import ConfigError, InputError, did_you_mean
from popi.io import validate


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""What can be the name of a folder."""


class Tokenizer(_Section):
    """The tokenizer that is trained for a mini model.

    Attributes:
        kind: ``byte-level`` or ``metaspace``.
        vocab_size: The number of tokens.
    """

    kind: Literal["byte-level", "metaspace"]
    vocab_size: int = Field(ge=300)


Dimension = Literal["opening", "emoji", "format", "stance", "tone", "level", "units", "length", "examples", "closing"]
"""Of the mini world, see :data:`popi.data.miniworld.tastes.SIDES`."""


class Dilution(_Section):
    """How the writer falls short; see :class:`popi.data.miniworld.curriculum.Dilution`.

    Attributes:
        blurred: Dimensions of which it does not say the side.
        overlooked: Dimensions that it leaves out.
        slip: The chance that it does otherwise with a claim.
    """

    blurred: tuple[Dimension, ...]
    overlooked: tuple[Dimension, ...]
    slip: float = Field(ge=0, le=1)


class Phase(_Section):
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


class PretrainRecipe(_Section):
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

    RUN: ClassVar = "popi.training.pretrain:run"

    task: Literal["pretrain"]
    name: Name
    seed: int = Field(default=0, ge=0)
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


class Users(_Section):
    """Whom to learn from: users with signals and with pairs that the signals do not show.

    Attributes:
        world: What makes them, or
        file: JSON lines of examples.
        users: How many; ``None`` takes all of a file.
        pairs: Pairs of each user, of a world.
    """

    world: Literal["miniworld"] | None = None
    file: Path | None = None
    users: PositiveInt | None = None
    pairs: PositiveInt = 4

    @model_validator(mode="after")
    def _one_of_both(self) -> Users:
        if (self.world is None) == (self.file is None):
            raise ValueError("give a world or a file")
        if self.world is not None and self.users is None:
            raise ValueError("say how many users the world shall make")
        return self


class Writer(_Section):
    """The preference-inference model and how it is reinforced. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id.
        learning_rate: At its peak; it rises for ``warmup`` steps and falls as a cosine.
        kl: Weight of the divergence from the initial writer.
        samples: Summaries of each user in a step.
        temperature: Of the sampling.
        max_tokens: The most tokens of a summary.
        scale_by_std: Divide advantages by the standard deviation of their group.
        over: Whether the loss of a summary's tokens is averaged over them, as GRPO does, or summed, as Dr. GRPO does:
            with the mean, what is bad weighs less where it is longer.
        token_price: What a token that the generator is told costs, in nats of reward.
        clip: The largest norm of its gradient.
    """

    model: str
    learning_rate: NonNegativeFloat = 1e-6
    kl: NonNegativeFloat = 2e-3
    samples: int = Field(default=8, ge=2)
    temperature: PositiveFloat = 0.6
    max_tokens: PositiveInt = 2048
    scale_by_std: bool = False
    over: Literal["mean", "sum"] = "mean"
    token_price: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0


class Generator(_Section):
    """The conditioned generator and the preference objective. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id; it is also the reference, on bare prompts.
        learning_rate: As the writer's.
        loss: ``dpo`` or ``ipo``.
        beta: Of the objective, which is also the writer's reward.
        over: Whether the log-probabilities of a response's tokens are summed or averaged.
        context: What it is told of a user where it is trained alone: a summary, the raw signals or nothing.
        clip: The largest norm of its gradient.
    """

    model: str
    learning_rate: NonNegativeFloat = 1e-6
    loss: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = 0.01
    over: Literal["sum", "mean"] = "sum"
    context: Literal["summary", "raw-signals", "none"] = "summary"
    clip: PositiveFloat = 10.0


class JointRecipe(_Section):
    """Trains a writer and a generator under one preference objective.

    Attributes:
        task: Tells recipes apart.
        name: What the pair is called.
        seed: Decides the users of a world, their order, and every sample.
        data: Whom to learn from.
        writer: The preference-inference model.
        generator: The conditioned generator.
        train: Both, or one of them alone.
        shared: One set of weights plays both roles; then both name the same model.
        schedule: ``sequential`` trains the writer against the frozen generator, then the generator on fixed summaries;
            ``alternating`` does so in ``rounds``; ``interleaved`` updates both in each step, on the same samples.
        rounds: Of the alternating schedule.
        steps: Updates of the writer, and of the generator.
        users_per_step: Users whose summaries are sampled in a step; the generator alone takes as many pairs.
        pairs_per_summary: Held-out pairs of the user that judge a summary; the generator learns from the first of them.
        warmup: Steps until the learning rates have risen.
        batch_tokens: The most tokens of one forward pass.
        evaluate_every: Steps between two looks at held-out users.
        evaluate_users: How many these are.
        checkpoint_every: Steps between two checkpoints.
    """

    RUN: ClassVar = "popi.training.joint:run"

    task: Literal["joint"]
    name: Name
    seed: int = Field(default=0, ge=0)
    data: Users
    writer: Writer
    generator: Generator
    train: Literal["both", "writer", "generator"] = "both"
    shared: bool = False
    schedule: Literal["sequential", "alternating", "interleaved"] = "interleaved"
    rounds: int = Field(default=2, ge=2)
    steps: PositiveInt
    users_per_step: PositiveInt = 8
    pairs_per_summary: PositiveInt = 1
    warmup: NonNegativeInt = 150
    batch_tokens: int = Field(default=8192, ge=256)
    evaluate_every: PositiveInt = 50
    evaluate_users: PositiveInt = 64
    checkpoint_every: PositiveInt = 50

    @model_validator(mode="after")
    def _fits_together(self) -> JointRecipe:
        if self.shared and (self.writer.model != self.generator.model or self.train != "both"):
            raise ValueError("shared weights are trained in both roles, and both roles name the same model")
        if self.generator.context != "summary" and self.train != "generator":
            raise ValueError("only a generator that is trained alone can be told something else than summaries")
        if self.schedule == "alternating" and self.steps < self.rounds:
            raise ValueError("a round has at least one step")
        return self

    def cost(self) -> dict[str, int]:
        """How many steps it takes, and how many rollouts of at most how many tokens."""
        updates = 2 if self.train == "both" and self.schedule != "interleaved" else 1
        rollouts = 0 if self.train == "generator" else self.steps * self.users_per_step * self.writer.samples
        tokens = rollouts * self.writer.max_tokens
        return {"steps": self.steps * updates, "rollouts": rollouts, "rollout_tokens_at_most": tokens}

    def results(self) -> tuple[str, ...]:
        """The models in its run folder."""
        return ("writer", "generator") if self.train == "both" else (self.train,)


Recipe = PretrainRecipe | JointRecipe
_RECIPES: dict[str, type[Recipe]] = {"pretrain": PretrainRecipe, "joint": JointRecipe}


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        path: A YAML file, or a folder with a ``config.yaml``.
        overrides: Values that replace those of the file, by dotted name: ``{"phases.0.steps": 2}``.

    Raises:
        InputError: If the file cannot be read or does not fit; the field is named.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=file, fix="give a recipe's YAML file") from error
    # A date that is none, or bytes that are no UTF-8, are a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        raise ConfigError("is not YAML in UTF-8", file=file, line=line, fix="mend the syntax") from error
    for name, value in (overrides or {}).items():
        _replace(tree, name, value, file)
    task = tree.get("task") if isinstance(tree, dict) else None
    if isinstance(tree, dict) and str(task) not in _RECIPES:
        fix = did_you_mean(str(task), _RECIPES)
        raise ConfigError(f"unknown task {task!r}" if task else "names no task", file=file, field="task", fix=fix)
    return validate(_RECIPES.get(str(task), PretrainRecipe), tree, file=file)


def _replace(tree: Any, name: str, value: Any, file: Path) -> None:
    *path, last = name.split(".")
    try:
        for part in path:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        if isinstance(tree, list):
            tree[int(last)] = value
        else:
            tree[last] = value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError("there is no such place to override", file=file, field=name) from error


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``field=value`` words; values are YAML.

    Raises:
        ConfigError: If a word has no ``=`` or its value is not YAML.
    """
    parsed = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            if not equals:
                raise ValueError
            parsed[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{word!r} is not an override", fix="write it as phases.0.steps=2") from error
    return parsed
