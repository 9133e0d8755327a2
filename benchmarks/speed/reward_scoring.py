"""The rewards of a GRPO step: our scorer against the procedure as it is usually written.

    python benchmarks/speed/reward_scoring.py

The usual procedure scores every sample by itself: whole sequences in a padded batch, logits of every position, and the
reference's forward passes again for each sample. Ours computes the reference once for each pair, what prompts and
answers have in common in front once, and logits only where an answer's token is predicted. Both run in this process, in
turn, on the same model and batch; equal rewards are asserted. Peak memory is what the process
holds above what it held before. "possible" is the ratio of the tokens that pass through the model.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from usual import differences, laid_out

from popi.backends.causal.chat_tokens import ChatTokens
from popi.backends.causal.loading import load
from popi.data.example import TestPair
from popi.data.miniworld import generate
from popi.training.objective import dpo_loss, rewards
from popi.training.scoring import Judged, PairScorer

MODEL, BETA, PAGE = "popi-mini-base", 0.1, 4096


def main() -> None:
    """Prints a line for each number of samples and length of a response."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default=MODEL)
    arguments.add_argument("--users", type=int, default=8)
    arguments.add_argument("--pairs", type=int, default=4, help="that judge a summary")
    arguments.add_argument("--samples", type=int, nargs="+", default=[4, 8, 16])
    arguments.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512], help="tokens of an answer, about")
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    model, tokenizer = load(given.model, None, "float32")
    tokens = ChatTokens(tokenizer, given.model)
    print(f"{given.model}, {given.users} users, {given.pairs} pairs a summary, {torch.get_num_threads()} threads")
    print("samples  answer tokens   usual s   ours s   ratio  possible   usual MiB   ours MiB   largest difference")
    for samples, length in product(given.samples, given.lengths):
        items, size = batch(tokens, given.users, given.pairs, samples, length)
        usual = measure(lambda items=items: usual_losses(model, tokens, items), given.repeats)
        scorer = PairScorer(model, tokens)
        ours = measure(lambda scorer=scorer, items=items: our_losses(scorer, items), given.repeats)
        possible = tokens_of_usual(tokens, items) / (scorer.tokens / given.repeats)
        earned, alike = (rewards(losses.view(-1, given.pairs)) for losses in (usual.result, ours.result))
        difference = (earned - alike).abs().max().item()
        assert difference < 1e-4, f"the rewards differ by {difference}"
        print(
            f"{samples:7d}  {size:13.1f}  {usual.seconds:8.2f} {ours.seconds:8.2f} {usual.seconds / ours.seconds:7.2f}"
            f"  {possible:8.2f}  {usual.peak:10.0f} {ours.peak:10.0f}   {difference:.1e}",
            flush=True,
        )


def batch(tokens: ChatTokens, users: int, pairs: int, samples: int, length: int) -> tuple[list[Judged], float]:
    """Pairs under summaries, with answers of about this many tokens, and the mean length of these."""
    items = []
    for place, example in enumerate(generate(split="train", users=users, seed=0, tests=pairs)):
        long = [
            TestPair(
                prompt=pair.prompt,
                chosen=stretch(tokens, pair.chosen, length),
                rejected=stretch(tokens, pair.rejected, length),
            )
            for pair in example.tests
        ]
        words = example.oracles["truth"]
        items += [Judged(f"{words}\n- sample {n} of {place}", pair, 0.0) for n in range(samples) for pair in long]
    lengths = [len(ids) for item in items for ids in tokens.encode([item.pair.chosen, item.pair.rejected])]
    return items, sum(lengths) / len(lengths)


def stretch(tokens: ChatTokens, text: str, length: int) -> str:
    """A text repeated until it has about this many tokens."""
    return " ".join([text] * max(1, round(length / len(tokens.encode([text])[0]))))


@torch.no_grad()
def usual_losses(model: Any, tokens: ChatTokens, items: list[Judged]) -> Tensor:
    """The loss of each item: (items,)."""
    return dpo_loss(differences(model, tokens, items) - differences(model, tokens, items, bare=True), BETA)


def tokens_of_usual(tokens: ChatTokens, items: list[Judged]) -> int:
    """How many tokens this reads, padding not counted."""
    return sum(len(p) + len(a) for bare in (False, True) for p, a in laid_out(tokens, items, bare=bare))


@torch.no_grad()
def our_losses(scorer: PairScorer, items: list[Judged]) -> Tensor:
    """The same by the scorer, the reference of each pair included."""
    pairs = list(dict.fromkeys(item.pair for item in items))
    bare = dict(zip(pairs, scorer.margins([Judged(None, pair, 0.0) for pair in pairs]).tolist(), strict=True))
    return dpo_loss(scorer.margins([Judged(item.context, item.pair, bare[item.pair]) for item in items]), BETA)


class Measured:
    """A result with the time and the memory that it took."""

    def __init__(self, result: Tensor, seconds: float, peak: float) -> None:
        self.result, self.seconds, self.peak = result, seconds, peak


def measure(work: Callable[[], Tensor], repeats: int) -> Measured:
    """Runs work some times; the best time and the highest peak, in MiB, count."""
    best = peak = 0.0
    for _ in range(repeats):
        with watched() as held:
            began = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - began
        best = min(best or seconds, seconds)
        peak = max(peak, max(held) - held[0])
    return Measured(result, best, peak / 2**20)


@contextmanager
def watched() -> Iterator[list[int]]:
    """Notes every five milliseconds how many bytes the process holds."""
    held = [resident()]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            held.append(resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join()


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


if __name__ == "__main__":
    main()
