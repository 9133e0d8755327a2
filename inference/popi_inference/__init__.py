"""Preference inference: a language model that reads a user's signals and writes a summary, and baselines."""

from popi_inference.baselines import AnotherUsers, Empty, Oracle, RawSignals
from popi_inference.llm import LLMSummarizer

__all__ = ["AnotherUsers", "Empty", "LLMSummarizer", "Oracle", "RawSignals"]
