"""Numbers as text, the same in all reports: "-" where there is none, and 95 % intervals in brackets."""

import math
from collections.abc import Sequence


def number(x: float | None, form: str = ".2f", scale: float = 1) -> str:
    """scale x in this format; "-" for None and what is not finite."""
    return "-" if x is None or not math.isfinite(x) else format(scale * x, form)


def interval(limits: Sequence[float | None] | None, form: str = ".2f", scale: float = 1) -> str:
    """[low, high], or "-" where there is none."""
    ends = [number(x, form, scale) for x in limits or ()]
    return f"[{', '.join(ends)}]" if ends and "-" not in ends else "-"


def estimate(x: float | None, limits: Sequence[float | None] | None, form: str = ".2f", scale: float = 1) -> str:
    """A number, and its interval where there is one."""
    brackets = interval(limits, form, scale)
    return number(x, form, scale) + ("" if brackets == "-" else f" {brackets}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
