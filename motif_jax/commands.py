"""How every entry point runs: one clear line instead of a traceback for whatever the user can mend."""

import contextlib
import difflib
import functools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

from motif_jax.config import Config, from_config_dict, to_dict
from motif_jax.errors import StoreError, UserError
from motif_jax.fields import field_names

# What absl and Python say of a flag, and what is meant.
_PLAIN = (
    (r"flag (--\S+)=None: Flag \S+ must have a value other than None\.", r"\1 must be given"),
    (r"invalid literal for int\(\) with base 10: .*", "must be a whole number"),
    (r"could not convert string to float: .*", "must be a number"),
    (r"\('Non-boolean argument to boolean flag', .*\)", "must be True or False"),
)
HELP = frozenset({"--help", "-help", "-h", "--helpshort", "--helpfull", "-?"})


def _of_this_host() -> str:
    """Empty for a user without a home, as containers have them."""
    home = os.path.expanduser("~")
    return "" if home == "~" else os.path.join(home, ".cache/motif_jax", platform.node())


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in ~/.cache/motif_jax, where the next start finds it; JAX_COMPILATION_CACHE_DIR says otherwise.

    One directory a host: a CPU cannot run what was compiled for another. For before JAX is imported. A program with a GPU's kernels is
    found again only if these name no lines of Python, which change with every edit above a call: they name layers alone, unless
    JAX_TRACEBACK_IN_LOCATIONS_LIMIT says how many.
    """
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    if directory := _of_this_host():
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", directory)


def share_compiled_programs(directory: str) -> None:
    """For a process of a job on accelerators: programs are kept in `directory`, which all hosts see, unless the user says where.

    Process 0 alone writes them. With a directory a host, the next start would find them on one host and compile on the others; on GPUs,
    where XLA shares out the trying of kernels, those would wait for results that the first never sends.
    """
    import jax

    if jax.process_count() > 1 and jax.default_backend() != "cpu" and os.environ.get("JAX_COMPILATION_CACHE_DIR", "") == _of_this_host():
        jax.config.update("jax_compilation_cache_dir", directory)


def run(name: str, main: Callable[[list[str]], None]) -> None:
    """Parses the flags and calls `main` with what is left; exits with 1 and "name: reason" on a mistake of the user's."""
    begin(name, sys.argv)

    def parse(arguments: list[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except SystemExit:
            if HELP.intersection(arguments):  # absl has printed it, and calls that a failure
                sys.exit(0)
            raise
        except flags.UnrecognizedFlagError as error:
            field = "config" in flags.FLAGS and error.flagname in field_names(Config)
            sys.exit(f"{name}: " + (f"--{error.flagname}: did you mean --config.{error.flagname}?" if field else _reason(error)))
        except flags.Error as error:
            sys.exit(f"{name}: {_reason(error)}")
        except Exception as error:  # a configuration file is code: it may raise anything
            sys.exit(f"{name}: {_unknown_field(arguments) or f'--config={_given(arguments)}: {_reason(error)}'}")

    keep_compiled_programs()
    if "config" in flags.FLAGS:
        parser = flags.FLAGS["config"].parser
        parser.parse = functools.partial(_complete, parser.parse)

    def guarded(arguments: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every detail
        try:
            with interrupts_reported(name), memory_errors_reported():
                main(arguments[1:])
        except (UserError, StoreError) as error:
            sys.exit(f"{name}: {error}")

    app.run(guarded, flags_parser=parse)


def begin(name: str, arguments: Sequence[str]) -> None:
    """Refuses an argument that is not UTF-8, which no file of ours could hold; what a terminal has no letters for is printed as escapes."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    sys.stdout.reconfigure(errors="backslashreplace")
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            sys.exit(f"{name}: {argument!r} is not UTF-8")


@contextlib.contextmanager
def interrupts_reported(name: str) -> Iterator[None]:
    """Ends the process at Ctrl-C with one line; an orderly exit could wait for a compilation, or crash in it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)


@contextlib.contextmanager
def memory_errors_reported() -> Iterator[None]:
    """Turns an error of a device, or of this machine, without memory left into a UserError that says what can be done.

    So does the end of one of Grain's worker processes, which the operating system kills first.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).strip().partition("\n")[0]
        if ended := re.search("Worker process was terminated unexpectedly with (exit code .?[0-9]+)", text):
            raise UserError(
                f"a worker process that reads data was ended from outside ({ended[1]}), most likely for want of memory: use fewer "
                "data.workers or a smaller data.prefetch; the same command continues the run"
            ) from error
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in text:
            raise
        where = "machine" if isinstance(error, MemoryError) else "device"
        raise UserError(
            f"the {where} has too little memory ({text}). Training: a smaller batch_size, grad_accumulation, remat=block, or more devices "
            "(mesh.fsdp, mesh.context). Sampling: a smaller --batch_size"
        ) from error


def _complete(load: Callable[[str], Any], path: str) -> Any:
    """What a configuration file gives, with the fields that it leaves out: flags can override every field."""
    from ml_collections import ConfigDict

    def fill(given: ConfigDict, defaults: dict[str, Any]) -> None:
        for name, value in defaults.items():
            if name not in given:
                given[name] = value
            elif isinstance(value, dict) and isinstance(given[name], ConfigDict):
                fill(given[name], value)

    if path.endswith(".json"):
        raise ValueError("must be a Python file with get_config(); --workdir=RUN takes the config.json of a run by itself")
    given = load(path)
    config = ConfigDict(given) if isinstance(given, dict) else given
    if isinstance(config, ConfigDict):
        with config.unlocked():
            fill(config, to_dict(Config()))
    return config


def _unknown_field(arguments: list[str]) -> str | None:
    """The first override --config.a.b=value of a field that does not exist, with the nearest that does."""
    known = field_names(Config)
    for argument in arguments:
        flag, dotted = re.match(r"--?(config\.([^=]*))|", argument).groups()
        if dotted and dotted not in known:
            close = difflib.get_close_matches(dotted, known, n=1)
            return f"--{flag}: no such field" + (f"; did you mean --config.{close[0]}?" if close else "; motif_jax/config.py lists them")
    return None


def _given(arguments: list[str]) -> str:
    """The last value of --config."""
    found = re.findall(r"^--?config[=\n](.*)$", "\n".join(arguments), re.MULTILINE)
    return found[-1] if found else ""


def _reason(error: Exception) -> str:
    """The message of an error in one line; of a configuration file's traceback within it, the last line."""
    text = str(error.args[0] if isinstance(error, KeyError) else error).replace("\\n", "\n")
    if "Traceback" in text:
        flag = text.partition(": ")[0]
        text = f"{flag}: " + re.sub(r"^\s*\w*(Error|Exception): ", "", text.strip().splitlines()[-1])
    text = " ".join(text.split())
    for said, meant in _PLAIN:
        text = re.sub(said, meant, text)
    return text


def configuration(flag: flags.FlagHolder) -> Config:
    """The validated configuration of a --config flag. Raises UserError when its file could not be loaded."""
    try:
        return from_config_dict(flag.value)
    except OSError as error:
        if not _given(sys.argv):
            raise UserError("--config= is empty: name a configuration file, such as configs/motif.py") from error
        raise UserError(f"--config: {' '.join(str(error).split())}") from error


def no_more(arguments: list[str]) -> None:
    """Refuses arguments that belong to no flag."""
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; flags are written --name=value")
