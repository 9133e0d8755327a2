"""The trainers of a joint run, made from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from popi.config import JointRecipe
from popi.errors import PopiError
from popi.roles import Failure
from popi.seeds import seed_of
from popi.summary import PreferenceSummary
from popi.training import engines
from popi.training.checkpoints import CheckpointCallback
from popi.training.contexts import ITEMS, Contexts
from popi.training.generator import GeneratorTrainer
from popi.training.metrics import MetricsCallback
from popi.training.models import GENERATOR, WRITER, JointModels
from popi.training.precision import Precision, resolve
from popi.training.ranks import Ranks
from popi.training.reference import Reference
from popi.training.reward import PairReward
from popi.training.rollouts import Rollouts
from popi.training.schedule import Phase
from popi.training.scoring import PairScorer
from popi.training.trl import GRPOConfig
from popi.training.updates import AdamWUpdate, GeneratorUpdate, Schedule, SharedUpdate, ZeroUpdate
from popi.training.users import UserSplit, epoch_order, summary_prompts
from popi.training.writer import WriterTrainer

SummaryTrainer = WriterTrainer[PreferenceSummary | Failure]

MakeMetrics = Callable[[Mapping[str, float]], MetricsCallback]
"""Makes the callback that reports metrics. Argument: the costs before the first step."""


def precision_of(recipe: JointRecipe) -> Precision:
    """The types that a recipe is trained with on this device."""
    return Precision.of(resolve(recipe.precision), zero=engines.stage_of(recipe.engine.kind) > 0)


def deepspeed_configs(recipe: JointRecipe, ranks: int) -> dict[str, dict[str, Any]]:
    """The configuration of DeepSpeed for each role that a recipe trains.

    Args:
        recipe: The recipe, with an engine of DeepSpeed.
        ranks: Number of ranks.
    """
    writer, generator = recipe.writer, recipe.generator
    users, together = recipe.users_per_step // ranks, recipe.train == "both" and recipe.schedule == "interleaved"
    # In the steps of the writer, the generator has a backward pass for each forward pass, and then one step.
    sizes = {
        WRITER: (writer.num_generations * users, 1, writer.max_grad_norm),
        GENERATOR: (1, 1, generator.max_grad_norm)
        if together
        else (users, writer.num_generations, generator.max_grad_norm),
    }
    trained = sizes if recipe.train == "both" else {recipe.train: sizes[recipe.train]}
    return {
        role: engines.deepspeed_config(
            recipe.engine.kind,
            recipe.engine.offload,
            precision_of(recipe),
            max_grad_norm=max_grad_norm,
            batch=batch,
            accumulate=accumulate,
            ranks=ranks,
        )
        for role, (batch, accumulate, max_grad_norm) in trained.items()
    }


def order_of(recipe: JointRecipe, phase: Phase, users: int) -> list[int]:
    """Places of the users of a phase, in the order in which it visits them.

    Args:
        recipe: The recipe.
        phase: The phase.
        users: Number of training users.
    """
    if phase.kind == "generator":
        # As many pairs as in a joint step, where the generator is trained on one pair under each summary.
        count = phase.steps * recipe.users_per_step * recipe.writer.num_generations
        return epoch_order(users, count, seed=seed_of(recipe.seed, ITEMS, phase.name))
    # If each role has phases of its own, half of the steps so far were the writer's.
    before = phase.first // 2 * recipe.users_per_step
    return epoch_order(users, before + phase.steps * recipe.users_per_step, seed=recipe.seed)[before:]


@dataclass(frozen=True, slots=True)
class PhaseTraining:
    """A trainer, and the update of the generator in its steps.

    Attributes:
        trainer: The trainer.
        update: The update, if the trainer is that of the writer and both roles are trained.
        scorer: The engine of a generator that is divided and not trained.
    """

    trainer: SummaryTrainer | GeneratorTrainer
    update: GeneratorUpdate | None = None
    scorer: nn.Module | None = None

    def wrappers(self) -> list[nn.Module]:
        """The engines of DeepSpeed, or other wrappers of the models."""
        update = self.update.engine if isinstance(self.update, ZeroUpdate) else None
        return [wrapper for wrapper in (self.trainer.model_wrapped, update, self.scorer) if wrapper is not None]

    def fit(self, checkpoint: Path | None, *, deepspeed: bool) -> None:
        """Trains to the end of the phase.

        Args:
            checkpoint: The checkpoint to resume from.
            deepspeed: Whether an engine of DeepSpeed has to be in use.

        Raises:
            PopiError: If a loss is not finite, or accelerate has been set up without DeepSpeed.
        """
        trainer = self.trainer
        if deepspeed and not trainer.is_deepspeed_enabled:
            raise PopiError("accelerate does not use DeepSpeed; unset the ACCELERATE_... variables, or use torchrun")
        if checkpoint is not None and self.update is not None:
            self.update.restore(checkpoint)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


class Trainers:
    """Makes the trainers of the phases.

    Args:
        recipe: The recipe.
        models: The models.
        contexts: Provides the contexts of a generator that is trained apart.
        users: The users.
        reference: The reference of their pairs.
        ranks: The ranks of the run.
    """

    def __init__(
        self,
        recipe: JointRecipe,
        models: JointModels,
        contexts: Contexts,
        users: UserSplit,
        reference: Reference,
        ranks: Ranks,
    ) -> None:
        self._recipe, self._models, self._contexts = recipe, models, contexts
        self._users, self._reference, self._ranks = users.train, reference, ranks

    def writer(self, phase: Phase, folder: Path, rollouts: Rollouts, metrics: MakeMetrics) -> PhaseTraining:
        """The trainer of a phase that updates the writer, and perhaps the generator."""
        recipe, models = self._recipe, self._models
        update = self._update(phase, lambda: trainer.model_wrapped) if phase.kind == "both" else None
        prompts = summary_prompts(self._users, models.summary_format)
        trainer: SummaryTrainer = WriterTrainer(
            models.writer,
            models.writer_tokenizer,
            self._writer_arguments(phase, folder),
            conversations=[prompt.messages for prompt in prompts],
            names=[prompt.user.user_id for prompt in prompts],
            order=order_of(recipe, phase, len(self._users)),
            parse=lambda place, reply, cut: models.summary_format.parse(prompts[place], reply, truncated=cut),
            reward=self._reward(update),
            rollouts=rollouts,
            abilities=models.writer_backend.abilities,
            batch_tokens=recipe.batch_tokens,
            first=phase.first,
            ranks=self._ranks,
            adapter=models.trained(WRITER) if recipe.writer.lora else None,
            within=models.computing(WRITER),
            initial=models.initial(),
            callbacks=[metrics({}), CheckpointCallback(self._ranks, None if update is None else update.save)],
        )
        divided = phase.kind == "writer" and recipe.engine.scorer == "sharded"
        return PhaseTraining(
            trainer, update, engines.divide(models.generator, precision_of(recipe)) if divided else None
        )

    def generator(self, phase: Phase, folder: Path, metrics: MakeMetrics) -> PhaseTraining:
        """The trainer of a phase that updates only the generator."""
        recipe, generator = self._recipe, self._recipe.generator
        scorer = self._models.scorer
        assert isinstance(scorer, PairScorer), "a served generator is not trained"
        items, spent = self._contexts.training_pairs(
            self._users,
            order_of(recipe, phase, len(self._users)),
            self._reference,
            temperature=recipe.writer.temperature,
            phase=phase.name,
            folder=folder,
        )
        trainer = GeneratorTrainer(
            self._models.generator,
            TrainingArguments(
                **self._arguments(GENERATOR, phase, folder),
                per_device_train_batch_size=recipe.users_per_step // self._ranks.count,
                gradient_accumulation_steps=recipe.writer.num_generations,
                learning_rate=generator.learning_rate,
                max_grad_norm=generator.max_grad_norm,
            ),
            scorer=scorer,
            items=items,
            loss=generator.loss,
            beta=generator.beta,
            first=phase.first,
            ranks=self._ranks,
            adapter=self._models.trained(GENERATOR) if generator.lora else None,
            callbacks=[metrics(spent), CheckpointCallback(self._ranks)],
        )
        return PhaseTraining(trainer)

    def _update(self, phase: Phase, wrapper: Callable[[], nn.Module]) -> GeneratorUpdate:
        recipe, model, generator = self._recipe, self._models.generator, self._recipe.generator
        if recipe.shared:
            return SharedUpdate(model, wrapper)
        schedule = Schedule(generator.learning_rate, steps=phase.steps, warmup=recipe.warmup)
        if self._uses_deepspeed:
            return ZeroUpdate(model, schedule, config=self._deepspeed(GENERATOR), ranks=self._ranks)
        trained = self._models.trained(GENERATOR)
        return AdamWUpdate(trained, schedule, max_grad_norm=generator.max_grad_norm, ranks=self._ranks)

    def _reward(self, update: GeneratorUpdate | None) -> PairReward:
        recipe, generator = self._recipe, self._recipe.generator
        return PairReward(
            self._models.scorer,
            [example.tests for example in self._users],
            self._reference,
            loss=generator.loss,
            beta=generator.beta,
            reward_beta=recipe.writer.beta or generator.beta,
            pairs_per_summary=recipe.pairs_per_summary,
            length_penalty=recipe.writer.length_penalty,
            count_tokens=self._models.writer_backend.count_tokens,
            seed=recipe.seed,
            update=update,
            ranks=self._ranks,
        )

    def _writer_arguments(self, phase: Phase, folder: Path) -> GRPOConfig:
        writer = self._recipe.writer
        return GRPOConfig(
            **self._arguments(WRITER, phase, folder),
            per_device_train_batch_size=writer.num_generations * self._recipe.users_per_step // self._ranks.count,
            learning_rate=writer.learning_rate,
            max_grad_norm=writer.max_grad_norm,
            num_generations=writer.num_generations,
            max_completion_length=writer.max_tokens,
            temperature=writer.temperature,
            beta=writer.kl_coef,
            shuffle_dataset=False,
            loss_type="grpo" if writer.reduction == "mean" else "dr_grpo",
            scale_rewards="group" if writer.scale_by_std else "none",
            vllm_importance_sampling_mode="token_truncate",
        )

    def _arguments(self, role: str, phase: Phase, folder: Path) -> dict[str, Any]:
        """The arguments that the trainers of both roles share."""
        deepspeed = self._deepspeed(role) if self._uses_deepspeed else None
        return {
            "output_dir": str(folder),
            "max_steps": phase.steps,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self._recipe.warmup,
            "weight_decay": 0.0,
            "seed": self._recipe.seed,
            "logging_steps": 1,
            "save_steps": self._recipe.checkpoint_every,
            "save_total_limit": 2,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": self._models.writer.device.type == "cpu",
            # The forward passes choose their own precision, and accelerate's wrapper would keep the model alive.
            "bf16": False,
            "gradient_checkpointing": False,
            **engines.trainer_arguments(self._recipe.engine.kind, deepspeed),
        }

    @property
    def _uses_deepspeed(self) -> bool:
        return engines.stage_of(self._recipe.engine.kind) > 0

    def _deepspeed(self, role: str) -> dict[str, Any]:
        return deepspeed_configs(self._recipe, self._ranks.count)[role]
