"""Tiny causal language models with random weights, made in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>"]

CHANNEL_TEMPLATE = """\
{% for message in messages %}{{ '<|start|>' + message['role'] }}\
{{ '<|channel|>final' if message['role'] == 'assistant' }}{{ '<|message|>' + message['content'] }}\
{{ '<|return|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
"""A template like that of gpt-oss: finished turns have a header that the generation prompt does not have."""

TEXT = [
    "the user prefers a short answer with a friendly tone and no emoji",
    "what is the best way to answer the question of the user",
    "here are three examples that show what the other answer is like",
]
"""Training text of the tokenizer: enough for tokens longer than a byte."""

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
"""Grouped queries."""

WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
"""One layer that sees the last 16 tokens, and one that sees all."""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

TIED = {"tie_word_embeddings": True}

LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""One layer of linear attention, which has a recurrent state, and one of attention."""


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "neox": ("GPTNeoXConfig", {}),
    "qwen3": ("Qwen3Config", GROUPED),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, **TIED}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2, "logit_scale": 1.0, **TIED}),
    "granite": ("GraniteConfig", {"num_key_value_heads": 2, "logits_scaling": 3.0}),
    # Positions: learned, rotary of several kinds, and biases of the attention (ALiBi).
    "gpt2": ("GPT2Config", TIED),
    "opt": ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 32, **TIED}),
    "gptj": ("GPTJConfig", {"rotary_dim": 4}),
    "llama3": (
        "LlamaConfig",
        {**_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)}
        | TIED,
    ),
    "llama_dynamic": ("LlamaConfig", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 64}),
    "phi3_longrope": (
        "Phi3Config",
        _rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0, 4.0, 6.0, 8.0], original_max_position_embeddings=64)
        | {"original_max_position_embeddings": 64},
    ),
    "falcon": ("FalconConfig", {"alibi": False, **TIED}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "bloom": ("BloomConfig", TIED),
    "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 2048}),
    # Attention to the last tokens only, or to those of the same chunk.
    "gpt_neo": ("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]], "window_size": 16, **TIED}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, **WINDOW, "final_logit_softcapping": 5.0, **TIED}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, **WINDOW, **TIED}),
    "gpt_oss": ("GptOssConfig", {**GROUPED, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {**GROUPED, "attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"]}
        | {"moe_layers": [], "intermediate_size_mlp": 64},
    ),
    # Mixtures of experts.
    "mixtral": ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
        | {"first_k_dense_replace": 1},
    ),
    # Recurrent states, with and without attention.
    "mamba": ("MambaConfig", {"state_size": 8}),
    "mamba2": ("Mamba2Config", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 32, "attention_window_size": 16, "block_types": ("recurrent", "attention")},
    ),
    "jamba": (
        "JambaConfig",
        {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}
        | {"mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2},
    ),
    "bamba": ("BambaConfig", {"num_key_value_heads": 2, "attn_layer_indices": [1], **MAMBA}),
    "lfm2": ("Lfm2Config", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("Qwen3NextConfig", {**GROUPED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 32}),
}

FAMILIES = tuple(_CONFIGS)
"""The families that :func:`tiny_model` makes."""

WITHOUT_BEGIN_TOKEN = ("qwen2", "gpt2", "gptj", "gpt_oss", "qwen3_moe", "rwkv", "qwen3_next")


def tiny_model(family: str = "llama", *, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Makes a model with some 50,000 random weights, and its tokenizer, in well under a second.

    The tokenizer is that of :func:`tiny_tokenizer`; some families have no begin token, and ``gpt_oss`` has a chat
    template with headers. Windows have 16 tokens, and encodings of positions change at 64 tokens. The head is tied to
    the embeddings where it usually is in a family.

    Args:
        family: One of :data:`FAMILIES`.
        seed: Seed of the weights. The global random state is left unchanged.

    Raises:
        ValueError: If the family is unknown.
    """
    if family not in _CONFIGS:
        raise ValueError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    import torch
    import transformers

    tokenizer = tiny_tokenizer(begin=family not in WITHOUT_BEGIN_TOKEN, channels=family == "gpt_oss")
    name, options = _CONFIGS[family]
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        # Ten times the usual value: the logits differ enough that rounding does not decide which is the largest.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, name)(**{**common, **options})
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model.train(False), tokenizer


def tiny_tokenizer(*, begin: bool = True, channels: bool = False) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of the tiny models: a byte-level BPE with a chat template.

    Args:
        begin: Whether it has a begin token, ``<|begin|>``, before a plain text and before a conversation.
        channels: Whether its template is :data:`CHANNEL_TEMPLATE`, where ``<|return|>`` ends a response, instead of
            :data:`CHAT_TEMPLATE`, where ``<|end|>`` does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, end = ([*SPECIAL, *CHANNELS], "<|return|>") if channels else (SPECIAL, "<|end|>")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if begin:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", bpe.token_to_id("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>" if begin else None,
        eos_token=end,
        pad_token="<|pad|>",
        extra_special_tokens=[token for token in special[2:] if token != end],
        chat_template=CHANNEL_TEMPLATE if channels else CHAT_TEMPLATE,
    )
