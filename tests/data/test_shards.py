"""Shards: complete or absent, every kind of damage found and named, metadata only when all is there."""

import json

import numpy as np
import pytest

from motif_jax.data import records, shards
from motif_jax.data.shards import Shard, Skipped, finish, plan_shards, read_manifest, write_shard
from motif_jax.data.verification import check_shard
from motif_jax.errors import UserError

LAYOUT = records.Layout(frames=2, height=8, width=8, flow_stride=8, image_format="png")


def record(i: int) -> bytes:
    frames = np.random.default_rng(i).integers(0, 256, (2, 8, 8, 3), np.uint8)
    text = {"clip_id": f"c{i}", "video": f"v{i}", "caption": f"number {i}"}
    return records.encode_clip(
        LAYOUT, text | {"fps": 8.0, "frame_stride": 1, "first_frame": i, "frames": frames, "flow": np.zeros((2, 1, 1, 2))}
    )


def outcomes(shard: Shard) -> list:
    """Item i gives record i; a negative one cannot be used."""
    return [record(i) if i >= 0 else Skipped(f"c{i}", f"v{i}", "too short", "too short: 1 frame") for i in shard.items]


def write_all(directory, items) -> list[Shard]:
    (directory / "manifests").mkdir(exist_ok=True)
    plan = plan_shards(items, 3)
    for shard in plan:
        write_shard(directory, shard, "plan", "print", outcomes(shard))
    return plan


@pytest.fixture
def dataset(tmp_path):
    plan = write_all(tmp_path, {"train": [0, 1, -2, 3, 4, 5, 6], "validation": [7]})
    assert finish(tmp_path, plan, "plan", LAYOUT, {"seed": 0}) == 0
    return tmp_path, plan


def test_plan_holds_every_item_once_and_in_order():
    plan = plan_shards({"train": list(range(7)), "validation": [7, 8]}, 3)
    assert [(s.split, s.index, s.count, s.items) for s in plan] == [
        ("train", 0, 3, (0, 1, 2)),
        ("train", 1, 3, (3, 4, 5)),
        ("train", 2, 3, (6,)),
        ("validation", 0, 1, (7, 8)),
    ]
    assert plan[1].name == "motif-train.array_record-00001-of-00003"
    assert plan_shards({"train": [], "validation": []}, 3) == []


def test_a_record_is_a_chunk_of_its_own_and_not_compressed(dataset):
    """As random access reads fastest: latents in zstd, an eighth smaller, were read at a third of the rate (benchmarks/shards.py)."""
    from array_record.python.array_record_module import ArrayRecordReader

    path, plan = dataset
    assert {"group_size:1", "uncompressed"} <= set(ArrayRecordReader(str(path / plan[0].name)).writer_options_string().split(","))


def test_a_file_is_no_dataset(tmp_path):
    (tmp_path / "list.csv").write_text("video,caption\n")
    with pytest.raises(UserError, match=r"data\.path=.*list\.csv: is a file; give the directory that motif_jax\.prepare wrote"):
        read_manifest(tmp_path / "list.csv")


def test_a_written_shard_holds_its_records_and_passes(dataset):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    directory, plan = dataset
    assert [check_shard(directory, s, LAYOUT) for s in plan] == [""] * 4
    assert list(ArrayRecordDataSource(str(directory / plan[0].name))) == [record(0), record(1)]
    manifest = shards.shard_manifest(directory, plan[0].name)
    assert manifest["records"] == 2 and manifest["skipped"][0]["video"] == "v-2"
    assert not list(directory.rglob(".tmp-*"))


@pytest.mark.parametrize("where", [0, 100, 0.3, 0.6, -1])
def test_a_flipped_byte_is_found(dataset, where):
    directory, plan = dataset
    path = directory / plan[1].name
    data = bytearray(path.read_bytes())
    data[int(where * len(data)) if isinstance(where, float) else where] ^= 1
    path.write_bytes(data)
    assert [bool(check_shard(directory, s, LAYOUT)) for s in plan] == [False, True, False, False]
    assert "sha256" in check_shard(directory, plan[1], LAYOUT)


