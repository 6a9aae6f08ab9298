"""FLOPs against products counted by hand; peaks by device name."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from motif_jax.models import along_frames
from motif_jax.models.placement import target_platform
from motif_jax.training.flops import jaxpr_flops, matmul_flops, peak_tflops, training_flops


def test_products_convolutions_and_loops():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
    assert matmul_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5 * 7
    x, k = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert matmul_flops(convolve, x, k) == 2 * 2 * 4 * 4 * 6 * 3 * 3 * 3
    square = jnp.zeros((4, 4))
    assert matmul_flops(jax.jit(lambda m: jax.lax.scan(lambda c, _: (c @ m, None), m, length=6)[0]), square) == 6 * 2 * 64
    assert matmul_flops(lambda m: jax.lax.cond(m[0, 0] > 0, lambda m: m @ m @ m, lambda m: m @ m, m), square) == 2 * 2 * 64
    assert matmul_flops(jax.checkpoint(lambda m: jnp.sin(m) @ m), square) == 2 * 64
    # The gradient of a product is two products.
    assert matmul_flops(jax.grad(lambda m, n: jnp.sum(m @ n) ** 2, argnums=(0, 1)), square, square) == 3 * 2 * 64


def test_a_step_is_three_forward_passes_whatever_is_recomputed(tiny):
    config = tiny(backbone="dit", dit={"width": 16, "depth": 1, "num_head_channels": 8, "patch": [1, 2, 2]})
    tokens, clips, text = 4 * 2 * 2, config.batch_size, 8
    width, patch, out = 16, 4 * 96, 4 * 48
    embeddings = 2 * (256 * width + width * width)  # two networks of two layers, per clip
    attention = 4 * width * width * tokens + 2 * tokens * tokens * width
    cross = 2 * width * width * tokens + 2 * 16 * width * text + 2 * tokens * text * width
    block = 6 * width * width + attention + cross + 8 * width * width * tokens
    ends = patch * width * tokens + 2 * width * width + (width + patch) * out * tokens
    forward = 2 * clips * (embeddings + block + ends)
    assert training_flops(config) == 3 * forward
    recomputed = tiny(backbone="dit", dit={"width": 16, "depth": 1, "num_head_channels": 8, "patch": [1, 2, 2]}, remat="block")
    assert training_flops(recomputed) == 3 * forward


def test_the_image_s_tokens_count(tiny):
    """Those of every frame have keys and values in each of the four spatial transformers, 16 wide, and a frame's pixels look at its own."""
    config = tiny(unet={"image_cross_attention": True}, image={"kind": "random"}, resampler={"frames": 4})
    pixels, tokens = 4 * 4 * 4, 4 * 16
    more = 4 * config.batch_size * 2 * (2 * tokens * 16 * 16 + 2 * pixels * 16 * 16)
    assert training_flops(config) - training_flops(tiny()) == 3 * more


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),
        ("TPU v6 lite", 918.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", None),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_tflops(kind) == peak


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_platform_s_kernels_do_not_matter(tiny, platform):
    """Products within the functions that a GPU's kernels are part of count as they do elsewhere."""
    config = tiny(dtype="bfloat16", data={"height": 64, "width": 64})
    expected = training_flops(config)
    with target_platform(platform):
        assert training_flops(config) == expected


def test_in_kernels(monkeypatch):
    """Every program of a kernel counts, on every device: two heads, products of 8 x 16 pixels' frames with each other and the values."""
    x = jax.ShapeDtypeStruct((4, 16, 32, 16), jnp.bfloat16)
    expected = 4 * 4 * 2 * 2 * (2 * 128 * 128 * 8)

    def attend(q, m):
        return along_frames.attend(8, q, q, q), m @ m

    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    for elements in (1, 2**18):  # programs of 8 and of 32 pixels
        monkeypatch.setattr(along_frames, "ELEMENTS", elements)
        jaxpr = jax.make_jaxpr(attend)(x, square).jaxpr
        assert jaxpr_flops(jaxpr, in_kernels=True) == expected and jaxpr_flops(jaxpr) == expected + 2 * 64
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "context")
    with jax.sharding.use_abstract_mesh(mesh):
        split = jax.shard_map(lambda q: along_frames.attend(8, q, q, q), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        assert matmul_flops(split, x) == expected
