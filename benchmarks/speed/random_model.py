"""Models with random weights in the shapes of real ones, for the benchmarks: speed depends on the shape only."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from popi.engine.loading import load_tokenizer

SHAPES = {
    "15m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12, "heads": 3, "key_heads": 1},
    "50m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 20, "heads": 6, "key_heads": 2},
    # SmolLM2-135M.
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "key_heads": 3},
    # Llama-3.2-1B and 3B, and the size of Qwen3-8B.
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": 32, "key_heads": 8},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "heads": 24, "key_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "heads": 32, "key_heads": 8},
}
VOCABULARY, CONTEXT = 49152, 8192


def make_model(shape: str, folder: Path) -> None:
    """Writes a model with random weights.

    Args:
        shape: One of :data:`SHAPES`.
        folder: The folder of the model. Its tokenizer is that of the shipped models, with made-up words.
    """
    tokenizer = load_tokenizer("popi-mini-base")
    tokenizer.add_tokens([f" w{number}" for number in range(len(tokenizer), VOCABULARY)])
    sizes = dict(SHAPES[shape])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        num_attention_heads=sizes.pop("heads"),
        num_key_value_heads=sizes.pop("key_heads"),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # In the type of published weights.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
