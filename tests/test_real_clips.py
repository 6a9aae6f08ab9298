"""Real videos through the whole chain: RAFT flow, heatmap pictures, 20 steps of the U-Net with a resume, a sample from a first frame."""

import functools
import json
import pathlib
import runpy
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from motif_jax import animation
from motif_jax.config import from_config_dict
from motif_jax.data.videos import read_clip
from motif_jax.errors import UserError
from motif_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "data.frames": 8,
    "unet.channel_mult": (1, 2),  # two levels instead of four, one of them with attention: every kind of block
    "unet.attention_resolutions": (2,),
    "sample.count": 1,
    "sample.steps": 4,
}


def configured(**more):
    """configs/motif.py:tiny with SMALL and the given values."""
    config = runpy.run_path(str(ROOT / "configs" / "motif.py"))["get_config"]("tiny")
    config.update_from_flattened_dict(SMALL | more)
    return from_config_dict(config)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_real_clips(shared, tmp_path, capsys):
    """The flow by the command; the rest in this process (test_commands.py has its commands)."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    command = [sys.executable, "-m", "motif_jax.prepare", "--config=configs/motif.py:tiny"]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    command += [f"--source={shared / 'clips' / 'captions.csv'}", f"--output={data}", "--preview=9"]
    command += [f"--config.prepare.flow_weights={shared / 'raft' / 'raft_small_things.safetensors'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "9 clips" in done.stdout and "0 skipped" in done.stdout, done.stdout + done.stderr
    assert len(list((data / "preview").glob("*.png"))) == 9
    settings = json.loads((data / "dataset.json").read_text())["settings"]
    assert settings["estimator.flow"] == "raft_small" and len(settings["estimator.flow_weights_sha256"]) == 64

    train = functools.partial(configured, **{"data.path": str(data), "checkpoint.every": 10})
    with pytest.raises(UserError, match="have no masks"):
        loop.train(train(**{"loss.heatmap": "mask"}), tmp_path / "masks")
    assert loop.train(train(steps=12), workdir) and "done: 12 steps" in capsys.readouterr().out
    assert loop.train(train(steps=20), workdir)
    text = capsys.readouterr().out
    assert "continuing at step 12" in text and "done: 20 steps" in text
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if "loss" in line]
    assert len(losses) == 20 and np.isfinite(losses).all()

    with av.open(str(shared / "clips" / "sam2_01_dog.mp4")) as container:
        next(container.decode(video=0)).to_image().save(tmp_path / "first.png")
    output, load = tmp_path / "dog.mp4", functools.partial(animation.Animator.load, workdir, steps=4)
    animation.animate_one(load, str(tmp_path / "first.png"), "a dog runs to the left", str(output), 0)
    clip = read_clip(output, 8, 64, 64, lambda n: (0, 1)).frames
    assert clip.shape == (8, 64, 64, 3) and clip.std() > 0
    assert Image.open(next((data / "preview").glob("sam2_01_dog*.png"))).width > 300
