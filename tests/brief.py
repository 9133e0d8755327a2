"""Tiny models whose replies are short."""

import torch

from popi.testing import tiny_model


def brief_model(*, seed=0):
    """A tiny Llama and its tokenizer whose sampled replies have some three tokens.

    A model with random weights hardly ever ends its turn within the few tokens of a test. Almost all of its summaries
    would be cut off, all rewards would be equal and nothing would be learned.
    """
    model, tokenizer = tiny_model(seed=seed)
    with torch.no_grad():
        # The first hidden unit is constant. The head reads it as a bias of the end token.
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(0.1)
                projection.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 1.0
    return model, tokenizer
