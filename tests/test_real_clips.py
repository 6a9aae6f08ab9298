"""Real videos through the whole chain: RAFT flow, heatmap pictures, 20 steps of the U-Net with a resume, a sample from a first frame."""

import json
import os
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from motif_jax.data.videos import read_clip

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--config=configs/motif.py:tiny",
    "--config.data.frames=8",
    "--config.unet.channel_mult=(1, 2)",  # two levels instead of four, one of them with attention: every kind of block
    "--config.unet.attention_resolutions=(2,)",
    "--config.sample.count=1",
    "--config.sample.steps=4",
]


@pytest.fixture
def run(quick_environment):
    def run(*arguments, expect=0):
        # RAFT computes more than it compiles.
        environment = os.environ | ({} if arguments[0] == "motif_jax.prepare" else quick_environment())
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + (done.stderr if expect else "")

    return run


@pytest.mark.slow
def test_real_clips(shared, run, tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    weights = shared / "raft" / "raft_small_things.safetensors"
    text = run(
        "motif_jax.prepare",
        *SMALL,
        f"--source={shared / 'clips' / 'captions.csv'}",
        f"--output={data}",
        f"--config.prepare.flow_weights={weights}",
        "--preview=9",
    )
    assert "9 clips" in text and "0 skipped" in text
    assert len(list((data / "preview").glob("*.png"))) == 9
    settings = json.loads((data / "dataset.json").read_text())["settings"]
    assert settings["estimator.flow"] == "raft_small" and len(settings["estimator.flow_weights_sha256"]) == 64

    masks = ("--config.loss.heatmap=mask", f"--workdir={tmp_path / 'masks'}")
    assert "have no masks" in run("motif_jax.main", *SMALL, *masks, f"--config.data.path={data}", expect=1)
    train = ("motif_jax.main", *SMALL, f"--workdir={workdir}", f"--config.data.path={data}", "--config.checkpoint.every=10")
    assert "done: 12 steps" in run(*train, "--config.steps=12")
    text = run(*train, "--config.steps=20")
    assert "continuing at step 12" in text and "done: 20 steps" in text
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert len(losses) == 20 and np.isfinite(losses).all()

    with av.open(str(shared / "clips" / "sam2_01_dog.mp4")) as container:
        next(container.decode(video=0)).to_image().save(tmp_path / "first.png")
    output = tmp_path / "dog.mp4"
    run(
        "motif_jax.sample",
        f"--workdir={workdir}",
        f"--image={tmp_path / 'first.png'}",
        "--prompt=a dog runs to the left",
        f"--output={output}",
        "--steps=4",
    )
    clip = read_clip(output, 8, 64, 64, lambda n: (0, 1)).frames
    assert clip.shape == (8, 64, 64, 3) and clip.std() > 0
    assert Image.open(next((data / "preview").glob("sam2_01_dog*.png"))).width > 300
