"""Clips of videos and of the synthetic world: contents of records, splits, names, masks."""

import dataclasses

import numpy as np
import pytest

from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import records, sources, sprites
from motif_jax.data.captions import read_source
from motif_jax.data.shards import Skipped
from motif_jax.data.videos import save_video
from motif_jax.errors import UserError

CONFIG = Config(
    data=DataConfig(frames=4, height=32, width=48),
    prepare=PrepareConfig(flow_stride=8, image_format="png", frame_stride_min=2, frame_stride_max=3, validation_share=0.0),
)


class Ramp:
    """A flow that tells which frame it came from: u = mean brightness of frame l, v = that of frame l + 1."""

    def flow(self, frames):
        means = frames.astype(np.float32).mean((1, 2, 3))
        pairs = np.stack([means[:-1], means[1:]], -1)
        return np.broadcast_to(np.concatenate([pairs, pairs[-1:]])[:, None, None], (len(frames), 4, 6, 2))

    def describe(self):
        return {"flow": "ramp", "flow_weights": "anywhere"}


def video(path, count=20):
    """Frame i has brightness 10 i."""
    save_video(path, np.repeat(10 * np.arange(count), 64 * 96 * 3).reshape(count, 64, 96, 3).astype(np.uint8), 30)


def decoded(source, split="train"):
    return [x if isinstance(x, Skipped) else records.decode_clip(source.layout, x) for x in source.outcomes(source.items[split])]


def listed(tmp_path, *lines):
    (tmp_path / "list.csv").write_text("\n".join(["video,caption,mask" if lines[0].count(",") == 2 else "video,caption", *lines]) + "\n")
    return read_source(str(tmp_path / "list.csv"))


def test_a_record_of_a_video(tmp_path):
    video(tmp_path / "a.mp4")
    (clip,) = decoded(sources.VideoClips(CONFIG, listed(tmp_path, "a.mp4,a grey world"), Ramp()))
    assert (clip["video"], clip["caption"], clip["fps"]) == ("a.mp4", "a grey world", 30)
    assert clip["frame_stride"] in (2, 3) and 0 <= clip["first_frame"] <= 19 - 3 * clip["frame_stride"]
    shown = clip["first_frame"] + clip["frame_stride"] * np.arange(4)
    np.testing.assert_allclose(clip["frames"].mean((1, 2, 3)), 10 * shown, atol=3)  # H.264
    assert clip["frames"].shape == (4, 32, 48, 3)
    np.testing.assert_allclose(clip["flow"][:, 0, 0, 0], 10 * shown[[0, 1, 2, 2]], atol=3)  # between sampled frames; the last repeats
    np.testing.assert_allclose(clip["flow"][:, 0, 0, 1], 10 * shown[[1, 2, 3, 3]], atol=3)
    assert "motion_mask" not in clip


def test_outcomes_keep_the_order_and_name_the_bad(tmp_path):
    for i in range(12):
        if i % 4:
            video(tmp_path / f"{i}.mp4", 20 if i % 4 < 3 else 3)
    source = sources.VideoClips(CONFIG, listed(tmp_path, *(f"{i}.mp4,number {i}" for i in range(12))), Ramp())
    found = [(x.video, x.kind) if isinstance(x, Skipped) else (x["video"], "") for x in decoded(source)]
    assert found == [(f"{i}.mp4", ["missing file", "", "", "too short"][i % 4]) for i in range(12)]


def test_clips_of_one_video_differ_and_captions_share_frames(tmp_path):
    video(tmp_path / "a.mp4", 25)
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, clips_per_video=3))
    found = decoded(sources.VideoClips(config, listed(tmp_path, "a.mp4,one", "a.mp4,two"), Ramp()))
    assert len({clip["clip_id"] for clip in found}) == 6
    taken = [(clip["first_frame"], clip["frame_stride"]) for clip in found]
    assert taken[:3] == taken[3:] and len(set(taken)) == 3


