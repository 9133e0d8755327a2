"""An interleaved training step: popi against a plain TRL script of the same procedure.

    python benchmarks/speed/train_step.py
    python benchmarks/speed/train_step.py --shape 135m --users 1 --lengths 1500 --summaries 64 --plain-batch 1

A step samples G summaries for each of U users, scores a pair under each, and computes the gradients of the writer
(GRPO with a KL divergence) and of the generator (DPO). The plain script is an unchanged ``GRPOTrainer`` of TRL: it
samples with ``generate``, and has its own log-probabilities and loss. Its reward scores whole sequences with the
generator and with a reference, and another pass computes the generator's gradient. Ours computes the prompt of a user
once for all of their summaries, in sampling and in the update, and takes rewards and the generator's gradient from the
same pass.

Both sides run in this process, in turn, on the same weights. Both sample exactly S tokens. Scoring and update then get
the same samples, and the gradients are compared: the script stops if the largest difference, relative to the largest
gradient, exceeds rounding. "possible" is the ratio of the writer's tokens: (T + S) G to T + G S.

``--shape`` takes a model with random weights instead: 135m is the shape of SmolLM2-135M. ``--precision mixed`` computes
in bfloat16 under autocast on both sides. Memory is what the process takes in a part beyond the models and their
gradients. If the plain update does not fit into it, ``--plain-batch`` accumulates the gradients of smaller batches.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from memory import peak_growth
from random_model import SHAPES, make_model
from torch import Tensor
from transformers.utils import logging as transformers_logging
from usual import differences, summary_of

from popi.data.example import PersonalizationExample
from popi.data.miniworld import generate
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import Abilities, verify
from popi.engine.loading import load
from popi.prompts import DEFAULT, Message
from popi.render import render_signals
from popi.training.likelihood import computing
from popi.training.objective import dpo_loss
from popi.training.reference import Reference, reference_key
from popi.training.reward import PairReward
from popi.training.rollouts import EngineRollouts
from popi.training.scoring import NO_REFERENCE, ConditionedPair, PairLogps, PairScorer
from popi.training.trl import GRPOConfig, GRPOTrainer
from popi.training.updates import SharedUpdate
from popi.training.writer import WriterTrainer
from popi_generators.prompted import QuotedSummary

MODEL, BETA, KL, BATCH_TOKENS, CONTEXT = "popi-mini-base", 0.1, 2e-3, 8192, 8192
ROUNDING = {"float32": 1e-5, "mixed": 0.1}
"""The largest difference of the gradients, divided by the largest gradient. bfloat16 has eight bits."""


class Step:
    """The parts of a step. Each side has its own models.

    Args:
        name: The model of both roles.
        users: Number of users of the step.
        length: Approximate number of tokens of their signals.
        samples: Number of summaries of each user.
        summary: Number of tokens of a summary.
        autocast: Whether both sides compute in bfloat16.
    """

    def __init__(
        self, name: str, users: int, length: int, samples: int, summary: int, *, autocast: bool = False
    ) -> None:
        self.autocast = autocast
        model, tokenizer = load(name, None, "float32")
        # The positions are rotary, so time can be measured beyond the context that the model was trained for.
        model.config.max_position_embeddings = CONTEXT
        self.chat, self.samples, self.summary = ChatTokens(tokenizer, name), samples, summary
        self.abilities = verify(model, self.chat, name)
        self.people = list(generate(split="train", users=users, seed=0, tests=1))
        conversations = [read(self.chat, example, length) for example in self.people]
        self.prompts = [prompt.tokens for prompt in self.chat.render(conversations) for _ in range(samples)]
        self.generators = model, copy.deepcopy(model)
        self.reference = copy.deepcopy(model)
        options = {
            "num_generations": samples,
            "max_completion_length": summary,
            "beta": KL,
            "loss_type": "grpo",
            "scale_rewards": "none",
            "generation_kwargs": {"min_new_tokens": summary},
        }
        rows = [{"prompt": [{"role": turn.role, "content": turn.content} for turn in c]} for c in conversations]
        self.plain = GRPOTrainer(
            copy.deepcopy(model),
            lambda completions, **_: [0.0] * len(completions),
            arguments(users * samples, options),
            Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        writer = copy.deepcopy(model)
        # No token ends a summary, as none does before S tokens on the other side.
        unending = Abilities(self.abilities.layout, frozenset())
        self.ours = WriterTrainer(
            writer,
            tokenizer,
            arguments(users * samples, options),
            conversations=conversations,
            names=[example.user.user_id for example in self.people],
            order=range(users),
            parse=lambda place, reply, truncated: reply,
            reward=lambda *_: ([], {}),
            rollouts=EngineRollouts(writer, abilities=unending, batch_tokens=BATCH_TOKENS, within=self.within(writer)),
            abilities=self.abilities,
            batch_tokens=BATCH_TOKENS,
            within=self.within(writer),
        )

    def within(self, model: Any) -> Callable[[], AbstractContextManager[None]]:
        """Makes the context that a model of ours computes in."""
        return partial(computing, model, autocast=self.autocast)

    def plainly(self, work: Callable[[], Any]) -> Any:
        """Runs a part of the plain script."""
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
            return work()

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text."""
        return len(self.chat.encode([text])[0])

    def plain_rollout(self) -> list[list[int]]:
        """TRL's sampling."""
        return list(self.plain._generate_single_turn(self.prompts, None, {}, self.samples)[0])

    def our_rollout(self) -> list[list[int]]:
        """Our sampling."""
        completions = self.ours._rollouts.sample(
            self.prompts, seeds=range(len(self.prompts)), max_tokens=self.summary, temperature=1.0, top_p=1.0
        )
        return [completion.token_ids for completion in completions]

    def texts(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """The texts of samples."""
        return [self.chat.decode(ids) for ids in completions]

    def plain_scoring(self, completions: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of each sample with a reference model, then the generator's gradient: (U G,)."""
        items = [
            ConditionedPair(summary_of(text), self.people[place // self.samples].tests[0], NO_REFERENCE)
            for place, text in enumerate(self.texts(completions))
        ]
        generator = self.generators[0]
        with torch.no_grad():
            plain = differences(self.reference, self.chat, items, plain=True)
            rewards = -dpo_loss(differences(generator, self.chat, items) - plain, BETA)
        for start in range(0, len(items), 4):
            part = slice(start, start + 4)
            losses = dpo_loss(differences(generator, self.chat, items[part]) - plain[part], BETA)
            (losses.sum() / len(items)).backward()
        return rewards

    def our_scoring(self, completions: Sequence[Sequence[int]]) -> Tensor:
        """The same in one pass, the reference computed once for each pair."""
        pairs = [example.tests[0] for example in self.people]
        format = QuotedSummary(self.count_tokens, limit=CONTEXT, prompts=DEFAULT)
        scorer = PairScorer(
            self.generators[1],
            self.chat,
            format,
            abilities=self.abilities,
            batch_tokens=BATCH_TOKENS,
            within=self.within(self.generators[1]),
        )
        plain = scorer.ratios([ConditionedPair(None, pair, NO_REFERENCE) for pair in pairs])
        logps = map(PairLogps, plain.chosen_N.tolist(), plain.rejected_N.tolist())
        reward = PairReward(
            scorer,
            [example.tests for example in self.people],
            Reference({reference_key(pair): values for pair, values in zip(pairs, logps, strict=True)}),
            loss="dpo",
            beta=BETA,
            reward_beta=BETA,
            pairs_per_summary=1,
            length_penalty=0.0,
            count_tokens=self.count_tokens,
            seed=0,
            update=SharedUpdate(self.generators[1], lambda: self.generators[1]),
        )
        summaries = [summary_of(text) for text in self.texts(completions)]
        users = [place // self.samples for place in range(len(completions))]
        return torch.tensor(reward(users, summaries, 0)[0])

    def update(
        self, trainer: GRPOTrainer, completions: Sequence[Sequence[int]], advantages: Tensor, batch: int
    ) -> None:
        """The gradient of the writer from a trainer's own log-probabilities and loss, including the initial writer.

        Args:
            trainer: The trainer.
            completions: The samples.
            advantages: The advantage of each.
            batch: Number of samples in a batch, whose gradients are accumulated.
        """
        # A trainer in evaluation divides by nothing, one in training by this number.
        trainer.current_gradient_accumulation_steps = 1
        for start in range(0, len(completions), batch):
            part = slice(start, start + batch)
            loss = self._loss(trainer, self.prompts[part], completions[part], advantages[part])
            (loss * len(completions[part]) / len(completions)).backward()

    def _loss(
        self,
        trainer: GRPOTrainer,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        advantages: Tensor,
    ) -> Tensor:
        width = max(map(len, prompts))
        prompt_ids = torch.tensor([[*[0] * (width - len(ids)), *ids] for ids in prompts])
        prompt_mask = torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in prompts])
        completion_ids = torch.tensor(completions)
        completion_mask = torch.ones_like(completion_ids)
        with torch.no_grad():
            initial = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                self.summary,
            )[0]
        return trainer._compute_loss(
            trainer.model,
            {
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": completion_ids,
                "completion_mask": completion_mask,
                "advantages": advantages,
                "ref_per_token_logps": initial,
                "num_items_in_batch": completion_mask.sum(),
            },
        )

    def forget(self, *, plain: bool) -> None:
        """Drops the gradients of a side."""
        for model in (self.generators[0], self.plain.model) if plain else (self.generators[1], self.ours.model):
            model.zero_grad(set_to_none=True)


def read(chat: ChatTokens, example: PersonalizationExample, length: int) -> list[Message]:
    """The prompt of a writer for a user whose signals have about this many tokens."""
    text = render_signals(example.user.signals, lambda part: len(chat.encode([part])[0])).text
    ids = chat.encode([text])[0]
    return DEFAULT.inference_messages(chat.decode((ids * (length // len(ids) + 1))[:length]))


def arguments(batch: int, options: dict[str, Any]) -> GRPOConfig:
    """TRL's arguments."""
    return GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        **options,
    )


class Part(NamedTuple):
    """What a part of a step took on a side: the best time in seconds, memory in MiB, and its last result."""

    seconds: float
    memory: float
    result: Any


def measured(work: Callable[[], Any], repeats: int, before: Callable[[], None]) -> Part:
    """Runs a part of a step ``repeats`` times, each time after ``before``."""
    best, most, result = float("inf"), 0.0, None

    def timed() -> tuple[Any, float]:
        began = time.perf_counter()
        return work(), time.perf_counter() - began

    for _ in range(repeats):
        before()
        (result, seconds), memory = peak_growth(timed)
        best, most = min(best, seconds), max(most, memory)
    return Part(best, most, result)


def gradient_difference(ours: Any, plain: Any) -> float:
    """The largest difference of two models' gradients, divided by the largest gradient."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True) if b.grad is not None]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def measure(
    name: str,
    users: int,
    length: int,
    samples: int,
    summary: int,
    repeats: int,
    *,
    precision: str = "float32",
    plain_batch: int | None = None,
) -> None:
    """Prints a line: seconds and memory of each part on both sides, the ratio, and the difference of the gradients."""
    step = Step(name, users, length, samples, summary, autocast=precision == "mixed")

    def both(ours: Callable[[], Any], plain: Callable[[], Any]) -> tuple[Part, Part]:
        return (
            measured(partial(step.plainly, plain), repeats, partial(step.forget, plain=True)),
            measured(ours, repeats, partial(step.forget, plain=False)),
        )

    rollout = both(step.our_rollout, step.plain_rollout)
    completions = rollout[1].result
    assert {len(ids) for part in rollout for ids in part.result} == {summary}, "both sides sample S tokens"
    scoring = both(lambda: step.our_scoring(completions), lambda: step.plain_scoring(completions))
    generators = gradient_difference(step.generators[1], step.generators[0])
    rewards = scoring[1].result
    tolerance = ROUNDING[precision]
    torch.testing.assert_close(rewards, scoring[0].result.float(), atol=10 * tolerance, rtol=tolerance)
    advantages = (rewards.view(users, samples) - rewards.view(users, samples).mean(dim=1, keepdim=True)).flatten()
    update = both(
        lambda: step.update(step.ours, completions, advantages, len(completions)),
        lambda: step.update(step.plain, completions, advantages, plain_batch or len(completions)),
    )
    writers = gradient_difference(step.ours.model, step.plain.model)
    assert max(writers, generators) <= tolerance, f"the gradients differ by {writers:.0e} and {generators:.0e}"
    mean = sum(map(len, step.prompts)) / len(step.prompts)
    possible = (mean + summary) * samples / (mean + samples * summary)
    parts = rollout, scoring, update
    plain, ours = (sum(part[side].seconds for part in parts) for side in (0, 1))
    each = "  ".join(f"{p.seconds:6.2f} {o.seconds:6.2f} {p.memory:6.0f} {o.memory:6.0f}" for p, o in parts)
    print(
        f"{mean:6.0f} {samples:3d} {summary:4d}   {each}   {plain:7.2f} {ours:7.2f}"
        f"  {plain / ours:5.2f}  {possible:8.2f}   {writers:.0e} {generators:.0e}",
        flush=True,
    )


def shapes(given: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Prompt length, samples and summary length of each line: the first of each option, then one changed at a time."""
    lengths, samples, summaries = given.lengths, given.samples, given.summaries
    yield lengths[0], samples[0], summaries[0]
    yield from ((length, samples[0], summaries[0]) for length in lengths[1:])
    yield from ((lengths[0], count, summaries[0]) for count in samples[1:])
    yield from ((lengths[0], samples[0], summary) for summary in summaries[1:])


def main() -> None:
    """Prints a line for each shape of a step."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=MODEL)
    options.add_argument("--users", type=int, default=4)
    options.add_argument("--lengths", type=int, nargs="+", default=[700, 200, 2000, 4000], help="T, about")
    options.add_argument("--samples", type=int, nargs="+", default=[8, 4, 16, 32], help="G")
    options.add_argument("--summaries", type=int, nargs="+", default=[32, 16, 128, 512], help="S")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--shape", choices=SHAPES, help="a model with random weights, in place of --model")
    options.add_argument("--precision", choices=ROUNDING, default="float32")
    options.add_argument("--plain-batch", type=int, help="samples in a batch of the plain update [default: all]")
    given = options.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(
        f"{given.shape or given.model}, {given.precision}, {given.users} users a step, {torch.get_num_threads()} "
        f"threads, the best of {given.repeats}"
    )
    columns = "  plain   ours  plain   ours"
    print(f"seconds, and MiB  {'rollout':^29}{'scoring':^29}{'update':^29}step, seconds")
    print(f"     T   G    S {columns}{columns}{columns}     plain    ours  ratio  possible   gradients")
    with tempfile.TemporaryDirectory() as folder:
        if given.shape:
            make_model(given.shape, Path(folder))
        for length, samples, summary in shapes(given):
            measure(
                folder if given.shape else given.model,
                given.users,
                length,
                samples,
                summary,
                given.repeats,
                precision=given.precision,
                plain_batch=given.plain_batch,
            )


if __name__ == "__main__":
    main()
