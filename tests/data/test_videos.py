"""Decoding: which frames are taken, from what kinds of files, how they are turned and cut, and what is refused."""

import gc
import pathlib
import struct
from fractions import Fraction

import av
import av.logging
import numpy as np
import pytest
from PIL import Image

from motif_jax.data import images, videos
from motif_jax.data.images import MediaError
from motif_jax.data.videos import choose_clip, read_clip, read_video, save_video

BITS = 8  # a numbered frame shows its number as black and white bars, which survive every codec


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    bits = (np.arange(count)[:, None] >> np.arange(BITS)) & 1
    bars = np.repeat(bits * 255, width // BITS, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (count, height, width, 3))


def number(frame: np.ndarray) -> int:
    bars = frame.mean((0, 2)).reshape(BITS, -1).mean(1) > 127
    return int((bars << np.arange(BITS)).sum())


def write(
    path: pathlib.Path,
    frames,
    codec="libx264",
    pixels="yuv420p",
    rate=10,
    options=None,
    pts=None,
    streams=1,
    metadata=None,
    aspect=None,
    **kw,
):
    """A file of `frames` (one list per stream if streams > 1); `pts` are in 1/1000 s, `aspect` is a pixel's width over its height."""
    per_stream = [frames] if streams == 1 else frames
    with av.open(str(path), "w", **kw) as container:
        outs = []
        for pictures in per_stream:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if pts is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            outs.append(stream)
        container.metadata.update(metadata or {})
        for stream, pictures in zip(outs, per_stream, strict=True):
            for i, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgba" if picture.shape[-1] == 4 else "rgb24")
                if pts is not None:
                    frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def take(path, first, stride, frames=4, height=48, width=64):
    return read_clip(path, frames, height, width, lambda available: (first, stride))


# Which clip


def test_stable_draw_is_uniform():
    counts = np.bincount([videos.stable_draw(10, "key", i) for i in range(10000)], minlength=10)
    assert np.abs(counts - 1000).max() < 160  # five standard deviations


def test_stride_is_uniform_over_those_that_fit():
    """40 frames hold 16 frames at strides 1 and 2 only; both and all their starts are drawn, equally often."""
    drawn = [choose_clip(40, 16, 1, 6, 0, f"video{i}", 0) for i in range(4000)]
    strides = np.array([stride for _, stride in drawn])
    assert set(strides.tolist()) == {1, 2}
    assert abs((strides == 1).mean() - 0.5) < 0.04  # five standard deviations
    for stride, starts in ((1, 25), (2, 10)):
        counts = np.bincount([first for first, s in drawn if s == stride], minlength=starts)
        assert len(counts) == starts
        expected = counts.sum() / starts
        assert ((counts - expected) ** 2 / expected).sum() < starts + 5 * np.sqrt(2 * starts)  # chi-square


def test_choice_is_fixed_for_all_time():
    """Written down once: datasets must not change with a new version of anything."""
    assert [choose_clip(300, 16, 1, 6, 0, f"v{i}.mp4", 0) for i in range(5)] == [(109, 5), (151, 1), (1, 5), (210, 5), (154, 5)]


def test_choice_differs_by_seed_video_and_number():
    keys = [(seed, video, k) for seed in (0, 1) for video in ("a", "b") for k in (0, 1)]
    assert len({choose_clip(10**6, 16, 1, 6, *key) for key in keys}) == len(keys)


def test_too_short_says_how_much_is_missing():
    with pytest.raises(MediaError, match="15 frames, a clip of 16 at stride 2 needs 31") as error:
        choose_clip(15, 16, 2, 6, 0, "a")
    assert error.value.kind == "too short"
    assert choose_clip(31, 16, 2, 6, 0, "a") == (0, 2)


# Kinds of files


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("b_frames.mp4", "libx264", "yuv420p", {"bf": "3", "g": "12"}),
        ("one_key.mkv", "libx264", "yuv444p", {"g": "500"}),
        ("a.webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
        ("a.avi", "mpeg4", "yuv420p", {"bf": "2"}),
        ("no_stamps.avi", "libx264", "yuv420p", {"bf": "3"}),
        ("a.ts", "mpeg2video", "yuv420p", {}),
        ("raw.h264", "libx264", "yuv420p", {"bf": "2"}),
        ("a.gif", "gif", "rgb8", {}),
        ("lossless.mkv", "ffv1", "yuv420p", {}),
        ("high.mkv", "ffv1", "yuv420p10le", {}),
        ("grey.mkv", "ffv1", "gray", {}),
        ("deep_grey.mkv", "ffv1", "gray10le", {}),
        ("rgb.mov", "qtrle", "rgb24", {}),
        ("alpha.mov", "qtrle", "argb", {}),
        ("full_range.mov", "mjpeg", "yuvj420p", {}),
    ],
)
def test_exactly_the_chosen_frames(tmp_path, name, codec, pixels, options):
    frames = numbered(60)
    path = write(tmp_path / name, frames, codec, pixels, options=options)
    counted = []
    read_clip(path, 2, 48, 64, lambda available: (counted.append(available) or 0, 1))
    assert counted == [60]
    for first, stride in ((0, 1), (3, 5), (41, 6), (56, 1)):
        clip = take(path, first, stride)
        assert [number(f) for f in clip.frames] == [first + k * stride for k in range(4)]
        assert (clip.first_frame, clip.frame_stride) == (first, stride)
        assert clip.fps == pytest.approx(25 if name == "raw.h264" else 10)  # a raw stream does not know its rate
        assert clip.frames.shape == (4, 48, 64, 3) and clip.frames.dtype == np.uint8
    with pytest.raises(MediaError, match="too short"):
        take(path, 57, 1)


