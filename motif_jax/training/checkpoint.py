"""Checkpoints {state, data, meta} through Orbax; no other module imports orbax.

`data` is the position in the data order (a step, the global batch, the seed, the dataset's fingerprint): it must agree
with the run that restores it, or the run is refused. `meta` holds checksums of the arrays, which are compared on reading.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from motif_jax.config import CheckpointConfig
from motif_jax.data.storage import Path
from motif_jax.errors import StoreError, UserError, enumerate_first

FIELDS = ("step", "params", "ema", "opt_state")  # of the state


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written, or does not belong to this run."""


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """uint32: every 32-bit word of x times a weight of its position, summed modulo 2^32; the same for any sharding."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        position = position * np.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


def _checksums(state: dict[str, Any]) -> dict[str, list[jax.Array]]:
    """`_checksum` of every array, by field, still on the device: an accelerator may not have computed them yet."""

    def one(x: jax.Array) -> jax.Array:
        # On CPU several programs with collectives, run at once, can deadlock.
        alone = jax.default_backend() != "cpu" or not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1
        return _checksum(x) if alone else jax.block_until_ready(_checksum(x))

    return {name: [one(x) for x in jax.tree.leaves(tree)] for name, tree in state.items()}


def _digests(sums: dict[str, list[jax.Array]]) -> dict[str, str]:
    """One hexadecimal number per field, over the checksums of its arrays in whatever order."""
    sums = jax.device_get(sums)
    return {name: hashlib.sha256(np.sort(np.asarray(found, np.uint32)).tobytes()).hexdigest() for name, found in sums.items()}


def checksums(state: dict[str, Any]) -> dict[str, str]:
    """One hexadecimal number per field of the state, over the bits of its arrays in whatever order."""
    return _digests(_checksums(state))


@functools.cache
def _copier(shardings: tuple[jax.sharding.Sharding, ...]) -> Callable:
    return jax.jit(lambda x: x, out_shardings=shardings)


def _on_host(x: jax.Array) -> jax.sharding.Sharding:
    """Where the copy of `x` lies: in the hosts' memory, once, also where several devices hold the same part of a kernel."""
    sharding = x.sharding.with_memory_kind("pinned_host")
    if x.ndim < 2 or not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    mesh, spec = sharding.mesh, [(a,) if isinstance(a, str) else a or () for a in (*sharding.spec, *[None] * x.ndim)[: x.ndim]]
    copies = tuple(axis for axis, size in mesh.shape.items() if size > 1 and not any(axis in axes for axes in spec))
    for i, size in enumerate(x.shape):
        if copies and size % math.prod(mesh.shape[axis] for axis in (*spec[i], *copies)) == 0:
            spec[i] = (*spec[i], *copies)
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(axes or None for axes in spec)), memory_kind="pinned_host")
    return sharding


def _copies_on_host(state: Any) -> Any:
    """The arrays of a tree, copied to the host's memory by the device, which does so after what it was given before."""
    leaves, structure = jax.tree.flatten(state)
    copies = []
    for i in range(0, len(leaves), 256):  # compiling takes a time that grows with the square
        part = tuple(leaves[i : i + 256])
        copies += _copier(tuple(map(_on_host, part)))(part)
    return structure.unflatten(copies)


def _reason(error: Exception) -> str:
    """The first line of an error's text, without the settings of a whole database that TensorStore adds to it."""
    return re.split(r" \[tensorstore_spec| See full TensorStore", str(error).strip().partition("\n")[0])[0]


def _fields(state: Any) -> dict[str, Any]:
    return {name: getattr(state, name) for name in FIELDS}


def state_checksums(state: Any) -> dict[str, str]:
    """`checksums` of a TrainState. The first call compiles one small program per shape."""
    return checksums(_fields(state))


def _compare(found: dict[str, str], meta: dict) -> None:
    wrong = [name for name, value in found.items() if meta["checksums"].get(name) != value]
    if wrong:
        raise ValueError(f"the content of {', '.join(wrong)} is not what was saved (checksum)")


def latest_step(workdir: Path) -> int | None:
    """The newest complete checkpoint of a work directory, if there is one; changes nothing on disk."""
    return max(_steps(workdir.absolute() / "checkpoints"), default=None)


def _steps(directory: Path) -> list[int]:
    import orbax.checkpoint as ocp

    return sorted(ocp.utils.checkpoint_steps(str(directory))) if directory.is_dir() else []


