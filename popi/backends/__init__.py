"""Backends: messages in, text out; text in, log-probabilities out. Any backend can play any role."""
