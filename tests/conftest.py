"""Shared fixtures, and what all processes of a test run share."""

import os
import pathlib
import runpy
import shutil
import tempfile

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """Before JAX is imported: what one process or test has compiled, the others need not. A run starts with an empty cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items):
    """Marks the tests that use `shared`. Modules with slow tests first: a process that starts one last would leave the others waiting."""
    for item in items:
        if "shared" in item.fixturenames:
            item.add_marker("shared")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Reference outputs, weights and videos beside the checkout; the test is skipped without them."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference material in ../shared, which is not part of the project")
    return SHARED


def _older_loops() -> dict[str, bool]:
    """The option of XLA's older generator of loops, which compiles a U-Net in two thirds of the newer one's time; jax 0.12 has none."""
    import jax

    return {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 12) else {}


@pytest.fixture(scope="module")
def quick_compile():
    """No LLVM optimiser, for modules that compile much and compute little: they take less time, and only roundings change.

    Gives the options that it sets in XLA. JAX has no public setting for an option of every program.
    """
    import jax
    from jax._src import compiler

    def options(*args, env_options_overrides=None, **kwargs):
        return original(*args, env_options_overrides=loops | (env_options_overrides or {}), **kwargs)

    original, loops = compiler.get_compile_options, _older_loops()
    if jax.default_backend() == "cpu":
        compiler.get_compile_options = options
        jax.config.update("jax_disable_most_optimizations", True)
    yield loops
    compiler.get_compile_options = original
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def quick_environment():
    """(number of CPU devices) -> the environment of a process that compiles as with `quick_compile`."""

    def environment(devices: int = 1) -> dict[str, str]:
        flags = [f"--xla_force_host_platform_device_count={devices}", *(f"--{name}=false" for name in _older_loops())]
        return {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}

    return environment


@pytest.fixture(scope="session")
def tiny():
    """A function that gives a valid configuration of seconds: 4 frames of 16x16, one-level U-Net; arguments are overrides."""
    from motif_jax.config import from_config_dict

    base = {
        "dtype": "float32",
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "log_every": 1,
        "data": {"frames": 4, "height": 16, "width": 16},
        "prepare": {"flow": "exact", "flow_stride": 4, "image_format": "png", "clips_per_shard": 8},
        "autoencoder": {"kind": "pixel", "factor": 4, "z_channels": 48, "scale_factor": 1.0},
        "text": {"kind": "words", "vocab_size": 512, "context_length": 8, "width": 16},
        "unet": {
            "in_channels": 96,
            "out_channels": 48,
            "model_channels": 16,
            "channel_mult": [1],
            "num_res_blocks": 1,
            "attention_resolutions": [1],
            "num_head_channels": 8,
            "context_dim": 16,
            "addition_attention": False,
            "norm_groups": 4,
        },
        "loss": {"intensity": "clip_max"},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "batches": 1, "buckets": 2},
        "sample": {"every": 0, "count": 1, "steps": 2},
    }

    def merge(into, new):
        return {**into, **{k: merge(into.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}}

    return lambda **overrides: from_config_dict(merge(base, overrides))


@pytest.fixture(scope="session")
def bucket():
    """A store of gs:// on this machine, which this process and those that it starts take for Google's; see gcs.py."""
    import fsspec

    server = runpy.run_path(str(pathlib.Path(__file__).with_name("gcs.py")))["Server"]()
    os.environ.update(server.environment)  # before gcsfs is imported
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    fsspec.config.conf["gs"] = {"token": "anon"}  # processes that are started read it from the environment
    yield server.store
    server.shutdown()
