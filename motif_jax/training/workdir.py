"""The work directory of a run: its configuration on disk, what a continued run must share with it, and its closing marks."""

import contextlib
import errno
import hashlib
import json
import pathlib
from collections.abc import Iterator

from motif_jax import report
from motif_jax.config import Config, UserError, from_json, to_json
from motif_jax.models.networks import Params
from motif_jax.training.checkpoint import CheckpointError

# A run may be continued with other values of these; everything else decides what the parameters become.
FREE_TO_CHANGE = (
    "steps",
    "log_every",
    "checkpoint",
    "eval",
    "sample",
    "profile",
    "mesh",
    "remat",
    "attention",
    "init_from",
    "data",
    "prepare",
    "name",
)


def run_fingerprint(config: Config) -> str:
    """sha256 over the settings that a continued run must share with its beginning."""
    fixed = {k: v for k, v in json.loads(to_json(config)).items() if k not in FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError when `workdir` holds checkpoints of a run whose fixed settings differ; writes nothing."""
    path = workdir / "config.json"
    try:
        if path.exists() and (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
            before = from_json(path.read_text())
            if run_fingerprint(before) != run_fingerprint(config):
                old, new = json.loads(to_json(before)), json.loads(to_json(config))
                changed = [k for k in new if k not in FREE_TO_CHANGE and old[k] != new[k]]
                raise UserError(
                    f"{workdir} holds a run with other settings ({', '.join(changed)} differ); use its settings, or another --workdir"
                )
    except OSError as error:
        raise UserError(f"cannot read the work directory {workdir}: {error}") from error


def prepare(config: Config, workdir: pathlib.Path) -> None:
    """Makes the directory and writes config.json; for one process of the job. Raises UserError."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(to_json(config))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write to the work directory {workdir}: {error}") from error


def write_overview(workdir: pathlib.Path, params: Params) -> None:
    """parameters.txt: name, shape and size of every weight."""
    from clu import parameter_overview

    (workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")


def check_position(saved: dict, expected: dict, directory: pathlib.Path) -> None:
    """Refuses a checkpoint whose place in the data order means other clips now."""
    differs = [f"{k}: {saved.get(k)} then, {v} now" for k, v in expected.items() if saved.get(k) != v]
    if differs:
        raise CheckpointError(f"checkpoint {directory} was made with other data ({', '.join(differs)}); use the same, or another --workdir")


def finish(workdir: pathlib.Path, step: int) -> None:
    """Writes the report and the mark DONE, unless an earlier call did; for one process of the job."""
    done = workdir / "DONE"
    if not (done.exists() and done.read_text() == f"{step}\n"):
        page = report.write(workdir)
        done.write_text(f"{step}\n")
        print(f"done: {step} steps; {page}", flush=True)


@contextlib.contextmanager
def full_disk_reported(workdir: pathlib.Path) -> Iterator[None]:
    """A full disk under metrics, samples or report as a UserError (checkpoints report their own)."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left for {workdir}: make room, then run the same command again; checkpoints are whole") from error