def test_names_do_not_depend_on_where_the_list_lies(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    here = sources.VideoClips(CONFIG, listed(tmp_path, "x/a b.mp4,one"), Ramp())
    there = sources.VideoClips(CONFIG, listed(tmp_path / "elsewhere", "./x/a b.mp4,one"), Ramp())
    assert here.items["train"][0].clip_id == there.items["train"][0].clip_id
    assert here.items["train"][0].clip_id.startswith("a_b-")
    assert here.settings == there.settings and "estimator.flow_weights" not in here.settings


def test_an_unusable_flow_is_one_clip_lost(tmp_path):
    class Broken(Ramp):
        def flow(self, frames):
            flow = np.array(super().flow(frames))
            if frames[0].mean() < 100:
                flow[0] = np.nan
            return flow

    save_video(tmp_path / "b.mp4", np.full((20, 64, 96, 3), 200, np.uint8), 30)
    save_video(tmp_path / "a.mp4", np.full((20, 64, 96, 3), 20, np.uint8), 30)
    found = decoded(sources.VideoClips(CONFIG, listed(tmp_path, "a.mp4,dark", "b.mp4,light"), Broken()))
    assert isinstance(found[0], Skipped) and found[0].kind == "unusable values" and found[1]["video"] == "b.mp4"


def test_masks(tmp_path):
    """The mask video is cut like its clip: here its left half lights up from frame 10 on."""
    video(tmp_path / "a.mp4", 25)
    video(tmp_path / "b.mp4", 25)
    mask = np.zeros((25, 64, 96, 3), np.uint8)
    mask[10:, :, :48] = 255
    save_video(tmp_path / "m.mp4", np.concatenate([mask, mask[-1:]]), 30)  # one frame more is a matter of containers
    save_video(tmp_path / "long.mp4", np.concatenate([mask, mask[-2:]]), 30)
    save_video(tmp_path / "short.mp4", mask[:3], 30)
    lines = "a.mp4,x,m.mp4", "b.mp4,y,", "b.mp4,z,long.mp4", "b.mp4,v,short.mp4", "b.mp4,w,none.mp4"
    source = sources.VideoClips(CONFIG, listed(tmp_path, *lines), Ramp())
    assert [(p.video, p.kind) for p in source.problems] == [("b.mp4", "no mask")]
    clip, *bad = decoded(source)
    assert [b.kind for b in bad] == ["unusable mask"] * 3
    assert [b.reason for b in bad] == [
        "mask long.mp4: another length: 27 frames, the video has 25",
        "mask short.mp4: another length: 3 frames, the video has 25",
        "mask none.mp4: missing file",
    ]
    assert clip["motion_mask"].shape == (4, 4, 6)
    lit = clip["first_frame"] + clip["frame_stride"] * np.arange(4) >= 10
    expected = np.where(lit[:, None, None] & (np.arange(6) < 3), 255, 0)
    np.testing.assert_allclose(clip["motion_mask"].astype(int), np.broadcast_to(expected, (4, 4, 6)), atol=8)  # H.264 softens the edge


def test_split_by_video(tmp_path):
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, validation_share=0.25, clips_per_video=2))
    lines = [f"{i}.mp4,{c}" for i in range(400) for c in ("one", "two")]
    split = sources.VideoClips(config, listed(tmp_path, *lines), Ramp()).items
    train, held_out = ({item.video for item in split[s]} for s in ("train", "validation"))
    assert not train & held_out and len(train | held_out) == 400
    assert abs(len(held_out) - 100) < 44  # five standard deviations
    again = sources.VideoClips(dataclasses.replace(config, seed=5), listed(tmp_path, *reversed(lines)), Ramp()).items
    assert {item.video for item in again["validation"]} == held_out  # neither seed nor order of the list matter


def test_training_is_never_empty(tmp_path):
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, validation_share=0.5))
    for i in range(20):
        split = sources.VideoClips(config, listed(tmp_path, f"{i}.mp4,x"), Ramp()).items
        assert (len(split["train"]), len(split["validation"])) == (1, 0)


# The synthetic world


def synthetic(count, **prepare):
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, flow="exact", **prepare))
    return sources.SpriteClips(config, f"synthetic:shapes:{count}")


