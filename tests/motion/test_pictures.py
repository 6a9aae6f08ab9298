"""Pictures of flow and heatmaps: colours known from the convention, sizes, and that what is drawn lies where it should."""

import numpy as np
import pytest
from PIL import Image

from motif_jax.motion import pictures


def test_flow_colours_follow_the_middlebury_wheel():
    """Compass points as in Baker et al.: right is pure red; the others lie between two of the wheel's six corners."""
    assert pictures.flow_colours(np.array([5.0, 0.0])).tolist() == [255, 0, 0]
    # 55 steps: red 15 yellow 6 green 4 cyan 11 blue 13 magenta 6 red. Down is a quarter, 13.75 steps, 13.75/15 of the way to yellow.
    assert pictures.flow_colours(np.array([0.0, 5.0])).tolist() == [255, round(255 * 13.75 / 15), 0]
    # Left is 27.5 steps: 2.5 of the 11 from cyan to blue. Up is 41.25 steps: 5.25 of the 13 from blue to magenta.
    assert pictures.flow_colours(np.array([-5.0, 0.0])).tolist() == [0, round(255 * (1 - 2.5 / 11)), 255]
    assert pictures.flow_colours(np.array([0.0, -5.0])).tolist() == [round(255 * 5.25 / 13), 0, 255]


def test_flow_length_is_saturation():
    flow = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [8.0, 0.0]])
    colours = pictures.flow_colours(flow, largest=4.0)
    assert colours.tolist() == [[255, 255, 255], [255, 128, 128], [255, 0, 0], [191, 0, 0]]  # the last is longer than the scale
    np.testing.assert_array_equal(pictures.flow_colours(flow), pictures.flow_colours(flow, largest=8.0))
    assert (pictures.flow_colours(np.zeros((2, 3, 3, 2))) == 255).all()


def test_wheel_shows_where_flow_points():
    wheel = pictures.wheel(101)
    assert wheel.shape == (101, 101, 3)
    assert wheel[50, 100].tolist() == [255, 0, 0] and wheel[50, 50].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(wheel[100, 50], pictures.flow_colours(np.array([0.0, 1.0])))  # image rows count downwards, as v does
    assert len(np.unique(wheel[[0, 0, -1, -1], [0, -1, 0, -1]])) == 1  # background


def test_heat_colours_grow_brighter():
    luminance = pictures.heat_colours(np.linspace(-0.5, 1.5, 101)) @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) >= -0.6).all()  # rounding to whole colour values
    assert luminance[0] == 0 and luminance[-1] > 230


def test_overlay_marks_the_moving_cell_only():
    frames = np.full((2, 32, 48, 3), 100, np.uint8)
    heat = np.zeros((2, 4, 6))
    heat[1, 2, 5] = 1.0
    shown = pictures.overlay(frames, heat)
    assert shown.shape == frames.shape and shown.dtype == np.uint8
    marked = (shown != 75).any(-1)  # still cells show the frame, dimmed to three quarters
    expected = np.zeros((2, 32, 48), bool)
    expected[1, 16:24, 40:48] = True
    np.testing.assert_array_equal(marked, expected)
    with pytest.raises(ValueError, match=r"2 frames need a heatmap \[2, h, w\], got \[3, 4, 6\]"):
        pictures.overlay(frames, np.zeros((3, 4, 6)))


def test_moving_share_counts_cells_above_one_half():
    assert pictures.moving_share(np.array([[0.0, 0.5], [0.51, 1.0]])) == 0.5


def test_strip_takes_first_and_last_frames():
    frames = np.arange(17, dtype=np.uint8)[:, None, None, None] * np.ones((1, 200, 180, 3), np.uint8)
    strip = pictures.strip(frames, columns=5)
    assert strip.shape == (200, 5 * 180 + 4 * pictures.GAP, 3)
    assert [int(strip[0, i * (180 + pictures.GAP), 0]) for i in range(5)] == [0, 4, 8, 12, 16]
    labelled = pictures.strip(frames, "seventeen", columns=5)
    np.testing.assert_array_equal(labelled[-200:], strip)
    assert labelled[:-200].min() < 80  # ink
    ended = pictures.strip(frames, "word " * 200, 5, " (truth)")
    np.testing.assert_array_equal(ended, pictures.label(strip, "word " * 200, " (truth)"))


