"""What a check of a loaded model finds, and what it leaves unchanged."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from popi.backends.transformers import TransformersBackend
from popi.engine.cache import Prefixes
from popi.engine.chat_tokens import ChatTokens
from popi.engine.checks import verify
from popi.errors import ModelError
from popi.testing import tiny_model
from popi.testing.tiny import tiny_tokenizer


def loaded(family: str = "llama"):
    model, tokenizer = tiny_model(family)
    return model, ChatTokens(tokenizer, family)


def test_a_model_that_shares_prefixes_exactly_is_trusted_without_a_word(caplog) -> None:
    model, tokens = loaded()
    assert verify(model, tokens, "m").layout == "shared"
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt_neo", "gpt_neo: sharing prefixes changes scores by "), ("falcon_alibi", "falcon_alibi: sharing prefixes ")],
)
def test_a_layout_that_is_wrong_is_replaced_in_one_line(family, message, caplog) -> None:
    model, tokens = loaded(family)
    assert verify(model, tokens, family).layout == "padded"
    [record] = caplog.records
    assert record.getMessage().startswith(message)
    assert record.getMessage().endswith("; requests are batched with left padding instead")


def test_a_layout_that_crashes_is_replaced_with_the_reason(monkeypatch, caplog) -> None:
    def crash(*args: object, **options: object) -> None:
        raise RuntimeError("no such mask\nand a page of advice")

    monkeypatch.setattr(Prefixes, "__call__", crash)
    model, tokens = loaded()
    assert verify(model, tokens, "m").layout == "padded"
    assert [record.getMessage() for record in caplog.records] == [
        "m: sharing prefixes fails (RuntimeError: no such mask); requests are batched with left padding instead"
    ]


def test_the_model_and_the_random_state_are_left_unchanged() -> None:
    model, tokens = loaded("gemma2")
    model.train(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    verify(model, tokens, "m")
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "layout"), [("llama", "shared"), ("mixtral", "shared"), ("gpt_neo", "padded")])
def test_rounding_in_half_precision_is_not_taken_for_an_error(family, layout, dtype) -> None:
    model, tokens = loaded(family)
    assert verify(model.to(dtype), tokens, family).layout == layout


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model, tokens = loaded()
    model.resize_token_embeddings(100)
    with pytest.raises(ModelError, match=r"has the token .*, and the model has only 100 embeddings; use the tokenizer"):
        verify(model, tokens, "m")


def test_an_end_token_of_the_configuration_that_is_plain_text_is_ignored(caplog) -> None:
    model, tokens = loaded()
    model.generation_config.eos_token_id = tokens.encode(["the"])[0][0]
    assert verify(model, tokens, "m").end_tokens == tokens.end_tokens
    assert "the generation config ends responses at the text" in caplog.text


def test_the_check_of_a_shipped_model_takes_well_under_a_second() -> None:
    model, tokenizer = tiny_model()
    verify(model, ChatTokens(tokenizer, "m"), "m")
    backend = TransformersBackend("popi-mini-writer")
    start = time.process_time()
    verify(backend._model, backend._tokens, "popi-mini-writer")
    assert time.process_time() - start < 1


def test_a_backend_says_how_its_requests_are_batched(caplog) -> None:
    caplog.set_level(logging.WARNING)
    model, _ = tiny_model("gpt_neo")
    TransformersBackend.from_model(model, tiny_tokenizer(begin=True), "mine")
    assert any(record.getMessage().startswith("mine: sharing prefixes") for record in caplog.records)
