"""Plain loops, without cache, batch or sharing, to compare the engine with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from popi.prompts import Message

WORDS = ["short", "answer 🍚", "the user", "如何煮米饭", "question about examples", "x" * 30, "tone"]


def conversation(number: int) -> list[Message]:
    """Conversations of many lengths; of two neighbours the same text."""
    number //= 2
    return [Message("user", " ".join(WORDS[(number * 3 + i) % len(WORDS)] for i in range(1 + number % 9)))]


def prompt_ids(tokenizer, messages: Sequence[Message]) -> list[int]:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def plain_score(model, tokenizer, messages: Sequence[Message], response: str) -> float:
    """The whole sequence, all logits, no cache, one response at a time."""
    prompt = prompt_ids(tokenizer, messages)
    target = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + target]), use_cache=False).logits[0].log_softmax(dim=-1)
    total = 0.0
    for place, token in enumerate(target):
        total += logprobs[len(prompt) + place - 1, token].item()
    return total


def plain_tokens(model, tokenizer, messages: Sequence[Message], count: int) -> list[int]:
    """The likeliest tokens, each from the whole sequence anew."""
    ids = prompt_ids(tokenizer, messages)
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new
