"""How the cost of a train step grows, and which mesh it wants: computed from the model, and checked against what XLA compiles.

    python benchmarks/scaling.py growth [--config=configs/motif.py]      traces only: seconds for each row
    python benchmarks/scaling.py meshes [--config=configs/motif.py]      arithmetic only: the tables of docs/scaling.md
    python benchmarks/scaling.py compiled                                a reduced network on this CPU and on 8 fake devices; minutes

"growth": model FLOPs and the activations that the backward pass keeps, of one clip. "meshes": memory of a chip, bytes of
communication and their time against that of the arithmetic. "compiled": XLA's counts of a small network beside the same
computation, and of each mesh axis on eight fake devices.
"""

import argparse
import dataclasses
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from common import run

from motif_jax.config import Config, MeshConfig, from_config_dict, load_config
from motif_jax.models.networks import Networks, image_condition
from motif_jax.models.placement import target_platform
from motif_jax.training.flops import jaxpr_flops, training_flops

GIB = 2**30
FAKE = 8


class Chip(NamedTuple):
    """peak: dense bfloat16 TFLOP/s. memory: GiB a program may use (of a GPU, the nine tenths that motif_jax.main takes).

    link: GB/s that a chip receives while it sends as much.
    TPU: half of the published interconnect bandwidth of a chip in one direction (v5e 200, v5p 600, v6e 400 GB/s;
    docs.cloud.google.com/tpu), as slices smaller than a full torus have no links around the edge. GPU: NVLink 4, 450 GB/s.
    utilisation: model FLOPs over the peak while nothing is waited for: XLA's bound for TPU (docs/compile.md), measured on one H200.
    """

    peak: float
    memory: float
    link: float
    utilisation: float


CHIPS = {
    "v5e": Chip(197, 15.75, 100, 0.45),
    "v5p": Chip(459, 95.74, 300, 0.53),
    "v6e": Chip(918, 31.25, 200, 0.29),
    "H100": Chip(989, 71.6, 450, 0.34),
    "H200": Chip(989, 126, 450, 0.34),
}
# slice -> meshes worth comparing, (data, fsdp)
MESHES = {
    "v5e:4x8": ("v5e", [(1, 32)]),
    "v5e:8x8": ("v5e", [(64, 1), (8, 8), (1, 64)]),
    "v5p:2x2x4": ("v5p", [(16, 1), (4, 4), (1, 16)]),
    "v6e:4x4": ("v6e", [(16, 1), (4, 4), (1, 16)]),
    "v6e:8x8": ("v6e", [(64, 1), (8, 8), (1, 64)]),
    "8 x H100": ("H100", [(8, 1), (1, 8)]),
    "8 x H200": ("H200", [(8, 1), (1, 8)]),
}
GATHERS = 1  # of all kernels in a step, in bfloat16; the backward pass uses them again
STATE = 20  # bytes of a parameter: itself, two moments, average and gradient, all float32
# GiB beside state and kept activations, gathered kernels and the block in work: through two compiled steps (docs/compile.md), v5e:8x8 with
# one clip on a chip, 7.9 GiB in all, and v5p:2x2x4 with four, 21.8.
WORK, WORK_PER_CLIP = 3.30, 0.98


def changed(config: Config, **values) -> Config:
    """`config` with other frames, height, width (of data), model_channels (of the U-Net) or fields of its own."""
    parts = {"data": ("frames", "height", "width"), "unet": ("model_channels",)}
    for part, names in parts.items():
        inner = {name: values.pop(name) for name in names if name in values}
        values[part] = dataclasses.replace(getattr(config, part), **inner)
    return dataclasses.replace(config, **values)


