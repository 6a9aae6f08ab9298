"""The blocks of the paper's U-Net at its finest level, forward and backward, compiled ahead of time for one chip: what bounds them.

    python benchmarks/blocks.py [--chip=v6e:2x2, h100 or here] [--clips=4] [--blocks residual spatial temporal]
        [--remat block convs dots] [--kernels auto xla] [--effort=-1]

Needs the chip's compiler and no chip. A TPU's: docs/compile.md, about a minute of one core per row. "optimal" is XLA's estimate; it counts
one turn of the loop over the queries of long self-attention (spatial) only, and no Pallas kernel. With --effort=0 programs are compiled as
JAX compiles them by default, and columns are million cycles: what XLA estimates for its operations (of loops all turns), and the lengths of
the kernels' schedules times their programs, waiting for memory not included. An H100's: `pip install 'jax[cuda12]'` in a virtual
environment of its own, five seconds per row; XLA gives no estimate there, and does not try kernels. "accessed" is then what all kernels
read and write, "elementwise" the part of it outside of matrix products, convolutions, attention and Triton kernels. On a GPU
`--chip=here` measures: milliseconds of a call, of ten on end.
"""

import argparse
import contextlib
import itertools
import math
import os
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import run
from flax import nnx
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh

from motif_jax.compilation import set_effort, tpu_devices
from motif_jax.config import load_config
from motif_jax.models.layers import Initializer, recompute
from motif_jax.models.placement import target_platform, use_kernels
from motif_jax.models.transformer import SpatialTransformer, TemporalTransformer
from motif_jax.models.unet3d import ResBlock

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCKS, REMAT = ["residual", "spatial", "temporal"], ["block", "convs", "dots"]


def trace(name: str, clips: int, remat: str, device: jax.Device, kernels: str = "auto") -> tuple[jax.stages.Traced, tuple]:
    """(a block's output and the gradients of its parameters and its input, traced for `device`; the shapes of its arguments)."""
    config = load_config(str(ROOT / "configs/motif.py"))
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
    arguments = jax.tree.map(lambda a: array(*a.shape), state), x, x, given
    platform = "gpu" if device.platform == "cuda" else device.platform
    # JAX 0.11 asks what GPU it is that Triton's kernels are for, where none is here.
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device.device_kind, None, device.platform))
    with target_platform(platform), use_kernels(kernels == "auto"), jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(both).trace(*arguments), arguments


def milliseconds(compiled: jax.stages.Compiled, shapes: tuple, calls: int = 10) -> float:
    """Of one call, of `calls` on end, on noise."""
    rng = np.random.default_rng(0)
    arguments = jax.device_put(jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes))
    jax.block_until_ready([compiled(*arguments) for _ in range(3)])
    began = time.perf_counter()
    for _ in range(calls):
        found = compiled(*arguments)
    jax.block_until_ready(found)
    return 1e3 * (time.perf_counter() - began) / calls


# What XLA asks of a device about to be compiled for (GpuTargetConfigProto), from NVIDIA's data sheet of the H100 SXM and the CUDA guide.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
"""


def h100() -> jax.Device:
    """The description of an H100 that is not here."""
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false " + os.environ.get("XLA_FLAGS", "")
    jax.config.update("jax_platforms", "cpu")
    import jax_plugins.xla_cuda12
    from jax._src import xla_bridge

    with contextlib.suppress(jax.errors.JaxRuntimeError):  # loaded already
        jax_plugins.xla_cuda12.initialize()
    # JAX looks "gpu" up among the devices that are here (github.com/jax-ml/jax/issues/23971).
    known = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform in ("gpu", "cuda") else known(platform)
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]


def accessed(hlo: str) -> tuple[float, float]:
    """(bytes that a compiled program's kernels read and write, those of its elementwise kernels)."""
    sizes, total, elementwise = {}, 0, 0
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if not (found := re.match(r"  (?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", line)):
            continue
        name, shapes, kind, operands = found.groups()
        arrays = re.findall(r"\b(?:pred|[a-z]+(16|32|64))\[([\d,]*)\]", shapes)  # not the bytes of a library's workspace
        sizes[name] = sum(int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(",")))) for bits, shape in arrays)
        if kind in ("fusion", "copy", "custom-call"):
            size = sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
            total, elementwise = total + size, elementwise + size * (kind != "custom-call")
    return total, elementwise


