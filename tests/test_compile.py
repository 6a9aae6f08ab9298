"""Ahead-of-time compilation: the report of a step on eight fake devices, what is said when it cannot be, and a real TPU compile."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from motif_jax.compilation import Report, batch_shapes, compile_step, too_large
from motif_jax.config import MeshConfig, from_config_dict, to_json
from motif_jax.dist.mesh import make_mesh
from motif_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBTPU = os.environ.get("MOTIF_LIBTPU", "")  # a directory that holds the TPU compiler alone: beside it, JAX looks for a TPU

EIGHT_DEVICES = """
import json, sys, jax
from motif_jax.compilation import compile_step
from motif_jax.config import from_json

report = compile_step(from_json(sys.argv[1]), jax.devices())
print(report, file=sys.stderr)
print(json.dumps(report.to_dict()))
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(batch_size=8, mesh={"data": 2, "fsdp": 4}, unet={"attention_resolutions": []})


@pytest.mark.slow
def test_report_on_eight_devices(config, quick_environment):
    done = run("-c", EIGHT_DEVICES, to_json(config), **quick_environment(8))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["chips"] == 8 and report["mesh"] == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    # Every weight is gathered over fsdp and every gradient summed over data: at least the bytes of all parameters, either way.
    assert report["collectives"]["all-gather"]["bytes"] > 1e5
    assert report["collectives"]["all-reduce"]["bytes"] > 1e5
    # Forward and backward pass without recomputation: what MFU counts, but for the first layer's input gradient.
    assert report["matmul_flops"] == pytest.approx(report["model_flops"], rel=0.1)
    assert report["memory_bytes"] > report["argument_bytes"] > 0
    assert report["mfu_bound"] is None  # a CPU has no stated peak
    for text in ("8 x cpu, data=2 fsdp=4 context=1 tensor=1", "memory of a chip", "collectives       all-gather", "MFU bound         none"):
        assert text in done.stderr


def test_a_kernel_of_another_platform_is_refused(config):
    with pytest.raises(UserError, match="attention='cudnn': runs on gpu and this is cpu"):
        compile_step(dataclasses.replace(config, attention="cudnn"), jax.devices())


def test_pretrained_towers_are_not_in_the_step():
    """The paper's batch holds latents and text embeddings; the toy's frames and tokens."""
    mesh = make_mesh(MeshConfig())
    paper = {name: (s.shape, s.dtype.name) for name, s in batch_shapes(from_config_dict({}), mesh).items()}
    assert paper == {
        "latent_moments": ((64, 16, 40, 64, 8), "float16"),
        "text_embedding": ((64, 77, 1024), "float16"),
        "flow": ((64, 16, 40, 64, 2), "float16"),
        "fps": ((64,), "float32"),
    }


def test_masks_are_in_the_batch_and_frames_lie_over_context():
    batch = batch_shapes(from_config_dict({"loss": {"heatmap": "mask"}}), make_mesh(MeshConfig()))
    assert (batch["motion_mask"].shape, batch["motion_mask"].dtype) == ((64, 16, 40, 64), "uint8")
    clips = ("data", "fsdp")
    specs = {name: tuple(s.sharding.spec) for name, s in batch.items()}
    split = dict.fromkeys(("latent_moments", "flow", "motion_mask"), (clips, "context"))
    assert specs == split | {"text_embedding": (clips,), "fps": (clips,)}


def test_image_tokens_are_made_of_the_first_frame():
    batch = batch_shapes(from_config_dict({"unet": {"image_cross_attention": True}}), make_mesh(MeshConfig()))
    assert set(batch) == {"latent_moments", "image", "text_embedding", "flow", "fps"} and batch["image"].shape == (64, 320, 512, 3)


def test_toys_read_frames_and_tokens(config):
    assert set(batch_shapes(config, make_mesh(MeshConfig()))) == {"frames", "tokens", "flow", "fps"}


@pytest.mark.parametrize(
    "message, sizes",
    [
        ("RESOURCE_EXHAUSTED: ... Used 24.89G of 15.75G hbm. Exceeded hbm capacity by 9.14G.", "needs 24.89G of the 15.75G"),
        ("RESOURCE_EXHAUSTED: ... HLO temporaries (720.00G) exceeds available HBM (95.74G).", "needs 720.00G of the 95.74G"),
        ("RESOURCE_EXHAUSTED: something new", "needs more memory than there is"),
    ],
)
def test_too_large(config, message, sizes):
    mesh = make_mesh(MeshConfig())
    text = too_large(message, config, mesh, "TPU v5 lite")
    assert sizes in text and "\n" not in text
    for remedy in ("remat='block'", "grad_accumulation=2 (8 clips at a time now)", "dtype='bfloat16'"):
        assert remedy in text
    text = too_large(message, dataclasses.replace(config, grad_accumulation=4), mesh, "TPU v5 lite")
    assert "grad_accumulation=8 (2 clips at a time now)" in text


