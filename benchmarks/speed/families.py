"""For each model family: the verified layout, the time of the check, and the cost of a batch of 16.

Both sides run in one process on tiny models with random weights: 16 requests in one call, and the same one by one::

    python benchmarks/speed/families.py [--quick]
"""

from __future__ import annotations

import argparse
import logging
import time

import torch
from rich.console import Console
from rich.table import Table

from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import Abilities, verify
from popi.engine.decoding import Draft, decode
from popi.prompts import Message
from popi.testing import FAMILIES, tiny_model

REQUESTS, NEW = 16, 24


def drafts_of(tokens: ChatTokens) -> list[Draft]:
    """Requests of several lengths with a common prefix."""
    texts = [f"What is the best pan for cooking? {'Why? ' * (number % 7)}And {number}?" for number in range(REQUESTS)]
    prompts = tokens.render([[Message("user", text)] for text in texts])
    return [Draft(prompt.tokens, NEW) for prompt in prompts]


def seconds_of(model: torch.nn.Module, batches: list[list[Draft]], abilities: Abilities) -> float:
    """Seconds to decode batches one after the other, best of three. No token ends a response."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for batch in batches:
            decode(model, batch, end_tokens=frozenset(), batch_tokens=16384, layout=abilities.layout)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Prints one row for each family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Four families instead of all.")
    families = FAMILIES[:4] if parser.parse_args().quick else FAMILIES
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table = Table("family", "layout", "check, s", "one by one, s", "batch of 16, s", "ratio")
    for family in families:
        model, tokenizer = tiny_model(family)
        tokens = ChatTokens(tokenizer, family)
        start = time.perf_counter()
        abilities = verify(model, tokens, family)
        check = time.perf_counter() - start
        drafts = drafts_of(tokens)
        apart = seconds_of(model, [[draft] for draft in drafts], abilities)
        together = seconds_of(model, [drafts], abilities)
        figures = (f"{value:.2f}" for value in (check, apart, together, apart / together))
        table.add_row(family, abilities.layout, *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
