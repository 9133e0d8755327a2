"""Servers: what is said to them, and what their failures mean."""