def unfinished(workdir: Path) -> list[str]:
    """Names of what a killed process left half written; Orbax removes them when it opens the directory."""
    directory = workdir.absolute() / "checkpoints"
    if isinstance(directory, pathlib.Path):
        return sorted(path.name for path in directory.glob("*.orbax-checkpoint-tmp*"))
    whole = _steps(directory)  # in a store, where nothing is renamed, it has its final name and lacks a mark
    return sorted(path.name for path in directory.glob("*") if path.name.isdigit() and int(path.name) not in whole)


def set_damaged_aside(workdir: Path) -> list[str]:
    """Moves the newest checkpoints that cannot be read to `<workdir>/damaged`, down to one that can; returns why, one line each.

    For one process of the job, before `Checkpoints` opens the directory. Raises CheckpointError, and moves nothing, when none can be read,
    or when one cannot for a reason that says nothing about it, such as too little memory.
    """
    workdir, damaged = workdir.absolute(), {}
    for step in reversed(_steps(workdir / "checkpoints")):
        path = workdir / "checkpoints" / str(step)
        try:
            for name in FIELDS:  # one after the other: together they may not fit into a host's memory
                read_arrays(path, (name,), np.ndarray)
            break
        except CheckpointError as error:
            reason = _reason(error.__cause__)
            if _is_no_damage(error.__cause__):
                text = f"could not be read ({reason}), which is no damage: none is set aside; try again"
                raise CheckpointError(f"checkpoint {path.name} in {workdir} {text}") from error
            damaged[path] = f"checkpoint {path} cannot be read: {reason}"
    else:
        if damaged:
            text = f"{workdir} holds no checkpoint that can be read: begin anew with another --workdir"
            raise CheckpointError("\n".join([*damaged.values(), text]))
    reasons = []
    for path, reason in damaged.items():
        (workdir / "damaged").mkdir(exist_ok=True)
        names = (workdir / "damaged" / (f"{path.name}-{n}" if n else path.name) for n in itertools.count())
        reasons.append(f"{reason}; moved to {path.replace(next(name for name in names if not name.exists()))}")
    return reasons


def _is_no_damage(error: BaseException | None) -> bool:
    """Whether a failed read says nothing about the checkpoint: too little memory, no permission, a store that does not answer."""
    codes = "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED"
    return isinstance(error, MemoryError | PermissionError | TimeoutError | StoreError) or re.search(codes, str(error)) is not None


def read_arrays(directory: Path, names: tuple[str, ...], kind: type = jax.Array) -> dict[str, Any]:
    """The fields `names` of the state in the directory of one checkpoint, on this host (NumPy) or its first device, and checked.

    Empty fields are left out. Needs no mesh and no other process. Raises CheckpointError.
    """
    import orbax.checkpoint as ocp

    directory = directory.absolute()
    meta = read_meta(directory)
    try:
        handler = ocp.PyTreeCheckpointHandler()
        state = epath.Path(str(directory / "state"))
        tree = handler.metadata(state).tree
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {n: jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree[n]) for n in names if tree.get(n)}
        if kind is np.ndarray:
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        else:
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        with _quietly():
            found = handler.restore(state, args=args) if wanted else {}
        _compare(checksums({name: {} for name in names} | found), meta)  # a field that is not there must have been empty
    except Exception as error:  # Orbax and tensorstore raise many kinds; all mean the same to a user.
        raise CheckpointError(f"checkpoint {directory} cannot be read: {_reason(error)}{_instead(directory)}") from error
    return found


