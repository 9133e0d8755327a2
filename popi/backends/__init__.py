"""Backends: they move messages to text and text to log-probabilities. Any backend can play any role."""
