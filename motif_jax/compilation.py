"""Ahead-of-time compilation of the real train step for TPUs that are not here: a `Config` and a topology in, a `Report` out.

Nothing is allocated: parameters, optimizer and batch are shapes. The compiler is that of the package libtpu.
"""

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from motif_jax.collectives import Traffic, collectives
from motif_jax.config import Config
from motif_jax.data.records import Layout
from motif_jax.dist.mesh import batch_sharding, check_fits, check_split, make_mesh, repeated_work, shard_networks
from motif_jax.errors import UserError
from motif_jax.models.attention import check_kernel
from motif_jax.models.networks import Networks
from motif_jax.models.placement import target_platform
from motif_jax.training.flops import jaxpr_flops, peak_tflops, training_flops
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.sharded import jit_train_step, make_state

# Some of the slices that Cloud TPU offers; chips of a host form 2x2, so every side but the last of a 3D torus is even.
TOPOLOGIES = (
    *(f"{chip}:{shape}" for chip in ("v5e", "v6e") for shape in ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    *(f"v5p:{shape}" for shape in ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")),
)
# GiB of a chip's memory that a program may use: what the compiler names when a program is too large.
HBM_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25}
# libtpu looks for a TPU, its metadata server and its lock; here there is none, and nothing runs.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What one training step costs. Memory, bytes and collectives are of one chip, FLOPs of all chips together."""

    chip: str
    chips: int
    mesh: dict[str, int]
    hbm_bytes: int | None
    argument_bytes: int
    output_bytes: int  # those that do not take the place of an argument
    temporary_bytes: int
    program_bytes: int
    model_flops: int  # three times the forward pass; without recomputation
    matmul_flops: int  # matrix products and convolutions, with recomputation
    kernel_flops: int  # those of them in Pallas kernels, which XLA neither counts nor estimates
    xla_flops: float  # XLA's count of one chip: elementwise work too, but one turn of each loop
    bytes_accessed: float  # XLA's count, likewise
    optimal_seconds: float | None  # XLA's estimate, likewise; None where it has none
    collectives: dict[str, Traffic]
    peak_tflops: float | None
    lower_seconds: float
    compile_seconds: float

    @property
    def memory_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.program_bytes

    @property
    def loops(self) -> float:
        """How much more the chip does than XLA counted, for loops that turn more than once (blockwise attention, accumulation)."""
        return max(1.0, (self.matmul_flops - self.kernel_flops) / self.chips / self.xla_flops)

    @property
    def step_seconds(self) -> float | None:
        """XLA's estimate with all turns of its loops, taken to be as fast as the rest, and the products of kernels at the chip's peak."""
        if self.optimal_seconds is None or (self.kernel_flops and not self.peak_tflops):
            return None
        kernels = self.kernel_flops / self.chips / (self.peak_tflops * 1e12) if self.kernel_flops else 0.0
        return self.optimal_seconds * self.loops + kernels

    @property
    def mfu_bound(self) -> float | None:
        """Model FLOPs over what the chips could do in XLA's time; communication comes on top, so it is an upper bound."""
        if not self.peak_tflops or not self.step_seconds:
            return None
        return self.model_flops / (self.step_seconds * self.chips * self.peak_tflops * 1e12)

    def __str__(self) -> str:
        def gib(size: float) -> str:
            return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.2f} MiB"

        def flop(count: float) -> str:
            return f"{count / 1e12:.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"

        shape = " ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        share = f" of {gib(self.hbm_bytes)}, {100 * self.memory_bytes / self.hbm_bytes:.0f} %" if self.hbm_bytes else ""
        time_per_step = f"{self.step_seconds:.3g} s" if self.step_seconds else "no estimate at this effort"
        bound = (
            f"{100 * self.mfu_bound:.1f} % of {self.peak_tflops:g} TFLOP/s (bfloat16)"
            if self.mfu_bound
            else "none: time or peak is unknown"
        )
        lines = [
            ("chips", f"{self.chips} x {self.chip}, {shape}"),
            ("memory of a chip", f"{gib(self.memory_bytes)}{share}"),
            ("", f"arguments {gib(self.argument_bytes)}, temporaries {gib(self.temporary_bytes)},"),
            ("", f"further outputs {gib(self.output_bytes)}, program {gib(self.program_bytes)}"),
            ("model FLOPs", f"{flop(self.model_flops)} a step; {flop(self.matmul_flops)} executed, with recomputation"),
            *[("", f"of these {flop(self.kernel_flops)} in Pallas kernels")] * bool(self.kernel_flops),
            ("XLA's count", f"{flop(self.xla_flops)} and {gib(self.bytes_accessed)} accessed on a chip, one turn of each loop"),
            ("optimal time", f"{time_per_step} a step by XLA's estimate, without waiting for communication (loops: x {self.loops:.2f})"),
            ("MFU bound", bound),
            *(("collectives", f"{kind}: {t.count} of {gib(t.bytes)} in all on a chip") for kind, t in self.collectives.items()),
            ("compilation", f"{self.lower_seconds:.0f} s to trace and lower, {self.compile_seconds:.0f} s to compile"),
        ]
        return "\n".join(f"{name:17} {text}" for name, text in lines)

    def to_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("memory_bytes", "step_seconds", "mfu_bound")}
        traffic = {kind: t._asdict() for kind, t in self.collectives.items()}
        return dataclasses.asdict(self) | derived | {"collectives": traffic}


