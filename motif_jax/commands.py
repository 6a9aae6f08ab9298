"""How every entry point runs: one clear line instead of a traceback for whatever the user can mend."""

import os
import pathlib
import platform
import sys
from collections.abc import Callable

from absl import app, flags, logging

from motif_jax.config import Config, UserError, from_config_dict

HELP = frozenset({"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"})


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in ~/.cache/motif_jax, where the next start finds it; JAX_COMPILATION_CACHE_DIR says otherwise.

    One directory a host: a CPU cannot run what was compiled for another. For before JAX is imported.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path("~/.cache/motif_jax").expanduser() / platform.node()))


def run(name: str, main: Callable[[list[str]], None]) -> None:
    """Parses the flags and calls `main` with what is left; exits with 1 and "name: reason" on a mistake of the user's."""

    def parse(arguments: list[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(arguments)
        except SystemExit:
            if HELP.intersection(arguments):  # absl has printed it, and calls that a failure
                sys.exit(0)
            raise
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:  # from a configuration file or an override of it
            reason = str(error.args[0] if error.args else error).strip("'\"").replace("\\n", " ")
            sys.exit(f"{name}: --config: {' '.join(reason.split())}")

    keep_compiled_programs()

    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every detail
        try:
            main(arguments[1:])
        except UserError as error:
            sys.exit(f"{name}: {error}")

    app.run(guarded, flags_parser=parse)


def configuration(flag: flags.FlagHolder) -> Config:
    """The validated configuration of a --config flag. Raises UserError when its file could not be loaded."""
    try:
        return from_config_dict(flag.value)
    except OSError as error:
        raise UserError(f"--config: {' '.join(str(error).split())}") from error


def no_more(arguments: list[str]) -> None:
    """Refuses arguments that belong to no flag."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; flags are written --name=value")
