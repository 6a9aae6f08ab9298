"""Clips per second out of shards through the training pipeline, against what the train step of the same configuration takes.

    python benchmarks/input_pipeline.py [--config=configs/quickstart.py] [--source=synthetic:quickstart:512] [--batches=50]

Prepares the source, times the real train step on one batch (its need: clips of a batch over the seconds of a step), then
`motif_jax.data.pipeline` alone with threads in this process and with one and two worker processes. Reading records against other
containers, and against decoding and flow on the fly, is in benchmarks/shards.py.
"""

import argparse
import dataclasses
import datetime
import pathlib
import platform
import statistics
import tempfile
import time

import jax
from common import cores, run

from motif_jax import preparation
from motif_jax.config import Config, load_config
from motif_jax.data import pipeline
from motif_jax.data.tokens import make_tokenizer
from motif_jax.models.networks import Networks
from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import make_train_step


def step_seconds(config: Config, batch: pipeline.Batch, tokenizer: pipeline.Tokenizer) -> float:
    """Median of five train steps after the first."""
    networks, optimizer = Networks.of(config), make_optimizer(config)
    params = networks.denoiser.init(jax.random.key(0))
    state = jax.jit(lambda p: train_state.create(p, optimizer, config.ema.decay > 0))(params)
    step = jax.jit(make_train_step(networks, optimizer), donate_argnums=0)
    frozen, taken = networks.with_unconditional(networks.init_frozen(), tokenizer), []
    for _ in range(6):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        float(metrics["loss"])
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def clips_per_second(config: Config, workers: int, batches: int, tokenizer: pipeline.Tokenizer) -> float:
    """Of `batches` batches after the first few, which also wait for the workers to start."""
    data = dataclasses.replace(config.data, workers=workers)
    stream = pipeline.make_iterator(pipeline.open_dataset(data), config.batch_size, 0, 0, tokenizer)
    for _ in range(2 * data.prefetch):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    taken = time.perf_counter() - began
    stream.close()
    return batches * config.batch_size / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--source", default="synthetic:quickstart:512")
    parser.add_argument("--batches", type=int, default=50)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    print(f"{platform.platform()}, {cores()} cores, jax {jax.__version__}, {datetime.date.today()}\n")
    with tempfile.TemporaryDirectory() as directory:
        prepare = dataclasses.replace(config.prepare, flow="exact")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=directory), prepare=prepare)
        preparation.prepare(config, arguments.source, pathlib.Path(directory), log=lambda line: None)
        tokenizer = make_tokenizer(config.text)
        first = pipeline.make_iterator(pipeline.open_dataset(config.data), config.batch_size, 0, 0, tokenizer)
        seconds = step_seconds(config, next(first), tokenizer)
        first.close()
        need = config.batch_size / seconds
        print(f"a step of {arguments.config} takes {seconds:.3f} s on this device and needs {need:.1f} clips/s\n")
        print("| pipeline | clips/s | of the need |\n|---|---|---|")
        for workers in (0, 1, 2):
            rate = clips_per_second(config, workers, arguments.batches, tokenizer)
            name = f"{workers} worker processes" if workers else f"{config.data.threads} threads in this process"
            print(f"| {name} | {rate:.0f} | {rate / need:.1f} x |", flush=True)


if __name__ == "__main__":
    run(main)
