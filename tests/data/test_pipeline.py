"""Batches: every record as often as every other, the same for any number of hosts, workers and interruptions."""

import copy
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from motif_jax import preparation
from motif_jax.commands import memory_errors_reported
from motif_jax.config import Config, DataConfig, PrepareConfig, TextConfig
from motif_jax.data import pipeline, records
from motif_jax.data.tokens import make_tokenizer
from motif_jax.errors import UserError

COUNT, VALIDATION = 41, 5  # 41 is prime: no batch size divides the epoch
CONFIG = Config(
    data=DataConfig(frames=4, height=16, width=24),
    prepare=PrepareConfig(flow="exact", flow_stride=8, image_format="png", clips_per_shard=9, validation_share=0.12),
)
TOKENIZER = make_tokenizer(TextConfig(kind="words", vocab_size=999, context_length=8, width=8))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    path = tmp_path_factory.mktemp("data")
    preparation.prepare(CONFIG, f"synthetic:shapes:{COUNT + VALIDATION}", path, log=lambda line: None)
    return dataclasses.replace(CONFIG.data, path=str(path))


@pytest.fixture(scope="module")
def dataset(data) -> pipeline.Dataset:
    return pipeline.open_dataset(data)


def batches(dataset, count, batch_size=4, seed=0, start=0, rows=None) -> list:
    iterator = pipeline.make_iterator(dataset, batch_size, seed, start, TOKENIZER, rows)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def names(dataset, found) -> np.ndarray:
    """Which record each element of the batches is, [batches, elements]."""
    known = {dataset[i].frames.tobytes(): i for i in range(len(dataset))}
    return np.array([[known[frames.tobytes()] for frames in batch["frames"]] for batch in found])


def assert_equal(a: list, b: list) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert set(x) == set(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_the_world_gave_what_the_tests_assume(dataset, data):
    assert len(dataset) == COUNT and len(pipeline.open_dataset(data, "validation")) == VALIDATION


def test_a_batch(dataset):
    (batch,) = batches(dataset, 1)
    shapes = {k: (v.dtype, v.shape) for k, v in batch.items()}
    assert shapes == {
        "frames": (np.uint8, (4, 4, 16, 24, 3)),
        "tokens": (np.int32, (4, 8)),
        "flow": (np.float16, (4, 4, 2, 3, 2)),
        "fps": (np.float32, (4,)),
        "motion_mask": (np.uint8, (4, 4, 2, 3)),
    }
    for i, name in enumerate(names(dataset, [batch])[0]):
        example = dataset[int(name)]
        np.testing.assert_array_equal(batch["tokens"][i], TOKENIZER([example.caption])[0])
        np.testing.assert_array_equal(batch["flow"][i], example.flow)
        np.testing.assert_array_equal(batch["motion_mask"][i], example.motion_mask)
        assert batch["fps"][i] == example.fps


def test_frames_per_second_are_those_shown(dataset):
    """The source's rate over the stride, in batches and in examples."""
    clip = records.decode_clip(dataset.layout, dataset.source[0])
    record = records.encode_clip(dataset.layout, clip | {"fps": 30.0, "frame_stride": 4})
    assert pipeline.Collate(dataset.layout, TOKENIZER)([record], 1)["fps"].tolist() == [7.5]
    other = copy.copy(dataset)
    other.source = [record]
    assert other[0].fps == 7.5


def test_every_epoch_is_another_permutation(dataset):
    order = names(dataset, batches(dataset, 41)).reshape(4, COUNT)  # 41 batches of 4: four epochs
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 4
    assert not (names(dataset, batches(dataset, 10, seed=1)) == order.reshape(-1, 4)[:10]).all()


def test_batches_of_one_have_the_same_order(dataset):
    one, four = batches(dataset, 8, batch_size=1), batches(dataset, 2)
    assert names(dataset, one).ravel().tolist() == names(dataset, four).ravel().tolist()


def test_resuming_gives_the_same_batches(dataset):
    straight = batches(dataset, 25)
    for step in (1, 10, 24):  # the epoch ends in batch 10
        assert_equal(batches(dataset, 25 - step, start=step), straight[step:])


@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((0,), (1,), (2,), (3,))], ids=str)
def test_processes_share_the_batches_of_one(dataset, shares):
    """Whatever rows a mesh gives to a process: put back in their places they are the batch of one process."""
    together = batches(dataset, 25)
    merged = [{k: np.empty_like(v) for k, v in batch.items()} for batch in together]
    elements = []
    for rows in shares:
        part = batches(dataset, 25, rows=rows)
        assert len(part[0]["fps"]) == len(rows)
        elements += names(dataset, part[:10]).reshape(-1).tolist()  # less than one epoch
        for into, batch in zip(merged, part, strict=True):
            for key, value in batch.items():
                into[key][list(rows)] = value
    assert_equal(merged, together)
    assert len(set(elements)) == 40