def test_colours_survive(tmp_path):
    """Also those of the other matrix and range: a file that says BT.709 is not read as BT.601, nor one of 0..255 as of 16..235."""
    red = np.full((3, 48, 64, 3), (200, 30, 60), np.uint8)
    path = tmp_path / "709.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.colorspace = 1
        for picture in red:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p", dst_colorspace="itu709"))
            )
        container.mux(stream.encode())
    full = write(tmp_path / "full.mov", red, "mjpeg", "yuvj444p")
    for file in (path, write(tmp_path / "601.mkv", red, "ffv1", "yuv444p"), full):
        clip = take(file, 0, 1, frames=3)
        assert np.abs(clip.frames.astype(int) - (200, 30, 60)).max() <= 4  # 8-bit YUV


def test_odd_sizes(tmp_path):
    frames = numbered(6, 49, 64)[:, :, :63]
    path = write(tmp_path / "odd.mkv", frames, "ffv1", "yuv444p")
    clip = take(path, 1, 1, height=49, width=63)
    np.testing.assert_allclose(clip.frames.astype(int), frames[1:5], atol=2)  # rounding to YUV and back


def test_transparency_is_laid_on_white(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 300)  # in bands of four rows
    frames = np.zeros((4, 48, 64, 4), np.uint8)
    frames[:, :24] = (10, 20, 30, 255)
    clip = take(write(tmp_path / "a.mov", frames, "qtrle", "argb"), 0, 1)
    assert (clip.frames[:, :24] == (10, 20, 30)).all() and (clip.frames[:, 24:] == 255).all()


def test_transparency_of_a_palette_is_laid_on_white(tmp_path):
    colours = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
    colours[:2] = (0, 70, 80, 90), (255, 10, 20, 30)
    picture = np.zeros((48, 64), np.uint8)
    picture[:24] = 1
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "pal8"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray((picture, colours), format="pal8")))
    clip = take(tmp_path / "a.mov", 0, 1)
    assert (clip.frames[:, :24] == (10, 20, 30)).all() and (clip.frames[:, 24:] == 255).all()


