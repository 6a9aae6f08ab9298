"""What programs for GPUs and TPUs do on a mesh, compiled for eight fake devices: kernels and layouts that XLA cannot partition by itself."""

import os
import subprocess
import sys

EIGHT_DEVICES = """
import re
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from motif_jax.config import MeshConfig
from motif_jax.dist.mesh import make_mesh, partition
from motif_jax.models import attention, group_norm, packed
from motif_jax.models.transformer import TemporalTransformer, TransformerBlock
from motif_jax.models.layers import Dense, Dropout, GroupNorm, Initializer, recompute, silu
from motif_jax.models.placement import target_platform, use_mesh
from motif_jax.models.residual import Residual
from motif_jax.training.optimizer import as_stored

mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))
rng = np.random.default_rng(0)
MOVES = "all-gather|all-to-all|all-reduce|collective-permute"

def compiled(function, specs, *arrays):
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    program = jax.jit(function, in_shardings=shardings, out_shardings=shardings[0]).lower(*arrays).compile()
    moved = re.findall(MOVES, program.as_text())
    return program(*jax.device_put(arrays, tuple(shardings))), moved

def attend(x):
    with use_mesh(mesh):
        return attention._on_each_device(packed.attend, x)

x = rng.normal(size=(16, 16, 3, 4, 16)).astype(np.float32)
given = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None, "tensor"))
program = jax.jit(attend, in_shardings=given).lower(x).compile()
moved = re.findall(MOVES, program.as_text())
assert not moved, moved
wanted = attention.attention(*np.moveaxis(x, 2, 0), "reference")
np.testing.assert_allclose(program(jax.device_put(x, given)), wanted, atol=2e-6)  # sums in another order

name, kernel = "input_blocks.1.0.in_layers.2.kernel", rng.normal(size=(3, 3, 32, 64)).astype(np.float32)
spec = partition(name, kernel.shape, mesh)
assert spec != PartitionSpec()
with target_platform("gpu"), use_mesh(mesh):
    out, moved = compiled(lambda x: as_stored({name: x})[name], [spec], kernel)
assert not moved, moved
np.testing.assert_array_equal(out, kernel)

# Dropout's mask goes by an element's number in the whole batch; alone the gradients of scale and bias are summed over devices.
mesh = make_mesh(MeshConfig(data=4, fsdp=2, context=1, tensor=1))
x, weight = (jnp.asarray(rng.normal(size=(8, 4, 8, 8, 64)), jnp.bfloat16) for _ in range(2))

def norm(rows, x, scale, shift):
    layer = GroupNorm(64, 8, 1e-5, dtype=jnp.bfloat16)
    layer.scale = nnx.Param(scale)
    with use_mesh(mesh if rows else None):
        return group_norm.in_kernels([layer, silu, Dropout(0.1, 3)], x, jax.random.key(5), shift, rows)[0]

def gradients(rows, *given):
    once_more = recompute(lambda *given: norm(rows, *given), "convs" if rows else "none")  # as the paper's mesh has it
    return jax.grad(lambda *given: jnp.sum(once_more(*given).astype(jnp.float32) * weight), (0, 1, 2))(*given)

given, rows = (x, jnp.linspace(0.5, 1, 64), jnp.linspace(-1, 1, 8 * 64).reshape(8, 64)), ("data", "fsdp")
specs = [PartitionSpec(rows), PartitionSpec(), PartitionSpec(rows)]
out, moved = compiled(lambda *given: norm(rows, *given), specs, *given)
assert not moved, moved
np.testing.assert_array_equal(np.float32(out), np.float32(jax.jit(lambda *given: norm((), *given))(*given)))
found = jax.jit(lambda *given: gradients(rows, *given))(*jax.device_put(given, tuple(NamedSharding(mesh, spec) for spec in specs)))
for a, b in zip(found, jax.jit(lambda *given: gradients((), *given))(*given), strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=1e-5 * np.abs(np.float32(b)).max())  # sums in another order

# A transformer's sum: each device has its sequences.
kwargs = {"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16}
graph, state = nnx.split((Dense(32, 64, **kwargs), TransformerBlock(64, 64, 4, 16, implementation="auto", **kwargs)))
weight = jnp.asarray(rng.normal(size=(32, 16, 64)), jnp.float32)

def chain(mesh, x, state):
    first, block = nnx.merge(graph, state)
    with use_mesh(mesh), target_platform("gpu", interpret=True):
        total = Residual(first, x)
        total.add(block.attn1, block.norm1)
        total.add(block.attn2, block.norm2)
        total.add(block.ff, block.norm3)
        return total.sum

def slopes(mesh, *given):
    return jax.grad(lambda *given: jnp.sum(chain(mesh, *given) * weight), (0, 1))(*given)

x = jnp.asarray(rng.normal(size=(32, 16, 32)), jnp.float32)
out, moved = compiled(lambda x: chain(mesh, x, state), [PartitionSpec(rows)], x)
assert not moved, moved
np.testing.assert_allclose(out, jax.jit(lambda x: chain(None, x, state))(x), rtol=1e-6, atol=1e-6)
found = jax.jit(lambda *given: slopes(mesh, *given))
given = jax.device_put(x, NamedSharding(mesh, specs[0])), state
names = ("layer_norm_forward", "layer_norm_backward", "geglu_forward", "geglu_backward", "attention_forward", "attention_backward")
assert all(name in str(found.trace(*given).jaxpr) for name in names)
for a, b in zip(jax.tree.leaves(found(*given)), jax.tree.leaves(jax.jit(lambda *given: slopes(None, *given))(x, state)), strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=2e-2 * np.abs(np.float32(b)).max())  # sums of bfloat16, five steps of 2^-8

# A TPU's temporal attention: each device has its clips, pixels and heads.
mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
layer = attention.Attention(64, 64, 4, 16, init=Initializer(nnx.Rngs(0)), dtype=jnp.bfloat16, implementation="auto")
lies = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "context", "tensor"))
q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 4, 16, 64)), jnp.bfloat16) for _ in range(4))

def along(mesh, *qkv):
    with use_mesh(mesh), target_platform("tpu", interpret=True):
        assert layer.takes_frames(4, 16)
        return layer._heads(qkv, None, None)

def along_slopes(mesh, *qkv):
    return jax.grad(lambda *qkv: jnp.sum((along(mesh, *qkv) * weight).astype(jnp.float32)), (0, 1, 2))(*qkv)

program = jax.jit(lambda *qkv: (along(mesh, *qkv), along_slopes(mesh, *qkv)), in_shardings=lies).lower(q, k, v).compile()
assert not re.findall(MOVES, program.as_text())
found, wanted = program(*jax.device_put((q, k, v), lies)), (along(None, q, k, v), along_slopes(None, q, k, v))
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-2)  # bfloat16, sums in another order

# Its spatial attention, of one sequence per clip: the queries are split over `context`.
lies = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context", "tensor"))
q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 1024, 2, 8)), jnp.float32) for _ in range(4))

def long(mesh, *qkv):
    with use_mesh(mesh), target_platform("tpu", interpret=True):
        return attention.attention(*qkv, "splash" if mesh else "xla")

def long_slopes(mesh, *qkv):
    return jax.grad(lambda *qkv: jnp.sum(long(mesh, *qkv) * weight), (0, 1, 2))(*qkv)

program = jax.jit(lambda *qkv: (long(mesh, *qkv), long_slopes(mesh, *qkv)), in_shardings=lies)
assert str(program.trace(q, k, v).jaxpr).count("splash_mha") >= 2
found, wanted = program(*jax.device_put((q, k, v), lies)), (long(None, q, k, v), long_slopes(None, q, k, v))
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))  # sums in another order

# Between them a whole temporal transformer stays split by pixels, also where it is recomputed: of three passes each comes and goes once.
mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2, tensor=1))
graph, state = nnx.split(TemporalTransformer(32, 2, 16, 1, 8, conv_projections=False, implementation="auto", **kwargs))
lies = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
x, weight = (jnp.asarray(rng.normal(size=(4, 4, 4, 4, 32)), jnp.float32) for _ in range(2))

def temporal_slopes(mesh, x, state):
    def loss(x, state):
        with use_mesh(mesh), target_platform("tpu", interpret=True):
            return jnp.sum(recompute(lambda x, state: nnx.merge(graph, state)(x), "block")(x, state) * weight)

    return jax.grad(loss, (0, 1))(x, state)

given = {"in_shardings": (lies, None), "out_shardings": (lies, None)}
program = jax.jit(lambda x, state: temporal_slopes(mesh, x, state), **given).lower(x, state).compile()
moved = re.findall(" (all-gather|all-to-all)\\(", program.as_text())
assert 0 < len(moved) <= 6, moved
for a, b in zip(jax.tree.leaves(program(jax.device_put(x, lies), state)), jax.tree.leaves(temporal_slopes(None, x, state)), strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=2e-2 * np.abs(np.float32(b)).max())  # bfloat16, sums in another order
print("fine")
"""


def test_eight_devices():
    """Each device works on its own part: kernels send nothing, and a transformer along the frames no more than it must."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "fine\n", done.stderr