def read_meta(directory: Path) -> dict[str, Any]:
    """The meta in the directory of one checkpoint. Raises CheckpointError."""
    try:
        return json.loads((directory / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {directory} cannot be read: {error}{_instead(directory)}") from error


def _instead(directory: Path) -> str:
    """What to do when the checkpoint in `directory` cannot be read."""
    others = [step for step in _steps(directory.parent) if str(step) != directory.name]
    nearest = f"; name another one, such as {directory.parent / str(others[-1])}" if others else ""
    return f"{nearest}; to train on, --config.checkpoint.fallback=True sets it aside" if others else ""


def _differences(directory: Path, template: Any) -> list[str]:
    """Names of what the state in the directory of one checkpoint and `template` do not both have in the same shape."""
    import orbax.checkpoint as ocp

    def shapes(tree: Any) -> dict[str, Any]:
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: not (isinstance(x, dict | list) and x))
        return {jax.tree_util.keystr(path, simple=True, separator="."): getattr(x, "shape", None) for path, x in leaves}

    try:
        saved = shapes(ocp.PyTreeCheckpointHandler().metadata(epath.Path(str(directory / "state"))).tree)
    except Exception:  # damaged, which is another matter
        return []
    expected = shapes(ocp.tree.serialize_tree(template, keep_empty_nodes=True))
    return sorted({name for name, _ in saved.items() ^ expected.items()})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences the logs of Orbax' threads and event loops. After a failure they stay silent, because these threads report it much later."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    yield
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Checkpoints:
    """The directory `<workdir>/checkpoints`: asynchronous saves, newest `keep` kept (and every `keep_every`-th).

    A save queues the checksums and a copy of the state to the host's memory on the device, behind the last step, and returns. All of Orbax
    runs in another thread, because its Python work per array, for thousands of arrays, takes as long as several steps. There processes
    synchronize through JAX's coordination service, and not by collectives, which would mix with those of the steps.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policy

        class Manager(ocp.CheckpointManager):
            def reached_preemption(self, step: int) -> bool:
                return False  # dist/preemption.py asks, by a counter of its own, which another counter would disturb

        self.directory = workdir.absolute() / "checkpoints"
        keep = [policy.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policy.EveryNSteps(config.keep_every))
        self._args = ocp.args
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future = concurrent.futures.Future()
        self._saving.set_result(None)
        with self._reported():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = Manager(
                str(self.directory),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy.AnyPreservationPolicy(keep),
                    create=False,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=False,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count()))),
                ),
            )

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # also one from the thread that writes
            late = "DEADLINE_EXCEEDED" in str(error)
            remedy = "Another process of the job did not come in time: see what it printed" if late else "Make room or mend the file system"
            raise CheckpointError(
                f"cannot write checkpoints in {self.directory}: {_reason(error)}\n"
                f"{remedy}, then run the same command again; whole checkpoints there: {_steps(self.directory)}"
            ) from error

    def prepare(self, state: Any) -> None:
        """Compiles what a save runs on the device, so that the first one does not hold up the loop."""
        jax.block_until_ready((_copies_on_host(state), _checksums(_fields(state))))

    def save(self, step: int, state: Any, data: dict, meta: dict, before: Callable[[], None] = lambda: None) -> None:
        """Starts a save, after what `before` does; `state` may be donated to the next step.

        Waits for the save before, and raises CheckpointError if that failed.
        """
        self.wait()
        sums, copy, args = _checksums(_fields(state)), _copies_on_host(state), self._args

        def write() -> None:
            items = {"state": args.StandardSave(copy), "data": args.JsonSave(data)}
            items["meta"] = args.JsonSave(meta | {"checksums": _digests(sums)})
            interval = sys.getswitchinterval()
            sys.setswitchinterval(2e-4)  # else the loop waits 5 ms each of the many times that a step needs the interpreter
            try:
                before()
                with _quietly():
                    self._manager.save(step, args=args.Composite(**items), force=True)
            finally:
                sys.setswitchinterval(interval)

        self._saving = self._thread.submit(write)

    def restore(self, step: int, template: Any) -> tuple[Any, dict, dict]:
        """(state, data, meta) of `step`; `template` gives shapes, types and shardings. Raises CheckpointError."""
        args, directory = self._args, self.directory / str(step)
        items = args.Composite(state=args.StandardRestore(template), data=args.JsonRestore(), meta=args.JsonRestore())
        try:
            with _quietly():
                found = self._manager.restore(step, args=items)
            _compare(state_checksums(found.state), found.meta)
        except Exception as error:
            if differs := _differences(directory, template):
                fit = not any(name.startswith("params") for name in differs)
                raise CheckpointError(
                    f"checkpoint {directory} holds another training state than this code makes ({enumerate_first(differs, 3, ', ')}): it "
                    f"was written by another version of motif_jax ({read_meta(directory).get('version', 'unknown')}) or with another "
                    "network or optimizer. Continue with that, or use another --workdir"
                    + (f"; --config.init_from={self.directory.parent} takes over its weights there" if fit else "")
                ) from error
            others = [found for found in _steps(self.directory) if found != step]
            remedy = "There is no other one here: begin anew with another --workdir"
            if others:
                remedy = f"--config.checkpoint.fallback=True continues from the newest one that can (others here: {others})"
            raise CheckpointError(f"checkpoint {directory} cannot be restored: {_reason(error)}\n{remedy}") from error
        return found.state, found.data, found.meta

    def wait(self) -> None:
        """Returns when what was saved is on disk. Raises CheckpointError."""
        with self._reported():
            self._saving.result()

    def check(self) -> None:
        """Raises CheckpointError if a save that is under way has failed."""
        if self._saving.done():
            self.wait()

    def close(self) -> None:
        """Waits for a save that is under way."""
        self._thread.shutdown()
        with self._reported():
            self._manager.close()
