"""docs/extend.md: its code, run as one script beside the files that it names."""

import json
import pathlib
import re
import runpy

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from motif_jax.animation import Animator
from motif_jax.errors import UserError
from motif_jax.training.metrics import read_lines

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT / "tests" / "testdata"


@pytest.mark.usefixtures("quick_compile")
def test_the_page_runs(tmp_path, monkeypatch):
    """As it stands; the run has the metrics, learning rates and network of the page."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").symlink_to(ROOT / "configs")
    for name in ("dog.png", "first.png", "second.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)).save(name)
    shapes = json.loads((TESTDATA / "raft_names.json").read_text())["small"]["torchvision"]
    safetensors.numpy.save_file(runpy.run_path(str(TESTDATA / "make_raft.py"))["weights"](shapes), "raft-small.safetensors")

    page, names = (ROOT / "docs" / "extend.md").read_text(), {"__name__": "page"}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S), 1):
        exec(compile(block, f"docs/extend.md, block {number}", "exec"), names)

    lines = [line for line in read_lines(pathlib.Path("RUN/metrics.jsonl")) if "loss" in line]
    assert all("error_last_frame" in line for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, 5e-5, 3.75e-5, 1.25e-5], rel=1e-5)
    assert "space.query.kernel" in pathlib.Path("RUN/parameters.txt").read_text()
    assert names["clips"].shape == (1, 16, 64, 64, 3) and pathlib.Path("dog.mp4").stat().st_size > 0
    heat = names["heat_Thw"]
    assert heat.shape == (16, 8, 8) and np.median(heat) < 0.1 and heat.max() > 0.99 and pathlib.Path("heatmap.png").stat().st_size > 0
    with pytest.raises(UserError, match=r"RUN: its network is SpaceTime, not the library's; sample from Python, with its Method"):
        Animator.load("RUN")
    assert names["flow"].shape == (1, 64, 80, 2)
    assert int(names["state"].step) == 1 and names["metrics"]["loss"] > 0
