"""Grouped attention gives the numbers of repeated keys and values."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from popi.engine.attention import GROUPED, group_heads
from popi.engine.decoding import Draft, decode
from popi.engine.packing import Scored
from popi.engine.scoring import score
from popi.testing import tiny_model
from tests.engine.test_other_caches import CONFIGS


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("scaled logits", "shared"), ("experts", "shared"), ("experts", "padded"), ("sliding window", "padded")],
)
def test_grouped_queries_change_nothing(kind: str, layout: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    prompts = [[*range(10, 10 + length)] for length in (3, 30, 12, 12)] * 2
    drafts = [Draft(prompt, limit=8) for prompt in prompts]
    items = [Scored(prompt, response) for prompt in prompts for response in ([3, 4], [5] * 9)]

    def compute() -> tuple[list[list[int]], list[float]]:
        completions = decode(model, drafts, end_tokens=frozenset(), batch_tokens=1000, layout=layout)
        return [each.token_ids for each in completions], score(model, items, batch_tokens=1000, layout=layout)

    tokens, scores = compute()
    group_heads(model)
    assert model.config._attn_implementation == GROUPED
    grouped_tokens, grouped_scores = compute()
    assert grouped_tokens == tokens
    assert grouped_scores == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_models_without_grouped_queries_keep_their_attention(family: str) -> None:
    model, _ = tiny_model(family)
    group_heads(model)
    assert model.config._attn_implementation == "sdpa"


def test_gradients_flow_through_grouped_queries() -> None:
    gradients = []
    for grouped in (False, True):
        model, _ = tiny_model("qwen3")
        if grouped:
            group_heads(model)
        mask = torch.zeros(2, 1, 5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
        model(input_ids=torch.arange(10).view(2, 5), attention_mask=mask).logits.logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
