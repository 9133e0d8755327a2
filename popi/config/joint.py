"""The recipe that trains a writer and a generator under one preference objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from popi.config.section import Name, Section


class Users(Section):
    """The training users: users with signals, and with pairs that the signals do not show.

    Attributes:
        world: The synthetic world that generates them. Exclusive with ``file``.
        file: JSON lines of examples. Exclusive with ``world``.
        users: Number of users. ``None`` takes all users of a file.
        pairs: Number of pairs of each user of a world.
    """

    world: Literal["miniworld"] | None = None
    file: Path | None = None
    users: PositiveInt | None = None
    pairs: PositiveInt = 4

    @model_validator(mode="after")
    def _one_source(self) -> Users:
        if (self.world is None) == (self.file is None):
            raise ValueError("give either world or file")
        if self.world is not None and self.users is None:
            raise ValueError("a world needs the number of users (data.users)")
        return self


class Lora(Section):
    """Trains an adapter of low rank instead of all weights of a role (LoRA).

    Attributes:
        rank: Rank of the matrices.
        alpha: The product of the matrices is multiplied by ``alpha / rank``.
        targets: Names of the linear layers that get matrices. ``all-linear`` takes all of them but the head.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    targets: Literal["all-linear"] | list[str] = "all-linear"


class RolloutServer(Section):
    """A vLLM server that samples the summaries.

    Attributes:
        url: The base URL of its API.
        key: Name of the environment variable with the API key; ``None`` for a server that needs none.
    """

    url: str
    key: str | None = None


class Writer(Section):
    """The preference-inference model and its reinforcement learning. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id.
        inference: Registry name or ``module:Class`` of the inference whose format renders the prompts and parses the
            replies.
        options: Options of the inference.
        learning_rate: Peak learning rate. It rises linearly for ``warmup`` steps and then falls as a cosine.
        kl_coef: Weight of the KL divergence from the initial writer.
        num_generations: Number of summaries sampled for each user in a step (the group).
        temperature: Sampling temperature.
        max_tokens: Maximum number of tokens of a summary.
        rollouts: What samples the summaries. ``engine`` samples in the process of the training. ``vllm-colocate``
            starts vLLM beside each rank, on the same device, and copies the weights to it before each step.
            ``vllm-server`` uses a running vLLM server.
        server: The vLLM server.
        cache_gib: Memory of vLLM for keys and values, in GiB. ``None`` leaves it to vLLM, which takes most of a GPU.
        beta: Beta of the objective in the reward. ``None`` takes that of the generator. A small beta gives a less noisy
            reward, but a generator learns to rank answers with a larger one (docs/log.md).
        scale_by_std: Divide advantages by the standard deviation of their group.
        reduction: How the loss of a summary's tokens is reduced: ``mean`` as in GRPO, ``sum`` as in Dr. GRPO. With the
            mean, each token of a long bad summary counts less than one of a short bad summary.
        length_penalty: Cost of a token of the summary that the generator reads, in nats of reward.
        max_grad_norm: Maximum norm of the gradient.
        lora: Train an adapter instead of all weights.
    """

    model: str
    inference: str = "llm"
    options: dict[str, Any] = Field(default_factory=dict)
    learning_rate: NonNegativeFloat = 1e-6
    kl_coef: NonNegativeFloat = 2e-3
    num_generations: int = Field(default=8, ge=2)
    temperature: PositiveFloat = 0.6
    max_tokens: PositiveInt = 2048
    rollouts: Literal["engine", "vllm-colocate", "vllm-server"] = "engine"
    server: RolloutServer | None = None
    cache_gib: PositiveFloat | None = None
    beta: PositiveFloat | None = None
    scale_by_std: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    length_penalty: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    lora: Lora | None = None

    @model_validator(mode="after")
    def _fits_rollouts(self) -> Writer:
        if self.cache_gib is not None and self.rollouts != "vllm-colocate":
            raise ValueError("cache_gib needs rollouts: vllm-colocate")
        if (self.server is None) == (self.rollouts == "vllm-server"):
            raise ValueError("rollouts: vllm-server needs a server, such as server: {url: http://127.0.0.1:8000/v1}")
        return self


