"""The offline job's launchers: run here task by task they give the dataset of one process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ARGUMENTS = ["--config=configs/quickstart.py", "--config.prepare.clips_per_shard=10", "--source=synthetic:quickstart:60"]
PYTHON = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}


def run(command, **environment):
    return subprocess.run(command, cwd=ROOT, env=PYTHON | environment, capture_output=True, text=True)


def shards(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process makes."""
    output = tmp_path_factory.mktemp("single")
    done = run([sys.executable, "-m", "motif_jax.prepare", *ARGUMENTS, f"--output={output}"])
    assert done.returncode == 0, done.stderr
    return shards(output)


@pytest.mark.parametrize("script", ["flow_slurm.sbatch", "flow_tpu.sh"])
def test_usage(script):
    done = run(["bash", f"launch/{script}"])
    assert done.returncode == 2 and "Usage" in done.stderr


def test_slurm_array(tmp_path, single):
    """What the script would run, run as the tasks 4, 6, 8 of --array=4-8:2."""
    done = run(["bash", "launch/flow_slurm.sbatch", "--dry-run", *ARGUMENTS, f"--output={tmp_path}"])
    assert done.stdout.startswith("python -m motif_jax.prepare --config=configs/quickstart.py")
    variables = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"MIN": "4", "MAX": "8", "COUNT": "3"}.items()}
    for number, words in (("8", "task 2 of 3"), ("4", "task 0 of 3"), ("6", "task 1 of 3")):
        task = run(["bash", "-c", done.stdout], SLURM_ARRAY_TASK_ID=number, **variables)
        assert task.returncode == 0 and words in task.stdout, task.stderr
    assert shards(tmp_path) == single


def test_kubernetes_job(tmp_path, single):
    """The container's command with its own variables, as the pods 0 and 1 of two."""
    job = pytest.importorskip("yaml").safe_load((ROOT / "launch/flow_k8s.yaml").read_text())["spec"]
    container = job["template"]["spec"]["containers"][0]
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert job["completionMode"] == "Indexed" and variables == {"MOTIF_TASK_COUNT": str(job["completions"])}
    assert all(a.startswith(("--config", "--source", "--output")) for a in container["args"])
    for index in ("0", "1"):
        variables = {"MOTIF_TASK_COUNT": "2", "JOB_COMPLETION_INDEX": index, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        done = run([*container["command"], *ARGUMENTS, f"--output={tmp_path}"], **variables)
        assert done.returncode == 0 and f"task {index} of 2" in done.stdout, done.stderr
    assert shards(tmp_path) == single


def test_tpu(tmp_path, single):
    """The command of every host, with a metadata server that answers from a file."""
    done = run(["bash", "launch/flow_tpu.sh", "--dry-run", "slice", *ARGUMENTS, f"--output={tmp_path}"], ZONE="us-x")
    archive, copy, ssh = done.stdout.splitlines()
    assert archive.startswith("git archive") and "scp" in copy and "--worker=all" in ssh and "--zone=us-x" in ssh
    words = json.loads(run([sys.executable, "-c", "import json, shlex, sys; print(json.dumps(shlex.split(sys.argv[1])))", ssh]).stdout)
    (remote,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    install, rest = remote.split(" && about()")
    assert install.endswith("source launch/environment.sh tpu,gs")
    for index in ("0", "1"):
        answers = {"agent-worker-number": index, "worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"}
        cases = " ".join(f"*/{name}) echo {value};;" for name, value in answers.items())
        done = run(["bash", "-c", f'curl() {{ case "${{@: -1}}" in {cases} esac; }}; about(){rest}'])
        assert done.returncode == 0 and f"task {index} of 2" in done.stdout, done.stderr
    assert shards(tmp_path) == single
