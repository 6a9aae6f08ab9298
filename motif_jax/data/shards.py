"""Shards: a deterministic plan, files that appear complete or not at all, and manifests to check them against.

A dataset directory holds `motif-SPLIT.array_record-IIIII-of-NNNNN`, one manifest per shard under manifests/, plan.json (what was
asked for), and, once every shard is there, TFDS's metadata and dataset.json. Reading one starts at `read_manifest`.
"""

import collections
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motif_jax.data import records, storage
from motif_jax.data.storage import Path, RemotePath, replacing, run_location, side_by_side
from motif_jax.errors import StoreError, UserError, enumerate_first

NAME = "motif"  # TFDS takes a dataset's name from its file names
SPLITS = ("train", "validation")
VERSION = "1.0.0"  # of the records: a shard of another version is made again
# One record per chunk: the chunk is what a random access reads. Frames are compressed already; zstd takes an eighth off latents, whose
# reading is then three times as slow.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclass(frozen=True)
class Shard:
    """The items of one file; `items` is whatever the job makes records of."""

    split: str
    index: int
    count: int
    items: tuple[Any, ...]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.index, self.count)


@dataclass(frozen=True)
class Skipped:
    """An item that gave no record: `kind` is the reason in two words, `reason` has the details."""

    clip_id: str
    video: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """A complete dataset: `shards` maps a split to its (file name, records, bytes) in order; splits without records are left out."""

    directory: Path
    fingerprint: str
    layout: records.Layout
    shards: dict[str, tuple[tuple[str, int, int], ...]]
    skipped: dict[str, int]
    settings: dict[str, Any]

    def count(self, split: str) -> int:
        return sum(n for _, n, _ in self.shards.get(split, ()))


