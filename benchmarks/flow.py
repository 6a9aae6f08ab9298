"""RAFT in JAX against the same network in PyTorch (benchmarks/torch_raft.py), side by side in one process.

    python benchmarks/flow.py --weights small=FILE --weights large=FILE [--height=320 --width=512 --iterations=12 --rounds=5]

FILE: .safetensors in the authors' names; without it weights are random. Rounds alternate between the two, so that what else the
machine does hits both; shown are medians of wall-clock and CPU seconds per frame pair, and the largest difference between the flows.
`clip` is the offline job's path, which encodes every frame of a clip once. Exits with 1 when JAX is slower than PyTorch
(on a GPU: less than twice as fast) in what this machine can tell best: CPU seconds on CPU, wall-clock seconds elsewhere.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

CLIP = 5  # frames of the clip row


def frames(count: int, height: int, width: int) -> np.ndarray:
    """A texture under a moving window, uint8 [T,H,W,3]."""
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, ((height + 64) // 8 + 1, (width + 64) // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([cells[3 * t : 3 * t + height, 5 * t : 5 * t + width] for t in range(count)])


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(variant: str, weights: str | None, options: argparse.Namespace) -> float:
    """Prints the rows of a variant; returns by which factor JAX is faster."""
    import jax
    import safetensors.torch
    import torch
    import torch_raft
    from flax import nnx

    from motif_jax.interop.raft import load_raft
    from motif_jax.motion.estimators import make_flow_estimator

    with tempfile.TemporaryDirectory() as scratch:
        file = weights or f"{scratch}/random.safetensors"
        if not weights:
            torch.manual_seed(0)
            safetensors.torch.save_file({k: v.clone() for k, v in torch_raft.RAFT(variant == "large").state_dict().items()}, file)
        graph, state = nnx.split(load_raft(file, variant))
        theirs = torch_raft.load(file, variant == "large")
        estimator = make_flow_estimator(f"raft_{variant}", file, options.iterations, enlarge_below=0)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    theirs = theirs.to(device)
    clip = frames(CLIP, options.height, options.width)
    pair = [torch.from_numpy(f.transpose(2, 0, 1)[None].astype(np.float32)).to(device) for f in clip[:2]]
    ours = jax.jit(lambda state, a, b: nnx.merge(graph, state)(a, b, options.iterations))

    def in_torch() -> np.ndarray:
        with torch.inference_mode():
            return theirs(*pair, options.iterations)[0].permute(1, 2, 0).cpu().numpy()

    def in_jax() -> np.ndarray:
        return np.asarray(ours(state, clip[:1], clip[1:2]))[0]

    calls = {"PyTorch, pair": (in_torch, 1), "JAX, pair": (in_jax, 1), "JAX, clip": (lambda: estimator.flow(clip), CLIP - 1)}
    difference = np.abs(in_torch() - in_jax()).max()
    estimator.flow(clip)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, (call, pairs) in calls.items():
            taken[name].append(tuple(seconds / pairs for seconds in timed(call)))
    median = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in taken.items()}
    base = median["PyTorch, pair"]
    for name, (wall, cpu) in median.items():
        print(
            f"| RAFT-{variant} | {name} | {wall:.3f} | {cpu:.3f} | {1 / wall:.2f} | {base[0] / wall:.2f} | {base[1] / cpu:.2f} |",
            flush=True,
        )
    print(f"| RAFT-{variant} | largest difference of the flows, px | {difference:.1e} | | | | |", flush=True)
    which = 1 if device == "cpu" else 0
    return base[which] / median["JAX, pair"][which]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="append", default=[], metavar="VARIANT=FILE", help="small=FILE or large=FILE")
    parser.add_argument("--variants", nargs="+", default=["small", "large"], choices=["small", "large"])
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    given = dict(item.split("=", 1) for item in options.weights)

    import jax
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    print(
        f"{options.height}x{options.width}, {options.iterations} iterations, float32, {cores} cores of {os.cpu_count()}, load "
        f"{os.getloadavg()[0]:.1f}, {jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}\n\n"
        "| network | | s per pair | CPU s per pair | pairs/s | times PyTorch | in CPU time |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    wanted = 2.0 if jax.default_backend() == "gpu" else 1.0
    factors = {variant: compare(variant, given.get(variant), options) for variant in options.variants}
    slow = [f"RAFT-{variant}: {factor:.2f} x PyTorch" for variant, factor in factors.items() if factor < wanted]
    if slow:
        sys.exit(f"benchmarks/flow.py: under {wanted:g}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
