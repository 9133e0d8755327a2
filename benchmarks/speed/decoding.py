"""Decoding: concurrent calls against one call, continuous against static batches, and both against transformers.

    python benchmarks/speed/decoding.py [--quick]

All sides run alternately in this process, on the same weights and on requests for summaries of mini-world users. Each
figure is the best of several runs. The script stops if the greedy tokens of the sides of a table differ.

1. 16 concurrent calls of ``chat`` with one request each, against one call with all of them.
2. 64 prompts with limits from 8 to 128 new tokens: a continuous batch against static batches, one after the other.
   Seconds until the first and until the last result, and the share of the prompts that were read before the first
   result.
3. Prompts with one limit, against ``model.generate`` in batches padded on the left, and against the continuous batching
   of transformers (``generate_batch``).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from popi.backends.base import ChatRequest
from popi.backends.transformers import TransformersBackend
from popi.data.miniworld import generate
from popi.engine.cache import layout_of
from popi.engine.chat_tokens import ChatTokens
from popi.engine.decoding import Completion, Draft, decode
from popi.engine.loading import load
from popi.prompts import DEFAULT, Message
from popi.render import render_signals

MODEL, BATCH_TOKENS, LIMITS = "popi-mini-writer", 16384, (8, 128)

Result = TypeVar("Result")


def conversations(chat: ChatTokens, count: int) -> list[list[Message]]:
    """Requests for the summaries of ``count`` users."""
    users = generate(split="train", users=count, seed=0, tests=1)
    texts = [render_signals(user.user.signals, lambda part: len(chat.encode([part])[0])).text for user in users]
    return [DEFAULT.inference_messages(text) for text in texts]


def best(sides: dict[str, Callable[[], Result]], repeats: int) -> dict[str, tuple[float, Result]]:
    """Seconds of the best run of each side, and its result. The sides run alternately."""
    found: dict[str, tuple[float, Result]] = {}
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            result = side()
            seconds = time.perf_counter() - began
            if name not in found or seconds < found[name][0]:
                found[name] = seconds, result
    return found


def concurrent_calls(name: str, repeats: int, calls: int = 16) -> None:
    """Table 1."""
    backend = TransformersBackend(name)
    requests = [ChatRequest(turns, max_tokens=64) for turns in conversations(backend._tokens, calls)]

    async def apart() -> list[str]:
        results = await asyncio.gather(*(backend.chat([request]) for request in requests))
        return [result.text for [result] in results]

    async def together() -> list[str]:
        return [result.text for result in await backend.chat(requests)]

    async def one_by_one() -> list[str]:
        return [(await backend.chat([request]))[0].text for request in requests]

    sides = {side.__name__: lambda side=side: asyncio.run(side()) for side in (together, apart, one_by_one)}
    found = best(sides, repeats)
    assert len({tuple(texts) for _, texts in found.values()}) == 1, "the texts are the same"
    seconds = {side: spent for side, (spent, _) in found.items()}
    print(f"\n{calls} requests, up to 64 new tokens      seconds   ratio to one call")
    for side, label in (("together", "one call"), ("apart", "concurrent calls"), ("one_by_one", "one after the other")):
        print(f"  {label:36s} {seconds[side]:7.2f}   {seconds[side] / seconds['together']:.2f}")


class Clock:
    """Records the times of results, and the share of the prompts that was read before the first one."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._tokens, self._read, self._began = tokens, 0, time.perf_counter()
        self.seconds: list[float] = []
        self.read = 0.0
        self._hook = model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: Any, args: Any, output: Any) -> None:
        self._read += args[0].numel() if args[0].shape[1] > 1 else 0

    def __call__(self, place: int, completion: Completion) -> None:
        """Records a result."""
        self.read = self.read or self._read / self._tokens
        self.seconds.append(time.perf_counter() - self._began)

    def stop(self) -> None:
        """Stops counting the prompts."""
        self._hook.remove()


def continuous(model: Any, drafts: Sequence[Draft], batch_tokens: int) -> tuple[Clock, list[Completion]]:
    """A continuous batch."""
    clock = Clock(model, sum(len(draft.prompt) - 1 for draft in drafts))
    options = {"end_tokens": frozenset[int](), "batch_tokens": batch_tokens, "layout": layout_of(model)}
    completions = decode(model, drafts, on_complete=clock, **options)  # type: ignore[arg-type]
    clock.stop()
    return clock, completions


def static(model: Any, drafts: Sequence[Draft], batch_tokens: int) -> tuple[Clock, list[Completion]]:
    """Batches of prompts of similar length, one after the other; rows that have ended are dropped."""
    clock = Clock(model, sum(len(draft.prompt) - 1 for draft in drafts))
    completions: dict[int, Completion] = {}
    for batch in batches(drafts, batch_tokens):
        rows = [drafts[place] for place in batch]
        for place, completion in zip(batch, static_batch(model, rows, clock), strict=True):
            completions[place] = completion
    clock.stop()
    return clock, [completions[place] for place in range(len(drafts))]


