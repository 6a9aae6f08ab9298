"""What a GPU did during a trace of `jax.profiler.trace`: which kinds of kernel took how long.

    python benchmarks/kernels.py DIRECTORY [--steps=1] [--top=0]

Kinds go by the names that cuDNN, cuBLAS and XLA give their kernels; `--top` lists single kernels as well. full_size.py,
train_step.py, sample.py and flow.py write such traces, and print the same, with `--profile=DIRECTORY`.
"""

import argparse
import collections
import pathlib
import re
import sys
from collections.abc import Callable

# The first pattern that a kernel's name fits.
KINDS = {
    "attention": r"attention|sdpa|flash|compute_dot_do_o|convert_dq",
    "convolution": r"fprop|dgrad|wgrad|convolve|winograd|5x_cudnn",
    "matrix product": r"nvjet|gemm|cutlass|splitk",
    "norms and gates (Triton)": r"^(group_norm|layer_norm|geglu)_",
    "changes of layout": r"transpose|copy|concatenate|memcpy|convertTensor",
    "elementwise and reductions": r"",
}


def kernels(directory: str | pathlib.Path) -> tuple[dict[str, tuple[float, int]], float, float]:
    """(milliseconds and calls of every kernel by name, milliseconds in which any ran, milliseconds from the first to the last)."""
    from jax.profiler import ProfileData

    files = sorted(pathlib.Path(directory).rglob("*.xplane.pb"))
    if not files:
        sys.exit(f"{directory}: no trace (*.xplane.pb) there; jax.profiler.trace writes one")
    found, spans = collections.defaultdict(lambda: (0.0, 0)), []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the others say the same in other units
                continue
            for event in line.events:
                total, count = found[event.name]
                found[event.name] = total + event.duration_ns / 1e6, count + 1
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
    if not spans:
        sys.exit(f"{directory}: the trace shows no GPU at work")
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return dict(found), busy / 1e6, (end - min(start for start, _ in spans)) / 1e6


def profiled(call: Callable[[], object], steps: int, directory: str) -> str:
    """`table` of a trace of `steps` calls, each of which waits for its result, written to `directory`."""
    import jax

    with jax.profiler.trace(directory):
        for _ in range(steps):
            call()
    return table(directory, steps)


def table(directory: str | pathlib.Path, steps: int = 1, top: int = 0) -> str:
    """Markdown: milliseconds a step, share and calls of each kind, and of the `top` kernels that took longest."""
    found, busy, span = kernels(directory)
    kinds = collections.defaultdict(lambda: (0.0, 0))
    for name, (taken, count) in found.items():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        kinds[kind] = kinds[kind][0] + taken, kinds[kind][1] + count
    rows = [(kind, *kinds[kind]) for kind in KINDS if kind in kinds] + [("nothing", span - busy, 0)]
    rows += sorted(((name[:100], *rest) for name, rest in found.items()), key=lambda row: -row[1])[:top]
    lines = [f"| {name} | {taken / steps:.2f} | {100 * taken / span:.1f} % | {count / steps:.0f} |" for name, taken, count in rows]
    return "\n".join(["| the GPU ran | ms a step | share | kernels |", "|---|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=1, help="how many steps the trace holds")
    parser.add_argument("--top", type=int, default=0)
    arguments = parser.parse_args()
    print(table(arguments.directory, arguments.steps, arguments.top))


if __name__ == "__main__":
    main()
