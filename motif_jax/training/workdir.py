"""The work directory of a run: its configuration on disk, what a continued run must share with it, and its closing marks."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from motif_jax import report
from motif_jax.config import Config, read_json, to_json
from motif_jax.data.storage import Path, RemotePath, write_whole
from motif_jax.errors import StoreError, UserError
from motif_jax.models.networks import Params
from motif_jax.training.checkpoint import CheckpointError
from motif_jax.training.mirror import mirrored
from motif_jax.training.weights import origin

# A run may be continued with other values of these; everything else decides what the parameters become.
FREE_TO_CHANGE = (
    "log_every",
    "checkpoint",
    "eval",
    "sample",
    "profile",
    "mesh",
    "remat",
    "grad_accumulation",
    "attention",
    "kernels",
    "init_from",
    "data",
    "prepare",
    "name",
)
# A run that goes on for longer, or diverged, may be continued with other values of these, which is said: the learning rates to come
# depend on them. None of them changes what the optimizer's state holds.
STEERING = ("steps", "learning_rate", "optimizer.grad_clip", "optimizer.warmup_steps", "optimizer.schedule", "method.learning_rate")
LOCK_SECONDS = 60  # how long `lock` waits for another process to end


def settings(config: Config) -> dict[str, Any]:
    """By dotted name, the settings that a continued run shares with its beginning."""
    found: dict[str, Any] = {}
    for name, value in json.loads(to_json(config)).items():
        if name not in FREE_TO_CHANGE:
            found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def compare(before: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> list[str]:
    """What steers the rest of the run otherwise than before, a line each. Raises UserError when other `settings` differ."""
    changed = {k: f"{k} was {before[k]!r} and is now {v!r}" for k, v in now.items() if k in before and before[k] != v}
    fixed = [text for name, text in changed.items() if name not in STEERING]
    if fixed:
        raise UserError(f"{workdir} holds a run with other settings: {'; '.join(fixed)}. Use its settings, or another --workdir")
    return list(changed.values())


def check(config: Config, workdir: Path) -> None:
    """Raises UserError when `workdir` holds checkpoints of a run whose fixed settings differ, is its own `init_from`, or has a path that
    Orbax cannot write to; writes nothing.
    """
    if set("[]") & set(str(workdir.absolute())):  # it looks for its files by patterns, and would leave checkpoints that nobody can read
        raise UserError(f"--workdir={workdir}: a path with [ or ] cannot hold checkpoints; choose another")
    origin(config.init_from, workdir.resolve())
    path = workdir / "config.json"
    try:
        if path.exists() and any((workdir / "checkpoints").glob("*")):
            compare(settings(read_json(path)), settings(config), workdir)
    except OSError as error:
        raise UserError(f"cannot read the work directory {workdir}: {error}") from error


def lock(workdir: Path) -> contextlib.AbstractContextManager:
    """Makes the directory; until the file that this returns is closed, no other process trains there. For one process of the job.

    Raises UserError when another process keeps it for LOCK_SECONDS. In a bucket, and on a file system without locks, nothing is held: the
    file only says who was the last.
    """
    path, waited, me = workdir / "lock", 0, f"process {os.getpid()} on {socket.gethostname()}\n"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if isinstance(path, RemotePath):
            path.write_text(me, encoding="utf-8")
            return contextlib.nullcontext()
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to the work directory {workdir}: {error}") from error
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if waited >= LOCK_SECONDS:
                file.seek(0)
                holder = file.read().strip() or "that process"
                file.close()
                raise UserError(
                    f"another process trains in {workdir}: wait until it ends, or use another --workdir; if {holder} is gone, delete {path}"
                ) from error
            if not waited:
                print(f"another process trains in {workdir}: waiting up to {LOCK_SECONDS} s for its end", flush=True)
            waited += 1
            time.sleep(1)
        except OSError:
            break
    with contextlib.suppress(OSError):  # on a full disk it says nothing
        file.truncate(0)
        os.write(file.fileno(), me.encode())
        os.fsync(file.fileno())  # other hosts see it, too
    return file


def other_start(config: Config, workdir: Path) -> list[str]:
    """A line where a run that goes on names another `init_from` than its config.json, which only frozen networks are read from."""
    path = workdir / "config.json"
    before = read_json(path).init_from if path.exists() else config.init_from
    if before == config.init_from:
        return []
    return [f"init_from was {before!r} and is now {config.init_from!r}: the run goes on with the weights of its checkpoint"]


def begin(config: Config, workdir: Path) -> None:
    """Writes config.json and takes away DONE, once nothing speaks against the run; for one process of the job."""
    (workdir / "DONE").unlink(missing_ok=True)
    write_whole(workdir / "config.json", to_json(config))


def write_overview(workdir: Path, params: Params) -> None:
    """parameters.txt: name, shape and size of every weight."""
    from clu import parameter_overview

    (workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n", encoding="utf-8")


def check_position(saved: dict, expected: dict, directory: Path) -> None:
    """Refuses a checkpoint whose place in the data order means other clips now."""
    differs = [f"{k}: {saved.get(k)} then, {v} now" for k, v in expected.items() if saved.get(k) != v]
    if differs:
        raise CheckpointError(f"checkpoint {directory} was made with other data ({', '.join(differs)}); use the same, or another --workdir")


def check_pretrained(saved: Mapping[str, str], now: Mapping[str, str], directory: Path) -> None:
    """Refuses a checkpoint that was trained behind other frozen networks: {name: checksum of its weights}, of then and now."""
    differs = [name for name, value in now.items() if saved.get(name, value) != value]
    if differs:
        raise CheckpointError(
            f"checkpoint {directory} was made with another {' and '.join(differs)}: set init_from to the weights that the run began with, "
            "or use another --workdir"
        )


def is_done(workdir: Path, step: int | None) -> bool:
    """Whether `finish` was called for `step`, and nothing has begun since."""
    done = workdir / "DONE"
    return done.exists() and done.read_text(encoding="utf-8") == f"{step}\n"


def finish(workdir: Path, step: int) -> None:
    """Writes the report and the mark DONE, unless an earlier call did; for one process of the job."""
    if not is_done(workdir, step):
        with mirrored(workdir) as local:
            page = report.write(local)
        (workdir / "DONE").write_text(f"{step}\n", encoding="utf-8")
        print(f"done: {step} steps; {workdir / page.name}", flush=True)


@contextlib.contextmanager
def disk_errors_reported(workdir: Path) -> Iterator[None]:
    """A disk that is full, read-only or lost as a UserError (checkpoints report their own, stores are named already)."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"no space left for {workdir}: make room" if full else f"{workdir}: {error}: mend that"
        raise UserError(f"{reason}, then run the same command again; checkpoints are whole") from error
