"""Checkpoints: back bit for bit, whole or parts; damage is found, named and set aside only on request; a full disk loses nothing."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.config import CheckpointConfig
from motif_jax.training import checkpoint
from motif_jax.training import state as train_state
from motif_jax.training.checkpoint import CheckpointError, Checkpoints
from motif_jax.training.optimizer import make_optimizer

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(tiny, seed, size=64):
    key = jax.random.key(seed)
    params = {f"{name}.kernel": jax.random.normal(jax.random.fold_in(key, i), (size, 8)) for i, name in enumerate("abc")}
    return train_state.create(params, make_optimizer(tiny()), True)


def template(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), state)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tiny, tmp_path):
    """Three checkpoints; returns (workdir, states by step)."""
    states = {step: make_state(tiny, step) for step in (10, 20, 30)}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=3))
    for step, state in states.items():
        checkpoints.save(step, state, {"step": step}, {"note": "x"})
    checkpoints.close()
    return tmp_path, states


def largest(workdir, step):
    """The largest file of a checkpoint's arrays."""
    return max((p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(workdir, step):
    """Flips bits in the middle of it."""
    path = largest(workdir, step)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(b ^ 255 for b in content[middle : middle + 64])
    path.write_bytes(content)


def test_restored_bit_for_bit(saved):
    workdir, states = saved
    assert checkpoint.latest_step(workdir) == 30
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))
    for step, state in states.items():
        found, data, meta = checkpoints.restore(step, template(state))
        assert_equal(found, state)
        assert data == {"step": step} and meta["note"] == "x"
    checkpoints.close()


@pytest.mark.parametrize("kind", [jax.Array, np.ndarray])
def test_parameters_only(saved, kind):
    workdir, states = saved
    found = checkpoint.read_arrays(workdir / "checkpoints" / "20", ("params",), kind)
    assert set(found) == {"params"} and all(isinstance(x, kind) for x in found["params"].values())
    assert_equal(found["params"], states[20].params)


def test_a_relative_path(saved, monkeypatch):
    workdir, states = saved
    monkeypatch.chdir(workdir.parent)
    path = pathlib.Path(workdir.name) / "checkpoints" / "20"
    assert_equal(checkpoint.read_arrays(path, ("params",))["params"], states[20].params)


def test_the_loop_goes_on_while_orbax_writes(tiny, tmp_path, monkeypatch):
    """`save` returns before Orbax has begun, the next step may have the state's memory, and what is written is the state of the save."""
    checkpoints, may_write = Checkpoints(tmp_path, CheckpointConfig()), threading.Event()
    write = checkpoints._manager.save

    def held_up(*args, **kwargs):
        assert may_write.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoints._manager, "save", held_up)
    state, kept = make_state(tiny, 0), make_state(tiny, 0)
    checkpoints.save(10, state, {}, {})
    next_state = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)(state)
    jax.block_until_ready(next_state)
    assert state.params["a.kernel"].is_deleted() and checkpoint.latest_step(tmp_path) is None
    may_write.set()
    checkpoints.wait()
    assert_equal(checkpoints.restore(10, template(kept))[0], kept)
    checkpoints.close()


def test_damage_is_named(saved):
    workdir, states = saved
    damage(workdir, 30)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))
    with pytest.raises(CheckpointError, match=r"checkpoints/30 cannot be restored(.|\n)*checkpoint\.fallback=True"):
        checkpoints.restore(30, template(states[30]))
    checkpoints.close()
    with pytest.raises(CheckpointError, match="checkpoints/30"):
        checkpoint.read_arrays(workdir / "checkpoints" / "30", ("params", "ema", "opt_state"))


@pytest.mark.parametrize(("field", "remedy"), [("opt_state", True), ("params", False)])
def test_another_state_is_not_called_damaged(saved, field, remedy):
    """A new run can start from the weights of one that has the same."""
    workdir, states = saved
    other = dataclasses.replace(states[30], **{field: {"x": jnp.zeros(3)}})
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))
    with pytest.raises(CheckpointError, match="checkpoints/30 holds another training state") as found:
        checkpoints.restore(30, template(other))
    checkpoints.close()
    assert f"{field}." in str(found.value) and "fallback" not in str(found.value) and ("init_from" in str(found.value)) == remedy


