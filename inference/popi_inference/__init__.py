"""Preference inference: what reads a user's signals and writes the summary, and the controls beside it."""

from popi_inference.baselines import AnotherUsers, Empty, Oracle, RawSignals
from popi_inference.llm import LLMSummarizer

__all__ = ["AnotherUsers", "Empty", "LLMSummarizer", "Oracle", "RawSignals"]
