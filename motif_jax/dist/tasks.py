"""Which share of an offline job is this process's: environment variables in; (index, count) out."""

import os
from collections.abc import Mapping

from motif_jax.errors import UserError
from motif_jax.dist import startup

TASK_COUNT = "MOTIF_TASK_COUNT"  # Kubernetes tells a pod its index, but not of how many
# How the processes of a JAX job are numbered; tasks share no state, so they need not join it.
_PROCESSES = {
    "explicit": (startup.INDEX, startup.COUNT),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


def share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(index, count) in a SLURM array, a Kubernetes indexed job, or among the processes of a JAX job; (0, 1) for a process on its own.

    Raises UserError when the variables do not say both.
    """
    if "SLURM_ARRAY_TASK_ID" in environment:
        number, first, last, count = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT"))
        step = max(1, (last - first) // max(count - 1, 1))
        if first + step * (count - 1) != last or (number - first) % step:
            raise UserError(
                f"a SLURM array of {count} tasks from {first} to {last} has gaps: pass --task_index and --task_count, or run the whole "
                "array again, which skips what is done"
            )
        return (number - first) // step, count
    if "JOB_COMPLETION_INDEX" in environment:
        return _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, TASK_COUNT)
    kind = startup.cluster(environment)
    if kind in _PROCESSES:
        index, count = _PROCESSES[kind]
        return _number(environment, index), _number(environment, count)
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return _number(environment, "TPU_WORKER_ID"), environment["TPU_WORKER_HOSTNAMES"].count(",") + 1
    return 0, 1


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise UserError(f"{name}={environment.get(name)!r}: must be a number; or pass --task_index and --task_count") from None
