"""Real jobs of two processes on this machine, through launch/local_pod.sh: equal to one process, stopped, killed, continued by fewer."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 16  # 6.5 batches make an epoch; a stop takes a few steps to reach all processes
CONFIG = [
    "--config=configs/quickstart.py",
    "--config.backbone=dit",
    "--config.dit.width=32",
    "--config.dit.depth=1",
    "--config.dit.num_head_channels=16",
    "--config.dit.patch=(8, 1, 1)",
    "--config.prepare.validation_share=0.2",
    "--config.data.height=16",
    "--config.data.width=16",
    "--config.diffusion.loss_space=x0",
    "--config.batch_size=8",
    f"--config.steps={STEPS}",
    "--config.log_every=1",
    "--config.checkpoint.every=3",
    f"--config.eval.every={STEPS}",
    "--config.eval.batches=1",
    "--config.sample.every=0",
]
SHEETS = [f"--config.sample.every={STEPS}", "--config.sample.count=3", "--config.sample.steps=2"]  # two devices make four clips
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
        "GRACE": "20",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


@pytest.fixture(scope="module")
def data(environment, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sprites"
    arguments = [a for a in CONFIG if not a.startswith("--config.backbone")]
    command = [sys.executable, "-m", "motif_jax.prepare", *arguments, "--source=synthetic:quickstart:64", f"--output={path}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return path


def start(environment, processes, data, workdir, *more, cwd=ROOT):
    """A job in a process group of its own, so that nothing of it outlives a failed test."""
    arguments = [*CONFIG, f"--workdir={workdir}", f"--config.data.path={data}", *more]
    command = ["bash", "launch/local_pod.sh", str(processes)] if processes > 1 else [sys.executable, "-m", "motif_jax.main"]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(job, timeout=180):
    try:
        return job.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise


def children(job):
    """Process ids of the processes of a running job, by their index."""
    found = {}
    for pid in pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        index = next((v for v in variables if v.startswith(b"MOTIF_PROCESS_INDEX=")), None)
        if index:
            found[int(index.split(b"=")[1])] = int(pid)
    return found


def lines(workdir):
    """Of the lines that are whole: a run that goes on may be writing its last one."""
    path = workdir / "metrics.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(text) for text in texts if text.endswith("\n")]
    return {line["step"]: line for line in found if "loss" in line}


def wait_for_step(job, workdir, step):
    limit = time.monotonic() + 150
    while max(lines(workdir), default=0) < step:
        assert job.poll() is None and time.monotonic() < limit, end(job)
        time.sleep(0.05)


def parameters(workdir):
    from motif_jax.training.checkpoint import read_arrays

    return read_arrays(workdir / "checkpoints" / str(STEPS), ("params", "ema"), np.ndarray)


def assert_same_run(found, expected):
    """Clips, noise and steps are the same; sums over the batch are taken in another order, and AdamW divides by small numbers."""
    assert lines(found).keys() == lines(expected).keys() == set(range(1, STEPS + 1))
    for step, line in lines(expected).items():
        assert lines(found)[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), step
    a, b = parameters(found), parameters(expected)
    for field in ("params", "ema"):
        for name, value in b[field].items():
            scale = np.abs(value).max() + 1e-6
            np.testing.assert_allclose(a[field][name] / scale, value / scale, atol=2e-3, err_msg=name)


def sheet(workdir, step):
    from PIL import Image

    return np.asarray(Image.open(workdir / "samples" / str(step) / "sheet.png"), np.float32)


@pytest.fixture(scope="module")
def single(environment, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "one"
    job = start(environment, 1, data, workdir, *SHEETS)
    text = end(job)
    assert job.returncode == 0, text
    return workdir


def test_two_processes_equal_one(environment, data, single, tmp_path):
    job = start(environment, 2, data, tmp_path, *SHEETS)
    text = end(job, timeout=300)
    assert job.returncode == 0 and f"done: {STEPS} steps" in text and "in 2 processes" in text, text
    assert_same_run(tmp_path, single)
    # Before the first step the weights are the same, bit for bit: only roundings of a pixel may differ.
    assert np.abs(sheet(tmp_path, 0) - sheet(single, 0)).mean() < 0.1
    assert len(list((tmp_path / "samples" / str(STEPS)).glob("*.gif"))) == 3


def test_two_processes_write_to_a_bucket(bucket, environment, data, single, tmp_path):
    """Each its part of a checkpoint; a third process reads them. Their clips come from the bucket, too."""
    for path in data.glob("*"):
        if path.is_file():
            bucket.put(f"data/{path.name}", path.read_bytes())
    job = start(dict(os.environ) | environment, 2, "gs://bucket/data", "gs://bucket/pod")  # os.environ: where the bucket is
    text = end(job, timeout=300)
    assert job.returncode == 0 and f"done: {STEPS} steps; gs://bucket/pod/report.html" in text and "in 2 processes" in text, text
    for name, (content, _) in bucket.objects.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert_same_run(tmp_path / "pod", single)
    parts = {name.split("/state/")[1].split("/")[0] for name in bucket.objects if f"/{STEPS}/state/" in name}
    assert parts >= {"ocdbt.process_0", "ocdbt.process_1"}


@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="finds the processes of a job in Linux' /proc")
def test_a_stopped_and_killed_job_continues_with_fewer_processes(environment, data, single, tmp_path):
    """SIGTERM to one of two: both save and leave. kill -9 of one of two: the job fails by itself. One process does the rest."""
    job = start(environment, 2, data, tmp_path)
    wait_for_step(job, tmp_path, 2)
    os.kill(children(job)[1], signal.SIGTERM)
    text = end(job)
    assert job.returncode == 0 and "the same command continues" in text, text

    job = start(environment, 2, data, tmp_path)
    wait_for_step(job, tmp_path, max(lines(tmp_path)) + 2)  # it runs, whatever the first left
    os.kill(children(job)[1], signal.SIGKILL)
    text = end(job, timeout=60)  # rather than for ever in a collective
    assert job.returncode != 0 and "continuing at step" in text, text
    assert "process 0 of 2" in text or "JAX distributed service detected fatal errors" in text, text

    job = start(environment, 1, data, tmp_path)
    text = end(job)
    assert job.returncode == 0 and "continuing at step" in text, text
    assert_same_run(tmp_path, single)


def pair(environment, port, one):
    """What two processes say that both fail; `one` starts number 0 or 1 with these variables."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{20000 + (os.getpid() + port) % 20000}", "MOTIF_PROCESS_COUNT": "2"}
    jobs = [one(index, environment | address | {"MOTIF_PROCESS_INDEX": str(index)}) for index in range(2)]
    texts = [end(job) for job in jobs]
    assert all(job.returncode != 0 for job in jobs), texts
    return texts


