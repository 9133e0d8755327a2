"""Causal language models in this process: their tokens, their caches, decoding and scoring."""
