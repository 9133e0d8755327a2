"""The recipe of a writer and a generator that are trained under one preference objective."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from popi.config.section import Name, Section


class Users(Section):
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


class Writer(Section):
    """The preference-inference model and how it is reinforced. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id.
        learning_rate: At its peak; it rises for ``warmup`` steps and falls as a cosine.
        kl: Weight of the divergence from the initial writer.
        samples: Summaries of each user in a step.
        temperature: Of the sampling.
        max_tokens: The most tokens of a summary.
        beta: Of the objective in its reward; ``None`` is that of the generator. A small one makes a reward of little
            noise, where a generator learns to order answers by a larger one (docs/log.md).
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
    beta: PositiveFloat | None = None
    scale_by_std: bool = False
    over: Literal["mean", "sum"] = "mean"
    token_price: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0


class Generator(Section):
    """The conditioned generator and the preference objective. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id; it is also the reference, on bare prompts.
        learning_rate: As the writer's.
        loss: ``dpo`` or ``ipo``.
        beta: Of the objective in its loss, and in the writer's reward unless the writer has one of its own.
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


class JointRecipe(Section):
    """Trains a writer and a generator under one preference objective.

    Attributes:
        task: Tells recipes apart.
        name: What the pair is called.
        seed: Decides the users of a world, their order, and every sample.
        data: Whom to learn from.
        writer: The preference-inference model.
        generator: The conditioned generator.
        train: Both, or one of them alone.
        shared: One set of weights plays both roles; then both name the same model. Interleaved, one update follows both
            gradients, with the writer's learning rate and clip; otherwise what a phase updates is also what judges in
            it, and so the generator is not frozen while the writer learns.
        schedule: ``sequential`` trains the writer against the frozen generator, then the generator on fixed summaries;
            ``alternating`` does so in ``rounds``; ``interleaved`` updates both in each step, on the same samples.
        rounds: Of the alternating schedule.
        steps: Updates of the writer, and of the generator.
        users_per_step: Users whose summaries are sampled in a step; the generator learns from as many pairs as there
            are summaries, alone too.
        pairs_per_summary: Held-out pairs of the user that judge a summary, or all where a user of a file has fewer; the
            generator learns from one of them.
        warmup: Steps of each phase of the schedule until the learning rates have risen.
        batch_tokens: The most tokens of one forward pass, and the most whose activations are kept for a gradient. The
            summaries of one user are sampled together even where they take more.
        evaluate_every: Steps between two looks at held-out users.
        evaluate_users: How many these are.
        checkpoint_every: Steps between two checkpoints.
    """

    RUN: ClassVar = "popi.training.joint:run"

    task: Literal["joint"]
    name: Name
    seed: int = Field(default=0, ge=0, lt=2**32)
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
        if self.data.world is not None and self.pairs_per_summary > self.data.pairs:
            raise ValueError(
                f"users with {self.data.pairs} pairs (data.pairs) have no {self.pairs_per_summary} to judge a summary "
                "(pairs_per_summary)"
            )
        return self

    def steps_of_rounds(self) -> list[int]:
        """How many steps each round has, of the writer and of the generator."""
        rounds = self.rounds if self.train == "both" and self.schedule == "alternating" else 1
        return [self.steps // rounds + (place < self.steps % rounds) for place in range(rounds)]

    def cost(self) -> dict[str, int]:
        """How many steps it takes, and at most how many rollouts of how many tokens."""
        apart = self.train == "both" and self.schedule != "interleaved"
        together = self.users_per_step * self.writer.samples
        rollouts = 0 if self.train == "generator" else self.steps * together
        if self.generator.context == "summary" and (apart or self.train == "generator"):
            # A generator that learns apart is told of each user once a round.
            items = [steps * together for steps in self.steps_of_rounds()]
            rollouts += sum(min(count, self.data.users or count) for count in items)
        tokens = rollouts * self.writer.max_tokens
        return {"steps": self.steps * (1 + apart), "rollouts": rollouts, "rollout_tokens_at_most": tokens}

    def results(self) -> tuple[str, ...]:
        """The models in its run folder."""
        return ("writer", "generator") if self.train == "both" else (self.train,)
