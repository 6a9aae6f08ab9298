"""What the loop costs beside the steps, and how long a save holds it up.

    python benchmarks/loop.py [--step=0.2] [--steps=100] [--width=64] [--depth=2]

The real `motif_jax.training.loop` on the synthetic world, with a train step that counts for a known time on one core and changes
nothing. The CPU backend works it off in the background, as an accelerator does, so the machine needs a second core that is idle.

    ahead      how long before a step ended the loop had handed over the next one
    idle       the share of the time in which it had not: what the loop adds to the steps, logging (every ten steps) included
    host work  CPU time of the loop's thread per step (median), which passes while the step before runs
    save       how long the loop stood still, from the run's own metrics; these steps are left out above
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
from motif_jax.dist.mesh import make_mesh
from motif_jax.models.networks import Networks
from motif_jax.training import loop, sharded
from motif_jax.training.optimizer import make_optimizer


def count(turns: int, start: jax.Array) -> jax.Array:
    """So many turns of a loop that XLA cannot shorten, and with a body that the CPU backend does not take for a trifle, which it
    would work off before the call returns."""
    return jax.lax.fori_loop(0, turns, lambda _, x: x * 1664525 + 1013904223, jnp.arange(4096, dtype=jnp.uint32) + start)[0]


def counting_step(turns: int):
    """A train step without a model."""

    def step(state, frozen, batch):
        loss = (count(turns, state.step.astype(jnp.uint32)) % 7).astype(jnp.float32)
        return type(state)(state.step + 1, state.params, state.ema, state.opt_state), {"loss": loss, "grad_norm": loss}

    return step


def turns_of(seconds: float) -> int:
    run = jax.jit(lambda start: count(100_000, start))
    run(jnp.uint32(0)).block_until_ready()
    began = time.perf_counter()
    for i in range(10):
        run(jnp.uint32(i)).block_until_ready()
    return int(1e6 * seconds / (time.perf_counter() - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.2, help="seconds of one step, about")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=64, help="of the model, which decides the size of a checkpoint")
    parser.add_argument("--depth", type=int, default=2, help="of the model, which decides the number of arrays")
    arguments = parser.parse_args()
    handed, ends, work = [], [], []  # of step 1, 2, ...: when it was handed over, when it ended, and the thread's CPU time so far

    class Watched(loop.Progress):
        def add(self, step, metrics, wait):
            super().add(step, metrics, wait)
            handed.append(time.perf_counter())
            ends.append(self._window[-1].end)
            work.append(time.thread_time())

    loop.Progress = Watched
    turns = turns_of(arguments.step)
    sharded.make_train_step = lambda *_: counting_step(turns)
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory) / "data"
        config = from_config_dict(
            {
                "dtype": "float32",
                "steps": arguments.steps,
                "batch_size": 4,
                "log_every": 10,
                "backbone": "dit",
                "dit": {"width": arguments.width, "depth": arguments.depth, "patch": [1, 1, 1]},
                "data": {"path": str(data), "frames": 8, "height": 64, "width": 64},
                "prepare": {"flow": "exact", "image_format": "png", "clips_per_shard": 64, "validation_share": 0.0},
                "autoencoder": {"kind": "pixel", "factor": 8, "z_channels": 192, "scale_factor": 1.0},
                "text": {"kind": "words", "vocab_size": 512, "context_length": 8, "width": 16},
                "checkpoint": {"every": arguments.steps // 4},
                "eval": {"every": 0},
                "sample": {"every": 0},
            }
        )
        preparation.prepare(config, "synthetic:shapes:64", data, log=lambda line: None)
        loop.train(config, pathlib.Path(directory) / "run")
        lines = [json.loads(text) for text in (pathlib.Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = {line["step"]: line["save_seconds"] for line in lines if "save_seconds" in line}
    plain = [i for i in range(2, arguments.steps - 1) if i + 1 not in saves]  # steps i + 1 and i + 2 follow each other at once
    end = np.array([e.result() for e in ends])
    ahead = end[:-1][plain] - np.array(handed)[1:][plain]
    seconds = np.diff(end)[plain]
    shapes = jax.tree.leaves(sharded.make_state(config, Networks.of(config), make_mesh(config.mesh), make_optimizer(config))[0])
    size = sum(np.prod(s.shape) * s.dtype.itemsize for s in shapes)
    print(f"step {1000 * np.median(seconds):.0f} ms, ahead {1000 * np.median(ahead):.0f} ms (least {1000 * ahead.min():.0f})")
    print(f"idle {100 * np.maximum(-ahead, 0).sum() / seconds.sum():.3f} %, in {np.sum(ahead < 0)} of {len(ahead)} steps")
    print(f"host work {1000 * np.median(np.diff(work)[plain]):.2f} ms of CPU a step, {len(shapes)} arrays")
    print(f"save of {size / 1e6:,.0f} MB holds the loop for {', '.join(f'{s:.3f}' for s in saves.values())} s")


if __name__ == "__main__":
    main()
