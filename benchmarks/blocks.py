"""The blocks of the paper's U-Net at its finest level, forward and backward, compiled ahead of time for one TPU chip: what bounds them.

    python benchmarks/blocks.py [--topology=v6e:2x2] [--clips=4] [--blocks residual spatial temporal] [--remat block convs dots]

Needs the TPU compiler (docs/compile.md) and about a minute of one core per row. "optimal" is XLA's estimate; it counts one turn of the loop
over the queries of long self-attention (spatial) only.
"""

import argparse
import itertools
import pathlib
import runpy
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from motif_jax.compilation import tpu_devices  # noqa: E402
from motif_jax.config import from_config_dict  # noqa: E402
from motif_jax.models.attention import SpatialTransformer, TemporalTransformer  # noqa: E402
from motif_jax.models.layers import Initializer, recompute, target_platform  # noqa: E402
from motif_jax.models.unet3d import ResBlock  # noqa: E402


def lower(name: str, clips: int, remat: str, device: jax.Device) -> jax.stages.Lowered:
    """A block's output and the gradients of its parameters and its input, lowered for `device`."""
    config = from_config_dict(runpy.run_path(str(ROOT / "configs/motif.py"))["get_config"]())
    u, sharding = config.unet, jax.sharding.SingleDeviceSharding(device)
    width, head = u.model_channels, u.num_head_channels
    options = {"init": Initializer(nnx.Rngs(0)), "dtype": jnp.bfloat16}
    kernel = {"implementation": "auto", **options}

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    match name:
        case "residual":
            block = ResBlock(width, width, 4 * width, u, itertools.count(), **options)
            given = (array(clips, 4 * width), array(2, dtype=jnp.uint32))
        case "spatial":
            block = SpatialTransformer(
                width, head, u.transformer_depth, u.context_dim, u.norm_groups, image=False, image_scale=False, **kernel
            )
            given = (array(clips, config.text.context_length, u.context_dim, dtype=jnp.bfloat16),)
        case "temporal":
            block = TemporalTransformer(width, width // head, head, u.transformer_depth, u.norm_groups, conv_projections=False, **kernel)
            given = ()
    graph, state = nnx.split(block)

    def both(state, x, cotangent, given):
        y, pull = jax.vjp(recompute(lambda state, x: nnx.merge(graph, state)(x, *given), remat), state, x)
        return y, pull(cotangent)

    x = array(clips, config.data.frames, config.latent_height, config.latent_width, width)
    with target_platform(device.platform):
        return jax.jit(both).trace(jax.tree.map(lambda a: array(*a.shape), state), x, x, given).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v6e:2x2")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--blocks", nargs="+", default=["residual", "spatial", "temporal"])
    parser.add_argument("--remat", nargs="+", default=["block", "convs", "dots"])
    arguments = parser.parse_args()
    device = tpu_devices(arguments.topology)[0]
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    print(f"{arguments.clips} clips on one {device.device_kind}, bfloat16, jax {jax.__version__}")
    print("| block | remat | optimal, ms | TFLOP | accessed, GiB | temporaries, GiB | compile, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, remat in itertools.product(arguments.blocks, arguments.remat):
        began = time.perf_counter()
        compiled = lower(name, arguments.clips, remat, device).compile()
        cost, temporaries = compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes
        numbers = cost["optimal_seconds"] * 1e3, cost["flops"] / 1e12, cost["bytes accessed"] / 2**30, temporaries / 2**30
        row = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {name} | {remat} | {row} | {time.perf_counter() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