def test_a_report_by_hand():
    """Half of each chip's memory; loops that turn twice; half of what four chips of 197 TFLOP/s could do in that time."""
    gib = 2**30
    report = Report(
        chip="TPU v5 lite",
        chips=4,
        mesh={"data": 4},
        hbm_bytes=16 * gib,
        argument_bytes=3 * gib,
        output_bytes=gib // 2,
        temporary_bytes=4 * gib,
        program_bytes=gib // 2,
        model_flops=197 * 10**12,
        matmul_flops=8 * 10**12,
        kernel_flops=0,
        xla_flops=1e12,
        bytes_accessed=1e9,
        optimal_seconds=0.25,
        collectives={},
        peak_tflops=197.0,
        lower_seconds=1.0,
        compile_seconds=2.0,
    )
    assert (report.memory_bytes, report.loops, report.step_seconds, report.mfu_bound) == (8 * gib, 2.0, 0.5, 0.5)
    for text in ("8.00 GiB of 16.00 GiB, 50 %", "0.5 s a step by XLA's estimate", "(loops: x 2.00)", "50.0 % of 197 TFLOP/s"):
        assert text in str(report)
    assert dataclasses.replace(report, matmul_flops=10**9).loops == 1.0  # XLA counts elementwise work too
    # Kernels are no loops: a quarter of a chip's second of products comes on top.
    with_kernels = dataclasses.replace(report, matmul_flops=8 * 10**12 + 197 * 10**12, kernel_flops=197 * 10**12)
    assert (with_kernels.loops, with_kernels.step_seconds) == (2.0, 0.75)
    assert "of these 197.0 TFLOP in Pallas kernels" in str(with_kernels) and "Pallas" not in str(report)
    assert dataclasses.replace(with_kernels, peak_tflops=None).step_seconds is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler():
    done = run("-m", "motif_jax.compile", "--config=configs/motif.py:tiny", "--topology=v5e:2x2")
    assert done.returncode == 1
    assert done.stderr.startswith("motif_jax.compile: the TPU compiler is not installed: pip install -e '.[tpu]'")
    assert done.stderr.count("\n") == 1


MESHES = """
from jax.experimental import topologies
from motif_jax.compilation import tpu_devices
from motif_jax.config import MeshConfig
from motif_jax.errors import UserError
from motif_jax.dist.mesh import make_mesh

for name, data, fsdp, context in (("v6e:4x4", 2, 8, 1), ("v6e:4x4", 8, 2, 1), ("v6e:8x8", 1, 32, 2), ("v5p:4x4x4", 2, 32, 1)):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context), tpu_devices(name))
    assert tuple(mesh.shape.values()) == (data, fsdp, context, 1), mesh
two = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices)
mesh = make_mesh(MeshConfig(data=4, fsdp=8), two)
assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
try:
    make_mesh(MeshConfig(data=1, fsdp=32), two)
except UserError as error:
    assert "data must be a multiple of the 2 slices" in str(error)
    print("fine")
"""

# The chip with the least on-chip memory that a program may use; the paper's two finest levels, other widths, odd frames, keys in blocks.
KERNELS = """
import functools, jax, jax.numpy as jnp
from motif_jax.compilation import set_effort, tpu_devices
from motif_jax.models import along_frames, splash
from motif_jax.models.placement import target_platform

sharding = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
set_effort(-1.0)

def compiled(attend, *shape):
    def all_of_it(q, k, v, g):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(g)

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    with target_platform("tpu"):
        text = jax.jit(all_of_it).trace(x, x, x, x).lower().compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2, text  # forward and backward

for L, H, K in ((2560, 5, 64), (640, 10, 64), (5000, 1, 128), (640, 2, 40)):
    compiled(splash.attend, 1, L, H, K)
for T, P, H, K in ((16, 2560, 5, 64), (16, 40, 20, 64), (32, 64, 20, 64), (25, 64, 2, 128), (3, 8, 3, 40)):
    compiled(functools.partial(along_frames.attend, K), 1, T, P, H * K)
print("fine")
"""


def compile_for_tpu(*arguments):
    path = os.pathsep.join(filter(None, (LIBTPU, os.environ.get("PYTHONPATH"))))
    return run("-m", "motif_jax.compile", "--config=configs/motif.py:tiny", *arguments, PYTHONPATH=path, JAX_ENABLE_COMPILATION_CACHE="0")


@pytest.mark.skipif(not LIBTPU, reason="needs the TPU compiler in the directory that MOTIF_LIBTPU names; launch/test.sh puts it there")
class TestForTpu:
    def test_unknown_topology(self):
        done = compile_for_tpu("--topology=v9:2x2")
        assert done.returncode == 1
        assert "motif_jax.compile: --topology=v9:2x2: " in done.stderr and "v5e:4x4" in done.stderr
        assert "Traceback" not in done.stderr

    def test_meshes(self):
        """Axes that divide those of the torus otherwise than along its sides, and two slices, between which lies `data`."""
        path = os.pathsep.join(filter(None, (LIBTPU, os.environ.get("PYTHONPATH"))))
        done = run("-c", MESHES, PYTHONPATH=path)
        assert done.returncode == 0 and done.stdout == "fine\n", done.stderr

    def test_kernels(self):
        path = os.pathsep.join(filter(None, (LIBTPU, os.environ.get("PYTHONPATH"))))
        done = run("-c", KERNELS, PYTHONPATH=path, JAX_ENABLE_COMPILATION_CACHE="0")
        assert done.returncode == 0 and done.stdout == "fine\n", done.stderr

    def test_tiny(self, tmp_path):
        small = ("batch_size=4", "mesh.data=2", "mesh.fsdp=2", "unet.channel_mult=(1,)", "unet.attention_resolutions=()", "data.frames=4")
        overrides = [f"--config.{setting}" for setting in small]
        target = ("--topology=v5e:2x2", f"--json={tmp_path / 'report.json'}")
        done = compile_for_tpu(*target, *overrides)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["chip"] == "TPU v5 lite" and report["chips"] == 4 and report["peak_tflops"] == 197.0
        assert 0 < report["memory_bytes"] < report["hbm_bytes"] and report["collectives"]
        assert 0 < report["mfu_bound"] < 1
        assert "from shards with flow, fps, frames: compiling" in done.stdout and "% of 197 TFLOP/s" in done.stdout
