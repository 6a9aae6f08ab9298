"""The mesh and the sharding table, on eight fake devices of another process where more than one device is needed."""

import contextlib
import math
import os
import re
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from motif_jax.config import MeshConfig, from_config_dict
from motif_jax.errors import UserError
from motif_jax.dist.mesh import AXES, check_fits, check_split, make_mesh, partition, repeated_work, shard_networks
from motif_jax.models.networks import Networks

EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from motif_jax.config import MeshConfig
from motif_jax.dist.mesh import batch_rows, global_batch, make_mesh, partition, shard_like_params

mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}, mesh.shape
assert partition("a.b.kernel", (3, 3, 64, 32), mesh) == P(None, None, "fsdp", "tensor")
assert partition("a.kernel", (63, 32), mesh) == P(None, "tensor")  # 63 channels cannot be halved
assert partition("a.bias", (32,), mesh) == P(None)
assert partition("a.lora_a", (64, 16), mesh) == P("fsdp", None) and partition("a.lora_b", (16, 32), mesh) == P(None, "tensor")
assert partition("token_embedding.embedding", (64, 32), mesh) == P("tensor", "fsdp")
tree = {"params": {"a.kernel": jax.ShapeDtypeStruct((64, 32), "float32")}, "count": jax.ShapeDtypeStruct((), "int32")}
tree["mu"] = dict(tree["params"])
shardings = shard_like_params(tree, {"a.kernel"}, mesh)
assert shardings["mu"]["a.kernel"].spec == shardings["params"]["a.kernel"].spec == P("fsdp", "tensor")
assert shardings["count"].spec == P()
batch = global_batch({"x": np.arange(16.0).reshape(8, 2)}, mesh, 8)["x"]
assert {s.data.shape for s in batch.addressable_shards} == {(2, 2)}
np.testing.assert_array_equal(batch, np.arange(16.0).reshape(8, 2))
frames = np.arange(64.0).reshape(4, 8, 2)
split = dict.fromkeys(("frames", "latent_moments", "flow", "motion_mask"), frames)
for name, x in global_batch(split | {"text_embedding": frames}, make_mesh(MeshConfig(data=2, context=4)), 4).items():
    assert {s.data.shape for s in x.addressable_shards} == {(2, 2, 2) if name in split else (2, 8, 2)}, name
    np.testing.assert_array_equal(x, frames)
# A checkpoint's copy in the host's memory is there once, however many devices hold copies; small vectors lie as they did.
from motif_jax.training.checkpoint import _copies_on_host
for sizes, bias in ((MeshConfig(data=4, fsdp=2), 8), (MeshConfig(data=8), 8), (MeshConfig(data=1, fsdp=8), 8)):
    mesh = make_mesh(sizes)
    values = {"a.kernel": np.arange(2048.0).reshape(64, 32), "a.bias": np.arange(32.0)}
    placed = {k: jax.device_put(x, jax.sharding.NamedSharding(mesh, partition(k, x.shape, mesh))) for k, x in values.items()}
    copies = _copies_on_host(placed)
    held = {k: sum(s.data.size for s in x.addressable_shards) / x.size for k, x in copies.items()}
    assert held == {"a.kernel": 1, "a.bias": bias}, held
    assert all(x.sharding.memory_kind == "pinned_host" for x in copies.values())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(copies), values)
# Devices 2 and 3 alone, as a process of four would have them; one mesh gives them rows of their own, the other all rows.
mine = jax.devices()[2:4]
patched = lambda self, shape: {d: i for d, i in self.devices_indices_map(shape).items() if d in mine}
jax.sharding.NamedSharding.addressable_devices_indices_map = patched
assert batch_rows(make_mesh(MeshConfig(data=8)), 16) == (4, 5, 6, 7)
assert batch_rows(make_mesh(MeshConfig(tensor=8)), 3) == (0, 1, 2)
print("fine")
"""


@pytest.fixture(scope="module")
def paper():
    return Networks.of(from_config_dict({"unet": {"image_cross_attention": True}}))


def test_one_device_is_a_mesh_of_one():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert partition("x.kernel", (4, 4), mesh) == PartitionSpec("fsdp", "tensor")


def test_wrong_number_of_devices_is_named():
    with pytest.raises(ValueError, match=r"data=3, fsdp=1, context=1, tensor=1\) needs 3 devices, but there are 1"):
        make_mesh(MeshConfig(data=3), jax.devices()[:1])
    with pytest.raises(ValueError, match=r"data=-1, fsdp=3, context=1, tensor=1\) needs a multiple of 3 devices, but there are 1"):
        make_mesh(MeshConfig(fsdp=3), jax.devices()[:1])


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "frames", "message"),
    [
        (16, 2, 4, None),
        (8, 2, 4, "batch_size=8: must be a multiple of 16"),
        (4, 1, 4, "batch_size=4: must be a multiple of 8"),
        (8, 1, 6, r"mesh\.context=4: must divide data\.frames=6"),
    ],
)
def test_a_batch_must_fit_the_mesh(batch_size, accumulation, frames, message):
    mesh = AbstractMesh((2, 4, 4, 2), AXES)
    if message is None:
        check_fits(mesh, batch_size, accumulation, frames)
    else:
        with pytest.raises(UserError, match=message):
            check_fits(mesh, batch_size, accumulation, frames)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "message"),
    [(8, 1, None), (16, 2, None), (32, 2, r"mesh\.context=4 with 2 clips at a time .*; grad_accumulation=4 takes one")],
)
def test_frames_of_several_clips_are_not_split(batch_size, accumulation, message):
    (found,) = repeated_work(AbstractMesh((2, 4, 4, 1), AXES), batch_size, accumulation) or [""]
    assert re.match(message, found) if message else not found
    assert not repeated_work(AbstractMesh((2, 4, 1, 1), AXES), 32, 2)


@pytest.mark.parametrize(
    ("fsdp", "tensor", "message"),
    [
        (8, 2, None),
        (24, 1, r"mesh\.fsdp=24: would split only 3 % of the parameters"),  # 960 and 1920 input channels
        (8, 3, r"mesh\.tensor=3: would split only 1 % of the parameters"),  # the resampler's 768
    ],
)
def test_an_axis_must_split_the_network(paper, fsdp, tensor, message):
    mesh = AbstractMesh((1, fsdp, 1, tensor), AXES)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_split(mesh, paper.denoiser.shapes)


def test_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"no partition rule matches parameter 'a\.mystery' of shape \(3,\)"):
        partition("a.mystery", (3,), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_the_paper_s_networks_are_sharded(paper):
    """All of them, image tower included: of 64 chips none holds much more than its 64th, because small vectors stay whole."""
    towers = {name: network.shapes for name, network in (paper.frozen | {"denoiser": paper.denoiser}).items()}
    shardings = shard_networks(towers, AbstractMesh((1, 64, 1, 1), AXES))
    assert set(towers) == {"autoencoder", "text", "image", "denoiser"}
    for name, shapes in towers.items():
        whole = sum(math.prod(s.shape) for s in shapes.values())
        local = sum(math.prod(shardings[name][k].shard_shape(s.shape)) for k, s in shapes.items())
        assert whole > 80e6 and local < 0.02 * whole, (name, local / whole)


def test_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