def test_content_is_compared_with_its_checksum(saved):
    """Also where every file can be read: here the reader is given another checkpoint's arrays."""
    workdir, states = saved
    state, other = workdir / "checkpoints" / "30" / "state", workdir / "checkpoints" / "20" / "state"
    state.rename(workdir / "away")
    subprocess.run(["cp", "-r", other, state], check=True)
    with pytest.raises(CheckpointError, match="content of params is not what was saved"):
        checkpoint.read_arrays(workdir / "checkpoints" / "30", ("params",))
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))
    with pytest.raises(CheckpointError, match=r"cannot be restored: the content of .* is not what was saved"):
        checkpoints.restore(30, template(states[30]))
    checkpoints.close()


def test_damaged_ones_are_set_aside_on_request(saved):
    workdir, _ = saved
    for step in (20, 30):
        damage(workdir, step)
    (workdir / "damaged" / "30").mkdir(parents=True)  # of another time
    reasons = checkpoint.set_damaged_aside(workdir)
    assert len(reasons) == 2 and "checkpoints/30" in reasons[0] and "checkpoints/20" in reasons[1] and "fallback" not in "".join(reasons)
    assert checkpoint.latest_step(workdir) == 10
    assert sorted(p.name for p in (workdir / "damaged").iterdir()) == ["20", "30", "30-1"] and "damaged/30-1" in reasons[0]
    assert checkpoint.set_damaged_aside(workdir) == []


def test_nothing_is_left_to_fall_back_to(saved):
    workdir, _ = saved
    for step in (10, 20, 30):
        damage(workdir, step)
    with pytest.raises(CheckpointError, match="holds no checkpoint that can be read") as nothing:
        checkpoint.set_damaged_aside(workdir)
    assert "name another" not in str(nothing.value)
    assert checkpoint.latest_step(workdir) == 30 and not (workdir / "damaged").exists()


@pytest.mark.parametrize(
    ("trouble", "damage"),
    [
        (MemoryError("Unable to allocate 22 GiB"), False),
        (PermissionError(13, "Permission denied"), False),
        (ValueError("UNAVAILABLE: Error reading the store"), False),
        (ValueError("DATA_LOSS: Error reading the store"), True),
        (OSError(5, "Input/output error"), True),
    ],
)
def test_a_whole_checkpoint_is_not_set_aside_for_trouble_elsewhere(saved, monkeypatch, trouble, damage):
    workdir, _ = saved
    sums = checkpoint.checksums

    def once(state):
        monkeypatch.setattr(checkpoint, "checksums", sums)
        raise trouble

    monkeypatch.setattr(checkpoint, "checksums", once)
    if damage:
        assert len(checkpoint.set_damaged_aside(workdir)) == 1
    else:
        with pytest.raises(CheckpointError, match=r"checkpoint 30 in .* could not be read \(.*\), which is no damage: none is set aside"):
            checkpoint.set_damaged_aside(workdir)
    assert (workdir / "damaged").exists() == damage and checkpoint.latest_step(workdir) == (20 if damage else 30)


def test_a_field_that_is_not_there_must_have_been_empty(tiny, tmp_path):
    """A run without an average has none; one whose meta knows of an average has lost it."""
    state = train_state.create(make_state(tiny, 1).params, make_optimizer(tiny()), False)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {"step": 1}, {})
    checkpoints.close()
    path = tmp_path / "checkpoints" / "1"
    assert checkpoint.read_arrays(path, ("ema",)) == {}
    meta = json.loads((path / "meta" / "metadata").read_text())
    meta["checksums"]["ema"] = meta["checksums"]["params"]
    (path / "meta" / "metadata").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="the content of ema is not what was saved"):
        checkpoint.read_arrays(path, ("ema",))


def test_unfinished_saves_are_no_checkpoints(saved):
    workdir, states = saved
    (workdir / "checkpoints" / "40.orbax-checkpoint-tmp-1").mkdir()
    assert checkpoint.unfinished(workdir) == ["40.orbax-checkpoint-tmp-1"]
    assert checkpoint.latest_step(workdir) == 30
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))
    checkpoints.save(50, states[30], {}, {})  # before which Orbax has made room, in the background
    checkpoints.close()
    assert checkpoint.unfinished(workdir) == [] and checkpoint.latest_step(workdir) == 50


def test_which_are_kept(tiny, tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_every=4))
    for step in range(1, 8):
        checkpoints.save(step, make_state(tiny, step), {"step": step}, {})
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


