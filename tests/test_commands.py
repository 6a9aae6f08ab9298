"""The commands, as a user calls them: prepare, train, stop in every way, continue, sample, judge; and what bad input gets.

The shipped quickstart configuration is shrunk by flags. A compile cache shared by the runs keeps this in seconds.
"""

import json
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "--config=configs/quickstart.py"
SMALL = [
    "--config.backbone=dit",
    "--config.dit.width=32",
    "--config.dit.depth=1",
    "--config.dit.num_head_channels=16",
    "--config.dit.patch=(8, 1, 1)",
    "--config.autoencoder.factor=8",
    "--config.autoencoder.z_channels=192",
    "--config.prepare.flow_stride=8",
    "--config.prepare.validation_share=0.2",
    "--config.data.height=16",
    "--config.data.width=16",
    "--config.diffusion.loss_space=x0",
    "--config.batch_size=4",
    "--config.steps=300",
    "--config.learning_rate=2e-4",
    "--config.log_every=10",
    "--config.checkpoint.every=40",
    "--config.eval.every=100",
    "--config.eval.batches=1",
    "--config.sample.every=150",
    "--config.sample.count=1",
    "--config.sample.steps=2",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("compiled")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def start(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(environment, *arguments, expect=0):
    process = start(environment, *arguments)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == expect, text
    return text


@pytest.fixture(scope="module")
def data(environment, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sprites"
    run(environment, "motif_jax.prepare", CONFIG, *SMALL, "--source=synthetic:quickstart:64", f"--output={path}")
    return path


@pytest.fixture(scope="module")
def trained(environment, data, tmp_path_factory):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    text = run(environment, "motif_jax.main", CONFIG, *SMALL, f"--workdir={workdir}", f"--config.data.path={data}")
    assert "done: 300 steps" in text
    return workdir


def compiled(environment):
    """Names of the programs in the compile cache."""
    return {path.name for path in pathlib.Path(environment["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache")}


def final_state(workdir):
    """Every array of the last checkpoint, by path."""
    import jax
    import orbax.checkpoint as ocp

    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / "300" / "state")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def lines(workdir, *names):
    """Of the lines that are whole: a run that goes on may be writing its last one."""
    found = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True) if text.endswith("\n")]
    return [(line["step"], *(line[n] for n in names)) for line in found if names[0] in line]


def test_a_run_leaves_what_the_readme_says(trained):
    promised = {"config.json", "metrics.jsonl", "parameters.txt", "checkpoints", "samples", "report.html", "DONE"}
    assert {p.name for p in trained.iterdir()} >= promised
    assert (trained / "samples" / "300" / "sheet.png").stat().st_size > 1000
    assert [step for step, _ in lines(trained, "eval/ratio")] == [0, 100, 200, 300]
    assert [step for step, *_ in lines(trained, "sample/mean_flow", "sample/mean_flow_data")] == [0, 150, 300]
    assert any(p.name.startswith("events.out.tfevents") for p in trained.iterdir())
    page = (trained / "report.html").read_text()
    assert page.count("data:image/png") >= 3 and page.count("data:image/gif") == 1


def test_training_lowers_the_loss(trained):
    losses = [loss for _, loss in lines(trained, "eval/loss")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_finished_run_exits_at_once(environment, data, trained):
    before = (trained / "metrics.jsonl").read_bytes()
    text = run(environment, "motif_jax.main", CONFIG, *SMALL, f"--workdir={trained}", f"--config.data.path={data}")
    assert "300 of 300 steps are done" in text
    assert (trained / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill-9", "sigterm"])
def test_a_disturbed_run_ends_in_the_same_bits(environment, data, trained, tmp_path, number):
    """Stopped twice, at whatever moment the signal finds it; parameters, average, moments and metrics equal the undisturbed run's.

    No process compiles what the undisturbed run has: the names in the compile cache depend on neither process nor work directory.
    """
    programs = compiled(environment)
    command = ("motif_jax.main", CONFIG, *SMALL, f"--workdir={tmp_path}", f"--config.data.path={data}")
    for after, status in (50, 0), (130, 75):
        process = start(environment, *command, f"--stopped_status={status}")
        end = time.monotonic() + 240
        while not any(step >= after for step, _ in (lines(tmp_path, "loss") if (tmp_path / "metrics.jsonl").exists() else [])):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        text, _ = process.communicate(timeout=120)
        if number == signal.SIGTERM:
            assert process.returncode == status and "the same command continues" in text, text
        else:
            assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "DONE").exists()
    text = run(environment, *command)
    assert "continuing at step" in text and "done: 300 steps" in text
    assert programs and compiled(environment) == programs
    expected, found = final_state(trained), final_state(tmp_path)
    assert expected.keys() == found.keys() and len(expected) > 20
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    if number == signal.SIGKILL:  # a stop by SIGTERM saves, and so ends a window of the averaged losses early
        assert lines(tmp_path, "loss", "grad_norm") == lines(trained, "loss", "grad_norm")
    assert lines(tmp_path, "eval/loss", "eval/ratio") == lines(trained, "eval/loss", "eval/ratio")


@pytest.mark.slow
def test_sampling(environment, trained, tmp_path):
    from PIL import Image

    from motif_jax.data.videos import read_clip

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    made = []
    for suffix in ("mp4", "gif"):
        output = tmp_path / f"out.{suffix}"
        said = run(
            environment,
            "motif_jax.sample",
            f"--workdir={trained}",
            f"--image={tmp_path / 'a.png'}",
            "--prompt=the red circle moves left",
            f"--output={output}",
        )
        assert f"{trained} at step " in said and "compiling and sampling" in said
        assert read_clip(output, 8, 16, 16, lambda n: (0, 1)).frames.shape == (8, 16, 16, 3)
        made.append(compiled(environment))
    assert made[0] == made[1]  # the second process found everything compiled
    requests = [{"image": "a.png", "prompt": f"the {c} circle moves up", "id": c} for c in ("red", "green", "blue")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in requests))
    command = (
        "motif_jax.sample",
        f"--workdir={trained}",
        f"--requests={tmp_path / 'list.jsonl'}",
        f"--output={tmp_path / 'all'}",
        "--format=gif",
    )
    run(environment, *command, "--batch_size=2")
    first = {p.name: p.read_bytes() for p in (tmp_path / "all").iterdir()}
    assert sorted(first) == ["blue.gif", "green.gif", "manifest.json", "red.gif"]
    # Another batch size, and files of an earlier run in place: a clip depends on (seed, id), what is there is kept.
    (tmp_path / "all" / "green.gif").unlink()
    assert "3 videos, 2 done before" in run(environment, *command, "--batch_size=2")
    assert (tmp_path / "all" / "green.gif").read_bytes() == first["green.gif"]
    assert "made otherwise (seed: 0 there, 1 now)" in run(environment, *command, "--seed=1", expect=1)


def test_synthetic_benchmark(environment, trained):
    text = run(environment, "motif_jax.bench", "synthetic", f"--workdir={trained}", "--count=4")
    assert "| heldout | static |" in text and "| heldout | ceiling |" in text
    found = json.loads((trained / "synthetic.json").read_text())["splits"]["heldout"]
    assert found["ceiling"]["moving"]["rates"]["direction_ok"]["rate"] == 1.0
    assert found["static"]["moving"]["rates"]["direction_ok"]["rate"] == 0.0
    assert "How often it does what it is told" in (trained / "report.html").read_text()


@pytest.mark.slow
def test_benchmark_of_a_users_list(environment, trained, tmp_path):
    """generate in two jobs and a repeat that finds all there, then score of what it made."""
    from PIL import Image

    folder = tmp_path / "TI2V-Bench"
    folder.mkdir()
    lines = ["image,prompt"]
    for n in range(2):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"dot{n}.jpg")
        lines.append(f"TI2V-Bench/dot{n}.jpg,The red circle moves left.")
    (tmp_path / "prompt.csv").write_text("\n".join(lines))
    made = tmp_path / "made"
    command = (
        "motif_jax.bench",
        "generate",
        f"--workdir={trained}",
        f"--list={tmp_path}",
        f"--output={made}",
        "--seeds=0,1",
        "--batch_size=2",
    )
    for task in (0, 1):
        assert "2 videos, 0 done before" in run(environment, *command, f"--task_index={task}", "--task_count=2")
    before = {p.name: p.read_bytes() for p in made.iterdir()}
    assert {f"dot{n}_the_red_circle_moves_left_{s}.mp4" for n in (0, 1) for s in (0, 1)} | {"manifest.json"} == set(before)
    assert "4 videos, 4 done before" in run(environment, *command)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
    assert "made otherwise (guidance" in run(environment, *command, "--guidance=3", expect=1)
    text = run(environment, "motif_jax.bench", "score", f"--list={tmp_path}", f"--videos=ours={made}", f"--output={tmp_path / 'scores'}")
    assert "| ours | 2 |" in text and "| static | 2 | 0.0 | 0.00 |" in text
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert found["models"]["ours"]["videos"] == 4 and not found["problems"]


