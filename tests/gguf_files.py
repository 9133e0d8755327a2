"""Tiny models with random weights as GGUF files, written like those of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

from popi.testing.tiny import tiny_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 128}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "stablelm": ("StableLmConfig", {"num_key_value_heads": 2}),
}
"""The class and the options of the configuration of each architecture."""


def model_of(architecture: str) -> PreTrainedModel:
    """A model in float32."""
    kind, options = CONFIGS[architecture]
    config = getattr(transformers, kind)(
        vocab_size=len(_vocabulary(architecture)),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model.train(False)


def write_gguf(
    path: Path, architecture: str, kind: Type = Type.F32, *, leave_out: tuple[str, ...] = (), **fields: Any
) -> dict[str, torch.Tensor]:
    """Writes a model, and returns its weights as they are after the quantisation.

    Args:
        path: The file.
        architecture: One of :data:`CONFIGS`.
        kind: Type of the matrices.
        leave_out: Names of tensors that are not written.
        fields: ``end`` and ``template`` in place of the usual ones, where ``None`` leaves them out; ``named``, another
            architecture in the file; ``extra``, the names of tensors with 32 numbers; ``split``, the number of parts.
    """
    model = model_of(architecture)
    config = model.config
    writer = gguf.GGUFWriter(path, fields.get("named", architecture))
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    writer.add_key_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, architecture, fields)
    if "split" in fields:
        writer.add_uint16("split.count", fields["split"])
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    stored = {}
    tied = set(getattr(model, "all_tied_weights_keys", {})) if config.tie_word_embeddings else set()
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        weight = value.numpy()
        used = kind if weight.ndim > 1 else Type.F32
        data = gguf.quants.quantize(_as_written(architecture, name, weight, config), used)
        back = gguf.quants.dequantize(data, used)
        stored[name] = torch.from_numpy(_as_read(architecture, name, back, config).copy())
        written = f"{names.get_name(stem)}.{suffix}"
        if name not in tied and written not in leave_out:
            writer.add_tensor(written, data, raw_dtype=used)
    for name in fields.get("extra", ()):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _as_written(architecture: str, name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    if architecture == "llama" and (heads := _heads(name, config)):
        return np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))
    return weight + 1 if architecture == "gemma2" and name.endswith("norm.weight") else weight


def _as_read(architecture: str, name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    if architecture == "llama" and (heads := _heads(name, config)):
        return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight - 1 if architecture == "gemma2" and name.endswith("norm.weight") else weight


def _heads(name: str, config: Any) -> int:
    if "q_proj" in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in name else 0


def _add_tokenizer(writer: gguf.GGUFWriter, architecture: str, fields: dict[str, Any]) -> None:
    tokens = _vocabulary(architecture)
    gemma = architecture == "gemma2"
    special = set(GEMMA_SPECIAL if gemma else SPECIAL)
    template = fields.get("template", GEMMA_TEMPLATE if gemma else TEMPLATE)
    end = fields.get("end", "<eos>" if gemma else "<|im_end|>")
    writer.add_tokenizer_model("llama" if gemma else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    if gemma:
        writer.add_token_scores([-float(place) for place in range(len(tokens))])
        writer.add_unk_token_id(tokens.index("<unk>"))
        writer.add_pad_token_id(tokens.index("<pad>"))
    else:
        writer.add_token_merges(_merges())
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(tokens.index("<bos>" if gemma else "<|im_start|>"))
    if end is not None:
        writer.add_eos_token_id(tokens.index(end))
    if template is not None:
        writer.add_chat_template(template)


def _vocabulary(architecture: str) -> list[str]:
    if architecture == "gemma2":
        characters = ["▁", *map(chr, range(33, 127)), "\n"]
        return [*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = tiny_tokenizer(begin=False).get_vocab()
    plain = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if not token.startswith("<|")]
    return [*SPECIAL, *plain]


def _merges() -> list[str]:
    model = json.loads(tiny_tokenizer(begin=False).backend_tokenizer.to_str())["model"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