def test_small_frames_are_enlarged_by_whole_factors():
    frame = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), dtype=np.uint8)
    strip = pictures.strip(frame)
    assert strip.shape == (120, 160, 3)
    np.testing.assert_array_equal(strip[2::5, 2::5], frame[0])


@pytest.mark.parametrize("text", ["", "a word", "a sentence that is far longer than the picture is wide " * 5, "漢字 é", "x" * 10**6])
def test_any_text_fits(text):
    picture = pictures.label(np.full((10, 160, 3), 7, np.uint8), text)
    assert picture.shape[1:] == (160, 3)
    np.testing.assert_array_equal(picture[-10:], np.full((10, 160, 3), 7))


def test_letters_beyond_ascii_are_no_boxes():
    bands = [pictures.label(np.zeros((10, 160, 3), np.uint8), letter) for letter in "éèжд–×"]
    assert len({band.tobytes() for band in bands}) == len(bands)


def test_a_long_text_is_cut_before_its_end_and_as_late_as_it_fits():
    picture = np.full((10, 1200, 3), 7, np.uint8)
    band = lambda *text: pictures.label(picture, *text)[:-10]  # noqa: E731
    np.testing.assert_array_equal(band("word " * 2000, "   frame 7")[:, -60:], band("word " * 1000, "   frame 7")[:, -60:])
    right = np.flatnonzero((band("word " * 2000, "   frame 7") < 200).any((0, 2))).max()
    assert 1200 - pictures.GAP - 50 < right < 1200 - pictures.GAP
    np.testing.assert_array_equal(band("a", "   frame 7"), band("a   frame 7"))
    np.testing.assert_array_equal(band("", "   frame 7"), band("frame 7"))


def test_side_by_side_holds_the_last_frame_of_a_short_clip():
    long = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 160, 160, 3), np.uint8)
    video = pictures.side_by_side({"long": long, "short": long[:2] + 50})
    assert video.shape[0] == 4 and video.shape[2] == 2 * 160 + pictures.GAP and video.dtype == np.uint8
    assert video[:, -1, 0, 0].tolist() == [0, 1, 2, 3] and video[:, -1, -1, 0].tolist() == [50, 51, 51, 51]


def test_clip_sheet_and_png(tmp_path):
    random = np.random.default_rng(1)
    frames = random.integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    flow = random.normal(size=(5, 8, 12, 2)).astype(np.float16)  # as records store it
    heat = np.zeros((5, 8, 12), np.float32)
    heat[4, :4] = 1
    sheet = pictures.clip_sheet(frames, flow, heat, "a caption", columns=3)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 3 * 192 + 2 * pictures.GAP
    wide = pictures.clip_sheet(frames.repeat(8, 2), flow, heat, "a caption", columns=3)
    assert wide.shape[0] > 3 * (64 + 8 + 2 * pictures.FONT)  # letters that can be read when it is scaled to a screen
    bar = sheet[-(128 + 22 + 22) :][4:18, -96 - pictures.GAP : -pictures.GAP].astype(int).sum(-1)
    assert (np.diff(bar[:, ::24]) > 0).all()  # the scale of the heatmap, 0 to 1, above its frames
    still = pictures.clip_sheet(frames, np.zeros_like(flow), np.zeros_like(heat), "a caption", columns=3)
    assert still.shape == sheet.shape and (still != sheet).any()
    pictures.save_png(tmp_path / "sheet.png", sheet)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[8, 12\]"):
        pictures.save_png(tmp_path / "heat.png", np.zeros((8, 12)))
    with pytest.raises(ValueError, match="5 frames need as many flow fields, got 4"):
        pictures.clip_sheet(frames, flow[:4], heat)