def tpu_devices(topology: str) -> list[jax.Device]:
    """Descriptions of the chips of a TPU slice by its name, such as "v5e:4x4".

    Raises UserError for a name that is unknown, and when the compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: pip install -e '.[tpu]' in a virtual environment of its own (beside libtpu, JAX "
            "looks for a TPU whenever it starts; docs/compile.md)"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2].splitlines()[0]
        raise UserError(f"--topology={topology}: {reason}. Known are {', '.join(TOPOLOGIES)}") from error


def stored(config: Config) -> Layout:
    """What the shards are taken to hold, whatever `prepare.latents` and `prepare.text_embeddings` say: all that pretrained towers make.

    That is text embeddings with text 'openclip', and latents with autoencoder 'kl', beside which the image tower has to see frames.
    """
    d = config.data
    latent = (config.latent_height, config.latent_width, 2 * config.autoencoder.z_channels) if config.autoencoder.kind == "kl" else ()
    text = (config.text.context_length, config.text.width) if config.text.kind == "openclip" else ()
    mask = config.loss.heatmap == "mask"
    return Layout(d.frames, d.height, d.width, config.prepare.flow_stride, motion_mask=mask, latent=latent, text=text)


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch as it comes from shards that hold what is `stored`, placed on `mesh`."""
    layout = stored(config)
    fields = layout.batch(config.image_tokens)
    if not layout.text:
        fields["tokens"] = ((config.text.context_length,), "<i4")

    def one(name: str, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), np.dtype(dtype), sharding=batch_sharding(mesh, name))

    return {name: one(name, *field) for name, field in fields.items()}


def lower_step(config: Config, mesh: Mesh) -> tuple[jax.stages.Lowered, int, int]:
    """(the train step of the training loop, lowered for `mesh`; the matrix FLOPs that it executes on all devices; those in kernels)."""
    check_fits(mesh, config.batch_size, config.grad_accumulation, config.data.frames)
    networks, optimizer = Networks.of(config), make_optimizer(config)
    template, _ = make_state(config, networks, mesh, optimizer)
    check_split(mesh, template.params)
    replicated = NamedSharding(mesh, PartitionSpec())
    towers = {name: network.shapes for name, network in networks.frozen.items()}
    frozen = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), towers, shard_networks(towers, mesh)
    )
    nothing = jax.eval_shape(networks.unconditional, towers, np.zeros(config.text.context_length, np.int32))
    frozen["unconditional"] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated), nothing)
    with target_platform(mesh.devices.flat[0].platform):
        traced = jit_train_step(networks, optimizer, mesh, template).trace(template, frozen, batch_shapes(config, mesh))
    return traced.lower(), jaxpr_flops(traced.jaxpr.jaxpr), jaxpr_flops(traced.jaxpr.jaxpr, in_kernels=True)


def set_effort(effort: float) -> None:
    """XLA's effort to make programs fast, from -1 (compiles fastest) over 0 (its default) to 1; JAX 0.11 has levels instead."""
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", effort)
    else:
        jax.config.update("jax_optimization_level", "O0" if effort < 0 else "O3" if effort > 0 else "UNKNOWN")


def compile_step(config: Config, devices: list[jax.Device], effort: float = -1.0) -> Report:
    """Compiles the train step for `devices` and measures it; raises UserError when it does not fit, with what would help.

    effort: XLA's exec_time_optimization_effort, -1 (compiles fastest) to 1. Its default, 0, takes several times as long.
    """
    check_kernel(config.attention, devices[0].platform)
    set_effort(effort)
    mesh = make_mesh(config.mesh, devices)
    for text in repeated_work(mesh, config.batch_size, config.grad_accumulation):
        print(text, flush=True)
    began = time.perf_counter()
    lowered, matmuls, kernels = lower_step(config, mesh)
    lowering = time.perf_counter() - began
    chip = devices[0].device_kind
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(too_large(str(error), config, mesh, chip)) from error
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    hbm = HBM_GIB.get(chip)
    return Report(
        chip=chip,
        chips=len(devices),
        mesh=dict(mesh.shape),
        hbm_bytes=hbm and int(hbm * 2**30),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        program_bytes=memory.generated_code_size_in_bytes,
        model_flops=training_flops(config),
        matmul_flops=matmuls,
        kernel_flops=kernels,
        xla_flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        optimal_seconds=seconds if (seconds := cost.get("optimal_seconds", 0.0)) > 0 else None,
        collectives=collectives(compiled.as_text()),
        peak_tflops=peak_tflops(chip),
        lower_seconds=lowering,
        compile_seconds=time.perf_counter() - began - lowering,
    )


def too_large(message: str, config: Config, mesh: Mesh, chip: str) -> str:
    """The compiler's error as one line: what it needs, what the chip has, and the settings that would help."""
    found = re.search(r"Used ([\d.]+\w+) of ([\d.]+\w+) hbm", message) or re.search(r"\(([\d.]+\w+)\) exceeds .*\(([\d.]+\w+)\)", message)
    sizes = f"needs {found[1]} of the {found[2]} of memory" if found else "needs more memory than there is"
    clips = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accumulation)
    helps = []
    if config.remat != "block":
        helps.append("remat='block' (recompute activations)")
    if clips > 1:
        helps.append(f"grad_accumulation={2 * config.grad_accumulation} ({clips} clips at a time now)")
    if mesh.shape["data"] > 1:
        helps.append(f"mesh.fsdp={2 * mesh.shape['fsdp']} (parameters and optimizer over more chips)")
    if clips == 1:
        helps.append(f"mesh.context={2 * mesh.shape['context']} (frames of a clip over more chips)")
    if config.dtype == "float32":
        helps.append("dtype='bfloat16'")
    return (
        f"does not fit: a step {sizes} on each {chip} ({len(mesh.devices.flat)} chips). What would help: {', '.join(helps)}, or more chips"
    )
