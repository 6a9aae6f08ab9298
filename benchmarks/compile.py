"""The paper's train step compiled ahead of time for each TPU generation: does it fit, what bounds it, how long does it compile.

    python benchmarks/compile.py [--topologies v5e:8x8 v5p:2x2x4 v6e:4x4] [--effort -1] [--config configs/motif.py]

Needs the TPU compiler (docs/compile.md), tens of minutes of one core and about 14 GB of memory per topology. Each runs in a
process of its own; the table is printed row by row.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

# The mesh of each slice: clips over all chips, parameters sharded over all of them.
MESHES = {"v5e:8x8": {"data": 1, "fsdp": 64}, "v5p:2x2x4": {"data": 1, "fsdp": 16}, "v6e:4x4": {"data": 1, "fsdp": 16}}
COLUMNS = ("topology", "fits", "GiB of a chip", "bound s/step", "MFU bound", "all-gather GiB", "reduce GiB", "compile s")


def row(topology: str, config: str, effort: float) -> list[str]:
    """The table's line for one topology; a failure's last words instead of numbers."""
    settings = [f"--config.mesh.{axis}={size}" for axis, size in MESHES.get(topology, {"data": 1, "fsdp": -1}).items()]
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "report.json"
        command = [sys.executable, "-m", "motif_jax.compile", f"--config={config}", f"--topology={topology}", f"--effort={effort}"]
        done = subprocess.run([*command, f"--json={path}", *settings], capture_output=True, text=True)
        if done.returncode:
            return [topology, "no", done.stderr.strip().splitlines()[-1]]
        report = json.loads(path.read_text())
    traffic = {kind: t["bytes"] / 2**30 for kind, t in report["collectives"].items()}
    reduced = traffic.get("all-reduce", 0) + traffic.get("reduce-scatter", 0)
    bound = f"{report['step_seconds']:.3f}" if report["step_seconds"] else "-"
    mfu = f"{100 * report['mfu_bound']:.0f} % of {report['peak_tflops']:g}" if report["mfu_bound"] else "-"
    memory = f"{report['memory_bytes'] / 2**30:.1f} of {report['hbm_bytes'] / 2**30:.1f}"
    return [
        topology,
        "yes",
        memory,
        bound,
        mfu,
        f"{traffic.get('all-gather', 0):.1f}",
        f"{reduced:.1f}",
        f"{report['compile_seconds']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=list(MESHES))
    parser.add_argument("--effort", type=float, default=-1.0, help="XLA's exec_time_optimization_effort")
    parser.add_argument("--config", default="configs/motif.py")
    arguments = parser.parse_args()
    print(" | ".join(COLUMNS), flush=True)
    for topology in arguments.topologies:
        print(" | ".join(row(topology, arguments.config, arguments.effort)), flush=True)


if __name__ == "__main__":
    main()
