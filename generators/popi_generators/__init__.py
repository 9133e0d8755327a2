"""Conditioned generators: what answers a prompt under a summary."""
