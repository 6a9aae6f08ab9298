"""Cuts: every one between two real clips is found, and hardly anything inside them is taken for one."""

import collections
import itertools

import av
import numpy as np
import pytest

from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import records, scenes, sources, videos
from motif_jax.data.captions import Entry
from motif_jax.data.shards import Skipped
from motif_jax.data.videos import THUMBNAIL, save_video

THRESHOLD = PrepareConfig().cut_threshold
CUT = 30  # the frame of `film` with which its second scene begins


class Still:
    def flow(self, frames):
        return np.zeros((len(frames), frames.shape[1] // 8, frames.shape[2] // 8, 2), np.float32)

    def describe(self):
        return {"flow": "still"}


def scene(seed: int, frames: int, step: int = 1) -> np.ndarray:
    """A texture of large patches that moves to the left."""
    texture = np.random.default_rng(seed).integers(0, 256, (9, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([texture[:64, step * t : step * t + 96] for t in range(frames)])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two scenes of 30 and 20 frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    save_video(path, np.concatenate([scene(1, CUT), scene(2, 20)]), 25)
    return path


def test_a_cut_and_nothing_else():
    frames = np.concatenate([scene(1, 9), scene(2, 7), scene(3, 5)])
    assert scenes.cuts(frames, THRESHOLD).tolist() == [9, 16]
    assert not len(scenes.cuts(scene(1, 30, step=7), THRESHOLD))  # fast, but steady
    assert not len(scenes.cuts(np.random.default_rng(0).integers(0, 256, (12, 36, 64, 3), np.uint8), THRESHOLD))  # noise has no scenes
    assert scenes.cuts(np.concatenate([scene(1, 1), scene(2, 1)]), THRESHOLD).tolist() == [1]
    assert not len(scenes.cuts(scene(1, 1), THRESHOLD))
    flash = scene(1, 9)
    flash[4] = 255
    assert scenes.cuts(flash, THRESHOLD).tolist() == [4, 5]


@pytest.mark.parametrize("times", [2, 3, 6])
def test_pictures_that_are_shown_several_times(times):
    """A fast move stays one, a cut stays a cut, also beside a still scene and of two stills."""
    still, one, other = scene(2, 1).repeat(9, 0), scene(1, 9), scene(3, 9)
    assert not len(scenes.cuts(scene(1, 9, step=7).repeat(times, 0), THRESHOLD))
    for parts in ((one, other), (one, still, other), (scene(1, 1), scene(2, 1))):
        ends = np.cumsum([len(part) for part in parts[:-1]])
        assert scenes.cuts(np.concatenate(parts).repeat(times, 0), THRESHOLD).tolist() == (times * ends).tolist()


def test_change_is_the_difference_of_luma_and_chroma():
    grey = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (10, 10, 73)])
    np.testing.assert_allclose(scenes.changes(grey), [0, 63])
    red = np.zeros((2, 2, 2, 3), np.uint8)
    red[1, ..., 0] = 255
    # BT.601: Y 76, Cr 255 (clipped), Cb 85.
    np.testing.assert_allclose(scenes.changes(red), [76 + 127 + 43], atol=1)


def test_thumbnails_are_every_source_frame_of_the_clip(film):
    clip = videos.read_clip(film, 4, 64, 96, lambda n: (25, 4), thumbnails=True)
    assert clip.thumbnails.shape == (13, THUMBNAIL[1], THUMBNAIL[0], 3)
    assert scenes.cuts(clip.thumbnails, THRESHOLD).tolist() == [CUT - 25]
    assert videos.read_clip(film, 4, 64, 96, lambda n: (25, 4)).thumbnails is None


@pytest.mark.parametrize("threshold", [THRESHOLD, 0.0])
def test_clips_lie_within_a_scene(film, threshold):
    """Without the detector some of the same draws cross the cut."""
    p = PrepareConfig(clips_per_video=24, frame_stride_min=1, frame_stride_max=3, validation_share=0.0, cut_threshold=threshold)
    config = Config(data=DataConfig(frames=6, height=64, width=96), prepare=p)
    source = sources.VideoClips(config, ([Entry("film.mp4", film, "two scenes")], []), Still())
    found = [x for x in source.outcomes(source.items["train"]) if not isinstance(x, Skipped)]
    assert len(found) >= 20
    clips = [records.decode_clip(source.layout, x, ("first_frame", "frame_stride")) for x in found]
    crossing = [c for c in clips if c["first_frame"] < CUT <= c["first_frame"] + 5 * c["frame_stride"]]
    assert bool(crossing) == (threshold == 0)
    assert {c["first_frame"] < CUT for c in clips} == {True, False}  # both scenes give clips


@pytest.mark.parametrize("container", ["mp4", "h264"])
def test_a_video_of_cuts_is_left_out(tmp_path, monkeypatch, container):
    """When its frames are shown is found out once for all the clips that are tried: a raw stream is decoded whole for it."""
    path = tmp_path / f"flicker.{container}"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in np.concatenate([scene(i, 5) for i in range(8)]):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    asked = collections.Counter()
    for name in ("_packet_timeline", "_decoded_timeline"):
        find = getattr(videos, name)
        monkeypatch.setattr(videos, name, lambda *a, name=name, find=find: asked.update([name]) or find(*a))
    config = Config(data=DataConfig(frames=8, height=64, width=96), prepare=PrepareConfig(validation_share=0.0))
    source = sources.VideoClips(config, ([Entry(path.name, path, "flicker")], []), Still())
    (outcome,) = source.outcomes(source.items["train"])
    assert isinstance(outcome, Skipped) and outcome.kind == "scene cut" and "each of 8" in outcome.reason
    assert asked == {"_packet_timeline": 1} | ({"_decoded_timeline": 1} if container == "h264" else {})


def test_real_clips_put_together(shared):
    """Eight frames of one clip, then eight of another: 72 ordered pairs, the middle frame is the cut. Alone, a clip has none.

    The same holds when every frame is shown three times.
    """
    clips = {}
    for path in sorted((shared / "clips").glob("*.m??")):
        with av.open(str(path)) as container:
            frames = itertools.islice(container.decode(video=0), 120)
            clips[path.name] = np.stack([f.reformat(*THUMBNAIL, format="rgb24", interpolation="AREA").to_ndarray() for f in frames])
    assert len(clips) == 9
    for (a, first), (b, second) in itertools.permutations(clips.items(), 2):
        for at, times in itertools.product((20, 75), (1, 3)):
            both = np.concatenate([first[at : at + 8], second[at : at + 8]]).repeat(times, 0)
            assert scenes.cuts(both, THRESHOLD).tolist() == [8 * times], (a, b, at, times)
    for times in (1, 3):
        assert {name: scenes.cuts(f.repeat(times, 0), THRESHOLD).tolist() for name, f in clips.items()} == {name: [] for name in clips}
