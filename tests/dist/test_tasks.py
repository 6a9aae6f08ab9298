"""Which share of the offline job: what SLURM, Kubernetes, TPU pods and JAX launchers tell their processes."""

import pytest

from motif_jax.errors import UserError
from motif_jax.dist.tasks import share


def array(number, first, last, count):
    names = ("ID", "MIN", "MAX", "COUNT")
    return {f"SLURM_ARRAY_TASK_{n}": str(v) for n, v in zip(names, (number, first, last, count), strict=True)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        (array(0, 0, 9, 10), (0, 10)),
        (array(3, 1, 8, 8), (2, 8)),  # --array=1-8
        (array(12, 4, 16, 4), (2, 4)),  # --array=4-16:4
        (array(7, 7, 7, 1), (0, 1)),
        (array(2, 0, 9, 10) | {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n", "SLURM_PROCID": "3"}, (2, 10)),  # the array comes first
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[0-3]", "SLURM_PROCID": "3"}, (3, 4)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # the batch script itself, not a step
        ({"JOB_COMPLETION_INDEX": "5", "MOTIF_TASK_COUNT": "16", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (5, 16)),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, (2, 4)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
        ({"MOTIF_PROCESS_INDEX": "1", "MOTIF_PROCESS_COUNT": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, (1, 3)),
    ],
)
def test_shares(environment, expected):
    assert share(environment | {"JAX_PLATFORMS": "cpu"}) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_MIN=None"),
        (array(4, 1, 8, 3), "a SLURM array of 3 tasks from 1 to 8 has gaps"),  # --array=1,4,8: also to the task that would fit
        (array(3, 1, 7, 3), "has gaps"),  # --array=1,3,7
        ({"JOB_COMPLETION_INDEX": "0"}, "MOTIF_TASK_COUNT=None: must be a number"),
        ({"JOB_COMPLETION_INDEX": "0", "MOTIF_TASK_COUNT": "many"}, "MOTIF_TASK_COUNT='many'"),
    ],
)
def test_what_is_missing_is_named(environment, message):
    with pytest.raises(UserError, match=message):
        share(environment | {"JAX_PLATFORMS": "cpu"})
