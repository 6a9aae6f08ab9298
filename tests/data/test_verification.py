"""--verify and the repair after it: every kind of damage is named, and the next run of the job writes that shard alone."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from motif_jax import preparation
from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import records, shards, storage
from motif_jax.data.verification import verify
from motif_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = Config(
    data=DataConfig(frames=2, height=16, width=16),
    prepare=PrepareConfig(flow="exact", image_format="png", clips_per_shard=5, validation_share=0.2),
)


def prepare(directory) -> tuple[preparation.Summary, list[str]]:
    lines: list[str] = []
    return preparation.prepare(CONFIG, "synthetic:shapes:30", directory, log=lines.append), lines


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def flip(path, manifest):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def truncate(path, manifest):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path, manifest):
    path.write_bytes(b"")


def older(path, manifest):
    shards.write_object(manifest, shards.read_object(manifest) | {"schema": "0.9.0"})


def other_fields(path, manifest):
    """Whole, and in agreement with its manifest, but its records lack a field."""
    found = [records.decode_example(record) for record in ArrayRecordDataSource(str(path))]
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for values in found:
        values = {k: [bytes(x) if isinstance(x, memoryview) else x for x in v] for k, v in values.items() if k != "motion_mask"}
        writer.write(records.encode_example(values))
    writer.close()
    agrees = {"bytes": path.stat().st_size, "sha256": storage.sha256(path)}
    shards.write_object(manifest, shards.read_object(manifest) | agrees)


DAMAGE = [
    (flip, "sha256"),
    (truncate, "truncated"),
    (empty, "truncated (0 of"),
    (lambda path, manifest: path.unlink(), "missing"),
    (lambda path, manifest: manifest.unlink(), "without a manifest"),
    (lambda path, manifest: manifest.write_text("{"), "without a manifest"),
    (older, f"of schema version 0.9.0 (this is {shards.VERSION})"),
    (other_fields, "of another schema (record 0 differs in motion_mask)"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_is_named_and_repaired_alone(tmp_path, damage, words):
    prepare(tmp_path)
    assert verify(tmp_path) == []
    whole = files(tmp_path)
    path = sorted(tmp_path.glob("motif-train*"))[1]
    others = {p: p.stat().st_mtime_ns for p in tmp_path.glob("motif-*") if p != path}
    damage(path, tmp_path / "manifests" / f"{path.name}.json")
    assert [line for line in verify(tmp_path) if line.startswith(f"{path.name} is ") and words in line], verify(tmp_path)
    assert len(verify(tmp_path)) == 1
    with pytest.raises(UserError, match=rf"1 files are not as they should be \({path.name}\)"):
        preparation.verify(tmp_path, log=lambda line: None)
    summary, lines = prepare(tmp_path)
    assert summary.written == 1 and (path.name in "".join(lines) or words in ("missing", "without a manifest"))
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert files(tmp_path) == whole and verify(tmp_path) == []


def test_what_belongs_to_the_whole_dataset(tmp_path):
    with pytest.raises(UserError, match=r"there is no plan\.json"):
        verify(tmp_path)
    prepare(tmp_path)
    (tmp_path / "features.json").unlink()
    assert verify(tmp_path) == ["features.json is missing"]
    prepare(tmp_path)
    dataset = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(dataset | {"fingerprint": "0"}))
    assert verify(tmp_path) == ["dataset.json is not of these shards"]
    (tmp_path / "dataset.json").write_text(json.dumps(dataset | {"version": "0.9.0"}))
    with pytest.raises(UserError, match=r"is of schema version 0\.9\.0, this code reads"):
        shards.read_manifest(tmp_path)
    plan = (tmp_path / "plan.json").read_text()
    for damage in (b"{", b"null", b"[]", b"\xff", b"{}", plan.replace('"seed": 0', '"seed": 1').encode()):
        (tmp_path / "plan.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"plan\.json cannot be read"):
            verify(tmp_path)
        assert prepare(tmp_path)[0].written == 0 and (tmp_path / "plan.json").read_text() == plan
    (tmp_path / "plan.json").unlink()
    assert prepare(tmp_path)[0].written == 0 and (tmp_path / "plan.json").read_text() == plan and verify(tmp_path) == []
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"its plan\.json is lost, its shards are of another plan"):
        preparation.prepare(dataclasses.replace(CONFIG, seed=1), "synthetic:shapes:30", tmp_path, log=str)


@pytest.mark.parametrize("name", ["dataset.json", "features.json", "dataset_info.json"])
def test_damaged_metadata(tmp_path, name):
    prepare(tmp_path)
    whole = (tmp_path / name).read_text()
    damaged = [b"{", b"[]", b"{}", b"\xff", b"garbage", b"[" * 100_000]
    for damage in damaged + [json.dumps(json.loads(whole) | {"splits": {}}).encode()] * (name != "features.json"):
        (tmp_path / name).write_bytes(damage)
        assert verify(tmp_path) == [f"{name} is not of these shards"]
        if name == "dataset.json" and damage in damaged:
            with pytest.raises(UserError, match=r"dataset\.json cannot be read.*motif_jax.prepare again"):
                shards.read_manifest(tmp_path)
        assert prepare(tmp_path)[0].written == 0 and (tmp_path / name).read_text() == whole


def test_everything_is_named_at_once(tmp_path):
    """With a broken shard too, and one whose manifest is lost."""
    prepare(tmp_path)
    whole = files(tmp_path)
    shards_there = sorted(tmp_path.glob("motif-train*"))
    flip(shards_there[0], None)
    (tmp_path / "manifests" / f"{shards_there[2].name}.json").unlink()
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"name": "other"}))
    (tmp_path / "dataset.json").write_text("{")
    (tmp_path / "features.json").unlink()
    found = [line.split()[0] for line in verify(tmp_path)]
    assert found == [shards_there[0].name, shards_there[2].name, "dataset_info.json", "features.json", "dataset.json"]
    assert prepare(tmp_path)[0].written == 2 and files(tmp_path) == whole


def test_damaged_manifests(tmp_path):
    """Whatever its text has become, the shard is made again and the others are kept."""
    prepare(tmp_path)
    path = sorted(tmp_path.glob("manifests/*train*"))[1]
    values = shards.read_object(path)
    another = values | {"shard": "another"}
    for damaged in ([], values, values | {"digest": "0"}, another | {"digest": shards.digest(another)}):
        path.write_text(json.dumps(damaged))
        assert verify(tmp_path) == [f"{path.stem} is without a manifest"]
        assert prepare(tmp_path)[0].written == 1 and verify(tmp_path) == []


@pytest.mark.parametrize("name", ["plan.json", "manifests/*train*00001-of*", "dataset.json", "features.json", "dataset_info.json"])
def test_a_flipped_bit_in_a_small_file_is_found_wherever_it_is(tmp_path, name):
    prepare(tmp_path)
    (path,) = tmp_path.glob(name)
    whole = path.read_bytes()
    for at in range(0, len(whole), 9 if len(whole) < 2000 else 31):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"plan\.json cannot be read" if name == "plan.json" else rf"1 files .*\({path.stem}"):
            preparation.verify(tmp_path, log=str)
    assert prepare(tmp_path)[0].written == name.startswith("manifests") and path.read_bytes() == whole


def test_progress_is_told(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setattr(preparation, "_SECONDS_BETWEEN_LINES", 0)
    lines = []
    preparation.verify(tmp_path, log=lines.append)
    assert lines[:-1] == [f"{i} of {len(lines) - 1} shards read" for i in range(1, len(lines))] and len(lines) > 3


def test_what_cannot_be_read(tmp_path, monkeypatch):
    prepare(tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"--output={tmp_path / 'file'} cannot be read: .*Not a directory"):
        preparation.verify(tmp_path / "file")
    monkeypatch.setattr(storage, "sha256", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    bad = verify(tmp_path / "out")
    assert len(bad) == len(list((tmp_path / "out").glob("motif-*"))) and "is unreadable (Input/output error)" in bad[0]


def test_the_command(tmp_path):
    """Needs neither configuration nor source; exits with 1 and one line that names the shard."""
    prepare(tmp_path)
    command = [sys.executable, "-m", "motif_jax.prepare", "--verify", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "every record is as it was written" in done.stdout, done.stderr
    path = sorted(tmp_path.glob("motif-train*"))[0]
    flip(path, None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and path.name in done.stderr and "Traceback" not in done.stderr
