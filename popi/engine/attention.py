"""Grouped-query attention without copies of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "sdpa_grouped"


def group_heads(model: PreTrainedModel) -> None:
    """Makes a model with grouped queries attend without repeating its keys and values for each query head.

    With a mask, transformers repeats the whole cache for each query head in every layer and step. Here the query heads
    that share a key head become further queries of that head: the same numbers from a fraction of the memory traffic.
    Models without grouped queries, or with another attention implementation, are not changed.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    grouped = heads != (getattr(config, "num_key_value_heads", None) or heads)
    if grouped and config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(GROUPED)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that :func:`group_heads` sets, with the signature that transformers expects.

    Args:
        module: The attention layer.
        query: Queries, ``[R, heads, T, D]``.
        key: Keys, ``[R, key heads, L, D]``.
        value: Values, ``[R, key heads, L, D]``.
        attention_mask: Additive or boolean mask, ``[R, 1, T, L]``, or ``None``.
        dropout: Dropout probability.
        scaling: Factor of the logits.
        options: Passed on where queries are not grouped here.

    Returns:
        The output, ``[R, T, heads, D]``, and no attention weights.
    """
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    # Without a mask transformers does the same by itself; a mask or a bias of each head cannot be shared by a group.
    if groups == 1 or attention_mask is None or attention_mask.shape[1] > 1 or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    output = scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * length, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
