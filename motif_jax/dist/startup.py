"""Several processes, one job: joining it, agreeing on what is run, and leaving it so that no one waits for the dead.

Found by themselves: TPU pods (VMs and GKE), SLURM, Open MPI, Kubernetes jobs (with the package `kubernetes`); any other set-up says
where the first process is and who this one is (`ADDRESS`, `COUNT`, `INDEX`).
"""

import collections
import contextlib
import ctypes
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping

import numpy as np

from motif_jax.errors import StoreError, UserError, enumerate_first

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "MOTIF_PROCESS_COUNT", "MOTIF_PROCESS_INDEX"  # host:port of process 0
HEARTBEAT = "MOTIF_HEARTBEAT_SECONDS"  # a process that is silent for so long is dead, and the job ends
VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
TEXT_BYTES = 8192  # room for the facts of one process, which travel as one array; one may name a path, of 4096 bytes at most


def cluster(env: Mapping[str, str]) -> str:
    """What starts the processes of this job: "explicit", "slurm", "mpi", "kubernetes", "tpu", or "" for a process on its own."""
    if COUNT in env or INDEX in env:
        return "explicit"
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env:  # a step made by srun, not the batch script itself
        return "slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "mpi"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "," in env.get("TPU_PROCESS_ADDRESSES", ""):
        return "tpu"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "kubernetes"
    on_tpu = env.get("JAX_PLATFORMS", "tpu").startswith("tpu") and "TPU_SKIP_MDS_QUERY" not in env
    return "tpu" if on_tpu and (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")) else ""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """`jax.distributed.initialize` where there is a job to join; call it before anything that touches a device.

    Raises UserError on incomplete variables, and when the others cannot be reached.
    """
    import jax

    kind = cluster(environment)
    if not kind:
        return
    arguments = {}
    if kind == "explicit":
        absent = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
        if absent:
            raise UserError(f"several processes: set {', '.join(absent)} as well (docs/training.md)")
        given = f"{COUNT}={environment[COUNT]!r}, {INDEX}={environment[INDEX]!r}"
        try:
            count, index = int(environment[COUNT]), int(environment[INDEX])
        except ValueError:
            raise UserError(f"{given}: must be whole numbers") from None
        if not 0 <= index < count:
            raise UserError(f"{given}: the processes of a job are numbered from 0 to its count less one")
        arguments = {"coordinator_address": environment[ADDRESS], "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=int(environment.get(HEARTBEAT, 30)))
    except ValueError as error:
        if kind == "tpu" and "coordinator_address" in str(error):
            return  # a single TPU machine outside of any pod
        asks = " (JAX asks the cluster: this needs the package kubernetes, and permission to read jobs and pods)" * (kind == "kubernetes")
        raise UserError(f"joining the job ({kind}): {error}{asks}; or set {ADDRESS}, {COUNT} and {INDEX} (docs/training.md)") from error
    except RuntimeError as error:
        raise UserError(f"joining the job ({kind}): {error}") from error


def keep_memory() -> None:
    """Keeps the memory that a step frees in the process, on CPU with glibc; on every platform the CPU's work is dispatched synchronously.

    XLA asks for a step's temporaries anew each time, and pages fresh from the kernel take their time (docs/speed.md). Only glibc's
    main heap keeps so large a piece, and only the main thread allocates from it, so that is where steps have to run:
    without asynchronous dispatch they do, if their arguments are ready. For before anything touches a device.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def job() -> Iterator[None]:
    """Joins the job, and leaves it at the end of the block; `keep_memory` holds in it.

    A process of several that fails says why and is gone at once: an orderly exit would wait for the others, who wait for it
    in a collective; its death ends theirs.
    """
    join()
    keep_memory()
    import jax

    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, UserError | StoreError) else traceback.format_exc()
        try:
            sys.stdout.flush()
            print(f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {reason}", file=sys.stderr, flush=True)
        finally:  # also when nobody reads it any more
            os._exit(1)
    jax.distributed.shutdown()


def digest(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def code_version() -> str:
    """The package's sources by name and hash, and the versions of what computes."""
    root = pathlib.Path(__file__).parents[1]
    sources = {str(path.relative_to(root)): digest(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    return json.dumps(sources | {name: importlib.metadata.version(name) for name in VERSIONS})


def agree(facts: Mapping[str, str]) -> None:
    """Compares `facts` (name -> hash or short text) over all processes. Raises UserError on each, naming fact and processes that differ."""
    import jax

    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text = json.dumps({"host": socket.gethostname()} | dict(facts), ensure_ascii=False).encode()
    mine = np.zeros(TEXT_BYTES, np.uint8)
    mine[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(multihost_utils.process_allgather(mine))]
    disagreements = compare(everyone)
    if disagreements:
        raise UserError("the processes do not run the same thing:\n  " + "\n  ".join(disagreements))


def check_shared(directory: pathlib.Path) -> None:
    """Returns when every process has come here. Raises UserError on each unless all see in `directory` what process 0 writes there.

    A directory of the same name on every host would pass for a new run, and fail at the first save.
    """
    import jax

    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    # A name that no host has asked for before: file systems remember for a while what was not there.
    drawn = np.random.default_rng().integers(2**31, dtype=np.int32)
    mine = directory / f"shared-{drawn}"
    try:
        if jax.process_index() == 0:
            mine.write_text("", encoding="utf-8")
        mark = directory / f"shared-{multihost_utils.broadcast_one_to_all(drawn)}"  # of process 0, whose file is there by now
        agree({f"a new file in {directory} (is it on a file system that all share?)": "it" if mark.exists() else "nothing"})
    finally:
        if jax.process_index() == 0:
            mine.unlink(missing_ok=True)


def compare(everyone: list[dict[str, str]]) -> list[str]:
    """One line per fact that is not the same in all of `everyone`, the facts of each process with its "host"."""
    lines = []
    for name in everyone[0].keys() - {"host"}:
        values = [facts.get(name, "nothing") for facts in everyone]
        usual, count = collections.Counter(values).most_common(1)[0]
        if count < len(values):
            odd = [f"process {i} on {f['host']} has {v[:16]}" for i, (f, v) in enumerate(zip(everyone, values, strict=True)) if v != usual]
            lines.append(f"{name}: {enumerate_first(odd, 8, ', ')}; {count} of {len(values)} have {usual[:16]}")
    return sorted(lines)
