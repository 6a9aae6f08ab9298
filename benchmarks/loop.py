"""What the training loop costs beside the steps, and how long a save holds it up.

    python benchmarks/loop.py [--step=0.2] [--steps=40] [--parameters=20_000_000]

The real `motif_jax.training.loop` on the synthetic world, with a train step that takes a known time: it waits on the host for
that long and changes nothing. Loop time is what the run's own metrics say; "save" is the time that the loop stood still.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from motif_jax import preparation
from motif_jax.config import from_config_dict
from motif_jax.training import loop


def waiting_step(networks, optimizer, empty_L, seconds: float):
    """A train step without a model."""

    def wait(_) -> np.ndarray:
        time.sleep(seconds)
        return np.float32(0)

    def step(state, frozen, batch):
        zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), state.step)
        return type(state)(state.step + 1, state.params, state.ema, state.opt_state), {"loss": zero, "grad_norm": zero}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.2, help="seconds of one step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--parameters", type=int, default=20_000_000, help="about how many; a checkpoint holds four times as many")
    arguments = parser.parse_args()
    width = max(64, int((arguments.parameters / 26) ** 0.5) // 64 * 64)
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory) / "data"
        config = from_config_dict(
            {
                "dtype": "float32",
                "steps": arguments.steps,
                "batch_size": 4,
                "log_every": 5,
                "backbone": "dit",
                "dit": {"width": width, "depth": 2, "patch": [1, 4, 4]},
                "data": {"path": str(data), "frames": 8, "height": 64, "width": 64},
                "prepare": {"flow": "exact", "image_format": "png", "clips_per_shard": 64, "validation_share": 0.0},
                "autoencoder": {"kind": "pixel", "factor": 8, "z_channels": 192, "scale_factor": 1.0},
                "text": {"kind": "words", "vocab_size": 512, "context_length": 8, "width": 16},
                "checkpoint": {"every": arguments.steps // 2},
                "eval": {"every": 0},
                "sample": {"every": 0},
            }
        )
        preparation.prepare(config, "synthetic:shapes:64", data, log=lambda line: None)
        loop.make_train_step = lambda *args: waiting_step(*args, seconds=arguments.step)
        loop.train(config, pathlib.Path(directory) / "run")
        lines = [json.loads(text) for text in (pathlib.Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
    per_step = np.array([line["seconds_per_step"] for line in lines if "seconds_per_step" in line])
    saves = [line["save_seconds"] for line in lines if "save_seconds" in line]
    size = 4 * 4 * sum(np.prod(s.shape) for s in loop.Networks.of(config).denoiser.shapes.values())
    overhead = 100 * (np.median(per_step) / arguments.step - 1)
    print(f"step {arguments.step:.3f} s   loop {np.median(per_step):.4f} s   overhead {overhead:.2f} %")
    print(f"save of {size / 1e6:,.0f} MB holds the loop for {', '.join(f'{s:.3f}' for s in saves)} s")


if __name__ == "__main__":
    main()
