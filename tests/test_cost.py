"""A guard against a slower step that needs no clock: XLA's counts for the tiny train step, against recorded ones.

A deliberate change: `python tests/test_cost.py` records them anew, under each jax that is supported; the difference belongs in the commit.
"""

import json
import pathlib

import jax
import pytest

from motif_jax.compilation import lower_step
from motif_jax.config import from_config_dict
from motif_jax.dist.mesh import make_mesh

RECORDED = pathlib.Path(__file__).parent / "testdata" / "step_cost.json"
JAX = ".".join(jax.__version__.split(".")[:2])  # "0.10"
TINY = {
    "dtype": "float32",
    "batch_size": 2,
    "remat": "block",
    "data": {"frames": 4, "height": 16, "width": 16},
    "prepare": {"flow": "exact", "flow_stride": 4},
    "autoencoder": {"kind": "pixel", "factor": 4, "z_channels": 48, "scale_factor": 1.0},
    "text": {"kind": "words", "vocab_size": 512, "context_length": 8, "width": 16},
    "unet": {
        "in_channels": 96,
        "out_channels": 48,
        "model_channels": 32,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),  # transformers in the middle block only: compilation is what this costs
        "num_head_channels": 8,
        "context_dim": 16,
        "norm_groups": 8,
        "addition_attention": False,
    },
}


def measure() -> dict[str, float]:
    """Counts of one device: floating point operations, bytes read and written, bytes of temporaries, bytes at most in use."""
    config = from_config_dict(TINY)
    lowered, *_ = lower_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})  # of machine code: compiles faster, counts the same
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": cost["flops"],
        "bytes accessed": cost["bytes accessed"],
        "temporaries": memory.temp_size_in_bytes,
        "peak memory": memory.peak_memory_in_bytes,
    }


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the recorded counts are those of the CPU")
def test_the_step_costs_what_it_did():
    recorded = json.loads(RECORDED.read_text())
    assert JAX in recorded, f"no counts are recorded with jax {JAX}: python tests/test_cost.py"
    recorded, found = recorded[JAX], measure()
    for name, value in found.items():
        expected = recorded[name]
        assert abs(value - expected) <= 0.05 * expected, (
            f"{name}: {value:.4g}, {100 * (value / expected - 1):+.1f} % from the {expected:.4g} recorded with jax {JAX}; "
            f"if that is meant, record it: python tests/test_cost.py"
        )


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(json.loads(RECORDED.read_text()) | {JAX: measure()}, indent=1) + "\n")