def batches(drafts: Sequence[Draft], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of prompts of similar length that fit with the longest limit among them."""
    batch: list[int] = []
    for place in sorted(range(len(drafts)), key=lambda place: len(drafts[place].prompt)):
        longest = max(drafts[each].limit for each in (*batch, place)) + len(drafts[place].prompt)
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    yield batch


@torch.inference_mode()
def static_batch(model: Any, drafts: Sequence[Draft], clock: Clock) -> list[Completion]:
    """Greedy decoding of one batch, padded on the left."""
    ids, mask = padded([draft.prompt for draft in drafts])
    cache, positions = None, (mask.cumsum(1) - 1).clamp(min=0)
    new: list[list[int]] = [[] for _ in drafts]
    running = list(range(len(drafts)))
    while running:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, chosen = output.past_key_values, output.logits[:, -1].argmax(-1)
        for place, token in zip(running, chosen.tolist(), strict=True):
            new[place].append(token)
            if len(new[place]) == drafts[place].limit:
                clock(place, Completion(new[place], [], "length"))
        kept = [row for row, place in enumerate(running) if len(new[place]) < drafts[place].limit]
        if len(kept) < len(running):
            cache.batch_select_indices(torch.tensor(kept, dtype=torch.long))
        running = [running[row] for row in kept]
        ids, positions = chosen[kept][:, None], positions[kept][:, -1:] + 1
        mask = torch.cat((mask[kept], torch.ones(len(kept), 1, dtype=torch.long)), dim=1)
    return [Completion(tokens, [], "length") for tokens in new]


def padded(prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def scheduling(model: Any, prompts: Sequence[list[int]], repeats: int) -> None:
    """Table 2."""
    low, high = LIMITS
    count = len(prompts)
    # Limits in an order that does not depend on the lengths of the prompts.
    limits = [low + (high - low) * ((place * 37) % count) // (count - 1) for place in range(count)]
    drafts = [Draft(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    mean = sum(map(len, prompts)) / count
    print(f"\n{count} prompts of {mean:.0f} tokens, limits from {low} to {high}")
    print("  batch_tokens                      first, s   last, s   prompts read at the first")
    for batch_tokens in (BATCH_TOKENS, BATCH_TOKENS // 4):
        sides = {side.__name__: partial(side, model, drafts, batch_tokens) for side in (continuous, static)}
        found = best(sides, repeats)
        assert found["continuous"][1][1] == found["static"][1][1], "the tokens are the same"
        for name, (_, (clock, _)) in found.items():
            first, last = clock.seconds[0], clock.seconds[-1]
            print(f"  {batch_tokens:6d}   {name:22s} {first:9.2f} {last:9.2f}   {100 * clock.read:5.0f} %")
        last = {name: clock.seconds[-1] for name, (_, (clock, _)) in found.items()}
        print(f"  static / continuous: {last['static'] / last['continuous']:.2f}")


def against_transformers(model: Any, prompts: Sequence[list[int]], limit: int, repeats: int) -> None:
    """Table 3."""
    drafts, ends = [Draft(prompt, limit) for prompt in prompts], frozenset[int]()
    # An end token that no model has, because the default is that of the model's configuration.
    greedy = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=2**30, pad_token_id=0)
    blocks = ContinuousBatchingConfig(block_size=32, num_blocks=1024, max_batch_tokens=512, use_cuda_graph=False)

    def ours() -> list[list[int]]:
        completions = decode(model, drafts, end_tokens=ends, batch_tokens=BATCH_TOKENS, layout=layout_of(model))
        return [completion.token_ids for completion in completions]

    def generate_in_batches() -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        for batch in batches(drafts, BATCH_TOKENS):
            ids, mask = padded([prompts[place] for place in batch])
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
            tokens |= zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)
        return [tokens[place] for place in range(len(prompts))]

    def generate_batch() -> list[list[int]]:
        outputs = model.generate_batch(
            inputs=list(prompts), generation_config=greedy, continuous_batching_config=blocks, warmup=False
        )
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [list(by_prompt[tuple(prompt)]) for prompt in prompts]

    found = best({side.__name__: side for side in (ours, generate_in_batches, generate_batch)}, repeats)
    for name, (_, tokens) in found.items():
        assert tokens == found["ours"][1], f"{name} has the same tokens"
    print(f"\n{len(prompts)} prompts, {limit} new tokens each      seconds   ratio to ours")
    for name, (seconds, _) in found.items():
        print(f"  {name:36s} {seconds:7.2f}   {seconds / found['ours'][0]:.2f}")


def main() -> None:
    """Prints the three tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=MODEL)
    options.add_argument("--quick", action="store_true", help="fewer prompts, under a minute")
    given = options.parse_args()
    logging.disable(logging.WARNING)
    repeats, count, limit = (1, 24, 32) if given.quick else (3, 64, 64)
    model, tokenizer = load(given.model, "cpu", "float32")
    chat = ChatTokens(tokenizer, given.model)
    prompts = [rendered.tokens for rendered in chat.render(conversations(chat, count))]
    print(f"{given.model}, float32, {torch.get_num_threads()} threads, the best of {repeats}")
    # The first pass of a process is slow.
    decode(model, [Draft(prompts[0], 2)], end_tokens=frozenset(), batch_tokens=BATCH_TOKENS, layout=layout_of(model))
    concurrent_calls(given.model, repeats)
    scheduling(model, prompts, repeats)
    against_transformers(model, prompts[: count // 2], limit, repeats)


if __name__ == "__main__":
    main()