def test_worker_processes_change_nothing(dataset, data):
    workers = pipeline.open_dataset(dataclasses.replace(data, workers=1))
    assert_equal(batches(workers, 6, start=9), batches(dataset, 6, start=9))


def test_a_dataset_smaller_than_a_batch(dataset):
    (batch,) = batches(dataset, 1, batch_size=100)
    counts = np.bincount(names(dataset, [batch])[0], minlength=COUNT)
    assert counts.sum() == 100 and counts.min() == 2 and counts.max() == 3


# Validation and examples


def test_validation_is_always_the_same(data):
    held_out = pipeline.open_dataset(data, "validation")
    first = pipeline.validation_batches(data, 2, 4, TOKENIZER)
    assert len(first) == 2  # whole batches only
    np.testing.assert_array_equal(names(held_out, first), [[0, 1], [2, 3]])
    assert_equal(list(first), list(pipeline.validation_batches(data, 2, 2, TOKENIZER)))
    parts = [pipeline.validation_batches(data, 2, 4, TOKENIZER, [row]) for row in range(2)]
    np.testing.assert_array_equal([names(held_out, p)[:, 0] for p in parts], [[0, 2], [1, 3]])


def test_a_small_validation_split_fills_one_batch(data):
    held_out = pipeline.open_dataset(data, "validation")
    found = pipeline.validation_batches(data, 8, 4, TOKENIZER)
    np.testing.assert_array_equal(names(held_out, found), [[0, 1, 2, 3, 4, 0, 1, 2]])
    assert found.distinct == 5 and pipeline.validation_batches(data, 2, 4, TOKENIZER).distinct == 4


def test_no_validation_split(tmp_path):
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, validation_share=0.0))
    preparation.prepare(config, "synthetic:shapes:3", tmp_path, log=lambda line: None)
    data = dataclasses.replace(config.data, path=str(tmp_path))
    assert not pipeline.validation_batches(data, 2, 4, TOKENIZER)
    assert [e.clip_id for e in pipeline.examples(data, 9)] == [f"shapes-{i:07d}" for i in range(3)]
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        pipeline.open_dataset(data, "validation")


def test_examples_are_held_out(data):
    found = pipeline.examples(data, 2)
    held_out = pipeline.open_dataset(data, "validation")
    assert [e.clip_id for e in found] == [held_out[0].clip_id, held_out[1].clip_id]
    assert found[0].fps == 8.0 and found[0].frames.shape == (4, 16, 24, 3) and "the" in found[0].caption


# Several datasets


def test_several_datasets_are_one(data, dataset, tmp_path):
    """An epoch shows every clip of both once; what is held out of either is held out; order and bytes make the fingerprint."""
    more = dataclasses.replace(CONFIG, seed=1, prepare=dataclasses.replace(CONFIG.prepare, image_format="jpeg", clips_per_shard=4))
    preparation.prepare(more, "synthetic:quickstart:9", tmp_path, log=lambda line: None)
    second = pipeline.open_dataset(dataclasses.replace(data, path=str(tmp_path)))
    both = pipeline.open_dataset(dataclasses.replace(data, path=f"{data.path}, {tmp_path}"))
    assert len(both) == len(dataset) + len(second) and both[0].clip_id == dataset[0].clip_id
    assert both[len(dataset)].clip_id == second[0].clip_id != dataset[0].clip_id
    shown = names(both, batches(both, len(both), batch_size=1)).ravel()
    assert sorted(shown) == list(range(len(both)))
    held_out = [e.clip_id for e in pipeline.examples(both.data, 99)]
    assert held_out == [e.clip_id for part in (data, second.data) for e in pipeline.examples(part, 99)]
    other_order = pipeline.open_dataset(dataclasses.replace(data, path=f"{tmp_path},{data.path}"))
    assert len({d.fingerprint for d in (both, other_order, dataset, second)}) == 4


def test_a_split_that_only_one_dataset_has(data, tmp_path):
    whole = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, validation_share=0.0))
    preparation.prepare(whole, "synthetic:shapes:3", tmp_path / "a,b", log=lambda line: None)
    alone = dataclasses.replace(data, path=str(tmp_path / "a,b"))
    assert len(pipeline.open_dataset(alone)) == 3  # a directory's name may have a comma where it is the only one
    (tmp_path / "a,b").rename(tmp_path / "ab")
    both = dataclasses.replace(data, path=f"{tmp_path / 'ab'},{data.path}")
    assert len(pipeline.open_dataset(both)) == 3 + COUNT and len(pipeline.open_dataset(both, "validation")) == VALIDATION


def test_datasets_with_other_fields_are_refused(data, tmp_path):
    finer = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, flow_stride=4))
    preparation.prepare(finer, "synthetic:shapes:3", tmp_path, log=lambda line: None)
    fault = rf"{tmp_path} hold frames, flow \(4, 4, 6, 2\), .*, those of {data.path} frames, flow \(4, 2, 3, 2\), .*; prepare both"
    with pytest.raises(UserError, match=fault):
        pipeline.open_dataset(dataclasses.replace(data, path=f"{data.path},{tmp_path}"))
    with pytest.raises(UserError, match="no dataset in '/nowhere'"):
        pipeline.open_dataset(dataclasses.replace(data, path=f"{data.path},/nowhere"))


