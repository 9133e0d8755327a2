"""The mini world: users with known tastes, their signals, and answers whose style a program can check.

In this miniature every part of popi runs on a laptop. The truth about each user is known, and the judge and the
posterior over tastes given the signals are exact. Its figures say nothing about real users.
"""

from popi.data.miniworld.language import as_sides, as_vector, claimed_tastes, style_of
from popi.data.miniworld.tastes import DIMENSIONS, NOISE, SIDES
from popi.data.miniworld.world import SPLITS, User, as_example, draw_user, generate

__all__ = [
    "DIMENSIONS",
    "NOISE",
    "SIDES",
    "SPLITS",
    "User",
    "as_example",
    "as_sides",
    "as_vector",
    "claimed_tastes",
    "draw_user",
    "generate",
    "style_of",
    "utility",
]


def utility(tastes: dict[str, str], style: dict[str, str]) -> int:
    """How much a user likes a style: the number of tastes that it meets minus the number that it misses.

    Example:
        >>> utility({"length": "short", "tone": "casual"}, {"length": "short", "tone": "formal", "format": "prose"})
        0

    Args:
        tastes: The preferred side of each dimension that the user cares about.
        style: The side of each dimension that the style takes.
    """
    return sum(1 if style[name] == side else -1 for name, side in tastes.items() if name in style)
