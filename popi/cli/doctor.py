"""``popi doctor``."""

from popi.cli.output import JsonFlag


def doctor(json: JsonFlag = False) -> None:
    """Say what is installed, and what is missing."""