def turn(path, matrix):
    """Writes the display matrix into the track header by hand, as a phone does."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # type 4, version and flags 4, times and ids 20, reserved 8, layer to reserved 8
    a, b, c, d = (x << 16 for x in matrix)
    assert data[start + 32 : start + 36] == struct.pack(">i", 1 << 30)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # a phone held upright: shown a quarter turn clockwise
        ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
    ],
)
def test_display_matrix(tmp_path, matrix, expected):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    path = turn(write(tmp_path / "a.mov", [picture] * 4, "qtrle", "rgb24"), matrix)
    shown = expected(picture)
    np.testing.assert_array_equal(take(path, 0, 1, 2, *shown.shape[:2]).frames, [shown] * 2)


@pytest.mark.parametrize(("orientation", "quarters"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_turned_as_exif_says(tmp_path, orientation, quarters):
    """Motion JPEG of a camera, each frame with the tags of a photograph."""
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=tags)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuvj444p"
        for i in range(4):
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 10)
            container.mux(packet)
    shown = np.rot90(picture, quarters)
    assert np.abs(take(tmp_path / "a.mov", 0, 1, 2, *shown.shape[:2]).frames - shown.astype(int)).mean() < 4


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0)])
def test_pixels_that_are_not_square(tmp_path, matrix):
    """Of 24 x 32 pixels that are twice as wide as high, 48 x 32 are shown; a quarter turn makes them high ones."""
    picture = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    path = turn(write(tmp_path / "a.mov", [picture] * 4, "qtrle", "rgb24", aspect=Fraction(2, 1)), matrix)
    turned = matrix[0] == 0
    frame = take(path, 0, 1, 2, *((48, 32) if turned else (32, 48))).frames[0]
    centres = np.s_[4::8, 8::16]  # of the blocks: the picture is enlarged, and their edges are soft
    np.testing.assert_array_equal(np.rot90(frame, int(turned))[centres], picture.repeat(2, 1)[centres])


# Time


def test_variable_frame_rate_goes_by_time(tmp_path):
    """Every second frame of the second half is missing: frames there are 80 ms apart instead of 40."""
    pts = [40 * i for i in range(30)] + [1200 + 80 * i for i in range(15)]
    path = write(tmp_path / "vfr.mkv", numbered(45), "ffv1", "yuv420p", pts=pts)
    shown = lambda ms: min(range(45), key=lambda i: abs(pts[i] - ms))  # noqa: E731
    clip = take(path, 20, 4, frames=8)
    assert clip.fps == pytest.approx(25)
    assert [number(f) for f in clip.frames] == [shown(40 * (20 + 4 * k)) for k in range(8)]
    assert [number(f) for f in take(path, 2, 3, frames=8).frames] == [2 + 3 * k for k in range(8)]


def test_rounded_time_stamps_are_a_constant_rate(tmp_path):
    pts = [round(1000 * i / 29.97) for i in range(120)]
    path = write(tmp_path / "ms.mkv", numbered(120), "ffv1", "yuv420p", pts=pts)
    clip = take(path, 90, 7)
    assert clip.fps == pytest.approx(29.97, rel=1e-3)
    assert [number(f) for f in clip.frames] == [90, 97, 104, 111]


def test_a_jump_of_the_clock_is_not_a_still(tmp_path):
    pts = [40 * i for i in range(20)] + [10**6 + 40 * i for i in range(20)]
    path = write(tmp_path / "jump.mkv", numbered(40), "ffv1", "yuv420p", pts=pts)
    clip = take(path, 14, 4)
    assert [number(f) for f in clip.frames] == [14, 18, 22, 26] and clip.fps == pytest.approx(25)


def test_files_joined_end_to_end(tmp_path):
    """The clock of the second begins anew, between the stamps of the first: its frames come behind those, not between them."""
    path = tmp_path / "a.ts"
    parts = [write(path, numbered(40), "mpeg4", rate=25, pts=[40 * i + late for i in range(40)]).read_bytes() for late in (0, 13)]
    path.write_bytes(b"".join(parts))
    clip = take(path, 36, 3)
    assert [number(f) for f in clip.frames] == [36, 39, 2, 5] and clip.fps == 25


def test_a_median_between_a_short_and_a_long_step(tmp_path):
    """Two steps of 40 and 360 ms: nothing is near their median of 200, the short one is the period."""
    path = write(tmp_path / "vfr.mkv", numbered(3), "ffv1", "yuv420p", pts=[0, 40, 400])
    clip = read_video(path)
    assert clip.fps == pytest.approx(25) and [number(f) for f in clip.frames] == [0] + [1] * 5 + [2] * 5
    assert [number(f) for f in take(path, 1, 3).frames] == [1, 1, 2, 2]


def test_bursts_have_no_frame_rate(tmp_path):
    """Four frames in 3 ms every 0.9 s: at 1000 a second, nearly every clip would be one frame."""
    path = write(tmp_path / "burst.mkv", numbered(20), "ffv1", "yuv420p", pts=[900 * (i // 4) + i % 4 for i in range(20)])
    with pytest.raises(MediaError, match=r"no frame rate: 20 frames in 3\.603 s, most of them 0\.001 s apart"):
        take(path, 0, 1)


def test_an_empty_sample_is_the_frame_before_it(tmp_path):
    """The last of a file that lists as many as before, as some recorders write for a frame without change."""
    path = write(tmp_path / "a.mp4", numbered(20), "mjpeg", "yuvj420p")
    data = bytearray(path.read_bytes())
    last = data.index(b"stsz") + 16 + 4 * 19  # type 4, version and flags 4, common size 4, count 4
    data[last : last + 4] = bytes(4)
    path.write_bytes(data)
    assert [number(f) for f in take(path, 15, 1).frames] == [15, 16, 17, 18] and len(read_video(path).frames) == 19


def test_a_playlist_without_an_end_is_not_waited_for(tmp_path):
    write(tmp_path / "a.ts", numbered(9), "mpeg2video", rate=25)
    (tmp_path / "live.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:0\n#EXTINF:0,\na.ts\n")
    level = av.logging.get_level()
    av.logging.set_level(av.logging.VERBOSE)
    try:
        with av.logging.Capture(local=False) as said:
            assert [number(f) for f in take(tmp_path / "live.m3u8", 2, 1).frames] == [2, 3, 4, 5]
    finally:
        av.logging.set_level(level)
    readings = sum("value of segment" in text for _, _, text in said)  # of the playlist, whose segment has no length
    assert 0 < readings < 100  # by itself, FFmpeg reads it a thousand times whenever the file is opened


# Streams


def test_first_stream_that_can_give_the_clip(tmp_path):
    path = write(tmp_path / "two.mkv", [numbered(2), numbered(30)[::-1]], "ffv1", "yuv420p", streams=2)
    assert [number(f) for f in take(path, 0, 2).frames] == [29, 27, 25, 23]
    assert [number(f) for f in take(path, 0, 1, frames=2).frames] == [0, 1]
    cover_first = write(tmp_path / "cover.mkv", [numbered(1), numbered(9)], "ffv1", "yuv420p", streams=2)
    assert len(read_video(cover_first).frames) == 9


def test_the_second_stream_where_the_first_is_damaged(tmp_path, monkeypatch):
    path = write(tmp_path / "two.mkv", [numbered(30), numbered(30)[::-1]], "ffv1", "yuv420p", streams=2)
    frames = videos._frames

    def damaged(container, stream):
        if stream.index == 0:
            raise av.error.ExternalError(1, "no such picture")
        return frames(container, stream)

    monkeypatch.setattr(videos, "_frames", damaged)
    assert [number(f) for f in take(path, 0, 2).frames] == [29, 27, 25, 23]
    assert number(read_video(path).frames[0]) == 29


def test_tags_and_names_of_any_kind(tmp_path, monkeypatch):
    """A title in Latin-1; a relative name with a colon, which FFmpeg would take for an address."""
    path = write(tmp_path / "12:30.mp4", numbered(9), metadata={"title": "caf?"})
    path.write_bytes(path.read_bytes().replace(b"caf?", b"caf\xe9"))
    monkeypatch.chdir(tmp_path)
    assert number(take("12:30.mp4", 5, 1).frames[0]) == 5 and len(read_video("12:30.mp4").frames) == 9
    save_video("1:2.mp4", numbered(3), 8)
    assert len(read_video("1:2.mp4").frames) == 3


def test_real_clip_equals_a_full_decode(shared):
    """B-frames, a key frame every 250, a seek on our side; every frame decoded and counted on the other."""
    path = shared / "clips" / "tc_nasa.mp4"
    with av.open(str(path)) as container:
        plain = [f.to_ndarray(format="rgb24") for f in container.decode(container.streams.video[0])]
    clip = take(path, 290, 6, frames=5, height=180, width=320)
    np.testing.assert_array_equal(clip.frames, [plain[290 + 6 * k] for k in range(5)])
    assert clip.fps == 25


# Refusals


def kind_of(path) -> str:
    with pytest.raises(MediaError) as error:
        take(path, 0, 1)
    return error.value.kind


def test_bad_files(tmp_path):
    assert kind_of(tmp_path / "nowhere.mp4") == "missing file"
    assert kind_of(tmp_path) == "missing file"
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert kind_of(tmp_path / "empty.mp4") == "cannot be read"
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    assert kind_of(tmp_path / "text.mp4") == "cannot be read"
    assert kind_of(write(tmp_path / "one.mp4", numbered(1))) == "too short"


def test_frames_that_would_fill_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", numbered(9))
    monkeypatch.setattr(videos, "_MOST_PIXELS", 48 * 64)
    assert len(read_video(path).frames) == 9
    monkeypatch.setattr(videos, "_MOST_PIXELS", 48 * 64 - 1)
    for read in (read_video, lambda path: take(path, 3, 1)):
        with pytest.raises(MediaError, match="too large: frames of 64x48, more than 3,071 pixels"):
            read(path)


def test_decoded_frames_are_freed_at_once(tmp_path):
    """Not when Python next looks for cycles, by when hundreds may be there."""
    save_video(tmp_path / "a.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    gc.collect()
    gc.disable()
    try:
        read_clip(tmp_path / "a.mp4", 8, 16, 16, lambda available: (0, 1), thumbnails=True)
        assert not [found for found in gc.get_objects() if isinstance(found, av.VideoFrame)]
    finally:
        gc.enable()


def test_audio_only(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for _ in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert kind_of(path) == "no video stream"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_truncated_file(tmp_path, name):
    """Cut at four fifths, index at the front: what is left would still give a clip, but not the one that was asked for."""
    options = {"container_options": {"movflags": "faststart"}} if name == "a.mp4" else {}
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    path = write(tmp_path / name, noise, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    assert kind_of(path) == "truncated"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif"])
def test_a_whole_video(tmp_path, name):
    frames = numbered(23)
    if name == "a.gif":
        save_video(tmp_path / name, frames, 10)
    else:
        write(tmp_path / name, frames)
    clip = read_video(tmp_path / name)
    assert clip.frames.shape == (23, 48, 64, 3) and clip.fps == pytest.approx(10)
    assert [number(f) for f in clip.frames] == list(range(23))


def test_a_whole_video_shows_a_long_frame_for_as_long(tmp_path):
    pts = [100, 200, 300, 600, 700, 800, 900]
    path = write(tmp_path / "vfr.mkv", numbered(7), "ffv1", "yuv420p", pts=pts)
    # Between frames 2 and 3 lie 300 ms; a point of the grid in the middle goes to the nearer one.
    assert [number(f) for f in read_video(path).frames] == [0, 1, 2, 2, 3, 3, 4, 5, 6]


def test_whole_videos_that_are_none(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    cut = write(tmp_path / "cut.mp4", noise, container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    for name, kind in (
        ("cut.mp4", "truncated"),
        ("empty.mp4", "cannot be read"),
        ("text.mp4", "cannot be read"),
        ("no.mp4", "missing file"),
    ):
        with pytest.raises(MediaError) as refused:
            read_video(tmp_path / name)
        assert refused.value.kind == kind


def test_a_codec_that_is_not_known(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(9))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))
    for read in (read_video, lambda path: take(path, 0, 1)):
        with pytest.raises(MediaError, match="no video stream"):
            read(path)


def test_a_surprise_while_reading_is_the_files_fault(tmp_path, monkeypatch):
    """Damage takes forms that nobody has seen yet: an index out of range, a number that is none."""
    path = write(tmp_path / "a.mp4", numbered(9))
    for surprise in (IndexError("list index out of range"), ZeroDivisionError("by zero"), ValueError("NaN")):
        monkeypatch.setattr(videos, "_timeline", lambda *_, error=surprise: (_ for _ in ()).throw(error))
        assert kind_of(path) == "cannot be read"


def test_index_cut_off(tmp_path):
    path = write(tmp_path / "a.mp4", numbered(60))  # the index is at the end
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert kind_of(path) == "cannot be read"


def test_damage_behind_the_clip_does_not_matter(tmp_path):
    """One packet is overwritten; every frame after it leans on it until the next key frame."""
    path = write(tmp_path / "a.mp4", numbered(40), options={"g": "20", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        place, size = [(p.pos, p.size) for p in container.demux(video=0)][25]
    data = bytearray(path.read_bytes())
    data[place + 5 : place + size] = b"\xff" * (size - 5)  # its length and type stay
    path.write_bytes(data)
    assert [number(f) for f in take(path, 0, 8).frames] == [0, 8, 16, 24]
    with pytest.raises(MediaError) as error:
        take(path, 0, 9)
    assert error.value.kind == "does not decode"


def test_damage_that_the_decoder_has_hidden_lasts_to_the_next_key_frame(tmp_path, monkeypatch):
    """Of what it paints over it marks the first frame alone; here it is told to mark frame 25."""
    path = write(tmp_path / "a.mp4", numbered(50), options={"g": "20", "bf": "0", "sc_threshold": "0"})
    frames = videos._frames

    class Marked:
        is_corrupt = True

        def __init__(self, frame):
            self.frame = frame

        def __getattr__(self, name):
            return getattr(self.frame, name)

    def marked(container, stream):
        for frame in frames(container, stream):
            yield Marked(frame) if round(float(frame.pts * frame.time_base) * 10) == 25 else frame

    monkeypatch.setattr(videos, "_frames", marked)
    assert [number(f) for f in take(path, 4, 20, frames=2).frames] == [4, 24]
    assert [number(f) for f in take(path, 0, 20, frames=3).frames] == [0, 20, 40]
    with pytest.raises(MediaError, match="frame 39 is damaged"):
        take(path, 0, 39, frames=2)


def test_thumbnails_are_of_one_reading(tmp_path, monkeypatch):
    """The first one, from a key frame before the clip, fails in its middle, and the whole file is read from its beginning."""
    path = write(tmp_path / "a.mp4", numbered(30))
    frames, readings = videos._frames, []

    def fails_once(container, stream):
        readings.append(stream)
        for frame in frames(container, stream):
            if len(readings) == 1 and frame.pts * frame.time_base > 1.2:
                raise av.error.ExternalError(1, "no such picture")
            yield frame

    monkeypatch.setattr(videos, "_frames", fails_once)
    clip = read_clip(path, 4, 48, 64, lambda available: (10, 3), thumbnails=True)
    assert len(readings) == 2 and len(clip.thumbnails) == 10


# Writing


@pytest.mark.parametrize("name", ["a.mp4", "A.GIF"])
def test_saved_videos_come_back(tmp_path, name):
    save_video(tmp_path / name, numbered(12), 8)
    clip = take(tmp_path / name, 0, 1, frames=12)
    assert [number(f) for f in clip.frames] == list(range(12))
    assert clip.fps == pytest.approx(8, rel=0.04)  # GIF counts in hundredths of a second
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_mp4_is_what_browsers_play_and_odd_sizes_lose_nothing(tmp_path):
    frames = np.zeros((5, 33, 47, 3), np.uint8)
    frames[:, :, -1] = 255
    save_video(tmp_path / "a.mp4", frames, 10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (34, 48)
        assert stream.codec_context.colorspace == 6  # BT.601 is said: players guess BT.709 for large pictures
        picture = next(container.decode(stream)).to_ndarray(format="rgb24")
    assert picture[:, 46:].min() > 200 and picture[:, :44].max() < 50


def test_gif_keeps_equal_frames(tmp_path):
    """For 20 ms each at least: shorter ones are shown for 100 by browsers."""
    save_video(tmp_path / "a.gif", np.zeros((6, 20, 30, 3), np.uint8), 100)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 6 and image.info["loop"] == 0 and image.info["duration"] == 20


def test_gif_of_few_colours_is_exact(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4, (4, 20, 30, 1), np.uint8) * np.array([60, 40, 80], np.uint8)
    save_video(tmp_path / "a.gif", frames, 10)
    np.testing.assert_array_equal(take(tmp_path / "a.gif", 0, 1, 4, 20, 30).frames, frames)


def test_save_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        save_video(tmp_path / "a.avi", numbered(2), 8)
    with pytest.raises(ValueError, match="frames"):
        save_video(tmp_path / "a.mp4", numbered(2)[:0], 8)
    with pytest.raises(ValueError, match="fps"):
        save_video(tmp_path / "a.mp4", numbered(2), 0)
    assert not list(tmp_path.iterdir())
