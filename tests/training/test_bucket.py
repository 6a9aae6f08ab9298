"""Runs whose work directory is gs://: as on a disk, through interruptions, damage and refusals."""

import dataclasses
import json
import pathlib
import threading
import uuid

import jax
import numpy as np
import pytest

from motif_jax.animation import Animator
from motif_jax.config import EvalConfig, SampleConfig
from motif_jax.data.storage import run_location
from motif_jax.errors import StoreError, UserError
from motif_jax.training import checkpoint, loop, mirror, weights
from motif_jax.training.mirror import Mirror

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def url(bucket):
    yield f"gs://bucket/{uuid.uuid4().hex}"
    bucket.failing = None


def files(bucket, url) -> dict[str, bytes]:
    """Objects below a URL, by name; not those in the directories of checkpoints, which carry random names."""
    prefix = url.removeprefix("gs://bucket/") + "/"
    return {name.removeprefix(prefix): x for name, (x, _) in bucket.objects.items() if name.startswith(prefix) and "/state/" not in name}


def logged(text: str) -> list[dict]:
    """Lines of metrics.jsonl without what a clock or the memory of the machine decides."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("step", "loss", "eval", "sample", "grad"))} for line in lines]


def steps_and_values(lines: list[dict]) -> list[tuple]:
    return sorted((line["step"], key, value) for line in lines for key, value in line.items() if key != "step")


def test_a_run_in_a_bucket_is_the_run_on_a_disk(eventful, bucket, url, tmp_path, capsys):
    """In two parts, with a half-written save between them: state, metrics, pictures, marks; then read by those who read runs.

    So is its data, and its disk has another path than the bucket's.
    """
    loop.train(eventful, tmp_path)
    for path in pathlib.Path(eventful.data.path).glob("*"):
        if path.is_file():
            bucket.put(f"data-{url[-32:]}/{path.name}", path.read_bytes())
    eventful = dataclasses.replace(eventful, data=dataclasses.replace(eventful.data, path=f"gs://bucket/data-{url[-32:]}"))
    assert loop.train(dataclasses.replace(eventful, steps=3), url)
    del bucket.objects[f"{url.removeprefix('gs://bucket/')}/checkpoints/3/commit_success.txt"]
    capsys.readouterr()
    assert loop.train(eventful, url)
    said = capsys.readouterr().out
    assert f"{url}/checkpoints/3: an unfinished save, left out" in said and "continuing at step 2 of 4" in said
    assert f"done: 4 steps; {url}/report.html" in said

    there, run = files(bucket, url), run_location(url)
    here = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
    assert {n for n in there if "/" not in n or n.startswith("samples")} - {"lock"} >= {n for n in here if "tfevents" not in n} - {"lock"}
    assert sum("tfevents" in name for name in there) == 2 and there["DONE"] == b"4\n"
    assert there["samples/4/00.gif"] == (tmp_path / "samples/4/00.gif").read_bytes()
    assert b"data:image/gif" in there["report.html"]
    assert steps_and_values(logged(there["metrics.jsonl"].decode())) == steps_and_values(logged((tmp_path / "metrics.jsonl").read_text()))
    metas = [checkpoint.read_meta(directory / "checkpoints" / "4") for directory in (tmp_path, run)]
    assert metas[0]["checksums"] == metas[1]["checksums"]

    assert loop.train(eventful, url) and "nothing to train: 4 of 4 steps are done" in capsys.readouterr().out
    for a, b in zip(*(jax.tree.leaves(weights.load(place)["denoiser"]) for place in (str(tmp_path), url)), strict=True):
        np.testing.assert_array_equal(a, b)
    image = np.zeros((16, 16, 3), np.uint8)
    clips = [Animator.load(place)([image], ["a square"], [0]) for place in (tmp_path, f"{url}/checkpoints/4")]
    np.testing.assert_array_equal(*clips)
    continued = tmp_path / "continued"
    assert loop.train(dataclasses.replace(eventful, steps=1, init_from=url), continued)
    with pytest.raises(UserError, match=f"init_from: a run would start from itself \\({url}"):
        loop.train(dataclasses.replace(eventful, init_from=url), url)


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(eventful, bucket, url, capsys):
    config = dataclasses.replace(eventful, eval=EvalConfig(every=0), sample=SampleConfig(every=0))
    fallback = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, fallback=True))
    assert loop.train(config, url)
    prefix = url.removeprefix("gs://bucket/")
    before = {name for name in bucket.objects if name.startswith(f"{prefix}/checkpoints/4/")}
    largest = max(before, key=lambda name: len(bucket.objects[name][0]))
    bucket.objects[largest] = (bytes(len(bucket.objects[largest][0])), 0)
    (run_location(url) / "DONE").unlink()
    with pytest.raises(UserError, match=f"checkpoint {url}/checkpoints/4 cannot be restored"):
        loop.train(dataclasses.replace(config, steps=5), url)
    assert loop.train(fallback, url)
    said = capsys.readouterr().out
    assert f"moved to {url}/damaged/4" in said and "continuing at step 2 of 4" in said
    assert {name.replace("/damaged/", "/checkpoints/") for name in bucket.objects if name.startswith(f"{prefix}/damaged/4/")} == before


def test_a_bucket_that_refuses(eventful, bucket, url):
    with pytest.raises(UserError, match="cannot write to the work directory gs://nobody/run: "):
        loop.train(eventful, "gs://nobody/run")
    with pytest.raises(UserError, match="s3://bucket/run: training reads and writes file systems and gs:// alone"):
        loop.train(eventful, "s3://bucket/run")
    with pytest.raises(UserError, match=r"holds neither config\.json"):
        weights.load(url)
    bucket.failing = "/upload/"
    with pytest.raises(UserError, match=f"cannot write to the work directory {url}: .*Forbidden"):
        loop.train(eventful, url)


def test_a_slow_bucket_does_not_hold_up_a_save(bucket, url, monkeypatch):
    """Processes that come to a save wait for the first one 300 s and no longer."""
    answers = threading.Event()
    monkeypatch.setattr(mirror, "SECONDS", 0.1)
    monkeypatch.setattr(mirror, "upload", lambda *_: answers.wait(60))
    copies = Mirror(run_location(url))
    (copies.local / "metrics.jsonl").write_text("1")
    copies.copy_first()
    assert not copies._copied
    answers.set()
    copies.close()
    assert set(copies._copied) == {"metrics.jsonl"}


def test_what_cannot_be_copied_is_told_and_copied_later(bucket, url, capsys, monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS", 0)
    copies = Mirror(run_location(url))
    (copies.local / "metrics.jsonl").write_text("1")
    (copies.local / ".tmp-half").write_text("1")
    (copies.local / "samples" / ".4.tmp").mkdir(parents=True)
    (copies.local / "samples" / ".4.tmp" / "00.gif").write_text("1")
    bucket.failing = "upload"
    copies.try_to_copy()
    assert f"{url}: metrics and samples cannot be copied there now" in capsys.readouterr().out
    with pytest.raises(StoreError, match=f"{url}: the last metrics and samples cannot be copied there, and are in {copies.local}"):
        copies.close()
    with pytest.raises(KeyError):  # what ended the run is what its user has to know
        try:
            raise KeyError
        finally:
            copies.close()
    assert f"cannot be copied there, and are in {copies.local}" in capsys.readouterr().out
    bucket.failing = None
    assert files(bucket, url) == {} and (copies.local / "metrics.jsonl").read_text() == "1"
    copies = Mirror(run_location(url))
    (copies.local / "metrics.jsonl").write_text("12")
    copies.copy_sometimes()
    copies.close()
    assert files(bucket, url) == {"metrics.jsonl": b"12"} and not copies.local.exists()
    again = Mirror(run_location(url))
    again.fetch(mirror.METRICS)
    assert (again.local / "metrics.jsonl").read_text() == "12"
    generation = [x[1] for name, x in bucket.objects.items() if name.endswith("metrics.jsonl") and url[12:] in name]
    again.close()
    assert generation == [x[1] for name, x in bucket.objects.items() if name.endswith("metrics.jsonl") and url[12:] in name]


def test_a_run_on_a_disk_is_not_copied(tmp_path):
    copies = Mirror(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("1")
    copies.fetch_report()
    copies.copy_sometimes()
    copies.close()
    assert copies.local == pathlib.Path(tmp_path) and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
