"""What entry points print as one line, without a traceback, and how they list much in it."""

from collections.abc import Sequence


class UserError(ValueError):
    """An error that the user can fix: the message names the thing and the remedy."""


class StoreError(OSError):
    """An object store that does not answer, or refuses."""


def enumerate_first(items: Sequence[str], most: int = 10, separator: str = "; ") -> str:
    """The first `most` of what a message lists, and how many more there are; "" for nothing."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])