@pytest.mark.parametrize("module", ["main", "prepare", "sample", "convert", "bench"])
def test_help(environment, module):
    text = run(environment, f"motif_jax.{module}", "--help")
    assert f"python -m motif_jax.{module}" in text and "--" in text


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    from motif_jax import commands

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    commands.keep_compiled_programs()
    assert pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).is_relative_to(tmp_path / ".cache" / "motif_jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    commands.keep_compiled_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_an_edit_above_a_call_does_not_change_a_gpus_kernels(environment):
    """They go into a program as bytes, locations included; JAX' key of a kept program cannot leave these out."""
    code = """
import hashlib
from motif_jax.commands import keep_compiled_programs
keep_compiled_programs()
import jax, jax.numpy as jnp
from motif_jax.models import group_norm
from motif_jax.models.layers import GroupNorm, silu
from motif_jax.models.placement import target_platform
from jax.sharding import AbstractDevice, AbstractMesh
def loss(x, EDIT):
    return group_norm.in_kernels([GroupNorm(320, 32, 1e-5, dtype=jnp.bfloat16), silu], x)[0].astype(jnp.float32).sum()
h100 = AbstractDevice("NVIDIA H100", None, "cuda")
with target_platform("gpu"), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
    text = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((2, 8, 16, 320), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
assert text.count("xla.gpu.triton") == (4 if jax.__version_info__ < (0, 12) else 3)  # 0.12 leaves out the result, which nothing uses
print(hashlib.sha256(text.encode()).hexdigest())
"""

    def digest(edit):
        run = subprocess.run(
            [sys.executable, "-c", code.replace(", EDIT", edit)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert digest("") == digest("\n")


def homeless(monkeypatch):
    """A user whom the system does not know, as `docker run --user` makes them."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_keeps_no_compiled_programs(monkeypatch):
    from motif_jax import commands

    homeless(monkeypatch)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    commands.keep_compiled_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("home", [True, False])
@pytest.mark.parametrize(
    ("processes", "backend", "said", "kept"),
    [(4, "gpu", None, "run/compiled"), (1, "gpu", None, None), (4, "cpu", None, None), (4, "gpu", "elsewhere", None)],
)
def test_a_job_on_several_hosts_shares_its_compiled_programs(monkeypatch, tmp_path, processes, backend, said, kept, home):
    """JAX's process 0 alone writes them: with a directory a host, a restart would compile on all hosts but one."""
    import jax

    from motif_jax import commands

    if not home:
        homeless(monkeypatch)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if said:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", said)
    set_to = {}
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    commands.keep_compiled_programs()
    commands.share_compiled_programs(str(tmp_path / "run" / "compiled"))
    assert set_to == ({"jax_compilation_cache_dir": str(tmp_path / kept)} if kept else {})


OPENCLIP = ("--config.text.kind=openclip", "--config.text.tokenizer={tmp}", "--config.text.heads=8")
BAD_CALLS = {
    "unknown field": (
        ["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.stepz=3"],
        "--config.stepz: no such field; did you mean --config.steps?",
    ),
    "a field taken for a flag": (
        ["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--steps=4"],
        "motif_jax.main: --steps: did you mean --config.steps?",
    ),
    "no flag that must be given": (["motif_jax.main", CONFIG], "motif_jax.main: --workdir must be given"),
    "a fraction for a whole number": (
        ["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.data.frames=8.5"],
        "motif_jax.main: flag --config.data.frames=8.5: must be a whole number",
    ),
    "a word for a switch": (
        ["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.ema.warmup=maybe"],
        "motif_jax.main: flag --config.ema.warmup=maybe: must be True or False",
    ),
    "a name of bytes": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir={tmp}/\udcff", "--config.data.path={data}"],
        "\\udcff' is not UTF-8",
    ),
    "a name of bytes for bench": (
        ["motif_jax.bench", "score", "--list={tmp}", "--videos=\udcff={tmp}", "--output={tmp}/out"],
        "is not UTF-8",
    ),
    "a store that Orbax does not know as work directory": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir=s3://bucket/run", "--config.data.path={data}"],
        "s3://bucket/run: training reads and writes file systems and gs:// alone; mount the store",
    ),
    "an output in a store": (
        ["motif_jax.convert", "import", "--kind=raft", "--input=x.pth", "--output=gs://bucket/weights"],
        "motif_jax.convert: gs://bucket/weights: must be a path of this machine",
    ),
    "an output in a store, of bench": (
        ["motif_jax.bench", "generate", "--list=x", "--workdir=gs://bucket/run", "--output=gs://bucket/videos"],
        "argument --output: gs://bucket/videos: must be a path of this machine",
    ),
    "unknown group": (["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.los.heatmap=flow"], "did you mean --config.loss.heatmap?"),
    "fields that the file leaves out": (
        ["motif_jax.main", "--config={tmp}/few.py", "--workdir={tmp}/w", "--config.data.path={tmp}/none", "--config.mesh.data=1"],
        "no dataset in",
    ),
    "no configuration": (["motif_jax.main", "--config={tmp}/list.py", "--workdir={tmp}/w"], "a configuration must be a group of fields"),
    "a configuration without get_config": (
        ["motif_jax.main", "--config={tmp}/empty.py", "--workdir={tmp}/w"],
        "empty.py: module 'config_config' has no attribute 'get_config'",
    ),
    "a run's config.json": (
        ["motif_jax.sample", "--checkpoint={run}", "--config={run}/config.json", "--image=x", "--prompt=x", "--output=x.gif"],
        "config.json: must be a Python file with get_config(); --workdir=RUN takes",
    ),
    "no configuration file": (["motif_jax.main", "--config=", "--workdir={tmp}/w"], "--config= is empty"),
    "no such file, in two arguments": (["motif_jax.main", "--config", "configs/nope.py", "--workdir={tmp}/w"], "configs/nope.py"),
    "no source": (["motif_jax.prepare", CONFIG, "--output={tmp}/d"], "motif_jax.prepare: --source must be given"),
    "an output below a file": (
        ["motif_jax.sample", "--workdir={tmp}/none", "--image={tmp}/a.png", "--prompt=x", "--output={tmp}/few.py/a.mp4"],
        "few.py: cannot be written: ",
    ),
    "workdir not named": (["motif_jax.main", CONFIG, "--workdir="], "--workdir= is empty"),
    "no vocabulary": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir={tmp}/w", "--config.data.path={data}", *OPENCLIP],
        "no CLIP vocabulary there",
    ),
    "data not named": (["motif_jax.main", CONFIG, "--workdir={tmp}/w"], "data.path is not set"),
    "no data": (["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.data.path={tmp}/none"], "none"),
    "wrong value": (["motif_jax.main", CONFIG, "--workdir={tmp}/w", "--config.loss.heatmap=flo"], "loss.heatmap='flo': must be one of"),
    "wrong shape": (
        ["motif_jax.main", CONFIG, *SMALL, "--config.data.frames=16", "--workdir={tmp}/w", "--config.data.path={data}"],
        "frames",
    ),
    "configuration that does not exist": (["motif_jax.main", "--config=configs/nope.py", "--workdir={tmp}/w"], "configs/nope.py"),
    "unknown size": (
        ["motif_jax.main", "--config=configs/motif.py:huge", "--workdir={tmp}/w"],
        "configs/motif.py:huge: unknown size; use paper, small or tiny",
    ),
    "wrong mesh": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir={tmp}/w", "--config.data.path={data}", "--config.mesh.data=3"],
        "needs 3 devices, but there are 1",
    ),
    "unwritable": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir=/dev/null/w", "--config.data.path={data}"],
        "cannot write to the work directory",
    ),
    "no run": (["motif_jax.sample", "--workdir={tmp}", "--image={tmp}/a.png", "--prompt=x", "--output={tmp}/x.mp4"], "neither config.json"),
    "no image": (
        ["motif_jax.sample", "--workdir={run}", "--image={tmp}/x.png", "--prompt=x", "--output={tmp}/x.mp4"],
        "x.png: missing file",
    ),
    "no video type": (
        ["motif_jax.sample", "--workdir={run}", "--image=x", "--prompt=x", "--output={tmp}/x.avi"],
        "must end in .mp4 or .gif",
    ),
    "no work directory": (["motif_jax.sample", "--workdir=", "--image=x", "--prompt=x", "--output=x.gif"], "give either --workdir, or"),
    "no list": (["motif_jax.sample", "--workdir={run}", "--requests=", "--output=x"], "give either --image and --prompt, or --requests"),
    "a list and an image": (
        ["motif_jax.sample", "--workdir={run}", "--requests=x.jsonl", "--image=x", "--output=x"],
        "give either --image and --prompt, or --requests",
    ),
    "no output": (["motif_jax.sample", "--workdir={run}", "--requests=x.jsonl", "--output="], "--output is empty: name a file"),
    "huge seed": (
        ["motif_jax.sample", "--workdir={run}", "--image=x", "--prompt=x", "--output=x.gif", "--seed=2147483648"],
        "--seed=2147483648",
    ),
    "guidance that is no number": (
        ["motif_jax.sample", "--workdir={run}", "--image={tmp}/a.png", "--prompt=x", "--output=x.gif", "--guidance=nan"],
        "--guidance=nan: must be a finite number",
    ),
    "bad list": (["motif_jax.sample", "--workdir={run}", "--requests={tmp}/none.jsonl", "--output={tmp}/o"], "cannot be read"),
    "empty path": (["motif_jax.bench", "score", "--list=x", "--videos=a=b", "--output="], "--output= is empty: give it a value"),
    "unknown world": (
        ["motif_jax.bench", "synthetic", "--workdir={run}", "--world=mars"],
        "motif_jax.bench synthetic: argument --world: invalid choice: 'mars' (choose from ",
    ),
    "other settings": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir={run}", "--config.data.path={data}", "--config.loss.motion_weight=2.0"],
        "loss.motion_weight was 1.0 and is now 2.0",
    ),
    "brackets": (
        ["motif_jax.main", CONFIG, *SMALL, "--workdir={tmp}/w[1]", "--config.data.path={data}"],
        "a path with [ or ] cannot hold checkpoints",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_one_clear_line(environment, data, trained, tmp_path, name):
    from PIL import Image

    arguments, message = BAD_CALLS[name]
    (tmp_path / "few.py").write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'name': 'few'})\n")
    (tmp_path / "empty.py").write_text("")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "list.py").write_text("def get_config(): return [1]\n")
    process = start(environment, *(a.format(tmp=tmp_path, data=data, run=trained) for a in arguments))
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert message in text and "Traceback" not in text, text