def test_checksums_see_values_and_places():
    x = jnp.arange(12.0).reshape(3, 4)
    one = checkpoint.checksums({"a": {"k": x}})
    assert one == checkpoint.checksums({"a": {"k": x + 0}})
    for other in (x.at[1, 2].add(1e-6), x[::-1], x[:, ::-1], x.at[0, 0].set(-0.0)):
        assert checkpoint.checksums({"a": {"k": other}}) != one


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


FULL_DISK = """
import pathlib
import sys
import jax
import jax.numpy as jnp
from motif_jax.config import CheckpointConfig
from motif_jax.training.checkpoint import CheckpointError, Checkpoints
from motif_jax.training.state import TrainState

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig(keep=1))
try:
    for step, size in (1, 64), (2, 64 * 1024):  # 65 MB
        params = {f"{i}.kernel": jax.random.normal(jax.random.key(i), (size, 8)) for i in range(32)}
        checkpoints.save(step, TrainState(jnp.int32(step), params, {}, {}), {"step": step}, {})
        checkpoints.wait()
except CheckpointError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_is_one_clear_error_and_loses_nothing(small_disk):
    found = subprocess.run([sys.executable, "-c", FULL_DISK, small_disk], capture_output=True, text=True)
    assert found.returncode == 1
    first, remedy = found.stderr.splitlines()  # and nothing that Orbax' threads have to say
    assert first.startswith(f"cannot write checkpoints in {small_disk}/checkpoints: ") and "No space left on device" in first
    assert remedy.startswith("Make room") and remedy.endswith("whole checkpoints there: [1]")
    found = checkpoint.read_arrays(small_disk / "checkpoints" / "1", ("params",))["params"]
    assert_equal(found, {f"{i}.kernel": jax.random.normal(jax.random.key(i), (64, 8)) for i in range(32)})


def test_a_process_that_does_not_come_is_no_full_disk(saved, monkeypatch):
    """It is told of where a save is waited for or looked after, and no later than at the next one."""
    workdir, states = saved
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=3))

    def late(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(checkpoints._manager, "save", late)
    checkpoints.save(40, states[30], {}, {})
    for call in (checkpoints.wait, checkpoints.check, lambda: checkpoints.save(50, states[30], {}, {})):
        with pytest.raises(CheckpointError, match=r"Another process of the job did not come in time: .*there: \[10, 20, 30\]") as found:
            call()
        assert "Make room" not in str(found.value)
    checkpoints.close()


DAMAGED = """
import pathlib
import sys
import jax.numpy as jnp
from motif_jax.config import CheckpointConfig
from motif_jax.training.checkpoint import CheckpointError, Checkpoints
from motif_jax.training.state import TrainState

state = TrainState(jnp.int32(1), {f"{i}.kernel": jnp.ones((64, 8)) for i in range(200)}, {}, {})
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig())
checkpoints.save(1, state, {"step": 1}, {})
checkpoints.wait()
(checkpoints.directory / "1" / "state" / "manifest.ocdbt").unlink()
try:
    checkpoints.restore(1, state)
except CheckpointError as error:
    sys.exit(str(error))
"""


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    found = subprocess.run([sys.executable, "-c", DAMAGED, tmp_path], capture_output=True, text=True)
    assert found.returncode == 1
    first, remedy = found.stderr.splitlines()  # and nothing of the coroutines that Orbax leaves behind
    assert first.startswith(f"checkpoint {tmp_path}/checkpoints/1 cannot be restored: ") and remedy.startswith("There is no other one")


def test_what_else_there_is_to_read(saved):
    workdir, _ = saved
    damage(workdir, 30)
    with pytest.raises(CheckpointError, match=r"name another one, such as .*checkpoints/20; to train on, .*fallback=True"):
        checkpoint.read_arrays(workdir / "checkpoints" / "30", checkpoint.FIELDS)
    (workdir / "checkpoints" / "30" / "meta" / "metadata").write_text("")
    with pytest.raises(CheckpointError, match=r"such as .*checkpoints/20"):
        checkpoint.read_meta(workdir / "checkpoints" / "30")
    largest(workdir, 20).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_arrays(workdir / "checkpoints" / "20", checkpoint.FIELDS)
    assert "TensorStore" not in str(caught.value)
