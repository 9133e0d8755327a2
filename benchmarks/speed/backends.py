"""One model in three backends (transformers, a vLLM engine, a vLLM server), and the overhead of popi.

    python benchmarks/speed/backends.py

Each backend gets the same concurrent requests: greedy summaries of the signals of mini-world users, and scores of both
responses of their test pairs under the true summaries. The server receives token ids, like the other backends, and
"tokens/s" counts prompt tokens and new tokens. All backends run on the CPU (with vLLM's build for it), in float32, one
after the other. vLLM has the options that popi uses on a CPU, in the server too.

Each round has its own users, so that no prefix is cached from the round before; a backend may compute a common prefix
of the requests of a round once. The first round is a warm-up. For each backend the best of the other rounds counts.
"same" is the number of texts that equal those of transformers in these rounds, and "difference" the maximum difference
of a score, in nats a token.

Models use the number of threads of torch in this process (``OMP_NUM_THREADS``). With the executor "uni", which popi
chooses, vLLM's worker reads that variable and does not bind its threads to cores: ``VLLM_CPU_OMP_THREADS_BIND`` has no
effect. vLLM has further threads that do not compute, here and in the server's process. Pin the script to the same
number of cores as threads (``taskset``); otherwise they use additional cores.

The last part sends requests for one token to the server by messages, alternately with popi's backend and with the
``openai`` client directly. Each goes first every other time, and both send the same JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from openai import AsyncOpenAI

from popi.backends.base import Backend, ChatRequest, ChatResult, ScoreRequest, ScoreResult
from popi.backends.openai import OpenAIBackend
from popi.backends.transformers import TransformersBackend
from popi.backends.vllm import VLLMBackend
from popi.data.miniworld import generate
from popi.engine.chat_tokens import ChatTokens
from popi.engine.loading import load_tokenizer
from popi.models import find
from popi.prompts import DEFAULT
from popi.render import render_signals
from popi.testing import vllm_server

MODEL, SPLIT, SUMMARY, TESTS, CACHE_GIB, WARM_UP = "popi-mini-base", "unseen-users", 256, 4, 2, 20

Request = TypeVar("Request")
Result = TypeVar("Result", ChatResult, ScoreResult)


@dataclass(frozen=True)
class Round:
    """The requests of a round.

    Attributes:
        chats: A summary of each user.
        scores: Both responses of each pair.
    """

    chats: list[ChatRequest]
    scores: list[ScoreRequest]


@dataclass(frozen=True)
class Measured:
    """Seconds and results of each round of a backend, without the warm-up."""

    chats: list[tuple[float, list[ChatResult]]]
    scores: list[tuple[float, list[ScoreResult]]]


def main() -> None:
    """Prints a line for each backend, and the overhead of popi."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=MODEL)
    options.add_argument("--users", type=int, default=64, help="number of summaries in a round")
    options.add_argument("--pairs", type=int, default=512, help="number of scored pairs in a round")
    options.add_argument(
        "--requests", type=int, default=300, help="number of requests with popi's backend, and without it"
    )
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends too
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    tokens = ChatTokens(load_tokenizer(given.model), given.model)
    rounds = [make_round(tokens, given.users, given.pairs, seed) for seed in range(given.repeats + 1)]
    print(f"{given.model}, {torch.get_num_threads()} threads, the best of {given.repeats}")
    print(f"                  {f'{given.users} summaries':56s}{given.pairs} pairs")
    print(
        f"{'':16s}  {'prompt':>6s}   {'new':>6s}  {'seconds':>7s}  {'tokens/s':>8s}  {'ratio':>5s}  {'same':9s}"
        f"  {'seconds':>7s}  {'pairs/s':>7s}  {'ratio':>5s}  difference"
    )
    first = asyncio.run(measure(TransformersBackend(given.model, device="cpu"), rounds))
    show("transformers", first, first)
    show("vLLM in process", asyncio.run(measure(VLLMBackend(given.model, cache_gib=CACHE_GIB), rounds)), first)
    cache = ["--kv-cache-memory-bytes", str(CACHE_GIB * 2**30)]
    with vllm_server(find(given.model), name=given.model, options=cache) as server:
        known = OpenAIBackend(given.model, base_url=server.url, key=None, tokenizer=given.model)
        show("vLLM served", asyncio.run(measure(known, rounds)), first)
        show_layer(*asyncio.run(layer(given.model, server.url, given.requests)))


