"""The rewards of a GRPO step: our scorer against the usual procedure.

    python benchmarks/speed/reward_scoring.py

The usual procedure scores every sample by itself: whole sequences in a padded batch, logits at every position, and the
reference again for each sample. Ours computes the reference once for each pair, shared prefixes once, and logits only
for the tokens of responses. Both run in this process, in turn, on the same model and batch, and must give equal
rewards. "possible" is the ratio of the numbers of tokens that pass through the model.

Peak memory is measured in a fresh process for each side and shape, because a process keeps memory that it has freed. It
is the maximum resident memory while scoring, minus that just before it, with the model loaded and used on a tiny shape
(Linux).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any, Literal

import torch
from memory import peak_growth, return_freed_memory
from torch import Tensor
from usual import differences, encode, summary_of

from popi.data.example import HeldOutPair
from popi.data.miniworld import generate
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.engine.loading import load
from popi.prompts import DEFAULT
from popi.training.objective import dpo_loss
from popi.training.scoring import NO_REFERENCE, ConditionedPair, PairLogps, PairScorer
from popi_generators.prompted import QuotedSummary

MODEL, BETA = "popi-mini-base", 0.1
TINY = 1, 1, 1, 8
"""Users, pairs, samples and response tokens of the batch that warms up a process."""

Side = Literal["usual", "ours"]


def main() -> None:
    """Prints a line for each number of samples and length of a response."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default=MODEL)
    arguments.add_argument("--users", type=int, default=8)
    arguments.add_argument("--pairs", type=int, default=4, help="number of pairs per summary")
    arguments.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16])
    arguments.add_argument(
        "--lengths", type=int, nargs="+", default=[32, 128, 512], help="approximate number of tokens of a response"
    )
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    model, tokenizer = load(given.model, None, "float32")
    tokens = ChatTokens(tokenizer, given.model)
    print(f"{given.model}, {given.users} users, {given.pairs} pairs a summary, {torch.get_num_threads()} threads")
    print("samples  answer tokens   usual s   ours s   ratio  possible   usual MiB   ours MiB   largest difference")
    for samples, length in product(given.samples, given.lengths):
        items, size = batch(tokens, given.users, given.pairs, samples, length)
        usual = measure(lambda items=items: usual_losses(model, tokens, items), given.repeats)
        scorer = scorer_of(model, tokens)
        ours = measure(lambda scorer=scorer, items=items: our_losses(scorer, items), given.repeats)
        possible = tokens_of_usual(tokens, items) / (scorer.tokens_read / given.repeats)
        earned, alike = (-losses.view(-1, given.pairs).mean(dim=1) for losses in (usual.result, ours.result))
        shape = given.users, given.pairs, samples, length
        usual_peak, our_peak = peak("usual", given.model, shape), peak("ours", given.model, shape)
        difference = (earned - alike).abs().max().item()
        assert difference < 1e-4, f"the rewards differ by {difference}"
        print(
            f"{samples:7d}  {size:13.1f}  {usual.seconds:8.2f} {ours.seconds:8.2f} {usual.seconds / ours.seconds:7.2f}"
            f"  {possible:8.2f}  {usual_peak:10.0f} {our_peak:10.0f}   {difference:.1e}",
            flush=True,
        )


def batch(tokens: ChatTokens, users: int, pairs: int, samples: int, length: int) -> tuple[list[ConditionedPair], float]:
    """Pairs under summaries, with answers of about this many tokens, and the mean length of these."""
    items = []
    for place, example in enumerate(generate(split="train", users=users, seed=0, tests=pairs)):
        long = [
            HeldOutPair(
                prompt=pair.prompt,
                chosen=stretch(tokens, pair.chosen, length),
                rejected=stretch(tokens, pair.rejected, length),
            )
            for pair in example.tests
        ]
        words = example.oracles["truth"]
        items += [
            ConditionedPair(summary_of(f"{words}\n- sample {n} of {place}"), pair, NO_REFERENCE)
            for n in range(samples)
            for pair in long
        ]
    lengths = [len(ids) for item in items for ids in tokens.encode([item.pair.chosen, item.pair.rejected])]
    return items, sum(lengths) / len(lengths)


def stretch(tokens: ChatTokens, text: str, length: int) -> str:
    """Repeats a text until it has about ``length`` tokens."""
    return " ".join([text] * max(1, round(length / len(tokens.encode([text])[0]))))


@torch.no_grad()
def usual_losses(model: Any, tokens: ChatTokens, items: list[ConditionedPair]) -> Tensor:
    """The loss of each item: (items,)."""
    return dpo_loss(differences(model, tokens, items) - differences(model, tokens, items, plain=True), BETA)


def tokens_of_usual(tokens: ChatTokens, items: list[ConditionedPair]) -> int:
    """How many tokens this reads, padding not counted."""
    return sum(len(p) + len(a) for plain in (False, True) for p, a in encode(tokens, items, plain=plain))


@torch.no_grad()
def our_losses(scorer: PairScorer, items: list[ConditionedPair]) -> Tensor:
    """The same by the scorer, the reference of each pair included."""
    pairs = list(dict.fromkeys(item.pair for item in items))
    plain = scorer.ratios([ConditionedPair(None, pair, NO_REFERENCE) for pair in pairs])
    logps = map(PairLogps, plain.chosen_N.tolist(), plain.rejected_N.tolist())
    reference = dict(zip(pairs, logps, strict=True))
    conditioned = [ConditionedPair(item.interface, item.pair, reference[item.pair]) for item in items]
    return dpo_loss(scorer.ratios(conditioned).margins_N, BETA)


def scorer_of(model: Any, tokens: ChatTokens) -> PairScorer:
    """Our scorer with the format of the default generator."""
    format = QuotedSummary(lambda text: len(tokens.encode([text])[0]), limit=4096, prompts=DEFAULT)
    return PairScorer(model, tokens, format, abilities=verify(model, tokens, MODEL))


class Measured:
    """A result and its duration."""

    def __init__(self, result: Tensor, seconds: float) -> None:
        self.result, self.seconds = result, seconds


def measure(work: Callable[[], Tensor], repeats: int) -> Measured:
    """Runs the work ``repeats`` times, and returns the best time."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return Measured(result, best)


def peak(side: Side, name: str, shape: tuple[int, int, int, int]) -> float:
    """Peak memory of scoring a batch, in MiB.

    Args:
        side: The scorer.
        name: The model.
        shape: Users, pairs, samples and answer tokens of the batch.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(growth, side, name, shape).result()


def growth(side: Side, name: str, shape: tuple[int, int, int, int]) -> float:
    """Peak memory of this process while it scores a batch, minus that before, in MiB. Needs a fresh process."""
    return_freed_memory()
    model, tokenizer = load(name, None, "float32")
    tokens = ChatTokens(tokenizer, name)

    def score(items: list[ConditionedPair]) -> Tensor:
        return usual_losses(model, tokens, items) if side == "usual" else our_losses(scorer_of(model, tokens), items)

    score(batch(tokens, *TINY)[0])
    items, _ = batch(tokens, *shape)
    return peak_growth(lambda: score(items))[1]


if __name__ == "__main__":
    main()
