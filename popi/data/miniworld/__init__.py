"""The mini world: users with known tastes, their signals, answers whose style a program can check.

A complete world in miniature, in which every part of popi runs for real on a laptop: the truth about each user is
known, the posterior over tastes given the signals is exact, and so is the judge. Its numbers are those of a miniature.
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
    """How much a user likes a style, both by named sides: tastes met minus tastes missed."""
    return sum(1 if style[name] == side else -1 for name, side in tastes.items() if name in style)
