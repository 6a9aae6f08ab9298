"""What the training loop costs beside the steps, and how long a save holds it up.

    python benchmarks/loop.py [--step=0.2] [--steps=40] [--width=64]

The real `motif_jax.training.loop` on the synthetic world, with a train step that sleeps for a known time and changes nothing.
Host work: CPU time of the loop's thread per step (median), for batch, dispatch and log. An accelerator works on the step before
meanwhile; the CPU backend cannot (a step that calls the host is run where it is dispatched), so loop time minus step time would
measure the machine here. "save": how long the loop stood still, from the run's own metrics.
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


def waiting_step(seconds: float):
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
    parser.add_argument("--width", type=int, default=64, help="of the model, which decides the size of a checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory) / "data"
        config = from_config_dict(
            {
                "dtype": "float32",
                "steps": arguments.steps,
                "batch_size": 4,
                "log_every": 5,
                "backbone": "dit",
                "dit": {"width": arguments.width, "depth": 2, "patch": [1, 1, 1]},
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
        loop.make_train_step = lambda *_: waiting_step(arguments.step)
        host: list[float] = []
        place_batch = loop.global_batch

        def noted(*args):
            host.append(time.thread_time())
            return place_batch(*args)

        loop.global_batch = noted
        loop.train(config, pathlib.Path(directory) / "run")
        lines = [json.loads(text) for text in (pathlib.Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = [line["save_seconds"] for line in lines if "save_seconds" in line]
    size = 4 * 4 * sum(np.prod(s.shape) for s in loop.Networks.of(config).denoiser.shapes.values())
    work = np.median(np.diff(host[2 : arguments.steps // 2]))  # up to the first save
    print(f"step {arguments.step:.3f} s   host work {1000 * work:.2f} ms = {100 * work / arguments.step:.2f} %")
    print(f"save of {size / 1e6:,.0f} MB holds the loop for {', '.join(f'{s:.3f}' for s in saves)} s")


if __name__ == "__main__":
    main()