# Refusals


@pytest.mark.parametrize("side", ["frames", "height", "width"])
def test_another_shape_is_refused(data, side):
    with pytest.raises(UserError, match=rf"clips of 4 frames of 16x24.*data\.{side}=32"):
        pipeline.open_dataset(dataclasses.replace(data, **{side: 32}))


def test_no_dataset(tmp_path):
    for path in ("", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=r"motif_jax\.prepare"):
            pipeline.open_dataset(DataConfig(path=path))


def test_records_are_counted_when_opening(tmp_path):
    """A file that was never closed reads as empty without an error; here the manifest is made to promise one more."""
    preparation.prepare(CONFIG, "synthetic:shapes:5", tmp_path, log=lambda line: None)
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    dataset["splits"]["train"][0]["records"] += 1
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=r"split train, shard motif-train\S* cannot be read \(\d records of \d\): run the same"):
        pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=str(tmp_path)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_workers_at_work(data, number):
    """As a terminal or a job scheduler sends it: on its way to a save the loop needs more batches than are there. A killed one is named."""
    dataset = pipeline.open_dataset(dataclasses.replace(data, workers=1))
    iterator = pipeline.make_iterator(dataset, 4, 0, 0, TOKENIZER)
    try:
        next(iterator)
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, number)
        for _ in range(40):
            next(iterator)
        for worker in workers:  # as when memory is short
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"reads data was ended from outside \(exit code -9\).*data\.workers"), memory_errors_reported():
            for _ in range(40):
                next(iterator)
    finally:
        iterator.close()


_KILLED = """
import sys
from motif_jax.config import DataConfig, TextConfig
from motif_jax.data import pipeline
from motif_jax.data.tokens import make_tokenizer

data = DataConfig(path=sys.argv[1], frames=4, height=16, width=24, workers=2)
tokenizer = make_tokenizer(TextConfig(kind="words", vocab_size=999, context_length=8, width=8))
iterator = pipeline.make_iterator(pipeline.open_dataset(data), 4, 0, 0, tokenizer)
next(iterator)
print("a batch", flush=True)
sys.stdin.read()
"""


def test_workers_end_with_a_process_that_is_killed(data):
    process = subprocess.Popen([sys.executable, "-c", _KILLED, data.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "a batch\n"
    finally:
        process.kill()
    process.communicate(timeout=60)  # the workers have its standard output, too, which ends with the last of them


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named(data, tmp_path, workers):
    """In its middle, which shows when a record is read, also by another process; or at its end, which shows when it is opened."""
    shutil.copytree(data.path, path := tmp_path / "data")
    data = dataclasses.replace(data, path=str(path), workers=workers)
    names = sorted(p.name for p in path.glob("motif-train*"))
    shard = path / names[2]
    content = bytearray(shard.read_bytes())
    content[1000:2000] = bytes(1000)
    shard.write_bytes(content)
    fault = rf"^dataset {path}: split train, shard {names[2]} cannot be read \(.*\): run the same motif_jax\.prepare command again"
    with pytest.raises(UserError, match=fault) as error:
        batches(pipeline.open_dataset(data), 11)
    assert "\n" not in str(error.value)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=fault):
        pipeline.open_dataset(data)


def test_a_record_that_cannot_be_read_is_in_the_shard_that_is_named(data):
    """Also the first and the last record of a shard."""

    class Damaged:
        def __getitem__(self, index):
            raise RuntimeError("damaged")

    dataset = pipeline.open_dataset(data)
    dataset.source._source = Damaged()
    shards = [name for name, count, _ in dataset.manifests[0].shards["train"] for _ in range(count)]
    assert len(shards) == COUNT and len(set(shards)) > 3
    for index, name in enumerate(shards):
        with pytest.raises(UserError, match=f"shard {name} cannot be read"):
            dataset.source[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_shards_than_open_files_are_allowed(tmp_path, monkeypatch, workers):
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, clips_per_shard=1))
    preparation.prepare(config, "synthetic:shapes:60", tmp_path, log=lambda line: None)
    data = dataclasses.replace(CONFIG.data, path=str(tmp_path), workers=workers)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 24, before[1]))
    try:
        assert len(batches(pipeline.open_dataset(data), 12)) == 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 200))
    with pytest.raises(UserError, match=r"has 60 shards.*may open 200 files.*ulimit -Hn.* to 572.*prepare\.clips_per_shard"):
        pipeline.open_dataset(data)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, resource.RLIM_INFINITY))  # as on macOS, where this means little
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: (_ for _ in ()).throw(ValueError("Invalid argument")))
    with pytest.raises(UserError, match=r"has 60 shards.*may open 100 files"):
        pipeline.open_dataset(data)
