"""A full-size checkpoint of random numbers, imported and exported again: time against plain copying, and peak memory.

    python benchmarks/convert.py [--scale=full|tiny] [--format=safetensors|ckpt] [--directory=DIR]

Needs some 23 GB of disk at full size (three times the checkpoint); .ckpt needs PyTorch. Exits with 1 when a bound of the
project is missed: import in under 5 minutes, peak memory under 1.5 times the file, every tensor back bit for bit.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial

import numpy as np
from common import run

SECONDS, MEMORY = 300, 1.5


def random_checkpoint(path: pathlib.Path, scale: str) -> tuple[int, int]:
    """Writes the three networks in the reference's names; returns (tensors, parameters)."""
    from motif_jax.config import AutoencoderConfig, TextConfig, UNetConfig
    from motif_jax.interop import files, names
    from motif_jax.interop.reference import TABLES, VIDEOCRAFTER, constructors
    from motif_jax.interop.settings import Settings
    from motif_jax.models.networks import Network

    unet, autoencoder, text = UNetConfig(in_channels=4), AutoencoderConfig(), TextConfig()
    if scale == "tiny":
        unet = UNetConfig(in_channels=4, model_channels=32, num_res_blocks=1, num_head_channels=8, context_dim=64)
        autoencoder, text = AutoencoderConfig(ch=32), TextConfig(width=64, layers=3, heads=4)
    make = constructors(Settings(unet, autoencoder, text, VIDEOCRAFTER), np.float32)

    def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)

    tensors = {}
    for network in ("denoiser", "autoencoder", "text"):  # what a VideoCrafter file holds
        table = TABLES[network]
        for ours, leaf in Network.of(make[network]).shapes.items():
            name, shape = table.prefix + names.torch_name(ours), names.torch_shape(ours, leaf.shape)
            tensors[name] = files.Lazy(shape, np.dtype(np.float32), partial(numbers, name, shape))
    write = files.write_safetensors if path.suffix == ".safetensors" else files.write_pytorch
    write(path, tensors)
    return len(tensors), sum(int(np.prod(tensor.shape)) for tensor in tensors.values())


def measured(*command: str) -> tuple[float, float]:
    """(seconds, peak resident GB) of a command that must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "motif_jax.convert", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"convert {command[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def equal(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether `b` holds all tensors of `a`, bit for bit (it also has the schedule's tables)."""
    from motif_jax.interop.files import read_tensors

    one, two = read_tensors(a), read_tensors(b)
    return one.keys() <= two.keys() and all(np.asarray(one[n]).tobytes() == np.asarray(two[n]).tobytes() for n in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--format", choices=["safetensors", "ckpt"], default="safetensors")
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = pathlib.Path(name)
        source, back = directory / f"model.{args.format}", directory / f"back.{args.format}"
        tensors, parameters = random_checkpoint(source, args.scale)
        size = source.stat().st_size / 1e9
        start = time.perf_counter()
        shutil.copyfile(source, directory / "copy")
        os.sync()
        copy = time.perf_counter() - start
        (directory / "copy").unlink()

        rows = {"copy the file": (copy, 0.0)}
        rows["import"] = measured("import", "--kind=videocrafter", f"--input={source}", f"--output={directory}/in")
        rows["export"] = measured("export", f"--workdir={directory}/in", f"--output={back}", "--frozen")
        same = equal(source, back)
    print(f"{tensors} tensors, {parameters:,} parameters, {size:.2f} GB .{args.format}; {os.cpu_count()} CPUs")
    print(f"{'':14} {'seconds':>8} {'x copy':>7} {'peak GB':>8} {'x file':>7}")
    for row, (seconds, memory) in rows.items():
        print(f"{row:14} {seconds:8.1f} {seconds / copy:7.1f} {memory:8.2f} {memory / size:7.2f}")
    print(f"back bit for bit: {'yes' if same else 'NO'}")
    # At the tiny size the interpreter and its libraries outweigh the file.
    if not same or rows["import"][0] > SECONDS or (args.scale == "full" and rows["import"][1] > MEMORY * size):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
