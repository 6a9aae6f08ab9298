"""What starts a job, read off the environment; what processes disagree about."""

import pathlib
import platform
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from motif_jax.errors import UserError
from motif_jax.dist import startup

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, ""),
        ({"MOTIF_PROCESS_COUNT": "2", "MOTIF_PROCESS_INDEX": "0", **SLURM}, "explicit"),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[001-002]"}, "slurm"),
        (SLURM, ""),  # the batch script itself, before srun
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node001"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),  # a pod of no job, such as a notebook
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_cluster(environment, kind):
    assert startup.cluster({"JAX_PLATFORMS": "cpu"} | environment) == kind


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MOTIF_PROCESS_INDEX": "1"}, "set JAX_COORDINATOR_ADDRESS, MOTIF_PROCESS_COUNT as well"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "MOTIF_PROCESS_COUNT": "two", "MOTIF_PROCESS_INDEX": "0"}, "'two'.*must be whole numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "MOTIF_PROCESS_COUNT": "2", "MOTIF_PROCESS_INDEX": "2"}, "'2': the processes of a job are"),
    ],
)
def test_variables_that_cannot_be(environment, message):
    with pytest.raises(UserError, match=message):
        startup.join(environment)


def test_a_process_that_fails_is_gone_at_once_though_nobody_reads_why(monkeypatch):
    def leave(status):
        raise SystemExit(status)

    for name in ("join", "keep_memory"):
        monkeypatch.setattr(startup, name, lambda: None)
    monkeypatch.setattr(startup.os, "_exit", leave)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("builtins.print", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit), startup.job():
        raise UserError("reason")


def test_the_odd_one_out_is_named():
    everyone = [{"host": f"h{i}", "the data": "aaaa", "the code": "1" if i != 2 else "2"} for i in range(4)]
    assert startup.compare(everyone) == ["the code: process 2 on h2 has 2; 3 of 4 have 1"]
    assert startup.compare(everyone[:2]) == []


def test_a_fact_that_only_some_have():
    assert startup.compare([{"host": "a", "x": "1"}, {"host": "b"}, {"host": "c", "x": "1"}]) == [
        "x: process 1 on b has nothing; 2 of 3 have 1"
    ]


def test_a_fact_may_name_the_longest_path(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.stack([x, x]))
    startup.agree({f"the newest checkpoint in {'/日本語' * 409}": "7"})


def test_code_version_follows_the_sources(tmp_path, monkeypatch):
    version = startup.code_version()
    assert "dist/startup.py" in version and '"jax"' in version
    copy = tmp_path / "motif_jax"
    shutil.copytree(pathlib.Path(startup.__file__).parents[1], copy)
    monkeypatch.setattr(startup, "__file__", str(copy / "dist" / "startup.py"))
    assert startup.code_version() == version
    with (copy / "main.py").open("a") as file:
        file.write("\n")
    assert startup.digest(startup.code_version()) != startup.digest(version)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone can be told")
def test_a_step_on_cpu_needs_no_fresh_pages():
    """What a computation needs besides arguments and results, 36 MiB here, is asked from the kernel once and not for every call."""
    script = """
import resource, sys
from motif_jax.dist import startup
if sys.argv[1] == "keep":
    startup.keep_memory()
import jax, jax.numpy as jnp
x = jnp.arange(3072.0)
step = jax.jit(lambda x: jnp.sum(jnp.sort(jnp.sin(x)[:, None] + x, axis=0) ** 2)).lower(x).compile()
assert step.memory_analysis().temp_size_in_bytes >= 4 * 3072**2
pages = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages[1:]) * resource.getpagesize())
"""
    command = [sys.executable, "-c", script]
    fresh, kept = (int(subprocess.run([*command, how], check=True, capture_output=True, text=True).stdout) for how in ("leave", "keep"))
    assert kept < 2**20 < 2**25 < fresh