def test_processes_that_disagree_are_named(environment, data, tmp_path):
    rates = ("1e-3", "2e-3")
    texts = pair(environment, 0, lambda i, variables: start(variables, 1, data, tmp_path, f"--config.learning_rate={rates[i]}"))
    assert any("the processes do not run the same thing" in text and "the configuration: process 1 on" in text for text in texts), texts
    assert not (tmp_path / "checkpoints").exists()


def test_a_work_directory_that_is_not_shared_is_refused(environment, data, tmp_path):
    """The same name on each host, and every host has its own: a new run, where no checkpoint tells them apart yet."""
    for host in "01":
        (tmp_path / host).mkdir()
        (tmp_path / host / "configs").symlink_to(ROOT / "configs")
    variables = environment | {"PYTHONPATH": str(ROOT)}
    texts = pair(variables, 1, lambda i, variables: start(variables, 1, data, "run", cwd=tmp_path / str(i)))
    assert any("a new file in run (is it on a file system that all share?): process" in text for text in texts), texts
    assert sorted(path.name for path in tmp_path.rglob("run/*")) == ["lock"]


def test_other_weights_on_another_host_are_refused(environment, data, single, tmp_path):
    """`init_from` by the same name on each host, where one of the copies lags behind: a checkpoint would mix the two."""
    for host in "01":
        (tmp_path / host).mkdir()
        (tmp_path / host / "configs").symlink_to(ROOT / "configs")
        shutil.copytree(single, tmp_path / host / "weights")
    shutil.rmtree(tmp_path / "1" / "weights" / "checkpoints" / str(STEPS))
    variables, run = environment | {"PYTHONPATH": str(ROOT)}, tmp_path / "run"
    texts = pair(variables, 2, lambda i, variables: start(variables, 1, data, run, "--config.init_from=weights", cwd=tmp_path / str(i)))
    assert any("the weights to start from: process 1 on" in text for text in texts), texts
    assert not (run / "checkpoints").exists()
