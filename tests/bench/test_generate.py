"""Videos of a list from a tiny model: complete, repeatable, the same however the work is cut up."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from motif_jax import animation
from motif_jax.animation import Animator, generate, noise_seed
from motif_jax.bench import generate as module
from motif_jax.bench.arguments import Parser
from motif_jax.bench.generate import requests_of, write_vbench
from motif_jax.config import to_json
from motif_jax.data.videos import read_video
from motif_jax.errors import UserError
from motif_jax.models.networks import Networks
from motif_jax.pairs import Pair, find_videos, read_pairs
from motif_jax.requested import write_manifest
from motif_jax.training.weights import initial_weights

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(__file__).parents[2]
# Another batch shape or sharding makes XLA sum in another order; a value on the edge between two grey levels may fall to either.
ROUNDING = 1


def tiny_animator(config, mesh=None):
    networks = Networks.of(config)
    start = initial_weights(config, networks)
    # The last layer starts at zero, which would make every video the same noise.
    keys = jax.random.split(jax.random.key(0), len(start.denoiser))
    params = {name: v + 0.05 * jax.random.normal(k, v.shape) for k, (name, v) in zip(keys, start.denoiser.items(), strict=True)}
    return Animator(config, networks, params, start.frozen, 8.0, mesh)


@pytest.fixture(scope="module")
def animator(tiny):
    return tiny_animator(tiny())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("list")
    rng = np.random.default_rng(0)
    lines = ["image,prompt"]
    for n, prompt in enumerate(["A dog runs.", "A dog runs.", "Clouds, or leaves/birds, drift."]):
        Image.fromarray(rng.integers(0, 256, (20, 24 + 4 * n, 3), dtype=np.uint8)).save(folder / f"image{n}.png")
        lines.append(f"image{n}.png,{prompt}")
    (folder / "prompt.csv").write_text("\n".join(lines))
    return read_pairs(folder)


def quiet(text):
    pass


def command(*arguments):
    parser = Parser()
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.mp4")}


@pytest.fixture(scope="module")
def made(animator, pairs, tmp_path_factory):
    """Two seeds of every pair, made without a stop."""
    output = tmp_path_factory.mktemp("made")
    assert generate(animator, requests_of(pairs, [0, 7], False), output, 8, 4, quiet) == 6
    return output


def test_every_pair_and_seed_is_a_video_of_its_own(made, pairs):
    assert set(contents(made)) == {f"{p.id}_{s}.mp4" for p in pairs for s in (0, 7)}
    assert len(set(contents(made).values())) == 6
    clip = read_video(made / f"{pairs[0].id}_7.mp4")
    assert clip.frames.shape == (4, 16, 16, 3) and clip.fps == 8
    found = find_videos(made, pairs)
    assert set(found.videos) == {(p.id, s) for p in pairs for s in (0, 7)} and not found.strays + found.doubles


def test_a_stopped_run_continues(animator, made, pairs, tmp_path):
    """Half of a batch is there, as a kill leaves it: that is not touched, and all equals the run without a stop."""
    everything = requests_of(pairs, [0, 7], False)
    for request in everything[:2]:
        shutil.copy(made / request.file, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    said = []
    assert generate(animator, everything, tmp_path, 8, 4, said.append) == 4
    assert said == ["6 videos, 2 done before", "2 of 4", "4 of 4"]
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}.items()
    assert contents(tmp_path) == contents(made)


def test_jobs_share_the_list(animator, made, pairs, tmp_path):
    everything = requests_of(pairs, [0, 7], False)
    assert [generate(animator, everything, tmp_path, 8, 4, quiet, task, 3) for task in range(3)] == [4, 2, 0]
    assert contents(tmp_path) == contents(made)


def frames_of(animator, pairs, batch, count=4):
    """[4, T, H, W, 3] of two seeds of two pairs, made `batch` at a time."""
    jobs = [(p, s) for p in pairs[1:] for s in (0, 7)][:count]
    out = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        images = [np.asarray(Image.open(p.image)) for p, _ in part]
        out.append(animator(images, [p.prompt for p, _ in part], [noise_seed(s, p.id) for p, s in part]))
    return np.concatenate(out).astype(int)


def test_the_batch_size_changes_rounding_only(animator, pairs):
    one, four = frames_of(animator, pairs, 1), frames_of(animator, pairs, 4)
    assert np.abs(one - four).max() <= ROUNDING
    assert np.abs(one[0] - one[1]).mean() > 10 * ROUNDING  # seeds are told apart


@pytest.mark.slow
def test_devices_change_rounding_only(animator, pairs, tiny, quick_environment, tmp_path):
    """A batch of three over two devices, in a process that has two: as the first of four on one."""
    (tmp_path / "config.json").write_text(to_json(tiny()))
    code = (
        "import sys, jax, numpy as np\n"
        f"sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}]\n"
        "import test_generate as t\n"
        "from motif_jax.config import MeshConfig, from_json\n"
        "from motif_jax.dist.mesh import make_mesh\n"
        "from motif_jax.pairs import read_pairs\n"
        "assert len(jax.devices()) == 2\n"
        "animator = t.tiny_animator(from_json(open(sys.argv[1]).read()), make_mesh(MeshConfig(), jax.devices()))\n"
        "seen = []\n"
        "inner = animator._generate\n"
        "animator._generate = lambda *a: seen.append((out := inner(*a))[0].sharding.num_devices) or out\n"
        "np.save(sys.argv[3], t.frames_of(animator, read_pairs(sys.argv[2]), 3, 3))\n"
        "assert seen == [2], seen\n"
    )
    arguments = [tmp_path / "config.json", pairs[0].image.parent, tmp_path / "frames.npy"]
    environment = os.environ | quick_environment(2)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "frames.npy") - frames_of(animator, pairs, 4)[:3]).max() <= ROUNDING


def test_manifest(pairs, tmp_path):
    """Seeds may be added later; videos of other settings may not."""
    settings = {"steps": 2, "guidance": 7.5}
    for seeds in ([0], [0, 7], [0]):
        write_manifest(tmp_path, requests_of(pairs, seeds, False), settings)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["settings"] == settings and len(found["videos"]) == 6
    assert found["videos"][0] == {
        "file": "image0_a_dog_runs_0.mp4",
        "id": "image0_a_dog_runs",
        "seed": 0,
        "image": str(pairs[0].image),
        "prompt": "A dog runs.",
        "scenario": "",
    }
    with pytest.raises(UserError, match=r"made otherwise \(steps: 2 there, 3 now\)"):
        write_manifest(tmp_path, requests_of(pairs, [0], False), settings | {"steps": 3})
    (tmp_path / "manifest.json").write_text("x")
    with pytest.raises(UserError, match="is no manifest"):
        write_manifest(tmp_path, requests_of(pairs, [0], False), settings)


def test_vbench_files(animator, pairs, tmp_path):
    """What VBench-I2V asks for: <name>-<index>.mp4 beside an image <name>.jpg, and entries that lead to both."""
    requests = requests_of(pairs, [0, 1], True)
    write_vbench(tmp_path, requests, 16, 16)
    generate(animator, requests, tmp_path, 8, 4, quiet)
    names = ["A dog runs. (image0)", "A dog runs. (image1)", "Clouds, or leaves birds, drift."]
    assert set(contents(tmp_path)) == {f"{n}-{s}.mp4" for n in names for s in (0, 1)}
    info = json.loads((tmp_path / "vbench_info.json").read_text())
    assert [e["prompt_en"] for e in info] == names
    for entry in info:
        image = pathlib.Path(entry["custom_image_path"])
        assert image.stem == entry["prompt_en"] and Image.open(image).size == (16, 16)
        assert len(entry["video_list"]) == 2 and all(pathlib.Path(v).is_file() for v in entry["video_list"])
        assert {"i2v_subject", "i2v_background", "dynamic_degree"} <= set(entry["dimension"])
    assert set(find_videos(tmp_path, pairs).videos) == {(p.id, s) for p in pairs for s in (0, 1)}


def test_a_video_with_nan_costs_vbench_that_video_alone(animator, pairs, tmp_path, monkeypatch):
    broken = dataclasses.replace(animator, sampler=lambda config, schedule, denoise, x_BThwC, keys_B: x_BThwC.at[1, 0, 0, 0, 0].set(np.nan))
    monkeypatch.setattr(Animator, "load", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"1 of 3 videos are not written \(NaN or infinity, see above\): A dog runs\. \(image1\)-0\.mp4"):
        command("--workdir=x", f"--list={pairs[0].image.parent}", f"--output={tmp_path}", "--vbench")
    assert len(json.loads((tmp_path / "vbench_info.json").read_text())) == len(list((tmp_path / "images").iterdir())) == 3
    assert set(contents(tmp_path)) == {"A dog runs. (image0)-0.mp4", "Clouds, or leaves birds, drift.-0.mp4"}


def test_two_requests_never_share_a_file(tmp_path):
    pairs = [Pair("a", tmp_path / "sky.png", "Up/down."), Pair("b", tmp_path / "sky.png", "Up down.")]
    assert len(requests_of(pairs, [0], False)) == 2
    with pytest.raises(UserError, match=r"Up down\.-0\.mp4 would be the video of two pairs, 'a' and 'b'"):
        requests_of(pairs, [0], True)


def test_the_manifest_says_what_the_animator_says(animator, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Animator, "load", lambda *_, **__: animator)
    monkeypatch.setattr(animation, "generate", lambda *_: None)

    def run(output):
        command("--workdir=x", f"--list={pairs[0].image.parent}", f"--output={output}")

    run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"] == animator.settings
    file = json.loads((tmp_path / "out" / "manifest.json").read_text())["videos"][0]["file"]
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / file).write_bytes(b"another's")
    with pytest.raises(UserError, match=rf"{file} there is not in manifest\.json"):
        run(tmp_path / "strange")
    (tmp_path / "bad" / "manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--output=.*bad: cannot be written: .*Is a directory"):
        run(tmp_path / "bad")
    with pytest.raises(UserError, match=r"--output=.*png/out: cannot be written: .*Not a directory"):
        run(pairs[0].image / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --workdir, or --checkpoint"),
        (["--workdir=a", "--checkpoint=b"], "give either"),
        (["--checkpoint=b"], "go together"),
        (["--workdir=a", "--seeds=1,1"], "different whole numbers"),
        (["--workdir=a", "--seeds=x"], "different whole numbers"),
        (["--workdir=a", "--batch_size=0"], "argument --batch_size: 0: must be at least 1"),
        (["--workdir=a", "--task_count=2"], "needs --task_index"),
        (["--workdir=a", "--task_index=2", "--task_count=2"], "must be from 0 to --task_count - 1 = 1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        command(f"--list={tmp_path}", f"--output={tmp_path}", *arguments)