def backward_costs(config: Config, networks: Networks) -> tuple[int, int]:
    """(bytes of the activations that the forward pass leaves for the backward pass, matrix FLOPs of both passes) of one clip.

    Parameters are not counted among the bytes.
    """
    d, z = config.data, config.autoencoder.z_channels
    latent = jax.ShapeDtypeStruct((1, d.frames, config.latent_height, config.latent_width, z), jnp.float32)
    image = jax.eval_shape(lambda z: image_condition(z[:, 0], d.frames, config.condition.image), latent)
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text.context_length, config.text.width), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(params, latent, one, text, image, key):
        return jax.vjp(lambda p, x: networks.denoise(p, x, one, text, one, image, key), params, latent)

    def both(*inputs):
        out, pull = forward(*inputs)
        return pull(out)

    inputs = networks.denoiser.shapes, latent, one, text, image, key
    kept = jax.eval_shape(lambda *inputs: forward(*inputs)[1], *inputs)
    shapes = {s.shape for s in networks.denoiser.shapes.values()}
    sizes = [s.size * s.dtype.itemsize for s in jax.tree.leaves(kept) if s.shape not in shapes and jnp.issubdtype(s.dtype, jnp.number)]
    return sum(sizes), jaxpr_flops(jax.make_jaxpr(both)(*inputs).jaxpr)


def parameters(networks: Networks) -> int:
    return sum(math.prod(s.shape) for s in networks.denoiser.shapes.values())