def test_other_damage_is_found(dataset):
    directory, plan = dataset
    path = directory / plan[0].name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"truncated ({len(whole) - 1} of {len(whole)} bytes)" in check_shard(directory, plan[0], LAYOUT)
    path.write_bytes(whole + b"x")
    assert "too long" in check_shard(directory, plan[0], LAYOUT)
    path.write_bytes(whole)
    assert check_shard(directory, plan[0], LAYOUT) == ""
    path.unlink()
    assert check_shard(directory, plan[0], LAYOUT) == "missing"
    (directory / "manifests" / f"{plan[1].name}.json").write_text("{")
    assert check_shard(directory, plan[1], LAYOUT) == "missing"


def test_a_failure_leaves_nothing_behind(tmp_path):
    (tmp_path / "manifests").mkdir()
    shard = plan_shards({"train": [0, 1], "validation": []}, 3)[0]

    def fail():
        yield record(0)
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, shard, "plan", "print", fail())
    assert [p.name for p in tmp_path.rglob("*")] == ["manifests"]


def test_writing_again_gives_the_same_bytes(dataset, tmp_path_factory):
    directory, _ = dataset
    other = tmp_path_factory.mktemp("other")
    plan = write_all(other, {"train": [0, 1, -2, 3, 4, 5, 6], "validation": [7]})
    assert finish(other, plan, "plan", LAYOUT, {"seed": 0}) == 0
    files = sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert len(files) == 4 + 4 + 3
    assert [(directory / f).read_bytes() for f in files] == [(other / f).read_bytes() for f in files]


def test_manifest_of_a_finished_dataset(dataset):
    directory, _ = dataset
    manifest = read_manifest(directory)
    assert {split: manifest.count(split) for split in ("train", "validation", "test")} == {"train": 6, "validation": 1, "test": 0}
    assert manifest.layout == LAYOUT and manifest.skipped == {"too short": 1}
    assert read_manifest(f"file://{directory}") == manifest  # as motif_jax.prepare takes its --output


def test_fingerprint_follows_the_content(dataset, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    plan = write_all(other, {"train": [0, 1, -2, 3, 4, 5, 8], "validation": [7]})
    finish(other, plan, "plan", LAYOUT, {"seed": 0})
    assert read_manifest(other).fingerprint != read_manifest(dataset[0]).fingerprint


def test_unfinished_and_foreign_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json; make one"):
        read_manifest(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    plan = write_all(tmp_path, {"train": [0, 1, 2, 3], "validation": [4]})
    (tmp_path / plan[1].name).unlink()
    assert finish(tmp_path, plan, "plan", LAYOUT, {}) == 1
    manifest = tmp_path / "manifests" / f"{plan[0].name}.json"
    shards.write_object(manifest, shards.read_object(manifest) | {"schema": "0.9.0"})
    assert finish(tmp_path, plan, "plan", LAYOUT, {}) == 2 and finish(tmp_path, plan, "another", LAYOUT, {}) == len(plan)
    with pytest.raises(UserError, match="not finished"):
        read_manifest(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)


def test_opening_names_a_truncated_shard(dataset):
    directory, plan = dataset
    path = directory / plan[2].name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{plan[2].name} is truncated .*motif_jax.prepare again"):
        read_manifest(directory)


def test_nothing_usable_is_an_error(tmp_path):
    plan = write_all(tmp_path, {"train": [-1, -2], "validation": [4]})
    with pytest.raises(UserError, match=r"no usable training clip \(too short: 2\); the first: v-1: too short: 1 frame"):
        finish(tmp_path, plan, "plan", LAYOUT, {})
    assert not (tmp_path / "dataset.json").exists()


def test_shards_and_splits_without_records(tmp_path):
    """Chance may put only bad videos into a shard or into validation: both this reader and TFDS look past them."""
    import tensorflow_datasets as tfds

    plan = write_all(tmp_path, {"train": [-1, -2, -3, 0, 1], "validation": [-4]})
    assert finish(tmp_path, plan, "plan", LAYOUT, {}) == 0
    manifest = read_manifest(tmp_path)
    assert list(manifest.shards) == ["train"] and [n for _, n, _ in manifest.shards["train"]] == [2]
    source = tfds.builder_from_directory(str(tmp_path)).as_data_source()
    assert list(source) == ["train"] and [x["caption"] for x in source["train"]] == [b"number 0", b"number 1"]


def test_digest_ignores_the_order_of_keys():
    assert shards.digest({"a": 1, "b": [1, 2]}) == shards.digest(json.loads('{"b": [1, 2], "a": 1}'))
    assert shards.digest({"a": 1}) != shards.digest({"a": 2})
