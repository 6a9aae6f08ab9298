"""The synthetic benchmark with stand-in models whose score is known beforehand."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from motif_jax.bench import synthetic
from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data.sprites import COLOURS, STILL, UNIT, coverage, make_clips
from motif_jax.errors import UserError
from motif_jax.preparation import prepare

SIZE = {"frames": 8, "height": 32, "width": 32}


SPLITS = ("validation", "heldout", "several", "backgrounds")
MOVES = ("left", "right", "up", "down")


class Oracle:
    """Knows every clip by its first frame and plays the truth; told another direction, it turns the way of its object there."""

    def __init__(self, count: int, obey: bool):
        self.obey, self.calls, self.known = obey, [], {}
        for split in SPLITS:
            clips = make_clips("quickstart", 5, range(count), 8, 32, 32, split)
            for i, (frames, caption) in enumerate(zip(clips["frames"], clips["captions"], strict=True)):
                self.known[frames[0].tobytes()] = (frames, caption, clips, i)

    def __call__(self, images, sentences, seeds):
        self.calls.append((len(images), list(seeds)))
        return np.stack([self.play(image, sentence) for image, sentence in zip(images, sentences, strict=True)])

    def play(self, image, sentence):
        frames, caption, clips, i = self.known[image.tobytes()]
        if sentence == caption or not self.obey:
            return frames
        step = UNIT[MOVES.index(sentence.split()[-1])] * 1.5
        colour = np.array(COLOURS[sentence.split()[1]], np.float32)
        out = np.repeat(frames[-1:], 8, 0).astype(np.float32)  # where the object stood first it is not any more
        centres = clips["positions"][i, 0, 0] + step * np.arange(8)[:, None]
        alpha = coverage(np.repeat(clips["shape"][i, 0], 8), centres, 32, 32)[..., None]
        grey = out.mean(-1, keepdims=True)
        own = coverage(clips["shape"][i, :1], clips["positions"][i, :1, -1], 32, 32)[..., None]
        out += own * (grey - out)
        return np.clip(out + alpha * (colour - out), 0, 255).astype(np.uint8)


def test_the_oracle_reaches_the_ceiling_and_the_static_clip_nothing():
    oracle = Oracle(20, obey=True)
    result = synthetic.evaluate(oracle, "quickstart", 5, 20, **SIZE, batch_size=8)
    assert set(result["splits"]) == set(SPLITS)
    for split, rows in result["splits"].items():
        direction = make_clips("quickstart", 5, range(20), 8, 32, 32, split)["direction"]
        moving = rows["model"]["moving"]["rates"]["success"]
        assert moving["rate"] == 1.0 and moving["count"] == (direction != STILL).sum() and 0.7 < moving["low"] < 1
        assert rows["static"]["moving"]["rates"]["direction_ok"]["rate"] == 0.0
        assert rows["static"]["moving"]["means"]["leak"] == 1.0 and rows["model"]["moving"]["means"]["leak"] == 0.0
        assert rows["ceiling"]["moving"]["rates"]["success"]["rate"] == 1.0
    rows = result["splits"]["heldout"]
    # An object pushed out of the frame or over the bystander is lost: not all sentences can be obeyed.
    assert rows["antonym_contrast"]["mean"] > 0.8 and rows["prompt_retrieval"]["rate"] > 0.75
    assert "prompt_retrieval" not in result["splits"]["validation"]
    parts = [rows[f"{what} and direction"] for what in ("shape", "colour")]
    assert sum(p["moving"]["rates"]["success"]["count"] for p in parts) == rows["model"]["moving"]["rates"]["success"]["count"]
    # Full batches only, and every clip with its own seed.
    assert {n for n, _ in oracle.calls} == {8}
    assert oracle.calls[0][1] == list(range(8)) and oracle.calls[2][1] == [16, 17, 18, 19, 19, 19, 19, 19]


def test_a_model_that_ignores_the_sentence():
    rows = synthetic.evaluate(Oracle(12, obey=False), "quickstart", 5, 12, **SIZE)["splits"]["heldout"]
    assert rows["antonym_contrast"]["mean"] == 0.0
    assert rows["prompt_retrieval"]["rate"] == 0.25


def test_the_ceiling_goes_through_the_autoencoder():
    def dark(frames):
        return np.clip(frames.astype(int) - 10, 0, 255).astype(np.uint8)

    result = synthetic.evaluate(lambda i, s, n: dark(np.repeat(i[:, None], 8, 1)), "quickstart", 0, 4, **SIZE, round_trip=dark)
    rows = result["splits"]["validation"]
    assert rows["ceiling"]["moving"]["means"]["background_mae"] == pytest.approx(10, abs=0.01)


def test_result_is_json_and_a_table():
    result = synthetic.evaluate(Oracle(6, obey=True), "quickstart", 5, 6, **SIZE)
    assert json.loads(json.dumps(result)) == result
    lines = synthetic.table(result).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 4 * 3 + 2 and len({line.count("|") for line in rows}) == 1
    assert "100 [" in rows[2] and "picks the sentence" in lines[-1]


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        synthetic.evaluate(Oracle(1, obey=True), "quickstart", 5, 0, **SIZE)


def test_the_world_is_the_one_of_the_runs_clips(tmp_path):
    config = Config(
        data=DataConfig(frames=2, height=16, width=16), prepare=PrepareConfig(flow="exact", image_format="png", clips_per_shard=9)
    )
    for name in ("quickstart", "shapes"):
        prepare(config, f"synthetic:{name}:3", tmp_path / name, log=lambda line: None)
        assert synthetic.trained_world(dataclasses.replace(config.data, path=str(tmp_path / name))) == name
    for path, message in (
        (f"{tmp_path}/shapes,{tmp_path}/quickstart", "trained on synthetic:quickstart, synthetic:shapes, no world of its own: name one"),
        (f"{tmp_path}/gone", r"clips cannot be read \(no dataset in .*\): name it with --world"),
    ):
        with pytest.raises(UserError, match=message):
            synthetic.trained_world(dataclasses.replace(config.data, path=path))


def test_only_a_work_directory_gets_the_results(tmp_path):
    """A checkpoint's directory, which sampling takes, is refused: nothing is written into it."""
    step = tmp_path / "checkpoints" / "7"
    step.mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config\.json there"):
        synthetic.run(argparse.Namespace(workdir=step, world="quickstart", seed=0, count=1))
    assert not list(step.iterdir())
