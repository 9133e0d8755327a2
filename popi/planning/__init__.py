"""Estimates of a joint run before it starts: memory and time, from the configurations of its models."""
