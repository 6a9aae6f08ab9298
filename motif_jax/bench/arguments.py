"""What the commands' arguments share: one line for a mistake, and types that name what is allowed."""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NoReturn

from motif_jax.data.storage import here
from motif_jax.errors import UserError
from motif_jax.pairs import plain_name


class Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake, instead of printing the usage; so do its subparsers."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def local(text: str) -> pathlib.Path:
    """The type of a path of this machine."""
    try:
        return here(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def at_least(least: int, kind: type = int) -> Callable[[str], float]:
    """The type of a number of this kind that is not below `least`."""

    def number(text: str) -> float:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return number


def positive(text: str) -> float:
    """The type of a positive finite number."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be positive and finite")
    return number


def size(sides: range) -> Callable[[str], tuple[int, int]]:
    """The type of (height, width) in pixels, given as N or HEIGHTxWIDTH."""

    def pixels(text: str) -> tuple[int, int]:
        parts = text.split("x")
        if len(parts) > 2 or not all(p.isdecimal() and int(p) in sides for p in parts):
            allowed = f"from {sides[0]} to {sides[-1]} in steps of {sides.step}"
            raise argparse.ArgumentTypeError(f"{text}: must be N or HEIGHTxWIDTH, each {allowed}")
        return int(parts[0]), int(parts[-1])

    return pixels


def folders(videos: Sequence[str]) -> dict[str, pathlib.Path]:
    """The folder of every NAME of --videos=NAME=DIR. Raises UserError."""
    found: dict[str, pathlib.Path] = {}
    for text in videos:
        name, _, folder = text.partition("=")
        name = plain_name(name)
        if not (name and folder) or name in found:
            raise UserError(f"--videos={text}: must be NAME=DIR, every NAME once")
        found[name] = pathlib.Path(folder)
    return found
