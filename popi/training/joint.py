"""Joint training: runs the schedules in which a writer and a generator are trained under one objective."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from popi.config import JointRecipe
from popi.engine.loading import quiet
from popi.errors import BackendError, ConfigError, MissingExtra, PopiError
from popi.io import write_text
from popi.models import fingerprint as model_fingerprint
from popi.provenance import fingerprint_weights, now
from popi.roles import Failure
from popi.run_folder import METRICS, RunFolder, load_state, save_state
from popi.summary import PreferenceSummary
from popi.training.card import joint_card
from popi.training.checkpoints import STATE, CheckpointCallback, last_complete
from popi.training.contexts import SUMMARIES, Contexts
from popi.training.curves import draw_curves
from popi.training.generator import GeneratorTrainer, GeneratorUpdate
from popi.training.held_out import HeldOutEval, evaluate_held_out
from popi.training.metrics import MetricsCallback
from popi.training.models import JointModels, Role
from popi.training.reference import Reference
from popi.training.reward import PairReward
from popi.training.rollouts import EngineRollouts, Rollouts
from popi.training.schedule import Phase, phases_of
from popi.training.trl import GRPOConfig
from popi.training.users import UserSplit, epoch_order, generate_users, read_users, summary_prompts
from popi.training.writer import WriterTrainer

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
SummaryTrainer = WriterTrainer[PreferenceSummary | Failure]
REFERENCE, PHASES, SAMPLES, CURVES = "reference.json", "phases", "samples", "curves.png"
ONE_GPU = "make one visible: CUDA_VISIBLE_DEVICES=0 popi train ..."
ONE_PROCESS = "start it without torchrun or accelerate launch: popi train ..."
OUT_OF_MEMORY = (
    "out of memory; lower batch_tokens, writer.num_generations or writer.max_tokens (the summaries of a user are "
    "sampled together), or use a smaller model"
)
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "trl", "accelerate")


def run(recipe: JointRecipe, out: Path, *, source: str, report: Report) -> None:
    """Trains the models of a recipe, or resumes an interrupted run in the same folder.

    At the end the folder contains the models, ``writer`` and ``generator``; see :class:`popi.run_folder.RunFolder` for
    the other files. A resumed run ends with the same weights as an uninterrupted one.

    Args:
        recipe: The recipe.
        out: The run folder.
        source: The path of the recipe, for model cards.
        report: Called with the metrics of each step.

    Raises:
        InputError: If the folder contains another run, or the data or a model cannot be used.
        ConfigError: If several GPUs are visible, or several processes were started.
        PopiError: If another process uses the folder, the disk or the memory is full, or a loss is not finite.
    """
    if torch.cuda.device_count() > 1:
        raise ConfigError(f"{torch.cuda.device_count()} GPUs are visible, but a run uses one", fix=ONE_GPU)
    if (processes := PartialState().num_processes) > 1:
        raise ConfigError(f"{processes} processes were started, but a run uses one", fix=ONE_PROCESS)
    with RunFolder.open(out, recipe, libraries=LIBRARIES) as folder, quiet():
        users = _users(recipe)
        if recipe.warmup >= (shortest := min(recipe.steps_of_rounds())):
            log.info("warmup (%d steps) is not shorter than a phase (%d steps)", recipe.warmup, shortest)
        try:
            joint = _Run(recipe, folder, users, report)
            models = {"writer_model": recipe.writer.model, "generator_model": recipe.generator.model}
            files = {role: model_fingerprint(name) for role, name in models.items()}
            folder.begin({"data": users.digest(), **files, **joint.templates()})
            joint.train(source)
        except (torch.OutOfMemoryError, BackendError) as error:
            # A backend raises one type of error for whatever its model raises.
            if not any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__cause__)):
                raise
            raise PopiError(OUT_OF_MEMORY) from error


def _users(recipe: JointRecipe) -> UserSplit:
    """The users of a run. Logs those that are left out, and those with fewer pairs than requested."""
    data, held_out, seed = recipe.data, recipe.evaluate_users, recipe.seed
    if data.file is not None:
        users = read_users(data.file, users=data.users, held_out=held_out, seed=seed)
    else:
        assert data.users is not None, "the recipe of a world has a number of users"
        users = generate_users(data.users, pairs=data.pairs, held_out=held_out, seed=seed)
    for reason, count in users.left_out.items():
        log.info("left out %d %s", count, reason)
    wanted = recipe.pairs_per_summary
    few = sum(len(example.tests) < wanted for example in users.train)
    if few and recipe.train != "generator":
        message = "%d of %d users have fewer than %d pairs; all of their pairs score their summaries"
        log.info(message, few, len(users.train), wanted)
    return users


class _Run:
    """A run: the two models, and everything that its phases share."""

    def __init__(self, recipe: JointRecipe, folder: RunFolder, users: UserSplit, report: Report) -> None:
        self._recipe, self._folder, self._users, self._report = recipe, folder, users, report
        writer, generator = recipe.writer, recipe.generator
        self._models = JointModels(
            Role(writer.model, writer.inference, writer.options),
            Role(generator.model, generator.generation, generator.options),
            shared=recipe.shared,
            max_tokens=writer.max_tokens,
            batch_tokens=recipe.batch_tokens,
            reduction=generator.reduction,
        )
        self._scorer = self._models.scorer
        self._draws = True
        self._contexts = Contexts(generator.context, self._models, max_tokens=writer.max_tokens, seed=recipe.seed)
        self._contexts.check((*users.train, *users.held_out))

    def templates(self) -> dict[str, str]:
        """The template hash of each role, by its name in the configuration of the run."""
        return {f"{role}_templates": value for role, value in self._models.template_hashes().items()}

    def train(self, source: str) -> None:
        """Runs every phase that is not complete, and saves the models."""
        self._reference = Reference.of(
            self._users.pairs(),
            self._scorer,
            fingerprint=fingerprint_weights(self._models.generator.state_dict()),
            file=self._folder.path / REFERENCE,
        )
        phases = phases_of(
            self._recipe.train,
            interleaved=self._recipe.schedule == "interleaved",
            rounds=self._recipe.steps_of_rounds(),
        )
        done = max((place for place, phase in enumerate(phases) if self._weights_file(phase).exists()), default=-1)
        if done >= 0:
            self._models.restore(load_state(self._weights_file(phases[done])))
            self._clean_up(phases[: done + 1])
        for place, phase in enumerate(phases[done + 1 :], start=done + 1):
            self._train_phase(phase)
            save_state(self._weights_file(phase), self._models.weights())
            self._clean_up(phases[: place + 1])
        for role in self._recipe.results():
            if not (self._folder.path / role).exists():
                self._folder.save(role, partial(self._save, role, source))

    def _clean_up(self, done: Sequence[Phase]) -> None:
        """Removes all files of complete phases except the weights of the last one."""
        *earlier, last = (self._weights_file(phase).parent for phase in done)
        for folder in (*earlier, *last.glob("checkpoint-*")):
            if folder.exists():
                shutil.rmtree(folder)
        for file in last.glob(f"{SUMMARIES}-*"):
            file.unlink()

    def _weights_file(self, phase: Phase) -> Path:
        return self._folder.path / PHASES / phase.name / "weights.pt"

    def _save(self, role: str, source: str, folder: str) -> None:
        facts = {"recipe": source, "threads": torch.get_num_threads(), "finished": now()}
        facts["template_hash"] = self._models.template_hashes()[role]
        card = joint_card(self._recipe, role, self._folder.config, self._folder.path / METRICS, facts)
        self._models.save(role, card, folder)

    def _train_phase(self, phase: Phase) -> None:
        folder = self._folder.path / PHASES / phase.name
        checkpoint = last_complete(folder)
        at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self._folder.forget_after(phase.first + at)
        if phase.kind == "generator":
            self._fit(self._generator_trainer(phase, folder), None, checkpoint)
        else:
            with closing(self._rollouts()) as rollouts:
                self._fit(*self._writer_trainer(phase, folder, rollouts), checkpoint)
        # A trainer is part of a reference cycle. Without this, its optimizer and reference model would stay in memory.
        gc.collect()

    def _fit(
        self, trainer: SummaryTrainer | GeneratorTrainer, update: GeneratorUpdate | None, checkpoint: Path | None
    ) -> None:
        if checkpoint is not None and update is not None:
            fix = f"remove {checkpoint} to resume from the checkpoint before it"
            update.restore(load_state(checkpoint / STATE, fix=fix))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _writer_trainer(
        self, phase: Phase, folder: Path, rollouts: Rollouts
    ) -> tuple[SummaryTrainer, GeneratorUpdate | None]:
        recipe, models, users = self._recipe, self._models, self._users.train
        update = self._generator_update(phase) if phase.kind == "both" and not recipe.shared else None
        # If each role has phases of its own, half of the steps so far were the writer's.
        before = phase.first // 2 * recipe.users_per_step
        order = epoch_order(len(users), before + phase.steps * recipe.users_per_step, seed=recipe.seed)[before:]
        prompts = summary_prompts(users, models.summary_format)
        trainer: SummaryTrainer = WriterTrainer(
            models.writer,
            models.writer_tokenizer,
            self._writer_arguments(phase, folder),
            conversations=[prompt.messages for prompt in prompts],
            names=[prompt.user.user_id for prompt in prompts],
            order=order,
            parse=lambda place, reply, cut: models.summary_format.parse(prompts[place], reply, truncated=cut),
            reward=self._reward(phase, update),
            rollouts=rollouts,
            abilities=models.writer_backend.abilities,
            batch_tokens=recipe.batch_tokens,
            first=phase.first,
            callbacks=[
                self._metrics_callback(phase, {}),
                CheckpointCallback(lambda: {} if update is None else update.state()),
            ],
        )
        return trainer, update

    def _rollouts(self) -> Rollouts:
        models, writer = self._models, self._recipe.writer
        if writer.rollouts == "engine":
            abilities = models.writer_backend.abilities
            return EngineRollouts(models.writer, abilities=abilities, batch_tokens=self._recipe.batch_tokens)
        try:
            from popi.training.vllm_rollouts import VLLMRollouts
        except ImportError as error:
            raise MissingExtra("vllm", "vllm") from error
        return VLLMRollouts(models.writer, models.writer_tokenizer, cache_gib=writer.cache_gib)

    def _generator_update(self, phase: Phase) -> GeneratorUpdate:
        return GeneratorUpdate(
            self._models.generator,
            learning_rate=self._recipe.generator.learning_rate,
            steps=phase.steps,
            warmup=self._recipe.warmup,
            max_grad_norm=self._recipe.generator.max_grad_norm,
        )

    def _reward(self, phase: Phase, update: GeneratorUpdate | None) -> PairReward:
        recipe, generator = self._recipe, self._recipe.generator
        return PairReward(
            self._scorer,
            [example.tests for example in self._users.train],
            self._reference,
            loss=generator.loss,
            beta=generator.beta,
            reward_beta=recipe.writer.beta or generator.beta,
            pairs_per_summary=recipe.pairs_per_summary,
            length_penalty=recipe.writer.length_penalty,
            count_tokens=self._models.writer_backend.count_tokens,
            seed=recipe.seed,
            update=update,
            keep_gradient=phase.kind == "both" and recipe.shared,
        )

    def _writer_arguments(self, phase: Phase, folder: Path) -> GRPOConfig:
        writer = self._recipe.writer
        return GRPOConfig(
            **self._arguments(phase, folder),
            per_device_train_batch_size=writer.num_generations * self._recipe.users_per_step,
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

    def _generator_trainer(self, phase: Phase, folder: Path) -> GeneratorTrainer:
        recipe, generator = self._recipe, self._recipe.generator
        # As many pairs as in a joint step, where the generator is trained on one pair under each summary.
        items, spent = self._contexts.training_pairs(
            self._users.train,
            phase.steps * recipe.users_per_step * recipe.writer.num_generations,
            self._reference,
            temperature=recipe.writer.temperature,
            phase=phase.name,
            folder=folder,
        )
        return GeneratorTrainer(
            self._models.generator,
            TrainingArguments(
                **self._arguments(phase, folder),
                per_device_train_batch_size=recipe.users_per_step,
                gradient_accumulation_steps=recipe.writer.num_generations,
                learning_rate=generator.learning_rate,
                max_grad_norm=generator.max_grad_norm,
            ),
            scorer=self._scorer,
            items=items,
            loss=generator.loss,
            beta=generator.beta,
            first=phase.first,
            callbacks=[self._metrics_callback(phase, spent), CheckpointCallback(dict)],
        )

    def _arguments(self, phase: Phase, folder: Path) -> dict[str, Any]:
        """The arguments that the trainers of both roles share."""
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
        }

    def _metrics_callback(self, phase: Phase, before: dict[str, float]) -> MetricsCallback:
        every = self._recipe.evaluate_every
        return MetricsCallback(phase, evaluate=self._evaluate, every=every, log=self._log, before=before)

    def _evaluate(self, step: int) -> HeldOutEval:
        inference = self._contexts.inference()
        held_out = self._users.held_out
        return asyncio.run(evaluate_held_out(inference, self._scorer, held_out, self._reference, step=step))

    def _log(self, metrics: dict[str, Any], found: HeldOutEval | None) -> None:
        if found is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in found.samples)
            write_text(self._folder.path / SAMPLES / f"step-{metrics['step']:06d}.jsonl", lines)
        self._folder.log(metrics)
        self._report(metrics)
        if found is not None and self._draws:
            self._draw()

    def _draw(self) -> None:
        try:
            draw_curves(self._folder.path / METRICS, self._folder.path / CURVES)
        except MissingExtra as error:
            log.info("%s is not drawn: %s", CURVES, error)
            self._draws = False
