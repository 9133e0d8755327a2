"""Packed against usual weights on a CPU: tokens per second of reading prompts and of writing.

    python benchmarks/speed/packed.py --model smollm2-135m-instruct --dtype bfloat16 --rows 1 16 --length 300

The same model is loaded twice, and one copy is packed, as the transformers backend does. Both continue the same random
prompts greedily, alternately, and the best run of each counts. Reading is the time until the first token; writing is
the time for the others. The script stops if the tokens differ.

The limit of memory is what a step cannot be faster than: the bytes of all weights that it multiplies with and of the
keys and values that it reads, divided by the rate at which one sum over a large tensor reads memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from popi.engine.cache import layout_of
from popi.engine.decoding import Draft, decode
from popi.engine.loading import load
from popi.engine.packed import pack

GIB = 2**30


def main() -> None:
    """Prints a line for each number of rows."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="popi-mini-writer")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="numbers of prompts in a batch")
    options.add_argument("--length", type=int, default=300, help="number of tokens of a prompt")
    options.add_argument("--new", type=int, default=32, help="number of new tokens of each prompt, at least 2")
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    usual, packed = (load(given.model, "cpu", given.dtype)[0] for _ in range(2))
    weights = sum(layer.weight.nbytes for layer in usual.modules() if type(layer) is nn.Linear)
    pack(packed)
    rate = memory_rate()
    print(f"{given.model}, {usual.dtype}, {torch.get_num_threads()} threads, {rate / 1e9:.1f} GB/s")
    print("      reading, tokens/s           writing, tokens/s")
    print("rows    usual   packed  ratio     usual   packed  ratio   limit of memory")
    for rows in given.rows:
        sides = {"usual": usual, "packed": packed}
        read, written = measure(sides, prompts(usual, rows, given.length), given.new, given.repeats)
        step = weights + rows * kept(usual) * (given.length + given.new // 2)
        limit = rows * rate / step
        print(
            f"{rows:4d}  {read['usual']:7.0f}  {read['packed']:7.0f}  {read['packed'] / read['usual']:5.2f}"
            f"   {written['usual']:7.1f}  {written['packed']:7.1f}  {written['packed'] / written['usual']:5.2f}"
            f"  {limit:9.1f}",
            flush=True,
        )


def prompts(model: Any, rows: int, length: int) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(model.config.vocab_size, (rows, length), generator=generator).tolist()
    return found


def measure(
    sides: dict[str, Any], given: list[list[int]], new: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the tokens per second of each side, of reading and of writing."""
    seconds: dict[tuple[str, int], float] = {}
    for _ in range(repeats + 1):
        tokens = set()
        for name, model in sides.items():
            for limit in (1, new):
                spent, done = timed(partial(continued, model, given, limit))
                seconds[name, limit] = min(spent, seconds.get((name, limit), spent))
            tokens.add(done)
        assert len(tokens) == 1, "the tokens are the same"
    read = {name: len(given) * len(given[0]) / seconds[name, 1] for name in sides}
    written = {name: len(given) * (new - 1) / (seconds[name, new] - seconds[name, 1]) for name in sides}
    return read, written


def continued(model: Any, given: list[list[int]], limit: int) -> tuple[tuple[int, ...], ...]:
    """Returns the new tokens of each prompt."""
    drafts = [Draft(prompt, limit) for prompt in given]
    room = sum(len(prompt) + limit for prompt in given)
    done = decode(model, drafts, end_tokens=frozenset(), batch_tokens=room, layout=layout_of(model))
    return tuple(tuple(completion.token_ids) for completion in done)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of some work, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def kept(model: Any) -> int:
    """Returns the bytes of the keys and values of a token."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def memory_rate() -> float:
    """Returns the bytes per second of the best of five sums over a GiB."""
    large = torch.ones(GIB // 4)
    return GIB / min(timed(large.sum)[0] for _ in range(5))


if __name__ == "__main__":
    main()