def test_synthetic_records_are_the_world():
    source = synthetic(40, validation_share=0.2, flow_stride=4)
    for split in ("train", "validation"):
        numbers = [item.number for item in source.items[split]]
        world = sprites.make_clips("shapes", 0, numbers, 4, 32, 48, split)
        for i, clip in enumerate(decoded(source, split)):
            np.testing.assert_array_equal(clip["frames"], world["frames"][i])
            cells = world["flow"][i].reshape(4, 8, 4, 12, 4, 2)
            np.testing.assert_allclose(clip["flow"], cells.mean((2, 4)), atol=5e-3)  # float16
            np.testing.assert_allclose(clip["motion_mask"], 255 * (cells != 0).any(-1).mean((2, 4)), atol=0.51)
            assert (clip["caption"], clip["fps"], clip["frame_stride"]) == (world["captions"][i], 8.0, 1)
            assert clip["clip_id"] == f"shapes-{numbers[i]:07d}"


def test_synthetic_clips_do_not_depend_on_their_neighbours(monkeypatch):
    source = synthetic(10)
    together = list(source.outcomes(source.items["train"]))
    monkeypatch.setattr(sources, "_PIXELS_AT_ONCE", 1)
    assert list(source.outcomes(source.items["train"])) == together


def test_synthetic_with_an_estimated_flow():
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, flow="raft_small"))
    source = sources.SpriteClips(config, "synthetic:quickstart:2", Ramp())
    clip = decoded(source)[0]
    assert clip["flow"][0, 0, 0, 0] == pytest.approx(clip["frames"][0].mean(), rel=1e-3)
    assert source.settings["estimator.flow"] == "ramp"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no synthetic world 'nowhere'; there are"), ("shapes:x", "'x' is no number"), ("shapes:0", "no number")],
)
def test_unknown_worlds(name, message):
    with pytest.raises(UserError, match=message):
        sources.SpriteClips(CONFIG, f"synthetic:{name}")


def test_pool_is_the_mean():
    field = np.arange(2 * 4 * 6 * 1.0).reshape(2, 4, 6, 1)
    np.testing.assert_array_equal(sources.pool(field, 2)[1, 1, 2, 0], field[1, 2:4, 4:6].mean())


@pytest.mark.parametrize(
    ("limits", "kept", "reasons"),
    [
        ({}, {"slow", "medium", "fast"}, set()),
        ({"motion_min": 0.15}, {"medium", "fast"}, {"too little motion"}),
        ({"motion_max": 0.25}, {"slow", "medium"}, {"too much motion"}),
        ({"motion_min": 0.15, "motion_max": 0.25}, {"medium"}, {"too little motion", "too much motion"}),
    ],
)
def test_clips_of_too_little_or_too_much_motion_are_left_out(tmp_path, limits, kept, reasons):
    """The estimator reads |flow| off the brightness: a tenth, two tenths and three tenths of the diagonal."""

    class Brightness(Ramp):
        def flow(self, frames):
            flow = np.zeros((len(frames), 4, 6, 2), np.float32)
            flow[..., 0] = np.rint(frames.mean() / 10) / 10 * np.hypot(32, 48)
            flow[-1] = 1e4  # the repeated field does not count
            return flow

    for i, name in enumerate(("slow", "medium", "fast"), 1):
        save_video(tmp_path / f"{name}.mp4", np.full((20, 64, 96, 3), 10 * i, np.uint8), 30)
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, **limits))
    found = decoded(sources.VideoClips(config, listed(tmp_path, "slow.mp4,a", "medium.mp4,b", "fast.mp4,c"), Brightness()))
    assert {clip["video"].removesuffix(".mp4") for clip in found if not isinstance(clip, Skipped)} == kept
    assert {clip.kind for clip in found if isinstance(clip, Skipped)} == reasons


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "folder.mp4", "locked.mp4", "nul\0.mp4"])
def test_a_file_that_cannot_be_opened_is_not_there(tmp_path, monkeypatch, name):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "locked.mp4").touch()
    monkeypatch.setattr(type(tmp_path), "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "locked")))
    item = sources.Item("id", name, "x", 0, tmp_path / name)
    assert sources.identities([item]) == [["id", "x", None, None]] and sources.gone(item)
