"""Joint training: runs the schedules in which a writer and a generator are trained under one objective."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from popi.assembly import fingerprint_model
from popi.config import JointRecipe
from popi.config.joint import Lora
from popi.engine.quiet import quiet, silence_deepspeed
from popi.errors import BackendError, ConfigError, InputError, MissingExtra, PopiError
from popi.io import write_text
from popi.provenance import now
from popi.run_folder import METRICS, RunFolder, load_state, save_state
from popi.training import engines, launcher
from popi.training.card import joint_card
from popi.training.checkpoints import last_complete
from popi.training.contexts import SUMMARIES, Contexts
from popi.training.curves import draw_curves
from popi.training.held_out import HeldOutEval, evaluate_held_out
from popi.training.metrics import MetricsCallback
from popi.training.models import JointModels, LoraOptions, Role
from popi.training.precision import resolve
from popi.training.ranks import Ranks
from popi.training.reference import Reference
from popi.training.samplers import make_rollouts
from popi.training.schedule import Phase, phases_of
from popi.training.trainers import PhaseTraining, Trainers, order_of, precision_of
from popi.training.users import UserSplit, generate_users, read_users

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
REFERENCE, PHASES, SAMPLES, CURVES = "reference.json", "phases", "samples", "curves.png"
OUT_OF_MEMORY = (
    "out of memory; lower batch_tokens, writer.num_generations or writer.max_tokens (the summaries of a user are "
    "sampled together), or use a smaller model"
)
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "trl", "accelerate", "peft", "deepspeed")


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
        ConfigError: If the recipe does not fit the number of processes or GPUs.
        PopiError: If another process uses the folder, the disk or the memory is full, or a loss is not finite.
    """
    silence_deepspeed()
    ranks = engines.start(recipe.engine.kind)
    with launcher.reporting_once(ranks):
        _run(recipe, out, source, report, ranks)


def _run(recipe: JointRecipe, out: Path, source: str, report: Report, ranks: Ranks) -> None:
    _check_ranks(recipe, ranks)
    with ExitStack() as stack:
        folder = ranks.on_first(lambda: stack.enter_context(RunFolder.open(out, recipe, libraries=LIBRARIES)))
        stack.enter_context(quiet())
        users = _users(recipe)
        if recipe.warmup >= (shortest := min(recipe.steps_of_rounds())):
            log.info("warmup (%d steps) is not shorter than a phase (%d steps)", recipe.warmup, shortest)
        try:
            joint = stack.enter_context(closing(_Run(recipe, out, folder, users, report, ranks)))
            joint.begin()
            joint.train(source)
        except (torch.OutOfMemoryError, BackendError) as error:
            # A backend raises one type of error for whatever its model raises.
            if not any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__cause__)):
                raise
            raise PopiError(OUT_OF_MEMORY) from error


def _check_ranks(recipe: JointRecipe, ranks: Ranks) -> None:
    if recipe.users_per_step % ranks.count:
        raise ConfigError(
            f"{recipe.users_per_step} users cannot be divided among {ranks.count} ranks",
            field="users_per_step",
            fix="use a multiple of the number of ranks",
        )


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


def _lora(lora: Lora | None) -> LoraOptions | None:
    return None if lora is None else LoraOptions(lora.rank, lora.alpha, lora.targets)


