"""An interleaved training step: popi against a plain TRL script of the same procedure.

    python benchmarks/speed/train_step.py

A step samples G summaries for each of U users, scores a pair under each, and computes the gradients of the writer
(GRPO with a KL divergence) and of the generator (DPO). The plain script is an unchanged ``GRPOTrainer`` of TRL: it
samples with ``generate``, and has its own log-probabilities and loss. Its reward scores whole sequences with the
generator and with a reference, and another pass computes the generator's gradient. Ours computes the prompt of a user
once for all of their summaries, in sampling and in the update, and takes rewards and the generator's gradient from the
same pass.

Both sides run in this process, in turn, on the same weights. Both sample exactly S tokens. Scoring and update then get
the same samples, and the gradients are compared: the script stops if the largest difference, relative to the largest
gradient, exceeds rounding. "possible" is the ratio of the writer's tokens: (T + S) G to T + G S.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
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
ROUNDING = 1e-5


class Step:
    """The parts of a step. Each side has its own models.

    Args:
        name: The model of both roles.
        users: Number of users of the step.
        length: Approximate number of tokens of their signals.
        samples: Number of summaries of each user.
        summary: Number of tokens of a summary.
    """

    def __init__(self, name: str, users: int, length: int, samples: int, summary: int) -> None:
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
            rollouts=EngineRollouts(writer, abilities=unending, batch_tokens=BATCH_TOKENS),
            abilities=self.abilities,
            batch_tokens=BATCH_TOKENS,
        )
        for trainer in (self.plain, self.ours):
            trainer.current_gradient_accumulation_steps = 1

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
        scorer = PairScorer(self.generators[1], self.chat, format, abilities=self.abilities, batch_tokens=BATCH_TOKENS)
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

    def update(self, trainer: GRPOTrainer, completions: Sequence[Sequence[int]], advantages: Tensor) -> None:
        """The gradient of the writer from a trainer's own log-probabilities and loss, including the initial writer."""
        width = max(map(len, self.prompts))
        prompt_ids = torch.tensor([[*[0] * (width - len(ids)), *ids] for ids in self.prompts])
        prompt_mask = torch.tensor([[*[0] * (width - len(ids)), *[1] * len(ids)] for ids in self.prompts])
        completion_ids = torch.tensor(completions)
        completion_mask = torch.ones_like(completion_ids)
        with torch.no_grad():
            initial = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                self.summary,
            )[0]
        loss = trainer._compute_loss(
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
        loss.backward()

    def forget(self) -> None:
        """Drops all gradients."""
        for model in (*self.generators, self.plain.model, self.ours.model):
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


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The best time of ``repeats`` runs, in seconds, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def gradient_difference(ours: Any, plain: Any) -> float:
    """The largest difference of two models' gradients, divided by the largest gradient."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True) if b.grad is not None]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def measure(name: str, users: int, length: int, samples: int, summary: int, repeats: int) -> None:
    """Prints a line: seconds of each part on both sides, the ratio, and the difference of the gradients."""
    step = Step(name, users, length, samples, summary)
    plain: list[float] = []
    ours: list[float] = []

    def both(ours_work: Callable[[], Any], plain_work: Callable[[], Any]) -> tuple[Any, Any]:
        results = []
        for work, seconds in ((ours_work, ours), (plain_work, plain)):

            def fresh(work: Callable[[], Any] = work) -> Any:
                step.forget()
                return work()

            spent, result = timed(fresh, repeats)
            seconds.append(spent)
            results.append(result)
        return results[0], results[1]

    completions, others = both(step.our_rollout, step.plain_rollout)
    assert {len(ids) for ids in (*completions, *others)} == {summary}, "both sides sample S tokens"
    rewards, their_rewards = both(lambda: step.our_scoring(completions), lambda: step.plain_scoring(completions))
    torch.testing.assert_close(rewards, their_rewards.float(), atol=1e-4, rtol=1e-5)
    step.forget()
    step.our_scoring(completions), step.plain_scoring(completions)
    generators = gradient_difference(step.generators[1], step.generators[0])
    advantages = (rewards.view(users, samples) - rewards.view(users, samples).mean(dim=1, keepdim=True)).flatten()
    both(
        lambda: step.update(step.ours, completions, advantages),
        lambda: step.update(step.plain, completions, advantages),
    )
    step.forget()
    for trainer in (step.ours, step.plain):
        step.update(trainer, completions, advantages)
    writers = gradient_difference(step.ours.model, step.plain.model)
    assert max(writers, generators) <= ROUNDING, f"the gradients differ by {writers:.0e} and {generators:.0e}"
    mean = sum(map(len, step.prompts)) / len(step.prompts)
    possible = (mean + summary) * samples / (mean + samples * summary)
    parts = "  ".join(f"{p:6.2f} {o:6.2f}" for p, o in zip(plain, ours, strict=True))
    print(
        f"{mean:6.0f} {samples:3d} {summary:4d}   {parts}   {sum(plain):7.2f} {sum(ours):7.2f}"
        f"  {sum(plain) / sum(ours):5.2f}  {possible:8.2f}   {writers:.0e} {generators:.0e}",
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
    given = options.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"{given.model}, {given.users} users a step, {torch.get_num_threads()} threads, the best of {given.repeats}")
    print("seconds, plain and ours       rollout        scoring         update             step")
    print(
        "     T   G    S    plain   ours   plain   ours   plain   ours     plain    ours  ratio  possible   gradients"
    )
    for length, samples, summary in shapes(given):
        measure(given.model, given.users, length, samples, summary, given.repeats)


if __name__ == "__main__":
    main()
