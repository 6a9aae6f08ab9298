"""RAFT in JAX against the same network in PyTorch (benchmarks/torch_raft.py), side by side in one process.

    python benchmarks/flow.py --weights small=FILE --weights large=FILE [--height=320 --width=512 --iterations=12 --rounds=5]

FILE: .safetensors in the authors' names; without it weights are random. Rounds alternate between the two, so that what else the
machine does hits both; shown are medians of wall-clock and CPU seconds per frame pair, and the largest difference between the flows.
`clip` is the offline job's path, which encodes every frame of a clip once; it is compared with PyTorch's best row.
On a GPU both are timed on one pair and on eight, in float32 and with convolutions in TF32, PyTorch's default; cuDNN tries its kernels, as
XLA does.
Exits with 1 when JAX on the same pairs is slower than PyTorch (on a GPU: less than twice as fast).
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from common import cores, run, texture, timed


def compare(variant: str, dtype: str, weights: str | None, options: argparse.Namespace) -> list[str]:
    """Prints the rows of a variant; returns where JAX is less than `options.wanted` times as fast as PyTorch on the same pairs."""
    import jax
    import kernels
    import safetensors.torch
    import torch
    import torch_raft
    from flax import nnx

    from motif_jax.interop.raft import load_raft
    from motif_jax.motion.estimators import make_flow_estimator

    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = dtype == "tensorfloat32", True
    with tempfile.TemporaryDirectory() as scratch:
        file = weights or f"{scratch}/random.safetensors"
        if not weights:
            torch.manual_seed(0)
            safetensors.torch.save_file({k: v.clone() for k, v in torch_raft.RAFT(variant == "large").state_dict().items()}, file)
        graph, state = nnx.split(load_raft(file, variant, "highest" if dtype == "float32" else "default"))
        theirs = torch_raft.load(file, variant == "large")
        estimator = make_flow_estimator(f"raft_{variant}", file, options.iterations, enlarge_below=0, dtype=dtype)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    theirs = theirs.to(device)
    clip = texture(options.clip, options.height, options.width, motion=(3, 5))
    on_device = torch.from_numpy(clip.transpose(0, 3, 1, 2).astype(np.float32)).to(device)
    given = {pairs: jax.device_put((clip[:pairs], clip[1 : pairs + 1])) for pairs in options.pairs}
    ours = jax.jit(lambda state, a, b: nnx.merge(graph, state)(a, b, options.iterations))

    def in_torch(pairs: int) -> np.ndarray:
        with torch.inference_mode():
            return theirs(on_device[:pairs], on_device[1 : pairs + 1], options.iterations).permute(0, 2, 3, 1).cpu().numpy()

    def in_jax(pairs: int) -> np.ndarray:
        return np.asarray(ours(state, *given[pairs]))

    calls: dict[tuple[str, int], Callable[[], object]] = {}
    difference = np.max([np.abs(in_torch(pairs) - in_jax(pairs)).max() for pairs in options.pairs])
    for pairs in options.pairs:
        calls["PyTorch", pairs] = lambda pairs=pairs: in_torch(pairs)
        calls["JAX", pairs] = lambda pairs=pairs: in_jax(pairs)
    estimator.flow(clip)
    calls["JAX, clip", options.clip - 1] = lambda: estimator.flow(clip)
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {row: [] for row in calls}
    for _ in range(options.rounds):
        for (name, pairs), call in calls.items():
            taken[name, pairs].append(tuple(seconds / pairs for seconds in timed(call)))
    median = {row: [statistics.median(column) for column in zip(*times, strict=True)] for row, times in taken.items()}
    best = min((times for (name, _), times in median.items() if name == "PyTorch"), key=lambda times: times[0])
    short = []
    for (name, pairs), (wall, cpu) in median.items():
        base = median.get(("PyTorch", pairs), best)
        factors = f"{base[0] / wall:.2f} | {base[1] / cpu:.2f}"
        print(f"| RAFT-{variant}, {dtype} | {name} | {pairs} | {wall:.4f} | {cpu:.4f} | {factors} |", flush=True)
        if name == "JAX" and base[0] / wall < options.wanted:
            short.append(f"RAFT-{variant}, {dtype}, {pairs} pairs: {base[0] / wall:.2f} x PyTorch")
    print(f"| RAFT-{variant}, {dtype} | largest difference of the flows: {difference:.1e} px | | | | | |", flush=True)
    if options.profile:
        print(f"\nRAFT-{variant}, {dtype}, {max(options.pairs)} pairs:\n")
        print(kernels.profiled(calls["JAX", max(options.pairs)], 1, f"{options.profile}/{variant}-{dtype}") + "\n", flush=True)
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="append", default=[], metavar="VARIANT=FILE", help="small=FILE or large=FILE")
    parser.add_argument("--variants", nargs="+", default=["small", "large"], choices=["small", "large"])
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", help="on a GPU: directory for traces, of which kernels.py says what the network took")
    options = parser.parse_args()
    if wrong := [item for item in options.weights if item.partition("=")[0] not in ("small", "large") or not item.partition("=")[2]]:
        parser.error(f"--weights={wrong[0]}: must be small=FILE or large=FILE")
    given = dict(item.split("=", 1) for item in options.weights)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is PyTorch's, too

    import jax
    import torch

    gpu = jax.default_backend() == "gpu"
    options.wanted, options.pairs, options.clip = (2.0, (1, 8), 17) if gpu else (1.0, (1,), 5)
    torch.set_num_threads(cores())
    print(
        f"{options.height}x{options.width}, {options.iterations} iterations, {cores()} cores of {os.cpu_count()}, load "
        f"{os.getloadavg()[0]:.1f}, {jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}\n\n"
        "| network | | pairs | s per pair | CPU s per pair | times PyTorch | in CPU time |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    dtypes = ("float32", "tensorfloat32") if gpu else ("float32",)
    slow = [line for variant in options.variants for dtype in dtypes for line in compare(variant, dtype, given.get(variant), options)]
    if slow:
        sys.exit(f"benchmarks/flow.py: under {options.wanted:g}: {'; '.join(slow)}")


if __name__ == "__main__":
    run(main)
