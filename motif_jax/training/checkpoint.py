"""Checkpoints {state, data, meta} through Orbax; no other module imports orbax.

`data` is the position in the data order (a step, the global batch, the seed, the dataset's fingerprint): it must agree
with the run that restores it, or the run is refused.
"""

import pathlib
from typing import Any

import jax

from motif_jax.config import CheckpointConfig, UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not belong to this run."""


def latest_step(workdir: str | pathlib.Path) -> int | None:
    """The newest complete checkpoint of a work directory, if there is one; changes nothing on disk."""
    import orbax.checkpoint as ocp

    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    return max(ocp.utils.checkpoint_steps(directory), default=None) if directory.is_dir() else None


class Checkpoints:
    """The directory `<workdir>/checkpoints`: asynchronous saves, newest `keep` kept (and every `keep_every`-th)."""

    def __init__(self, workdir: str | pathlib.Path, config: CheckpointConfig | None = None, read_only: bool = False) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policy

        config = config or CheckpointConfig()
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        keep = [policy.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policy.EveryNSteps(config.keep_every))
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,  # what a killed process left half written
                read_only=read_only,
                create=not read_only,
                enable_async_checkpointing=True,
            ),
        )

    def save(self, step: int, state: Any, data: dict, meta: dict) -> None:
        """Starts a save; returns once the arrays are copied. A step that is already saved is left alone."""
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(state=args.StandardSave(state), data=args.JsonSave(data), meta=args.JsonSave(meta)),
            force=True,
        )

    def restore(self, step: int, template: Any) -> tuple[Any, dict, dict]:
        """(state, data, meta) of `step`; `template` gives shapes, types and shardings. Raises CheckpointError."""
        args = self._ocp.args
        try:
            found = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(template), data=args.JsonRestore(), meta=args.JsonRestore())
            )
        except Exception as error:  # Orbax and tensorstore raise many kinds; all mean the same to a user.
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be restored: {error}\n"
                f"Move that directory away to continue from the one before it (steps here: {sorted(self._manager.all_steps())})."
            ) from error
        return found.state, found.data, found.meta

    def restore_weights(self, step: int, names: tuple[str, ...]) -> dict[str, dict[str, jax.Array]]:
        """Only the parameter dicts `names` (of "params", "ema") of `step`, on the host's first device."""
        args, ocp = self._ocp.args, self._ocp
        try:
            handler = ocp.PyTreeCheckpointHandler()
            directory = self.directory / str(step) / "state"
            tree = handler.metadata(directory).tree
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = {
                n: jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), tree[n]) for n in names if tree.get(n)
            }
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            return handler.restore(directory, args=args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True))
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.directory / str(step)} cannot be read: {error}") from error

    def close(self) -> None:
        """Waits for a save that is under way."""
        self._manager.close()
