"""Tiny causal language models with random weights, made in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "neox", "qwen3")
"""The families that :func:`tiny_model` makes."""

SPECIAL = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

TEXT = [
    "the user prefers a short answer with a friendly tone and no emoji",
    "what is the best way to answer the question of the user",
    "here are three examples that show what the other answer is like",
]
"""What the merges of the tokenizer are learnt from: enough for tokens longer than a byte."""


def tiny_model(family: str = "llama", *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Makes a model of some 50,000 parameters with random weights, and its tokenizer, in well under a second.

    The head is untied. The tokenizer is a byte-level BPE that puts ``<|begin|>`` in front of a bare text, as its
    chat template does of a conversation, and ends a turn with ``<|end|>``, which is also its end token.

    Args:
        family: ``llama``, ``neox`` (another layout of a layer) or ``qwen3`` (grouped queries, normed heads).
        seed: Seeds the weights; the global random state is left as it is.

    Raises:
        ValueError: If there is no such family.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    config = _config(family, vocab_size=len(tokenizer), end=SPECIAL.index("<|end|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train(False), tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer of the tiny models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bpe.token_to_id("<|begin|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
    )


def _config(family: str, *, vocab_size: int, end: int) -> Any:
    from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        # Ten times the usual: logits far enough apart that rounding does not decide which is the largest.
        "initializer_range": 0.2,
        "bos_token_id": SPECIAL.index("<|begin|>"),
        "eos_token_id": end,
        "pad_token_id": SPECIAL.index("<|pad|>"),
    }
    if family == "llama":
        return LlamaConfig(**common)
    if family == "neox":
        return GPTNeoXConfig(**common)
    if family == "qwen3":
        return Qwen3Config(**common, num_key_value_heads=2, head_dim=8)
    raise ValueError(f"no family {family!r}: there are {', '.join(FAMILIES)}")
