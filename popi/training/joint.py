"""Joint training: the schedules in which a writer and a generator learn under one objective."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)

from popi.config import JointRecipe
from popi.engine.loading import quiet
from popi.errors import BackendError, ConfigError, MissingExtra, PopiError
from popi.io import write_text
from popi.models import fingerprint as model_fingerprint
from popi.provenance import fingerprint_weights, now
from popi.run_folder import METRICS, RunFolder, load_state, save_state
from popi.training.card import joint_card
from popi.training.checkpoints import BESIDE, Beside, last_complete
from popi.training.contexts import SUMMARIES, Contexts
from popi.training.curves import draw_curves
from popi.training.generator import GeneratorTrainer, GeneratorUpdate
from popi.training.look import Look, look
from popi.training.pair import Pair
from popi.training.reward import PairReward
from popi.training.schedule import Phase, phases_of
from popi.training.scoring import Reference
from popi.training.trl import GRPOConfig
from popi.training.users import People, conversations, in_turn, make_people, read_people
from popi.training.watch import Watch
from popi.training.writer import WriterTrainer

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
REFERENCE, PHASES, SAMPLES, CURVES = "reference.json", "phases", "samples", "curves.png"
ONE_GPU = "show it one: CUDA_VISIBLE_DEVICES=0 popi train ..."
ONE_PROCESS = "start it without torchrun or accelerate launch: popi train ..."
NO_MEMORY = (
    "out of memory; there may be room with a lower batch_tokens, with a lower writer.samples or writer.max_tokens, as "
    "the summaries of a user are sampled together, or for a smaller model"
)
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "trl", "accelerate")


def run(recipe: JointRecipe, out: Path, *, source: str, report: Report) -> None:
    """Trains what a recipe says, or goes on where an earlier run into the same folder was stopped.

    The folder ends with ``writer`` and ``generator``, the models; see :class:`popi.run_folder.RunFolder` for
    what stands beside. A resumed run ends with the same weights as an undisturbed one.

    Args:
        recipe: What to do.
        out: The run folder.
        source: Where the recipe was read from.
        report: Called after each step with what was measured.

    Raises:
        InputError: If the folder holds another run, or the data or the models cannot be used.
        ConfigError: If several GPUs are visible, or several processes were started.
        PopiError: If another process works in it, the disk or the memory is full, or the loss is no number.
    """
    if torch.cuda.device_count() > 1:
        raise ConfigError(f"{torch.cuda.device_count()} GPUs are visible, and a run uses one", fix=ONE_GPU)
    if (processes := PartialState().num_processes) > 1:
        raise ConfigError(f"{processes} processes were started, and a run is one", fix=ONE_PROCESS)
    with RunFolder.open(out, recipe, libraries=LIBRARIES) as folder, quiet():
        people = _gathered(recipe)
        if recipe.warmup >= (shortest := min(recipe.steps_of_rounds())):
            log.info("learning rates rise for %d steps, and a phase has %d: they have no peak", recipe.warmup, shortest)
        try:
            begun = _Run(recipe, folder, people, report)
            models = {"writer_model": recipe.writer.model, "generator_model": recipe.generator.model}
            files = {role: model_fingerprint(name) for role, name in models.items()}
            folder.begin({"data": people.digest(), **files})
            begun.all(source)
        except (torch.OutOfMemoryError, BackendError) as error:
            # A backend makes one error of all that its model raises.
            if not any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__cause__)):
                raise
            raise PopiError(NO_MEMORY) from error


def _gathered(recipe: JointRecipe) -> People:
    """The users of a run; tells of those that are left out, and of those with fewer pairs than were asked for."""
    data, held_out, seed = recipe.data, recipe.evaluate_users, recipe.seed
    if data.file is not None:
        people = read_people(data.file, users=data.users, held_out=held_out, seed=seed)
    else:
        assert data.users is not None, "a world is told how many users to make"
        people = make_people(data.users, pairs=data.pairs, held_out=held_out, seed=seed)
    for why, count in people.left_out.items():
        log.info("left out %s: %d users", why, count)
    wanted = recipe.pairs_per_summary
    few = sum(len(example.tests) < wanted for example in people.train)
    if few and recipe.train != "generator":
        told = "%d of %d users have fewer than %d pairs, and all of theirs judge their summaries"
        log.info(told, few, len(people.train), wanted)
    return people


class _Run:
    """A run in progress: the two models, and what all phases share."""

    def __init__(self, recipe: JointRecipe, folder: RunFolder, people: People, report: Report) -> None:
        self._recipe, self._folder, self._people, self._report = recipe, folder, people, report
        self._pair = Pair(
            recipe.writer.model,
            recipe.generator.model,
            shared=recipe.shared,
            batch_tokens=recipe.batch_tokens,
            over=recipe.generator.over,
        )
        self._scorer = self._pair.scorer
        self._draws = True
        self._contexts = Contexts(
            recipe.generator.context, self._pair, max_tokens=recipe.writer.max_tokens, seed=recipe.seed
        )
        self._contexts.check((*people.train, *people.held_out))

    def all(self, source: str) -> None:
        """Every phase that is not done, and the models in the end."""
        self._reference = Reference.of(
            self._people.pairs(),
            self._scorer,
            fingerprint=fingerprint_weights(self._pair.generator.state_dict()),
            file=self._folder.path / REFERENCE,
        )
        phases = phases_of(
            self._recipe.train,
            interleaved=self._recipe.schedule == "interleaved",
            rounds=self._recipe.steps_of_rounds(),
        )
        done = max((place for place, phase in enumerate(phases) if self._weights_of(phase).exists()), default=-1)
        if done >= 0:
            self._pair.restore(load_state(self._weights_of(phases[done])))
            self._forget_before(phases[: done + 1])
        for place, phase in enumerate(phases[done + 1 :], start=done + 1):
            self._train(phase)
            save_state(self._weights_of(phase), self._pair.weights())
            self._forget_before(phases[: place + 1])
        for role in self._recipe.results():
            if not (self._folder.path / role).exists():
                self._folder.save(role, partial(self._save, role, source))

    def _forget_before(self, done: Sequence[Phase]) -> None:
        """Removes all of the finished phases but the weights of the last."""
        *earlier, last = (self._weights_of(phase).parent for phase in done)
        for left in (*earlier, *last.glob("checkpoint-*")):
            if left.exists():
                shutil.rmtree(left)
        for left in last.glob(f"{SUMMARIES}-*"):
            left.unlink()

    def _weights_of(self, phase: Phase) -> Path:
        return self._folder.path / PHASES / phase.name / "weights.pt"

    def _save(self, role: str, source: str, folder: str) -> None:
        facts = {"recipe": source, "threads": torch.get_num_threads(), "finished": now()}
        card = joint_card(self._recipe, role, self._folder.config, self._folder.path / METRICS, facts)
        self._pair.save(role, card, folder)

    def _train(self, phase: Phase) -> None:
        folder = self._folder.path / PHASES / phase.name
        checkpoint = last_complete(folder)
        at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self._folder.forget_after(phase.first + at)
        make = self._generator_trainer if phase.kind == "generator" else self._writer_trainer
        trainer, update = make(phase, folder)
        if checkpoint is not None and update is not None:
            update.restore(load_state(checkpoint / BESIDE, fix=f"remove {checkpoint} to go on from the one before it"))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        # A trainer refers to itself: without this the next phase would begin beside its optimizer and its reference.
        del trainer, update
        gc.collect()

    def _writer_trainer(self, phase: Phase, folder: Path) -> tuple[WriterTrainer, GeneratorUpdate | None]:
        recipe, users = self._recipe, self._people.train
        update = self._update(phase) if phase.kind == "both" and not recipe.shared else None
        # Where each role has phases of its own, the writer has had half of the steps before.
        before = phase.first // 2 * recipe.users_per_step
        order = in_turn(len(users), before + phase.steps * recipe.users_per_step, seed=recipe.seed)[before:]
        trainer = WriterTrainer(
            self._pair.writer,
            self._pair.writer_tokenizer,
            self._writer_arguments(phase, folder),
            conversations=conversations(users, self._pair.writer_backend, recipe.writer.max_tokens),
            order=order,
            names=[example.user.user_id for example in users],
            earn=self._reward(phase, update),
            batch_tokens=recipe.batch_tokens,
            first=phase.first,
            callbacks=[self._watch(phase, {}), Beside(lambda: {} if update is None else update.state())],
        )
        return trainer, update

    def _update(self, phase: Phase) -> GeneratorUpdate:
        return GeneratorUpdate(
            self._pair.generator,
            learning_rate=self._recipe.generator.learning_rate,
            steps=phase.steps,
            warmup=self._recipe.warmup,
            clip=self._recipe.generator.clip,
        )

    def _reward(self, phase: Phase, update: GeneratorUpdate | None) -> PairReward:
        recipe, generator = self._recipe, self._recipe.generator
        return PairReward(
            self._scorer,
            [example.tests for example in self._people.train],
            self._reference,
            loss=generator.loss,
            beta=generator.beta,
            reward_beta=recipe.writer.beta or generator.beta,
            pairs_per_summary=recipe.pairs_per_summary,
            token_price=recipe.writer.token_price,
            seed=recipe.seed,
            update=update,
            keep_gradient=phase.kind == "both" and recipe.shared,
        )

    def _writer_arguments(self, phase: Phase, folder: Path) -> GRPOConfig:
        writer = self._recipe.writer
        return GRPOConfig(
            **self._arguments(phase, folder),
            per_device_train_batch_size=writer.samples * self._recipe.users_per_step,
            learning_rate=writer.learning_rate,
            max_grad_norm=writer.clip,
            num_generations=writer.samples,
            max_completion_length=writer.max_tokens,
            temperature=writer.temperature,
            beta=writer.kl,
            shuffle_dataset=False,
            loss_type="grpo" if writer.over == "mean" else "dr_grpo",
            scale_rewards="group" if writer.scale_by_std else "none",
        )

    def _generator_trainer(self, phase: Phase, folder: Path) -> tuple[GeneratorTrainer, None]:
        recipe, generator = self._recipe, self._recipe.generator
        # As many as beside the writer, which learns from a pair under each of its summaries.
        items, spent = self._contexts.lessons(
            self._people.train,
            phase.steps * recipe.users_per_step * recipe.writer.samples,
            self._reference,
            temperature=recipe.writer.temperature,
            phase=phase.name,
            folder=folder,
        )
        trainer = GeneratorTrainer(
            self._pair.generator,
            TrainingArguments(
                **self._arguments(phase, folder),
                per_device_train_batch_size=recipe.users_per_step,
                gradient_accumulation_steps=recipe.writer.samples,
                learning_rate=generator.learning_rate,
                max_grad_norm=generator.clip,
            ),
            scorer=self._scorer,
            items=items,
            loss=generator.loss,
            beta=generator.beta,
            first=phase.first,
            callbacks=[self._watch(phase, spent), Beside(dict)],
        )
        return trainer, None

    def _arguments(self, phase: Phase, folder: Path) -> dict[str, Any]:
        """What the trainers of both roles are told alike."""
        on_cpu = self._pair.writer.device.type == "cpu"
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
            "use_cpu": on_cpu,
            # The models are computed with by our own code, which knows its precision; accelerate's would cling to them.
            "bf16": False,
            "gradient_checkpointing": False,
        }

    def _watch(self, phase: Phase, before: dict[str, float]) -> Watch:
        return Watch(phase, look=self._look, every=self._recipe.evaluate_every, log=self._log, before=before)

    def _look(self, step: int) -> Look:
        inference = self._contexts.inference()
        return asyncio.run(look(inference, self._scorer, self._people.held_out, self._reference, step=step))

    def _log(self, measured: dict[str, Any], seen: Look | None) -> None:
        if seen is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in seen.samples)
            write_text(self._folder.path / SAMPLES / f"step-{measured['step']:06d}.jsonl", lines)
        self._folder.log(measured)
        self._report(measured)
        if seen is not None:
            self._draw()

    def _draw(self) -> None:
        if self._draws:
            try:
                draw_curves(self._folder.path / METRICS, self._folder.path / CURVES)
            except MissingExtra as error:
                log.info("no %s: %s", CURVES, error)
                self._draws = False
