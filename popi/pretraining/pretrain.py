"""Runs a recipe that trains a mini model from scratch on the mini world."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from popi.config import Phase, PretrainRecipe
from popi.config.pretrain import MAX_LESSONS
from popi.data.miniworld.curriculum import Dilution, Lesson, Task, lesson
from popi.engine.loading import has_bfloat16
from popi.engine.quiet import silence_deepspeed
from popi.errors import InputError
from popi.pretraining.card import model_card
from popi.pretraining.learner import Learner, build, learn
from popi.pretraining.probes import probe_following, probe_writing
from popi.pretraining.tokenizer import train_tokenizer
from popi.prompts import DEFAULT
from popi.provenance import now
from popi.run_folder import CHECKPOINT, METRICS, RunFolder, save_model
from popi.trained import TrainingRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER = "tokenizer"
TOKENIZER_LESSONS = 4000
PROBE_PAIRS, PROBE_USERS = 24, 96


def run(recipe: PretrainRecipe, out: Path, *, source: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains a mini model, or resumes a run that was stopped.

    The model at the end of each phase is saved in ``out/<phase>``; the last one is the result. A resumed run ends with
    the same weights as an uninterrupted one.

    Args:
        recipe: The recipe.
        out: The run folder; see :class:`popi.run_folder.RunFolder`.
        source: Path of the recipe, for the model card.
        report: Called after each step with its metrics.

    Raises:
        ConfigError: If no model can be made from the architecture.
        InputError: If the folder contains another run, or one of its files is damaged.
        PopiError: If another process uses the folder, the disk is full, or the training diverged.
    """
    silence_deepspeed()
    with RunFolder.open(out, recipe) as folder:
        folder.begin({"template_hash": DEFAULT.hash})
        _run(recipe, folder, source, report)


def _run(recipe: PretrainRecipe, folder: RunFolder, source: str, report: Callable[[dict[str, Any]], None]) -> None:
    tokenizer = _tokenizer(recipe, folder)
    learner = build(recipe.architecture, tokenizer, recipe.seed)
    _restore(learner, folder)
    resumed_at, bf16, first = learner.step, has_bfloat16(torch.device("cpu")), 0
    for phase in recipe.phases:
        end = first + phase.steps
        for step in range(max(first, learner.step), end):
            began = time.perf_counter()
            lessons = lessons_of(
                phase.lessons, signals=phase.signals, seed=recipe.seed, step=step, dilution=_dilution(phase)
            )
            metrics: dict[str, Any] = {"step": step + 1, "phase": phase.name}
            metrics |= learn(
                learner,
                tokenizer,
                lessons,
                lr=_learning_rate(phase, step - first),
                bf16=bf16,
                batch_tokens=recipe.batch_tokens,
            )
            metrics["seconds"] = time.perf_counter() - began
            if learner.step % recipe.evaluate_every == 0 or learner.step == end:
                metrics |= evaluate(learner, tokenizer, recipe.name)
            folder.log(metrics)
            report(metrics)
            if learner.step % recipe.checkpoint_every == 0:
                folder.save_checkpoint(learner.state())
        first = end
        if learner.step == end and (end > resumed_at or not (folder.path / phase.name).exists()):
            _save(learner, tokenizer, recipe, phase, folder, source)


def _restore(learner: Learner, folder: RunFolder) -> None:
    if (state := folder.load_checkpoint()) is None:
        return
    try:
        learner.restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "is not a checkpoint of this model", file=folder.path / CHECKPOINT, fix="remove the file to start again"
        ) from error


def _learning_rate(phase: Phase, step: int) -> float:
    """The learning rate of a step of a phase, linear between the first and the last step."""
    first, last = phase.learning_rate
    return first + step / max(1, phase.steps - 1) * (last - first)


def _dilution(phase: Phase) -> Dilution | None:
    return Dilution(**phase.dilution.model_dump()) if phase.dilution else None


def _save(
    learner: Learner,
    tokenizer: PreTrainedTokenizerFast,
    recipe: PretrainRecipe,
    phase: Phase,
    folder: RunFolder,
    source: str,
) -> None:
    """Saves the model at the end of a phase, in bfloat16: mini models ship with the package."""
    facts = {
        "recipe": source,
        "parameters": learner.model.num_parameters(),
        "threads": torch.get_num_threads(),
        "finished": now(),
    }
    card = model_card(recipe, phase.name, folder.config, folder.path / METRICS, facts)

    def write(path: str) -> None:
        save_model(learner.model, tokenizer, card, path, half=True)
        TrainingRecord(None, DEFAULT.hash).write(Path(path))

    folder.save(phase.name, write)
    folder.save_checkpoint(learner.state())


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Texts to train a tokenizer on: prompts and responses of every task."""
    for place in range(TOKENIZER_LESSONS):
        item = lesson(("write", "raw", "summary", "bare")[place % 4], seed, place, signals=6)
        yield item.messages[-1].content
        yield item.response


def lessons_of(
    counts: Mapping[Task, int], *, signals: tuple[int, int], seed: int, step: int, dilution: Dilution | None = None
) -> list[Lesson]:
    """The lessons of one step. No two steps of a run share a user or a response.

    Args:
        counts: Number of lessons of each task.
        signals: Minimum and maximum number of signals of a user.
        seed: Seed of the run.
        step: Number of earlier steps of the run.
        dilution: Errors in the summaries that the model learns to write; ``None`` for none.
    """
    rng = np.random.default_rng([seed, step, 7])
    tasks = [task for task, count in counts.items() for _ in range(count)]
    return [
        lesson(
            task,
            seed,
            place,
            signals=int(rng.integers(signals[0], signals[1] + 1)),
            dilution=dilution if task == "write" else None,
        )
        for place, task in enumerate(tasks, start=step * MAX_LESSONS)
    ]


def _tokenizer(recipe: PretrainRecipe, folder: RunFolder) -> PreTrainedTokenizerFast:
    """Trains the tokenizer once per run, because its merges also depend on the number of threads.

    Raises:
        InputError: If the saved tokenizer is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    saved = folder.path / TOKENIZER
    if not saved.exists():
        trained = train_tokenizer(tokenizer_texts(recipe.seed), recipe.tokenizer.vocab_size, recipe.tokenizer.kind)
        folder.save(TOKENIZER, trained.save_pretrained)
    try:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(saved)
    # The tokenizers library raises bare exceptions.
    except Exception as error:
        raise InputError(
            f"is damaged ({error})", file=saved, fix="restore it, or remove the run folder to start again"
        ) from error
    return loaded


def evaluate(learner: Learner, tokenizer: PreTrainedTokenizerFast, name: str) -> dict[str, Any]:
    """Measures the model on held-out users, through the backend that serves it.

    Returns:
        ``following`` and ``writing``; see :mod:`popi.pretraining.probes`.
    """
    from popi.backends.transformers import TransformersBackend

    async def probe() -> dict[str, Any]:
        async with TransformersBackend.from_model(learner.model, tokenizer, name=name) as backend:
            following = await probe_following(backend, PROBE_PAIRS)
            writing = await probe_writing(backend, PROBE_USERS)
        return {"following": following, "writing": writing}

    learner.model.eval()
    try:
        return asyncio.run(probe())
    finally:
        learner.model.train()
