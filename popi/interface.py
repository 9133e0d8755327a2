"""The interface between inference and generation: what a generator reads about a user."""

from __future__ import annotations

from pydantic import BaseModel, Field, field_validator

from popi.signals import FROZEN, UserId
from popi.summary import PreferenceSummary


class UserEmbedding(BaseModel):
    """A soft prompt for one user: dense, and usable only with the model that it was trained for.

    Example:
        >>> embedding = UserEmbedding(user_id="ann", vectors=((0.1, -0.2), (0.0, 0.3)), model_fingerprint="0a1b")
        >>> len(embedding.vectors), len(embedding.vectors[0])
        (2, 2)

    Attributes:
        user_id: The user.
        vectors: Soft tokens, ``[tokens, width]``; ``width`` is that of the model's token embeddings.
        model_fingerprint: Fingerprint of the weights of that model.
    """

    model_config = FROZEN

    user_id: UserId
    vectors: tuple[tuple[float, ...], ...] = Field(min_length=1)
    model_fingerprint: str

    @field_validator("vectors")
    @classmethod
    def _one_width(cls, vectors: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        widths = {len(vector) for vector in vectors}
        if len(widths) > 1 or 0 in widths:
            raise ValueError(f"soft tokens must have one positive width, got {sorted(widths)}")
        return vectors


Interface = PreferenceSummary | UserEmbedding
"""A summary works with every generator; an embedding only with the model that it was trained for."""
