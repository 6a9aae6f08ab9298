"""The paper's model trained on the accelerators of this machine, from made-up latents: step time, MFU, memory, and what the loop adds.

    python benchmarks/full_size.py --config=configs/motif.py --config.batch_size=4 --config.steps=60 [--data=DIR] [--config.a.b=value ...]

The real `motif_jax.training.loop` on shards of random latents and text embeddings (`--data`: made there unless they are there), with
random weights and without evaluation and sampling. `--config.checkpoint.every=N` also saves, unless there are fewer steps. Then the same
step without the loop: one batch that stays on the devices, each call made while the one before runs. `--profile=DIR` writes an XProf trace
of three of these, and says what the GPU did in it (benchmarks/kernels.py).
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import time

import kernels
import numpy as np
from absl import flags
from common import random_weights, write_dataset
from ml_collections import config_flags

from motif_jax import commands
from motif_jax.config import Config
from motif_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:args]", lock_config=True)
DATA = flags.DEFINE_string("data", None, "directory of the made-up dataset; default: a temporary one")
CLIPS = flags.DEFINE_integer("clips", 24, "clips of the dataset")
PROFILE = flags.DEFINE_string("profile", None, "directory for a trace of three steps")
flags.mark_flags_as_required(["config"])


def no_tokens(text):
    """A tokenizer without a vocabulary."""
    return lambda sentences: np.zeros((len(sentences), text.context_length), np.int32)


def seconds_alone(config: Config, weights, batch: dict[str, np.ndarray], steps: int) -> float:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from motif_jax.dist.mesh import global_batch, make_mesh, place, shard_networks
    from motif_jax.models.networks import Networks
    from motif_jax.training import sharded
    from motif_jax.training.optimizer import make_optimizer

    networks, optimizer, mesh = Networks.of(config), make_optimizer(config), make_mesh(config.mesh)
    template, create = sharded.make_state(config, networks, mesh, optimizer)
    shardings = jax.tree.map(lambda s: s.sharding, template)
    state = create(place(weights.denoiser, shardings.params))
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = place(weights.frozen, shard_networks(weights.frozen, mesh))
    frozen = networks.with_unconditional(placed, no_tokens(config.text), replicated)
    step = sharded.jit_train_step(networks, optimizer, mesh, template)
    on_devices = global_batch(batch, mesh, config.batch_size)

    def run(state, steps: int):
        before = None
        for _ in range(steps):
            state, metrics = step(state, frozen, on_devices)
            jax.block_until_ready(before)
            before = metrics
        return jax.block_until_ready(state)

    state = run(state, 3)
    began = time.perf_counter()
    state = run(state, steps)
    seconds = (time.perf_counter() - began) / steps
    if PROFILE.value:
        with jax.profiler.trace(PROFILE.value):
            run(state, 3)
    return seconds


def main(argv: list[str]) -> None:
    commands.no_more(argv)
    config = commands.configuration(CONFIG)
    if config.steps <= config.log_every:
        raise UserError(f"steps={config.steps}: must be more than log_every={config.log_every}, as the window that compiles does not count")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # as motif_jax.main
    import jax

    from motif_jax.models.networks import Networks
    from motif_jax.training import loop
    from motif_jax.training.weights import Weights

    with tempfile.TemporaryDirectory() as scratch:
        data, workdir = pathlib.Path(DATA.value or f"{scratch}/data"), pathlib.Path(scratch) / "run"
        if not (data / "dataset.json").exists():
            write_dataset(config, data, CLIPS.value, 8)
        off = {part: dataclasses.replace(getattr(config, part), every=0) for part in ("eval", "sample")}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)), **off)
        networks = Networks.of(config)
        weights = Weights(
            random_weights(networks.denoiser.shapes), {name: random_weights(network.shapes) for name, network in networks.frozen.items()}
        )
        loop.initial_weights = lambda *_, **__: weights
        loop.check_towers = lambda *_: None
        saving = config.checkpoint.every <= config.steps
        if not saving:  # the loop saves its last step whatever `every` is: 23 GB at the paper's size
            loop.checkpoint.Checkpoints.save = lambda *_, **__: None
        loop.make_tokenizer = no_tokens
        batches, place_batch = [], loop.global_batch

        def kept(batch, *others):
            batches[:] = [batch]
            return place_batch(batch, *others)

        loop.global_batch = kept
        loop.train(config, workdir)
        lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
        alone = seconds_alone(config, weights, batches[0], 10)
    found = [line for line in lines if "seconds_per_step" in line and "compile_seconds" not in line]
    mean = {name: float(np.mean([line[name] for line in found])) for name in found[0] if name not in ("step", "clips")}
    saves = [line["save_seconds"] for line in lines if "save_seconds" in line]
    seconds, mfu = mean["seconds_per_step"], f", MFU {100 * mean['mfu']:.1f} %" if "mfu" in mean else ""
    compilation = max(line.get("compile_seconds", 0) for line in lines)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {config.batch_size} clips a step, remat {config.remat}, {config.dtype}")
    print(f"loop {1000 * seconds:.1f} ms a step, {mean['clips_per_second']:.2f} clips/s, {mean['tflops_per_device']:.1f} TFLOP/s{mfu}")
    print(f"memory {mean['memory_gib']:.1f} GiB at most, input wait {100 * mean['input_wait']:.2f} %, first step after {compilation:.0f} s")
    print(f"step alone {1000 * alone:.1f} ms: the loop adds {100 * (seconds / alone - 1):+.2f} %")
    if PROFILE.value:
        print(kernels.table(PROFILE.value, 3))
    if saving:
        print(f"saves hold the loop for {', '.join(f'{s:.2f}' for s in saves)} s")


if __name__ == "__main__":
    commands.run("full_size", main)
