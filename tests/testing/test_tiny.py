"""The tiny models."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from popi.testing import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_tiny_and_quick(family: str) -> None:
    tiny_model(family)
    start = time.monotonic()
    model, tokenizer = tiny_model(family)
    assert time.monotonic() - start < 1
    assert 10_000 < sum(weight.numel() for weight in model.parameters()) < 150_000
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied == model.config.tie_word_embeddings
    assert model.get_output_embeddings().out_features == len(tokenizer)
    assert not model.training


def test_the_seed_makes_the_weights_and_nothing_else() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = (tiny_model(seed=seed)[0].get_output_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_the_tokenizer_takes_every_text() -> None:
    _, tokenizer = tiny_model()
    for text in ("the user", "米饭 🍚\x00\n", "كيف", "<|end|>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("the user prefers")["input_ids"]) < 8


def test_an_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="llama"):
        tiny_model("elephant")


def test_the_doubles_cost_no_heavy_import() -> None:
    code = "import sys, popi.testing; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
