"""Training a mini model from nothing on the mini world."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from popi.config import PretrainRecipe
from popi.data.miniworld.curriculum import Dilution, Lesson, Task, lesson
from popi.errors import ConfigError
from popi.pretraining.attention import use_float32_attention
from popi.pretraining.card import model_card
from popi.pretraining.lessons import SignalHeads, batches, encode, losses
from popi.pretraining.muon import Muon
from popi.pretraining.probes import probe_following, probe_writing
from popi.pretraining.tokenizer import train_tokenizer
from popi.provenance import now
from popi.run_folder import METRICS, RunFolder, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOKENIZER_LESSONS = 4000
CLIP = 1.0
WEIGHTS = {"response": 1.0, "styles": 0.2, "shows": 0.3, "believes": 0.3}
"""Of the mean loss of a response token and of the three readers, which sum over ten dimensions."""

TOKENIZER = "tokenizer"
PROBE_PAIRS, PROBE_USERS = 24, 96


@dataclass(slots=True)
class Learner:
    """What is trained, with the state that a checkpoint must hold.

    Attributes:
        model: A causal language model of transformers.
        heads: Thrown away at the end.
        optimizers: Muon for the matrices inside the layers, AdamW for the rest.
        step: The number of steps done.
    """

    model: PreTrainedModel
    heads: SignalHeads
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on; lessons depend on the number of the step alone."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Undoes :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def build(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> Learner:
    """Makes a model with random weights and its optimizers.

    Raises:
        ConfigError: If the architecture is none of a causal language model with layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        config = AutoConfig.for_model(
            **architecture,
            vocab_size=len(tokenizer),
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config)
        use_float32_attention(model)
        heads = SignalHeads(config.hidden_size)
        _ = model.base_model.layers
    # What a configuration makes of arguments that do not fit is up to each family.
    except Exception as error:
        raise ConfigError(f"makes no model ({error})", field="architecture", fix="see the family's config") from error
    inside = {id(p) for p in model.base_model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in inside]
    muon = Muon(matrices, weight_decay=0.01)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    return Learner(model, heads, [muon, adam])


def tokenizer_texts(seed: int) -> Iterator[str]:
    """What a tokenizer is trained on: prompts and answers of every task."""
    for place in range(TOKENIZER_LESSONS):
        made = lesson(("write", "raw", "summary", "bare")[place % 4], seed, place, signals=6)
        yield made.messages[-1].content
        yield made.response


def lessons_of(
    counts: Mapping[Task, int], *, signals: tuple[int, int], seed: int, step: int, dilution: Dilution | None = None
) -> list[Lesson]:
    """The lessons of one step; no two steps of a run share a user or an answer.

    Args:
        counts: Lessons of each task.
        signals: The fewest and the most signals of a user.
        seed: Of the run.
        step: Steps of the run before it.
        dilution: How a writer falls short of the evidence.
    """
    rng = np.random.default_rng([seed, step, 7])
    made, place = [], step * 4096
    for task, count in counts.items():
        for _ in range(count):
            shown = int(rng.integers(signals[0], signals[1] + 1))
            made.append(lesson(task, seed, place, signals=shown, dilution=dilution if task == "write" else None))
            place += 1
    return made