class Generator(Section):
    """The conditioned generator and the preference objective. The defaults are those of POPI as released.

    Attributes:
        model: Name of a shipped model, path or hub id. Its initial weights are the reference, on plain prompts. If only
            the writer is trained, it can be a YAML file that describes a backend: a generator on servers scores the
            summaries.
        generation: Registry name or ``module:Class`` of the generator whose format renders the prompts.
        options: Options of the generator.
        learning_rate: Peak learning rate, with the schedule of the writer's.
        loss: ``dpo`` or ``ipo``.
        beta: Beta of the objective in the loss, and in the writer's reward unless ``writer.beta`` is set.
        reduction: How the log-probabilities of a response's tokens are reduced: ``sum`` or ``mean``.
        context: The context of a generator that is trained without the writer: a summary, the raw signals, or nothing.
        max_grad_norm: Maximum norm of the gradient.
        lora: Train an adapter instead of all weights. If both roles train adapters of the same model, they share its
            weights, unless DeepSpeed divides them.
    """

    model: str
    generation: str = "prompted"
    options: dict[str, Any] = Field(default_factory=dict)
    learning_rate: NonNegativeFloat = 1e-6
    loss: Literal["dpo", "ipo"] = "dpo"
    beta: PositiveFloat = 0.01
    reduction: Literal["sum", "mean"] = "sum"
    context: Literal["summary", "raw-signals", "none"] = "summary"
    max_grad_norm: PositiveFloat = 10.0
    lora: Lora | None = None


class Engine(Section):
    """How the processes of a run, its ranks, share the training. Each rank has its own part of the users of a step.

    Attributes:
        kind: ``single`` is one process. With ``ddp`` each rank has all weights and its own optimizer. DeepSpeed
            distributes the optimizer over the ranks (``zero1``), also the gradients (``zero2``), or also the weights
            (``zero3``).
        offload: What is kept in the memory of the host: nothing, the state of the optimizer, or also the weights.
        scorer: Where a generator is while it scores and is not updated: ``replicated``, whole on each rank, or
            ``sharded``, divided among them.
    """

    kind: Literal["single", "ddp", "zero1", "zero2", "zero3"] = "single"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    scorer: Literal["replicated", "sharded"] = "replicated"

    @model_validator(mode="after")
    def _can_divide(self) -> Engine:
        if self.scorer == "sharded" and not self.kind.startswith("zero"):
            raise ValueError("scorer: sharded needs kind: zero1, zero2 or zero3")
        if self.offload != "none" and not self.kind.startswith("zero"):
            raise ValueError("offload needs kind: zero1, zero2 or zero3")
        if self.offload == "parameters" and self.kind != "zero3":
            raise ValueError("offload: parameters needs kind: zero3")
        return self


