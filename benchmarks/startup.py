"""How long until something happens: --help, the first training step with an empty and a filled compile cache, checkpoints against the disk.

    python benchmarks/startup.py [--config=configs/quickstart.py] [--megabytes=512]

Prints one table. Starting Python with `import jax` is the yardstick of --help, a plain fsynced file that of a checkpoint.
"""

import argparse
import datetime
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENTRY_POINTS = ("main", "prepare", "sample", "convert", "compile", "bench")


def seconds(*command: str, repeats: int = 5) -> float:
    """Median wall time of a command that must succeed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def first_steps(config: str, directory: pathlib.Path) -> list[float]:
    """Seconds from the start of the command to the end of the first step, without and with what an earlier start compiled."""
    data = directory / "data"
    flags = [f"--config={config}", "--config.steps=1", "--config.eval.every=0", "--config.sample.every=0", f"--config.data.path={data}"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
    prepare = [f"--config={config}", "--config.prepare.flow=exact", "--source=synthetic:quickstart:64", f"--output={data}"]
    if subprocess.run([sys.executable, "-m", "motif_jax.prepare", *prepare], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        sys.exit(1)  # it has said why
    found = []
    for number in range(2):
        command = [sys.executable, "-u", "-m", "motif_jax.main", *flags, f"--workdir={directory / f'run{number}'}"]
        start = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if re.match(r"step 1/", line):
                    found.append(time.perf_counter() - start)
                    break
            process.communicate()
        if len(found) <= number:
            raise SystemExit("".join(lines))
    return found


def checkpoint_rates(directory: pathlib.Path, megabytes: int) -> dict[str, float]:
    """MB/s of saving and restoring a checkpoint of random numbers, and of writing and reading a plain file of the same bytes."""
    import jax

    from motif_jax.config import CheckpointConfig
    from motif_jax.training.checkpoint import Checkpoints
    from motif_jax.training.state import TrainState

    count = 16
    arrays = np.random.default_rng(0).random((count, megabytes * 250_000 // count), np.float32)
    size = arrays.nbytes / 1e6
    state = TrainState(jax.numpy.zeros((), "int32"), {f"w{i}": jax.numpy.asarray(a) for i, a in enumerate(arrays)}, {}, ())

    def timed(action) -> float:
        start = time.perf_counter()
        action()
        return size / (time.perf_counter() - start)

    def write() -> None:
        with (directory / "plain").open("wb") as file:
            file.write(arrays.tobytes())
            file.flush()
            os.fsync(file.fileno())

    checkpoints = Checkpoints(directory, CheckpointConfig())

    def save() -> None:
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()

    rates = {"plain write": timed(write), "checkpoint save": timed(save)}
    rates["plain read"] = timed(lambda: (directory / "plain").read_bytes())
    rates["checkpoint restore"] = timed(lambda: jax.block_until_ready(checkpoints.restore(1, state)[0].params))
    checkpoints.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--megabytes", type=int, default=512)
    arguments = parser.parse_args()
    import jax

    print(f"{platform.platform()}, {os.cpu_count()} cores, jax {jax.__version__}, {datetime.date.today()}\n")
    print("| what | measured | against | ratio |\n|---|---|---|---|")
    base = seconds("-c", "import jax")
    for name in ENTRY_POINTS:
        taken = seconds("-m", f"motif_jax.{name}", "--help")
        print(f"| motif_jax.{name} --help | {taken:.2f} s | import jax {base:.2f} s | {taken / base:.2f} |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        cold, warm = first_steps(arguments.config, pathlib.Path(name))
        print(f"| first step of {arguments.config}, warm cache | {warm:.1f} s | empty cache {cold:.1f} s | {warm / cold:.2f} |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        rates = checkpoint_rates(pathlib.Path(name), arguments.megabytes)
    for what, plain in (("checkpoint save", "plain write"), ("checkpoint restore", "plain read")):
        ratio = rates[what] / rates[plain]
        print(f"| {what}, {arguments.megabytes} MB | {rates[what]:.0f} MB/s | {plain} {rates[plain]:.0f} MB/s | {ratio:.2f} |")


if __name__ == "__main__":
    main()
