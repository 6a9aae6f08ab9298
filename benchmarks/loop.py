"""What the loop costs beside the steps, and how long a save holds it up.

    python benchmarks/loop.py [--step=0.2] [--steps=100] [--width=64] [--depth=2]

The real `motif_jax.training.loop` on the synthetic world, with a train step that counts for a known time on one core and changes
nothing. The CPU backend works it off in the background, as an accelerator does, so the machine needs a second core that is idle.

    step alone   the same program on the same state, each call made while the one before runs; measured before and after the loop
    loop         from batch to batch, without the first steps and those with a save, logging (every ten steps) included
    host work    CPU time of the loop's thread per step (median), which passes while the step before runs
    save         how long the loop stood still, from the run's own metrics
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
from motif_jax.config import Config, from_config_dict
from motif_jax.dist.mesh import make_mesh, place
from motif_jax.models.networks import Networks
from motif_jax.training import loop
from motif_jax.training.optimizer import make_optimizer


def counting_step(turns: int):
    """A train step without a model: so many turns of a loop that XLA cannot shorten."""

    def step(state, frozen, batch):
        counted = jax.lax.fori_loop(0, turns, lambda _, x: x * 1664525 + 1013904223, state.step.astype(jnp.uint32))
        loss = (counted % 7).astype(jnp.float32)
        return type(state)(state.step + 1, state.params, state.ema, state.opt_state), {"loss": loss, "grad_norm": loss}

    return step


def seconds_alone(config: Config, turns: int, steps: int) -> float:
    """Mean time of a step that nothing but its own dispatch accompanies."""
    template, create = loop.make_state(config, Networks.of(config), make_mesh(config.mesh), make_optimizer(config))
    zeros = {name: np.zeros(s.shape, s.dtype) for name, s in template.params.items()}
    state = create(place(zeros, {name: s.sharding for name, s in template.params.items()}))
    step = jax.jit(counting_step(turns), donate_argnums=0)
    before = None
    for number in range(steps + 2):
        if number == 2:
            jax.block_until_ready(before)
            began = time.perf_counter()
        state, metrics = step(state, {}, {})
        jax.block_until_ready(before)
        before = metrics
    jax.block_until_ready(before)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.2, help="seconds of one step, about")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=64, help="of the model, which decides the size of a checkpoint")
    parser.add_argument("--depth", type=int, default=2, help="of the model, which decides the number of arrays")
    arguments = parser.parse_args()
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
        turns = int(1e5 * arguments.step / seconds_alone(config, 100_000, 3))
        alone = [seconds_alone(config, turns, arguments.steps // 4)]
        loop.make_train_step = lambda *_: counting_step(turns)
        place_batch, times = loop.global_batch, []

        def noted(*args):
            times.append((time.perf_counter(), time.thread_time()))
            return place_batch(*args)

        loop.global_batch = noted
        loop.train(config, pathlib.Path(directory) / "run")
        alone.append(seconds_alone(config, turns, arguments.steps // 4))
        lines = [json.loads(text) for text in (pathlib.Path(directory) / "run" / "metrics.jsonl").read_text().splitlines()]
    saves = {line["step"]: line["save_seconds"] for line in lines if "save_seconds" in line}
    plain = [step for step in range(3, arguments.steps - 1) if step + 1 not in saves]  # from batch number `step` to the next
    wall, work = np.diff(np.array(times), axis=0)[plain].T
    shapes = jax.tree.leaves(loop.make_state(config, Networks.of(config), make_mesh(config.mesh), make_optimizer(config))[0])
    size = sum(np.prod(s.shape) * s.dtype.itemsize for s in shapes)
    whole, step = np.mean(wall), np.mean(alone)
    print(f"step alone {', '.join(f'{1000 * s:.1f}' for s in alone)} ms   loop {1000 * whole:.1f} ms: {100 * (whole / step - 1):+.2f} %")
    print(f"host work {1000 * np.median(work):.2f} ms of CPU a step, {len(shapes)} arrays")
    print(f"save of {size / 1e6:,.0f} MB holds the loop for {', '.join(f'{s:.3f}' for s in saves.values())} s")


if __name__ == "__main__":
    main()