def learn(
    learner: Learner,
    tokenizer: PreTrainedTokenizerFast,
    lessons: Sequence[Lesson],
    *,
    lr: float,
    bf16: bool,
    batch_tokens: int,
) -> dict[str, float]:
    """One step: the mean over response tokens, and the readings of answers and signals, weighted and added.

    Returns:
        What was measured on the way: losses in nats, shares.
    """
    encoded = encode(tokenizer, lessons)
    counts = {
        "response": sum(len(item.ids) - item.prompt for item in encoded),
        "styles": sum(len(item.answer_marks) for item in encoded),
        "shows": sum(len(item.marks) for item in encoded),
        "believes": sum(len(item.marks) for item in encoded),
    }
    measured = dict.fromkeys(counts, 0.0)
    right, cells = 0, 0
    for batch in batches(encoded, int(tokenizer.pad_token_id), batch_tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            part = losses(learner.model, learner.heads, batch)
        means = {name: getattr(part, name).sum() / max(1, count) for name, count in counts.items()}
        torch.stack([WEIGHTS[name] * mean for name, mean in means.items()]).sum().backward()
        for name, mean in means.items():
            measured[name] += mean.item()
        right, cells = right + int(part.reading.sum()), cells + len(part.reading)
    norm = nn.utils.clip_grad_norm_((*learner.model.parameters(), *learner.heads.parameters()), CLIP)
    for optimizer in learner.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.step += 1
    tokens = sum(len(item.ids) for item in encoded)
    return {**measured, "reading": right / max(1, cells), "grad_norm": float(norm), "lr": lr, "tokens": tokens}


def run(recipe: PretrainRecipe, out: Path, *, source: str, report: Callable[[dict[str, Any]], None]) -> None:
    """Trains a mini model, or goes on where an earlier run into the same folder was stopped.

    The model at the end of each phase stands in ``out/<phase>``, the last one is the result. A resumed run ends with
    the same weights as an undisturbed one.

    Args:
        recipe: What to do.
        out: The run folder; see :class:`popi.run_folder.RunFolder`.
        source: Where the recipe was read from, for the model card.
        report: Called after each step with what was measured.

    Raises:
        ConfigError: If the recipe describes no model.
        InputError: If the folder holds another run.
        PopiError: If another process works in it, or the disk is full.
    """
    with RunFolder.open(out, recipe) as folder:
        folder.begin({})
        _run(recipe, folder, source, report)


def _run(recipe: PretrainRecipe, folder: RunFolder, source: str, report: Callable[[dict[str, Any]], None]) -> None:
    tokenizer = _tokenizer(recipe, folder)
    learner = build(recipe.architecture, tokenizer, recipe.seed)
    if (state := folder.load_checkpoint()) is not None:
        learner.restore(state)
    begun = learner.step
    bf16 = bf16_is_faster()
    first = 0
    for phase in recipe.phases:
        dilution = Dilution(**phase.dilution.model_dump()) if phase.dilution else None
        for step in range(max(first, learner.step), first + phase.steps):
            began = time.perf_counter()
            share = (step - first) / max(1, phase.steps - 1)
            rate = phase.learning_rate[0] + share * (phase.learning_rate[1] - phase.learning_rate[0])
            lessons = lessons_of(phase.lessons, signals=phase.signals, seed=recipe.seed, step=step, dilution=dilution)
            measured: dict[str, Any] = {"step": learner.step + 1, "phase": phase.name}
            measured |= learn(learner, tokenizer, lessons, lr=rate, bf16=bf16, batch_tokens=recipe.batch_tokens)
            measured["seconds"] = time.perf_counter() - began
            if learner.step % recipe.evaluate_every == 0 or learner.step == first + phase.steps:
                measured |= evaluate(learner, tokenizer, recipe.name)
            folder.log(measured)
            report(measured)
            if learner.step % recipe.checkpoint_every == 0:
                folder.save_checkpoint(learner.state())
        first += phase.steps
        if learner.step == first and (first > begun or not (folder.path / phase.name).exists()):
            facts = {
                "recipe": source,
                "parameters": learner.model.num_parameters(),
                "threads": torch.get_num_threads(),
                "finished": now(),
            }
            card = model_card(recipe, phase.name, folder.config, folder.path / METRICS, facts)
            folder.save(phase.name, partial(save_model, learner.model, tokenizer, card, half=True))
            folder.save_checkpoint(learner.state())


def _tokenizer(recipe: PretrainRecipe, folder: RunFolder) -> PreTrainedTokenizerFast:
    """Trained once a run: which of two equally frequent pairs is merged first depends on the number of threads."""
    from transformers import PreTrainedTokenizerFast

    saved = folder.path / TOKENIZER
    if not saved.exists():
        made = train_tokenizer(tokenizer_texts(recipe.seed), recipe.tokenizer.vocab_size, recipe.tokenizer.kind)
        folder.save(TOKENIZER, made.save_pretrained)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(saved)
    return loaded


def evaluate(learner: Learner, tokenizer: PreTrainedTokenizerFast, name: str) -> dict[str, Any]:
    """Probes the model as it would be used, through its backend."""
    from popi.backends.transformers import TransformersBackend

    async def probe() -> dict[str, Any]:
        backend = TransformersBackend.from_model(learner.model, tokenizer, name=name)
        following = await probe_following(backend, PROBE_PAIRS)
        writing = await probe_writing(backend, PROBE_USERS)
        return {"following": following, "writing": writing}

    learner.model.eval()
    try:
        return asyncio.run(probe())
    finally:
        learner.model.train()


def bf16_is_faster() -> bool:
    """Whether this processor multiplies in bfloat16 natively; where it must emulate, autocast halves the speed."""
    return bool(torch.cpu._is_avx512_bf16_supported())