def growth(config: Config) -> None:
    """One clip: model FLOPs, executed ones and kept activations, along each axis of the size and by what is recomputed."""
    d, width = config.data, config.unet.model_channels
    config = dataclasses.replace(config, batch_size=1)
    rows = {
        "as configured": {},
        "remat block": {"remat": "block"},
        "remat dots": {"remat": "dots"},
        "half the frames": {"frames": d.frames // 2},
        "twice the frames": {"frames": 2 * d.frames},
        "twice the height and width": {"height": 2 * d.height, "width": 2 * d.width},
        "half the channels": {"model_channels": width // 2},
        "twice the channels": {"model_channels": 2 * width},
    }
    print("| one clip | parameters | TFLOP | times | executed, of them | kept, GiB | times |\n|---|---|---|---|---|---|---|")
    base = None
    for name, values in rows.items():
        resized = changed(config, **values)
        networks = Networks.of(resized)
        with target_platform("tpu"):  # trace what an accelerator runs
            flops = training_flops(resized) / 1e12
            kept, executed = backward_costs(resized, networks)
        kept, executed = kept / GIB, executed / 1e12 / flops
        base = base or (flops, kept)
        count = f"{parameters(networks) / 1e9:.3f} B"
        cells = (name, count, f"{flops:.3g}", f"{flops / base[0]:.2f}", f"{executed:.2f}", f"{kept:.3g}", f"{kept / base[1]:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def meshes(config: Config) -> None:
    """Every slice of MESHES: memory of a chip and communication against arithmetic, by the model in docs/scaling.md."""
    networks = Networks.of(config)
    with target_platform("tpu"):
        flops = training_flops(dataclasses.replace(config, batch_size=1))
        kept, _ = backward_costs(config, networks)
    count = parameters(networks)
    print(f"{count / 1e9:.2f} B parameters, {flops / 1e12:.1f} TFLOP a clip, {kept / GIB:.2f} GiB kept of a clip\n")
    print("| slice | data x fsdp | clips of a chip | state, GiB | memory, GiB | fits | sent, GiB | arithmetic, s | sending, s | share |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, (kind, shapes) in MESHES.items():
        chip = CHIPS[kind]
        for data, fsdp in shapes:
            clips = config.batch_size / (data * fsdp)
            state = STATE * count / fsdp / GIB
            memory = state + WORK + (kept / GIB + WORK_PER_CLIP) * clips
            fits = f"{'yes' if memory < chip.memory else 'no'}, {chip.memory:g}"
            sent = traffic(count, data, fsdp)
            work = flops * clips / (chip.utilisation * chip.peak * 1e12)
            wait = sent / (chip.link * 1e9)
            cells = (name, f"{data} x {fsdp}", f"{clips:g}", f"{state:.1f}", f"{memory:.1f}", fits)
            print(f"| {' | '.join(cells)} | {sent / GIB:.1f} | {work:.2f} | {wait:.3f} | {100 * wait / work:.0f} % |")


def traffic(count: int, data: int, fsdp: int) -> float:
    """Bytes that a chip sends in a step. A ring's all-reduce sends everything twice: in bfloat16 over fsdp, in float32 over data."""
    gathered = GATHERS * 2 * count * (fsdp - 1) / fsdp
    scattered = 2 * 2 * count * (fsdp - 1) / fsdp
    reduced = 2 * 4 * count / fsdp * (data - 1) / data
    return gathered + scattered + reduced


REDUCED = {
    "dtype": "float32",
    "batch_size": 8,
    "remat": "block",
    "data": {"frames": 8, "height": 32, "width": 32},
    "prepare": {"flow": "exact", "flow_stride": 4},
    "autoencoder": {"kind": "pixel", "factor": 4, "z_channels": 48, "scale_factor": 1.0},
    "text": {"kind": "words", "vocab_size": 512, "context_length": 8, "width": 16},
    "unet": {
        "in_channels": 96,
        "out_channels": 48,
        "model_channels": 64,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),  # transformers in the middle block only: compilation is what this costs
        "num_head_channels": 16,
        "context_dim": 16,
        "norm_groups": 8,
        "addition_attention": False,
    },
}


def compile_small(config: Config, devices: int):
    """(compiled step, matrix FLOPs executed by all devices)."""
    from motif_jax.compilation import lower_step
    from motif_jax.dist.mesh import make_mesh

    lowered, matmuls, _ = lower_step(config, make_mesh(config.mesh, jax.devices()[:devices]))
    return lowered.compile(), matmuls


def compiled() -> None:
    """XLA's counts of the reduced network: one device as it grows, then eight devices by mesh axis."""
    from motif_jax.collectives import collectives

    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={FAKE} --xla_backend_optimization_level=0"
    jax.config.update("jax_platforms", "cpu")  # as the flags, before JAX looks for devices
    base = from_config_dict(REDUCED)
    sizes = {
        "reduced network": {},
        "twice the frames": {"frames": 16},
        "twice the height and width": {"height": 64, "width": 64},
        "twice the channels": {"model_channels": 128},
        "twice the clips": {"batch_size": 16},
    }
    print("| one device | model GFLOP | executed, times | XLA's count, times | temporaries, MiB | times |\n|---|---|---|---|---|---|")
    first = None
    for name, values in sizes.items():
        config = changed(base, **values)
        step, matmuls = compile_small(config, 1)
        model = training_flops(config)
        temporaries = step.memory_analysis().temp_size_in_bytes
        first = first or temporaries
        counted = step.cost_analysis()["flops"]
        cells = (name, f"{model / 1e9:.2f}", f"{matmuls / model:.2f}", f"{counted / model:.2f}", f"{temporaries / 2**20:.1f}")
        print(f"| {' | '.join(cells)} | {temporaries / first:.2f} |", flush=True)
    print(f"\n| {FAKE} devices | arguments, MiB | temporaries, MiB | XLA's GFLOP | communication, MiB |\n|---|---|---|---|---|")
    for axis, clips in (("data", 8), ("fsdp", 8), ("tensor", 8), ("context", 8), ("context", 1)):
        shape = MeshConfig(**{"data": 1, "fsdp": 1, "context": 1, "tensor": 1, axis: FAKE})
        step, _ = compile_small(dataclasses.replace(changed(base, batch_size=clips), mesh=shape), FAKE)
        memory = step.memory_analysis()
        moved = ", ".join(f"{kind} {t.bytes / 2**20:.1f}" for kind, t in collectives(step.as_text()).items())
        cells = (
            f"{axis}={FAKE}, clips: {clips}",
            f"{memory.argument_size_in_bytes / 2**20:.1f}",
            f"{memory.temp_size_in_bytes / 2**20:.1f}",
        )
        print(f"| {' | '.join(cells)} | {step.cost_analysis()['flops'] / 1e9:.2f} | {moved} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("growth", "meshes", "compiled"))
    parser.add_argument("--config", default="configs/motif.py")
    arguments = parser.parse_args()
    if arguments.table == "compiled":
        compiled()
    else:
        {"growth": growth, "meshes": meshes}[arguments.table](load_config(arguments.config))


if __name__ == "__main__":
    run(main)
