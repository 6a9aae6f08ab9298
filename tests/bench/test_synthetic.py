"""The synthetic benchmark with stand-in models whose score is known beforehand."""

import json

import numpy as np
import pytest

from motif_jax.bench import synthetic
from motif_jax.data.sprites import STILL, make_clips

SIZE = {"frames": 8, "height": 32, "width": 32}


class Oracle:
    """Knows every clip by its first frame; plays the truth, or for the opposite sentence the truth mirrored in time of motion."""

    def __init__(self, count: int, obey: bool):
        self.obey, self.calls = obey, []
        self.known = {}
        for split in ("validation", "heldout"):
            clips = make_clips("quickstart", 5, range(count), 8, 32, 32, split)
            for frames, caption in zip(clips["frames"], clips["captions"], strict=True):
                self.known[frames[0].tobytes()] = (frames, caption)

    def __call__(self, images, sentences, seeds):
        self.calls.append((len(images), list(seeds)))
        out = []
        for image, sentence in zip(images, sentences, strict=True):
            frames, caption = self.known[image.tobytes()]
            out.append(frames if sentence == caption or not self.obey else np.repeat(frames[:1], 8, 0))
        return np.stack(out)


def test_the_oracle_reaches_the_ceiling_and_the_static_clip_nothing():
    oracle = Oracle(20, obey=True)
    result = synthetic.evaluate(oracle, "quickstart", 5, 20, **SIZE, batch_size=8)
    assert set(result["splits"]) == {"validation", "heldout"}
    for split, rows in result["splits"].items():
        direction = make_clips("quickstart", 5, range(20), 8, 32, 32, split)["direction"]
        moving = rows["model"]["moving"]["rates"]["success"]
        assert moving["rate"] == 1.0 and moving["count"] == (direction != STILL).sum() and 0.7 < moving["low"] < 1
        assert rows["static"]["moving"]["rates"]["direction_ok"]["rate"] == 0.0
        assert rows["ceiling"]["moving"]["rates"]["success"]["rate"] == 1.0
        # It stands still for the opposite sentence: half of the way there and back.
        assert rows["antonym_contrast"]["mean"] == pytest.approx(0.5, abs=0.02)
    # Full batches only, and every clip with its own seed.
    assert {n for n, _ in oracle.calls} == {8}
    assert oracle.calls[0][1] == list(range(8)) and oracle.calls[2][1] == [16, 17, 18, 19, 19, 19, 19, 19]


def test_a_model_that_ignores_the_sentence_has_no_contrast():
    result = synthetic.evaluate(Oracle(12, obey=False), "quickstart", 5, 12, **SIZE, splits=["heldout"])
    assert result["splits"]["heldout"]["antonym_contrast"]["mean"] == 0.0


def test_the_ceiling_goes_through_the_autoencoder():
    def dark(frames):
        return np.clip(frames.astype(int) - 10, 0, 255).astype(np.uint8)

    result = synthetic.evaluate(
        lambda i, s, n: dark(np.repeat(i[:, None], 8, 1)), "quickstart", 0, 4, **SIZE, round_trip=dark, antonyms=False
    )
    rows = result["splits"]["validation"]
    assert rows["ceiling"]["moving"]["means"]["background_mae"] == pytest.approx(10, abs=0.01)
    assert "antonym_contrast" not in rows


def test_result_is_json_and_a_table():
    result = synthetic.evaluate(Oracle(6, obey=True), "quickstart", 5, 6, **SIZE)
    assert json.loads(synthetic.to_json(result)) == result
    lines = synthetic.table(result).splitlines()
    assert len(lines) == 4 + 2 * 3
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:])
    assert "100 [" in lines[4]


def test_no_clips_is_an_error():
    with pytest.raises(ValueError, match="at least one clip"):
        synthetic.evaluate(Oracle(1, obey=True), "quickstart", 5, 0, **SIZE)