def shard_name(split: str, index: int, count: int) -> str:
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def digest(value: Any) -> str:
    """sha256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plan_shards(items: Mapping[str, Sequence[Any]], per_shard: int) -> list[Shard]:
    """Items per split -> shards of at most `per_shard` items, in order; a function of its arguments alone."""
    shards = []
    for split in SPLITS:
        chunks = [items[split][i : i + per_shard] for i in range(0, len(items[split]), per_shard)]
        shards += [Shard(split, i, len(chunks), tuple(chunk)) for i, chunk in enumerate(chunks)]
    return shards


def write_file(path: Path, text: str) -> None:
    """Writes a small file so that it is there in full or not at all, also after a power cut; one that says so already is left alone."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    storage.write_whole(path, text)


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """`write_file` of a JSON object, sealed with the digest of its values."""
    write_file(path, json.dumps({**values, "digest": digest(values)}, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in a small file; None when there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def read_object(path: Path) -> dict[str, Any] | None:
    """The values that `write_object` has written; None when there are none or their seal is not theirs."""
    found = read_json(path)
    return found if isinstance(found, dict) and found.pop("digest", None) == digest(found) else None


def write_shard(directory: Path, shard: Shard, plan: str, fingerprint: str, outcomes: Iterable[bytes | Skipped]) -> dict[str, Any]:
    """Writes a shard's records in the order they come, then its manifest, which it returns.

    `plan` and `fingerprint` name what was asked of the dataset and of this shard. Until this returns, nothing under the final
    names says that the shard is done. Raises OSError when the directory cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = directory / shard.name
    skipped, count = [], 0
    with replacing(path) as temporary:
        writer = _disk(ArrayRecordWriter, str(temporary), _WRITER_OPTIONS)
        try:
            for outcome in outcomes:
                if isinstance(outcome, Skipped):
                    skipped.append(vars(outcome))
                else:
                    _disk(writer.write, outcome)
                    count += 1
        finally:
            _disk(writer.close)
        manifest = {
            "shard": shard.name,
            "schema": VERSION,
            "plan": plan,
            "fingerprint": fingerprint,
            "records": count,
            "bytes": temporary.stat().st_size,
            "sha256": storage.sha256(temporary),
            "skipped": skipped,
        }
    write_object(_manifest_path(directory, shard.name), manifest)
    return manifest


def shard_manifest(directory: Path, name: str) -> dict[str, Any] | None:
    """A shard's manifest; None when there is none or it cannot be read, which a new run mends."""
    found = read_object(_manifest_path(directory, name))
    return found if found and found.get("shard") == name else None


def shard_manifests(directory: Path, names: Sequence[str]) -> list[dict[str, Any] | None]:
    """`shard_manifest` of many: a large dataset has tens of thousands, and in an object store each is a request."""
    return side_by_side(lambda name: shard_manifest(directory, name), names)


def plans(directory: Path) -> set[str]:
    """The fingerprints of the plans that the shards which are there were made by."""
    names = [path.name.removesuffix(".json") for path in directory.glob(f"manifests/{NAME}-*.json")]
    return {manifest["plan"] for manifest in shard_manifests(directory, names) if manifest}


def finish(directory: Path, shards: Sequence[Shard], plan: str, layout: records.Layout, settings: dict[str, Any]) -> int:
    """Writes TFDS's metadata and dataset.json if every shard is there; returns how many are missing.

    Any task may call this, also several at once: they write the same bytes. Raises UserError when no training clip is left.
    """
    manifests = shard_manifests(directory, [s.name for s in shards])
    there = {path.name for path in directory.glob(f"{NAME}-*")}
    missing = sum(m is None or m["plan"] != plan or m["schema"] != VERSION or m["shard"] not in there for m in manifests)
    if missing:
        return missing
    if not any(m["records"] for s, m in zip(shards, manifests, strict=True) if s.split == "train"):
        skipped = [s for m in manifests for s in m["skipped"]]
        reasons = ", ".join(f"{kind}: {n}" for kind, n in sorted(collections.Counter(s["kind"] for s in skipped).items()))
        first = f"{skipped[0]['video']}: {skipped[0]['reason']}"
        looked = " (paths in a list are relative to its file)" if any(s["kind"] == "missing file" for s in skipped) else ""
        raise UserError(f"no usable training clip ({reasons}); the first: {first}{looked}. Delete {directory} before it takes another list")
    for name, text in metadata(manifests, plan, layout, settings).items():
        write_file(directory / name, text)
    return 0


def metadata(manifests: Sequence[Mapping[str, Any]], plan: str, layout: records.Layout, settings: dict[str, Any]) -> dict[str, str]:
    """The files of a finished dataset besides its shards, by name: TFDS's, then dataset.json, which vouches for all."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for manifest in manifests:
        split = manifest["shard"].removeprefix(f"{NAME}-").partition(".")[0]
        splits.setdefault(split, []).append({k: manifest[k] for k in ("shard", "records", "bytes", "sha256")})
    dataset = {
        "version": VERSION,
        "fingerprint": digest([layout.to_dict(), [m["sha256"] for m in manifests]]),
        "plan": plan,
        "layout": layout.to_dict(),
        "settings": settings,
        "skipped": dict(collections.Counter(s["kind"] for m in manifests for s in m["skipped"])),
        "splits": splits,
    }
    return _tfds_metadata(layout, splits) | {"dataset.json": json.dumps(dataset, indent=1, sort_keys=True) + "\n"}


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a finished dataset on a disk or in gs://; every file in it is there with the length it had when it was written.

    Raises UserError that names what is missing or damaged, with the remedy; StoreError when the store does not answer.
    """
    if not str(directory):
        raise UserError("data.path is not set: give the output of motif_jax.prepare, --config.data.path=DIR")
    directory = run_location(directory)
    if isinstance(directory, RemotePath) and "#" in directory.path:
        raise UserError(
            f"data.path={directory}: ArrayRecord takes what follows a # for an object's generation; copy the dataset to another name"
        )
    if directory.is_file():
        raise UserError(f"data.path={directory}: is a file; give the directory that motif_jax.prepare wrote (its --output)")
    again = "run the same motif_jax.prepare again, which rewrites what is missing or damaged and nothing else"
    try:
        dataset = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
        return _opened(directory, dataset, again)
    except FileNotFoundError as error:
        if (directory / "plan.json").exists():
            done = len([*directory.glob("manifests/*.json")])
            raise UserError(f"dataset {directory} is not finished ({done} shards are there); {again}") from error
        raise UserError(
            f"no dataset in {str(directory)!r} (data.path): there is no dataset.json; make one with motif_jax.prepare"
        ) from error
    except (UserError, StoreError):
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"dataset {directory}: dataset.json cannot be read ({error!r}); {again}") from error


def _opened(directory: Path, dataset: dict[str, Any], again: str) -> Manifest:
    if dataset["version"] != VERSION:
        raise UserError(f"dataset {directory} is of schema version {dataset['version']}, this code reads {VERSION}; {again}")
    bad, there = [], storage.sizes(directory)
    for shard in (s for split in dataset["splits"].values() for s in split):
        if fault := damaged_length(there.get(shard["shard"]), shard["bytes"]):
            bad.append(f"{shard['shard']} is {fault}")
    if bad:
        raise UserError(f"dataset {directory}: {enumerate_first(bad, 5)}; {again}")
    shards = {
        split: tuple((s["shard"], s["records"], s["bytes"]) for s in found if s["records"]) for split, found in dataset["splits"].items()
    }
    return Manifest(
        directory,
        dataset["fingerprint"],
        records.Layout.from_dict(dataset["layout"]),
        {split: found for split, found in shards.items() if found},
        dataset["skipped"],
        dataset["settings"],
    )


def _tfds_metadata(layout: records.Layout, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """features.json and dataset_info.json, which make the directory readable by `tfds.builder_from_directory`."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(name=NAME, version=tfds.core.Version(VERSION), data_dir="", module_name="motif_jax")
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=records.tfds_features(layout),
        description="Video clips with captions and optical flow (pixels at the clip's size, from each frame to the next).",
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(data_dir=pathlib.Path(), dataset_name=NAME, filetype_suffix="array_record")
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[s["records"] for s in found],
                    num_bytes=sum(s["bytes"] for s in found),
                    filename_template=template.replace(split=split),
                )
                for split, found in splits.items()
                if any(s["records"] for s in found)  # as_data_source reads every split, and cannot read one without records
            ]
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        info.write_to_directory(scratch)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(pathlib.Path(scratch).iterdir())}


def _manifest_path(directory: Path, name: str) -> Path:
    return directory / "manifests" / f"{name}.json"


def _disk(call: Callable[..., Any], *arguments: Any) -> Any:
    """ArrayRecord reports a full or missing disk as RuntimeError, which could also be a fault of the records' maker."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        raise OSError(f"writing a shard failed: {error}") from error


def damaged_length(found: int | None, expected: int) -> str:
    """What is wrong with a file of so many bytes (None: there is none); "" when nothing is."""
    if found is None:
        return "missing"
    return f"{'truncated' if found < expected else 'too long'} ({found} of {expected} bytes)" if found != expected else ""
