"""Models whose cache is not a plain one, or whose logits are more than a head's, are served as exactly."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

from popi.backends.base import ChatRequest, ScoreRequest
from popi.backends.transformers import TransformersBackend
from popi.engine.cache import has_plain_cache
from popi.testing.tiny import tiny_model, tiny_tokenizer
from tests.plain_loops import conversation, plain_score, plain_tokens

TOKENIZER = tiny_tokenizer()
COMMON = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}

CONFIGS = {
    "sliding window": lambda: transformers.MistralConfig(**COMMON, **ATTENTION, sliding_window=8),
    "soft caps": lambda: transformers.Gemma2Config(
        **COMMON, **ATTENTION, sliding_window=8, final_logit_softcapping=1.0
    ),
    "state": lambda: transformers.MambaConfig(**COMMON, state_size=4),
    "biases for places": lambda: transformers.BloomConfig(**COMMON, n_head=4),
    "no cache at all": lambda: transformers.RwkvConfig(**COMMON, attention_hidden_size=32),
    "scaled logits": lambda: transformers.GraniteConfig(
        **COMMON, num_attention_heads=4, intermediate_size=64, logits_scaling=3.0
    ),
}
PLAIN = {"scaled logits"}


@pytest.mark.parametrize("kind", CONFIGS)
async def test_as_exact_as_a_plain_loop(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    with caplog.at_level(logging.WARNING):
        backend = TransformersBackend.from_model(model, TOKENIZER, kind)
    assert ("one by one" in caplog.text) == (kind not in PLAIN)

    requests = [ChatRequest(conversation(i), max_tokens=10) for i in range(6)]
    for request, result in zip(requests, await backend.chat(requests), strict=True):
        tokens = plain_tokens(model, TOKENIZER, request.messages, 10)
        assert result.text == TOKENIZER.decode(tokens, skip_special_tokens=True)
    ratings = [ScoreRequest(request.messages, response) for request in requests for response in ("yes 🍚", "", "no")]
    for rating, result in zip(ratings, await backend.score(ratings), strict=True):
        expected = plain_score(model, TOKENIZER, rating.messages, rating.response)
        assert result.logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("attention", "plain"), [("sdpa", True), ("eager", True), ("flash_attention_2", False)])
def test_attention_that_knows_no_mask_of_single_places_shares_nothing(monkeypatch, attention, plain):
    model, _ = tiny_model()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
    assert has_plain_cache(model) is plain
