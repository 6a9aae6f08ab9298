"""What the program for GPUs does on a mesh, compiled for eight fake devices: kernels and layouts that XLA cannot partition by itself."""

import os
import subprocess
import sys

EIGHT_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from motif_jax.config import MeshConfig
from motif_jax.dist.mesh import make_mesh, partition
from motif_jax.models import attention, packed
from motif_jax.models.layers import target_platform, use_mesh
from motif_jax.training.optimizer import as_stored

mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))
rng = np.random.default_rng(0)

def compiled(function, specs, *arrays):
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    program = jax.jit(function, in_shardings=shardings, out_shardings=shardings[0]).lower(*arrays).compile()
    moved = re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", program.as_text())
    return program(*jax.device_put(arrays, tuple(shardings))), moved

def attend(*x):
    with use_mesh(mesh):
        return attention._on_each_device(packed.attend, *x)

x = [rng.normal(size=(16, 16, 4, 16)).astype(np.float32) for _ in range(3)]
out, moved = compiled(attend, [PartitionSpec(("data", "fsdp"), None, "tensor")] * 3, *x)
assert not moved, moved
np.testing.assert_allclose(out, attention.attention(*x, "reference"), atol=2e-6)  # sums in another order

name, kernel = "input_blocks.1.0.in_layers.2.kernel", rng.normal(size=(3, 3, 32, 64)).astype(np.float32)
spec = partition(name, kernel.shape, mesh)
assert spec != PartitionSpec()
with target_platform("gpu"), use_mesh(mesh):
    out, moved = compiled(lambda x: as_stored({name: x})[name], [spec], kernel)
assert not moved, moved
np.testing.assert_array_equal(out, kernel)
print("fine")
"""


def test_eight_devices():
    """Each device works on its own part: nothing is sent."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
