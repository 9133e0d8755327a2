"""Preference inference: what reads a user's signals and writes their summary."""
