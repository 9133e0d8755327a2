"""Models of every tiny family, in the layout that their check chose, against a plain loop without cache and batch."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from popi.engine.cache import reset_positions
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import Abilities, verify
from popi.engine.decoding import Draft, decode
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.prompts import Message
from popi.testing import FAMILIES, tiny_model

WORDS = ["short answers", "no emoji, please", "What is the best pan for cooking?", "x" * 20, "如何煮米饭"]
LENGTHS = (1, 2, 2, 5, 9)
"""Words of the prompts. The longest exceed all windows, and the length at which encodings of positions change."""

NEW = 6

NOT_SHARED = {
    "llama_dynamic",
    "phi3_longrope",
    "falcon_alibi",
    "bloom",
    "mpt",
    "gpt_neo",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "jamba",
    "bamba",
    "lfm2",
    "qwen3_next",
}
"""Families whose prefixes must not be shared, or only up to a length."""


@cache
def checked(family: str) -> tuple[PreTrainedModel, ChatTokens, Abilities]:
    model, tokenizer = tiny_model(family)
    tokens = ChatTokens(tokenizer, family)
    return model, tokens, verify(model, tokens, family)


def prompts_of(tokens: ChatTokens) -> list[list[int]]:
    conversations = [
        [Message("user", " ".join(WORDS[(number + place) % len(WORDS)] for place in range(length)))]
        for number, length in enumerate(LENGTHS)
    ]
    rendered = tokens.render([*conversations, conversations[-1]])
    assert all(prompt.error is None for prompt in rendered)
    return [prompt.tokens for prompt in rendered]


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, sequence: list[int]) -> torch.Tensor:
    # Dynamic encodings of positions keep the longest sequence that they have seen.
    reset_positions(model)
    return model(torch.tensor([sequence]), use_cache=False).logits[0].float().log_softmax(dim=-1)


def plain_greedy(model: PreTrainedModel, prompt: list[int], ends: frozenset[int]) -> list[int]:
    new: list[int] = []
    while len(new) < NEW and (not new or new[-1] not in ends):
        new.append(int(plain_logprobs(model, [*prompt, *new])[-1].argmax()))
    return new


def plain_score(model: PreTrainedModel, item: Scored) -> float:
    logprobs = plain_logprobs(model, [*item.prompt, *item.response])
    start = len(item.prompt) - 1
    return sum(logprobs[start + place, token].item() for place, token in enumerate(item.response))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_a_plain_loop(family: str) -> None:
    model, tokens, abilities = checked(family)
    prompts = prompts_of(tokens)
    drafts = [Draft(prompt, NEW) for prompt in prompts]
    done = decode(model, drafts, end_tokens=abilities.end_tokens, batch_tokens=2048, layout=abilities.layout)
    expected = [plain_greedy(model, prompt, abilities.end_tokens) for prompt in prompts]
    assert [completion.token_ids for completion in done] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_plain_loop(family: str) -> None:
    model, tokens, abilities = checked(family)
    responses = [[*ids, *tokens.end_of_turn] for ids in tokens.encode(["the pan", "no, it is the best answer"])]
    items = [Scored(prompt, response) for prompt in prompts_of(tokens) for response in responses]
    found = score(model, items, batch_tokens=2048, layout=abilities.layout)
    assert all(map(math.isfinite, found))
    assert found == pytest.approx([plain_score(model, item) for item in items], abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_shared_where_that_is_exact(family: str) -> None:
    _, _, abilities = checked(family)
    if abilities.layout == "shared":
        assert family not in NOT_SHARED or family in ("llama_dynamic", "phi3_longrope")
    else:
        assert family in NOT_SHARED


def test_all_kinds_of_models_are_among_the_families() -> None:
    assert len(FAMILIES) >= 30
    layouts = {checked(family)[2].layout for family in FAMILIES}
    assert {"shared", "padded"} <= layouts