def test_damaged_checkpoint_is_named(environment, data, trained, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for path in (copy / "checkpoints" / "300" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:1000])
    text = run(
        environment, "motif_jax.main", CONFIG, *SMALL, f"--workdir={copy}", f"--config.data.path={data}", "--config.steps=310", expect=1
    )
    assert str(copy / "checkpoints" / "300") in text and "checkpoint.fallback=True" in text and "Traceback" not in text


@pytest.mark.parametrize(("module", "where"), [("jax.numpy", "device"), ("numpy", "machine")])
def test_too_little_memory_is_one_clear_line(module, where):
    code = f"import {module} as x; from motif_jax import commands; commands.run('motif_jax.main', lambda _: print(x.ones(2**46).sum()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith(f"motif_jax.main: the {where} has too little memory (")


@pytest.mark.parametrize(
    ("body", "status", "out", "err"),
    [
        ("print('\u52d5')", 0, "\\u52d5\n", ""),  # on a terminal without the letter
        ("exec('raise KeyboardInterrupt')", 130, "", "motif_jax.main: interrupted\n"),
    ],
)
def test_what_a_command_leaves_on_a_terminal(environment, body, status, out, err):
    code = f"from motif_jax import commands; commands.run('motif_jax.main', lambda _: {body})"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120
    )
    assert (found.returncode, found.stdout, found.stderr) == (status, out, err)