class JointRecipe(Section):
    """Trains a writer and a generator under one preference objective.

    Example:
        >>> recipe = JointRecipe(
        ...     task="joint",
        ...     name="tiny",
        ...     data=Users(world="miniworld", users=100),
        ...     writer=Writer(model="popi-mini-base", max_tokens=96),
        ...     generator=Generator(model="popi-mini-base"),
        ...     steps=10,
        ... )
        >>> recipe.cost()
        {'steps': 10, 'rollouts': 640, 'max_rollout_tokens': 61440}

    Attributes:
        task: The type of recipe.
        name: Name of the pair of models.
        seed: Seed of the users of a world, their order, and all samples.
        data: The training users.
        writer: The preference-inference model.
        generator: The conditioned generator.
        train: Which roles are trained.
        shared: Whether one set of weights plays both roles. Both roles then name the same model. If ``interleaved``,
            one update follows both gradients, with the learning rate and ``max_grad_norm`` of the writer. Otherwise a
            phase updates the weights that also score in it, so the generator is not frozen while the writer is trained.
        schedule: ``sequential`` trains the writer against the frozen generator, then the generator on fixed summaries.
            ``alternating`` repeats this in ``rounds``. ``interleaved`` updates both in each step, on the same samples.
        rounds: Number of rounds of the alternating schedule.
        steps: Number of updates of the writer, and of the generator.
        users_per_step: Number of users whose summaries are sampled in a step. The generator is trained on one pair for
            each of these summaries.
        pairs_per_summary: Number of held-out pairs of the user that score a summary. A user of a file with fewer pairs
            has all of them used. The generator is trained on one of them.
        warmup: Number of steps in each phase until the learning rates reach their peak.
        batch_tokens: Maximum number of tokens of a forward pass, and maximum number of tokens whose activations are
            kept for a gradient. The summaries of one user are sampled together even if they need more.
        evaluate_every: Number of steps between evaluations on held-out users.
        evaluate_users: Number of held-out users.
        checkpoint_every: Number of steps between checkpoints.
        precision: ``float32``; ``mixed``, which computes in bfloat16 and updates weights in float32; or ``bfloat16``,
            which also updates in bfloat16, with half of the memory, and loses updates smaller than 1/256 of a weight.
            ``auto`` is ``mixed`` on a GPU or a CPU that computes in bfloat16 natively, else ``float32``.
        gradient_checkpointing: Keep only the inputs of a model's layers for the backward pass, which recomputes the
            rest: less memory for long signals, and a third more time for an update.
        engine: How the processes of the run share the training.
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
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    engine: Engine = Field(default_factory=Engine)

    @model_validator(mode="after")
    def _fits_together(self) -> JointRecipe:
        if self.shared and (self.writer.model != self.generator.model or self.train != "both"):
            raise ValueError("shared weights need train: both, and the same model in both roles")
        if self.shared and self.writer.lora != self.generator.lora:
            raise ValueError("shared weights need the same lora in both roles")
        if self.precision == "bfloat16" and self.engine.kind.startswith("zero"):
            raise ValueError("precision: bfloat16 needs engine.kind: single or ddp; ZeRO trains in mixed precision")
        served = self.generator.model.endswith((".yaml", ".yml"))
        if served and (self.train != "writer" or self.generator.lora):
            raise ValueError("a generator that is described by a backend file needs train: writer, and no lora")
        updated = self.train == "both" and (self.shared or self.schedule == "interleaved")
        if self.engine.scorer == "sharded" and (served or updated):
            raise ValueError("engine.scorer: sharded needs a local generator that is not updated while it scores")
        if self.generator.context != "summary" and self.train != "generator":
            raise ValueError("generator.context must be summary unless train is generator")
        if self.schedule == "alternating" and self.steps < self.rounds:
            raise ValueError(f"steps must be at least the number of rounds, {self.rounds}")
        if self.data.world is not None and self.pairs_per_summary > self.data.pairs:
            raise ValueError(
                f"pairs_per_summary must be at most the number of pairs of a user (data.pairs), {self.data.pairs}"
            )
        return self

    def steps_of_rounds(self) -> list[int]:
        """Number of steps of each round, for the writer and for the generator."""
        rounds = self.rounds if self.train == "both" and self.schedule == "alternating" else 1
        return [self.steps // rounds + (place < self.steps % rounds) for place in range(rounds)]

    def cost(self) -> dict[str, int]:
        """The size of the run: the number of steps, of rollouts, and the maximum number of rollout tokens."""
        apart = self.train == "both" and self.schedule != "interleaved"
        together = self.users_per_step * self.writer.num_generations
        rollouts = 0 if self.train == "generator" else self.steps * together
        if self.generator.context == "summary" and (apart or self.train == "generator"):
            # A generator that is trained apart reads one summary of each user per round.
            items = [steps * together for steps in self.steps_of_rounds()]
            rollouts += sum(min(count, self.data.users or count) for count in items)
        tokens = rollouts * self.writer.max_tokens
        return {"steps": self.steps * (1 + apart), "rollouts": rollouts, "max_rollout_tokens": tokens}

    def results(self) -> tuple[str, ...]:
        """The models in the run folder."""
        return ("writer", "generator") if self.train == "both" else (self.train,)
