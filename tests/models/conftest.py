"""Outputs of the reference's PyTorch networks at a tiny size, and the weights they were made with.

`testdata/videocrafter2_tiny.npz` holds inputs and float32 outputs of the VideoCrafter and DynamiCrafter code (torch 2.13, CPU,
evaluation mode) for `TINY`; layouts are the reference's, [B, C, T, H, W]. The weights are a function of their names.
"""

import contextlib
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu

from motif_jax.config import AutoencoderConfig, TextConfig, UNetConfig
from motif_jax.interop import names
from motif_jax.interop.tables import unet
from motif_jax.models.unet3d import UNet3D

TESTDATA = pathlib.Path(__file__).resolve().parents[1] / "testdata"


@pytest.fixture(scope="session")
def tiny_unet() -> UNetConfig:
    return UNetConfig(in_channels=8, model_channels=32, num_res_blocks=1, num_head_channels=8, context_dim=64)


@pytest.fixture(scope="session")
def tiny_autoencoder() -> AutoencoderConfig:
    return AutoencoderConfig(ch=32)


@pytest.fixture(scope="session")
def tiny_text() -> TextConfig:
    return TextConfig(width=64, layers=3, heads=4)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(TESTDATA / "videocrafter2_tiny.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def reference_tensors():
    """(network prefix, template) -> {PyTorch name: tensor}, the weights of the reference runs."""

    def make(prefix: str, template) -> dict[str, np.ndarray]:
        shapes = {names.dotted(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(template)}
        tensors = {names.torch_name(path): names.torch_shape(path, shape) for path, shape in shapes.items()}
        return {name: _tensor(prefix, name, shape) for name, shape in tensors.items()}

    return make


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products of float32 in float32 on accelerators too, for comparisons within 1e-5."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def with_reference_weights(reference_tensors):
    """(function that makes a module, prefix of its tensors, its name table) -> (graph, weights of the reference runs)."""

    def load(make, prefix: str, table):
        graph, template = nnx.split(nnx.eval_shape(make), nnx.Param)
        template = nnx.to_pure_dict(template)
        return graph, jax.tree.map(np.asarray, table.to_jax(reference_tensors(prefix, template), template))

    return load


@pytest.fixture(scope="session")
def reference_unet(tiny_unet, with_reference_weights):
    """The graph and weights of the reference runs, and one compiled function for loss, output and gradients."""
    graph, params = with_reference_weights(lambda: UNet3D(tiny_unet, rngs=nnx.Rngs(0)), "unet", unet)

    @jax.jit
    def evaluate(params, x, t, context, fps, target):
        def loss(params):
            out = nnx.merge(graph, params)(x, t, context, fps)
            return jnp.mean((out - target) ** 2), out

        (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, out, gradient

    return graph, params, evaluate


def _tensor(prefix: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers in eight levels, scaled by the kind of tensor; drawn from a stream seeded with the tensor's name."""
    # The first convolution was drawn with 9 input channels; the models with 8 and 4 use its first ones.
    drawn = (shape[0], 9, *shape[2:]) if prefix == "unet" and name == "input_blocks.0.0.weight" else shape
    normal = np.random.RandomState(zlib.crc32(f"20250101:{prefix}.{name}".encode())).randn(*drawn)
    level = (2 * np.clip(np.floor(2 * normal), -4, 3) + 1) / 4
    if "token_embedding" in name:
        tensor = level / 4
    elif "positional_embedding" in name:
        tensor = level / 8
    elif name == "logit_scale":
        tensor = 2 + level / 4
    elif name.endswith("bias"):
        tensor = level / 16
    elif len(shape) == 1:
        tensor = 1 + level / 8
    else:
        tensor = level * 2.0 ** np.round(np.log2(np.prod(drawn[1:]) ** -0.5))
    return tensor[:, : shape[1]].astype(np.float32) if drawn != shape else tensor.astype(np.float32)


@pytest.fixture(scope="session")
def difference():
    """Relative L2 distance of two arrays."""
    return lambda ours, theirs: float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


@pytest.fixture
def tpu_memory():
    """A TPU's kernels run on one that JAX imitates, where this is none: what they read before it is written is NaN."""
    imitated = tpu.InterpretParams(uninitialized_memory="nan")
    with tpu.force_tpu_interpret_mode(imitated) if jax.default_backend() != "tpu" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def with_gradients():
    """Of a kernel for attention and q, k, v: [its result, their gradients]."""

    def run(attend, *x):
        def loss(*x):
            out = attend(*x)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*x)
        return [out, *gradients]

    return run