class _Run:
    """A run: the two models, and everything that its phases share."""

    def __init__(
        self,
        recipe: JointRecipe,
        path: Path,
        folder: RunFolder | None,
        users: UserSplit,
        report: Report,
        ranks: Ranks,
    ) -> None:
        self._recipe, self._path, self._folder, self._users = recipe, path, folder, users
        self._report, self._ranks = report, ranks
        self._draws = True
        self._training: PhaseTraining | None = None
        self._load()
        self._contexts.check((*users.train, *users.held_out))

    def _load(self) -> None:
        recipe, writer, generator = self._recipe, self._recipe.writer, self._recipe.generator
        self._models = JointModels(
            Role(writer.model, writer.inference, writer.options, _lora(writer.lora), recipe.train != "generator"),
            Role(
                generator.model,
                generator.generation,
                generator.options,
                _lora(generator.lora),
                recipe.train != "writer",
            ),
            shared=recipe.shared,
            max_tokens=writer.max_tokens,
            batch_tokens=recipe.batch_tokens,
            reduction=generator.reduction,
            seed=recipe.seed,
            one_base=self._stage == 0,
            precision=precision_of(recipe),
            recompute=recipe.gradient_checkpointing,
            ranks=self._ranks,
        )
        self._scorer = self._models.scorer
        self._contexts = Contexts(
            generator.context, self._models, max_tokens=writer.max_tokens, seed=recipe.seed, ranks=self._ranks
        )

    def close(self) -> None:
        """Closes the models."""
        self._models.close()

    def begin(self) -> None:
        """Writes the configuration of the run, or compares it with that of the interrupted run."""
        names = {"writer_model": self._recipe.writer.model, "generator_model": self._recipe.generator.model}
        files = {role: fingerprint_model(name) for role, name in names.items()}
        templates = {f"{role}_templates": value for role, value in self._models.template_hashes().items()}
        facts = {"data": self._users.digest(), "precision": resolve(self._recipe.precision), **files, **templates}
        self._write(lambda folder: folder.begin({**facts, "ranks": self._ranks_of(folder)}))

    def _ranks_of(self, folder: RunFolder) -> int:
        """The number of ranks that the run was started with."""
        count = self._ranks.count
        started: int = folder.config.get("ranks", count)
        if started == count:
            return count
        if self._stage:
            raise InputError(
                f"was started with {started} ranks, and {self._recipe.engine.kind} cannot resume it with {count}",
                file=folder.path,
                fix=f"start {started} ranks, or choose another folder",
            )
        log.info("resuming a run of %d ranks with %d", started, count)
        return started

    @property
    def _stage(self) -> int:
        return engines.stage_of(self._recipe.engine.kind)

    def _write(self, write: Callable[[RunFolder], object]) -> None:
        """Writes to the run folder on the first rank, while the others wait."""
        folder = self._folder
        self._ranks.on_first(lambda: folder is not None and write(folder))

    def train(self, source: str) -> None:
        """Runs every phase that is not complete, and saves the models."""
        phases = phases_of(
            self._recipe.train,
            interleaved=self._recipe.schedule == "interleaved",
            rounds=self._recipe.steps_of_rounds(),
        )
        self._reference = Reference.of(
            self._users.pairs({place for phase in phases for place in self._order(phase)}),
            self._scorer,
            fingerprint=self._models.fingerprint(),
            file=self._path / REFERENCE,
            ranks=self._ranks,
        )
        files = [self._weights_file(phase) for phase in phases]
        done = self._ranks.from_first(lambda: max((n for n, file in enumerate(files) if file.exists()), default=-1))
        if done >= 0:
            self._models.restore(load_state(files[done]))
            self._write(lambda _: self._clean_up(phases[: done + 1]))
        for place, phase in enumerate(phases[done + 1 :], start=done + 1):
            self._train_phase(phase)
            self._finish_phase(phases[: place + 1])
        for role in self._recipe.results():
            self._write(partial(self._save_role, role, source))

    def _order(self, phase: Phase) -> list[int]:
        return order_of(self._recipe, phase, len(self._users.train))

    def _finish_phase(self, done: Sequence[Phase]) -> None:
        """Writes the weights of the last phase, and removes all other files of complete phases."""
        file = self._weights_file(done[-1])
        with engines.whole(*self._wrappers()):
            self._write(lambda _: save_state(file, self._models.weights()))
        self._write(lambda _: self._clean_up(done))
        # A trainer is part of a reference cycle. Without this, its optimizer and reference model would stay in memory.
        self._training = None
        gc.collect()
        if self._stage:
            # An engine leaves its hooks and its parts of the weights in a model.
            engines.forget_trainer()
            self._models.close()
            self._load()
            self._models.restore(load_state(file))

    def _clean_up(self, done: Sequence[Phase]) -> None:
        """Removes all files of complete phases except the weights of the last one."""
        *earlier, last = (self._weights_file(phase).parent for phase in done)
        for folder in (*earlier, *last.glob("checkpoint-*")):
            if folder.exists():
                shutil.rmtree(folder)
        for file in last.glob(f"{SUMMARIES}-*"):
            file.unlink()

    def _weights_file(self, phase: Phase) -> Path:
        return self._path / PHASES / phase.name / "weights.pt"

    def _save_role(self, role: str, source: str, folder: RunFolder) -> None:
        if (folder.path / role).exists():
            return
        facts = {"recipe": source, "threads": torch.get_num_threads(), "finished": now()}
        facts["template_hash"] = self._models.template_hashes()[role]
        card = joint_card(self._recipe, role, folder.config, folder.path / METRICS, facts)
        folder.save(role, partial(self._models.save, role, card))

    def _train_phase(self, phase: Phase) -> None:
        folder = self._path / PHASES / phase.name
        checkpoint = self._ranks.from_first(lambda: last_complete(folder))
        if checkpoint:
            log.info("resuming from %s", checkpoint)
        at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self._write(lambda run: run.forget_after(phase.first + at))
        trainers = Trainers(self._recipe, self._models, self._contexts, self._users, self._reference, self._ranks)
        metrics = partial(self._metrics_callback, phase)
        with ExitStack() as stack:
            if phase.kind == "generator":
                self._training = trainers.generator(phase, folder, metrics)
            else:
                sampler = make_rollouts(self._recipe, self._models, self._path, self._ranks)
                rollouts = stack.enter_context(closing(sampler))
                self._training = trainers.writer(phase, folder, rollouts, metrics)
            self._training.fit(checkpoint, deepspeed=self._stage > 0)

    def _wrappers(self) -> list[nn.Module]:
        return [] if self._training is None else self._training.wrappers()

    def _metrics_callback(self, phase: Phase, before: Mapping[str, float]) -> MetricsCallback:
        every = self._recipe.evaluate_every
        return MetricsCallback(phase, evaluate=self._evaluate, every=every, log=self._log, before=before)

    def _evaluate(self, step: int) -> HeldOutEval:
        inference = self._contexts.inference()
        held_out = self._users.held_out
        with engines.whole(*self._wrappers()):
            self._compare_ranks(step)
            return evaluate_held_out(inference, self._scorer, held_out, self._reference, step=step, ranks=self._ranks)

    def _compare_ranks(self, step: int) -> None:
        """Ranks whose weights differ report losses that look right, so their weights are compared."""
        weights = [value for role in self._models.roles for value in self._models.trained(role).values()]
        own = [float(value.detach().sum()) for value in weights]
        if len(set(map(tuple, self._ranks.gather([own])))) > 1:
            raise PopiError(f"the ranks have different weights after {step} steps; resume from the last checkpoint")

    def _log(self, metrics: dict[str, Any], found: HeldOutEval | None) -> None:
        if self._folder is None:
            return
        if found is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in found.samples)
            write_text(self._path / SAMPLES / f"step-{metrics['step']:06d}.jsonl", lines)
        self._folder.log(metrics)
        self._report(metrics)
        if found is not None and self._draws:
            self._draw()

    def _draw(self) -> None:
        try:
            draw_curves(self._path / METRICS, self._path / CURVES)
        except MissingExtra as error:
            log.info("%s is not drawn: %s", CURVES, error)
            self._draws = False