def programs(jaxpr: core.Jaxpr) -> dict[str, int]:
    """How many programs each Pallas kernel is, by its name."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            name = equation.params["name"]
            found[name] = math.prod(equation.params["grid_mapping"].grid)
        for inner in core.jaxprs_in_params(equation.params):
            found |= programs(inner)
    return found


def cycles(hlo: str, dump: pathlib.Path, programs: dict[str, int]) -> tuple[float, float]:
    """(what XLA estimates for its operations, of loops all turns; the schedules of Pallas kernels), of a compiled program for a TPU."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{$(.*?)^\}$", hlo, re.MULTILINE | re.DOTALL))

    def bundles(kernel: str) -> int:
        """Of one program; a kernel that is called twice is compiled once."""
        schedule = next(dump.glob(f"*{kernel}*-schedule-analysis_final_bundles.txt")).read_text()
        return int(re.search(r"total scheduled bundles:\s+(\d+)", schedule)[1])

    def walk(name: str) -> tuple[float, float]:
        estimated, scheduled = 0.0, 0.0
        for line in bodies[name].splitlines():
            if " while(" in line:
                condition, body = (re.search(rf"{part}=%?([\w.-]+)", line)[1] for part in ("condition", "body"))
                turns = max(map(int, re.findall(r"constant\((\d+)\)", bodies[condition])))
                inner = walk(body)
                estimated, scheduled = estimated + turns * inner[0], scheduled + turns * inner[1]
            elif 'custom_call_target="tpu_custom_call"' in line:
                call = re.match(r"\s+(?:ROOT )?%?(\S+) = ", line)[1]
                kernel = max((kernel for kernel in programs if kernel in call), key=len)
                scheduled += bundles(kernel) * programs[kernel]
            elif found := re.search(r'estimated_cycles":"(\d+)"', line):
                estimated += int(found[1])
        return estimated, scheduled

    return walk(re.search(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v6e:2x2", help="a TPU slice, of which one chip counts, h100, or here")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=BLOCKS)
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=REMAT)
    parser.add_argument("--kernels", nargs="+", choices=["auto", "xla"], default=["auto"], help="config.kernels")
    parser.add_argument("--effort", type=float, default=-1.0, help="of a TPU: XLA's exec_time_optimization_effort, -1 or 0")
    arguments = parser.parse_args()
    here, gpu = arguments.chip == "here", arguments.chip in ("h100", "here")
    scratch = tempfile.TemporaryDirectory()  # goes with the process
    dump = pathlib.Path(scratch.name)
    if estimates := not gpu and arguments.effort >= 0:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true " + os.environ.get("LIBTPU_INIT_ARGS", "")
    device = jax.devices()[0] if here else h100() if gpu else tpu_devices(arguments.chip)[0]
    columns = [*["ms"] * here, "elementwise, GiB"] if gpu else ["XLA's, Mcycles", "kernels'"] if estimates else ["optimal, ms", "TFLOP"]
    if not here:
        set_effort(-1.0 if gpu else arguments.effort)
    print(f"{arguments.clips} clips on one {device.device_kind}, bfloat16, jax {jax.__version__}")
    print(f"| block | remat | kernels | {' | '.join(columns)} | accessed, GiB | temporaries, GiB | compile, s |")
    print("|---|---|---|---|---|---|---|" + "---|" * (len(columns) - 1), flush=True)
    for name, remat, kernels in itertools.product(arguments.blocks, arguments.remat, arguments.kernels):
        began = time.perf_counter()
        for path in dump.iterdir():  # tens of thousands, of the row before
            path.unlink()
        traced, shapes = trace(name, arguments.clips, remat, device, kernels)
        compiled = traced.lower().compile()
        compilation = time.perf_counter() - began
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
        if gpu:
            total, elementwise = (size / 2**30 for size in accessed(compiled.as_text()))
            numbers = *([milliseconds(compiled, shapes)] if here else []), elementwise, total, temporaries
        elif estimates:
            found = cycles(compiled.as_text(), dump, programs(traced.jaxpr.jaxpr))
            numbers = *(count / 1e6 for count in found), compiled.cost_analysis()["bytes accessed"] / 2**30, temporaries
        else:
            cost = compiled.cost_analysis()
            numbers = cost["optimal_seconds"] * 1e3, cost["flops"] / 1e12, cost["bytes accessed"] / 2**30, temporaries
        row = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {name} | {remat} | {kernels} | {row} | {compilation:.0f} |", flush=True)


if __name__ == "__main__":
    run(main)