def make_round(tokens: ChatTokens, users: int, pairs: int, seed: int) -> Round:
    """Makes the requests of a round."""

    def count(text: str) -> int:
        return len(tokens.encode([text])[0])

    people = list(generate(split=SPLIT, users=max(users, -(-pairs // TESTS)), seed=seed, tests=TESTS))
    read = [DEFAULT.inference_messages(render_signals(example.user.signals, count).text) for example in people[:users]]
    scores = [
        ScoreRequest(DEFAULT.answer_messages(pair.prompt, example.oracles["truth"]), response)
        for example in people
        for pair in example.tests
        for response in (pair.chosen, pair.rejected)
    ]
    return Round([ChatRequest(messages, max_tokens=SUMMARY) for messages in read], scores[: 2 * pairs])


async def measure(backend: Backend, rounds: Sequence[Round]) -> Measured:
    """Runs all rounds on a backend, and closes it."""
    async with backend:
        chats = await timed(backend.chat, [each.chats for each in rounds])
        return Measured(chats, await timed(backend.score, [each.scores for each in rounds]))


async def timed(
    ask: Callable[[Sequence[Request]], Awaitable[list[Result]]], rounds: Sequence[Sequence[Request]]
) -> list[tuple[float, list[Result]]]:
    """Returns seconds and results of each round except the first."""
    done = []
    for requests in rounds:
        began = time.perf_counter()
        results = await ask(requests)
        done.append((time.perf_counter() - began, results))
        assert all(result.error is None for result in results), "a request failed"
    return done[1:]


def show(name: str, side: Measured, first: Measured) -> None:
    """Prints the line of a backend, compared with the first backend."""
    seconds, read, written = fastest(side)
    speed, reference = ((each[1] + each[2]) / each[0] for each in (fastest(side), fastest(first)))
    texts = list(zip(results(side.chats), results(first.chats), strict=True))
    same = sum(mine.text == other.text for mine, other in texts)
    scored, slower = (min(seconds for seconds, _ in each.scores) for each in (side, first))
    pairs = len(side.scores[0][1]) // 2
    both = zip(results(side.scores), results(first.scores), strict=True)
    difference = max(abs(mine.logprob - other.logprob) / other.tokens for mine, other in both)
    print(
        f"{name:16s}  {read:6d}   {written:6d}  {seconds:7.2f}  {speed:8.0f}  {speed / reference:5.2f}"
        f"  {f'{same}/{len(texts)}':9s}  {scored:7.2f}  {pairs / scored:7.1f}  {slower / scored:5.2f}"
        f"  {difference:10.1e}",
        flush=True,
    )


def fastest(side: Measured) -> tuple[float, int, int]:
    """Returns seconds, prompt tokens and completion tokens of the round with the most tokens a second."""
    lines = [
        (seconds, sum(each.prompt_tokens for each in texts), sum(each.completion_tokens for each in texts))
        for seconds, texts in side.chats
    ]
    return max(lines, key=lambda line: (line[1] + line[2]) / line[0])


def results(rounds: Sequence[tuple[float, Sequence[Result]]]) -> list[Result]:
    """Returns the results of all rounds."""
    return [result for _, each in rounds for result in each]


async def layer(model: str, url: str, requests: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each request with popi's backend, and of each with the client only."""
    example = next(iter(generate(split=SPLIT, users=1, seed=0)))
    messages = DEFAULT.answer_messages(example.tests[0].prompt, example.oracles["truth"])
    request = ChatRequest(messages, max_tokens=1)
    written: list[Any] = [{"role": turn.role, "content": turn.content} for turn in messages]
    backend = OpenAIBackend(model, base_url=url, key=None)
    client = AsyncOpenAI(api_key="none", base_url=url, max_retries=0, timeout=120.0)

    async def ours() -> tuple[int, str]:
        [result] = await backend.chat([request])
        return result.completion_tokens, result.text

    async def bare() -> tuple[int, str]:
        answer = await client.chat.completions.create(model=model, messages=written, max_tokens=1, temperature=0.0)
        return answer.usage.completion_tokens if answer.usage else 0, answer.choices[0].message.content or ""

    seconds: dict[Callable[[], Awaitable[tuple[int, str]]], list[float]] = {ours: [], bare: []}
    async with backend, client:
        for turn in range(WARM_UP + requests):
            answers = []
            for ask in (ours, bare) if turn % 2 else (bare, ours):
                began = time.perf_counter()
                answers.append(await ask())
                seconds[ask].append(time.perf_counter() - began)
            assert answers[0] == answers[1] and answers[0][0] == 1, "both responses are the same token"
    return seconds[ours][WARM_UP:], seconds[bare][WARM_UP:]


def show_layer(ours: list[float], bare: list[float]) -> None:
    """Prints milliseconds of a request with popi's backend and without it, and the difference."""
    print(f"\n{len(ours)} requests for a token, ms    ours     bare  more, ms  more, %")
    for name, of in (("median", statistics.median), ("95th of 100", lambda each: statistics.quantiles(each, n=20)[18])):
        mine, theirs = 1000 * of(ours), 1000 * of(bare)
        print(f"{name:29s} {mine:8.2f} {theirs:8.2f}  {mine - theirs:8.2f}  {100 * (mine / theirs - 1):7.1f}")


if __name__ == "__main__":
    main()
