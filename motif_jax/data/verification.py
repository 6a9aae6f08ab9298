"""Finished shards against their manifests: a directory in; what is missing, damaged or of another version, in words, out."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from motif_jax.data import records, storage
from motif_jax.data.shards import VERSION, Shard, damaged_length, metadata, read_json, read_object, shard_manifest, shard_name
from motif_jax.data.storage import Path
from motif_jax.errors import UserError

FROM_SHARDS = ("splits", "fingerprint", "skipped")  # what the files of the whole dataset say of its shards


def check_shard(directory: Path, shard: Shard, layout: records.Layout) -> str:
    """ "" when the shard is done and every byte of it is right, else what is wrong with it."""
    manifest = shard_manifest(directory, shard.name)
    return _fault(directory / shard.name, manifest, layout, every_record=False) if manifest else "missing"


def verify(directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Reads every record of every shard of a finished dataset; "NAME is ..." for each file that is not as it should be.

    `progress` is told after each shard how many of how many are done. Raises UserError when the directory holds no dataset,
    OSError when it cannot be read at all.
    """
    plan = read_object(directory / "plan.json")
    if plan is None and not (directory / "plan.json").exists():
        raise UserError(f"no dataset in {str(directory)!r}: there is no plan.json; make one with motif_jax.prepare")
    try:
        layout = records.Layout.from_dict(plan["layout"])
        names = [shard_name(split, i, n) for split, n in plan["shards"].items() for i in range(n)]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / 'plan.json'} cannot be read; run motif_jax.prepare again, which writes it anew") from error
    bad, manifests = [], []
    for done, name in enumerate(names, 1):
        manifest = shard_manifest(directory, name)
        if manifest is None:
            fault = "without a manifest" if (directory / name).exists() else "missing"
        elif manifest["plan"] != plan["fingerprint"] and manifest["schema"] == VERSION:
            fault = "of another plan"
        else:
            manifests.append(manifest)
            try:
                fault = _fault(directory / name, manifest, layout, every_record=True)
            except OSError as error:
                fault = f"unreadable ({error.strerror or error})"
        if fault:
            bad.append(f"{name} is {fault}")
        progress(done, len(names))
    unknown = FROM_SHARDS if bad else ()

    def known(value: Any) -> Any:
        return {k: v for k, v in value.items() if k not in unknown} if isinstance(value, dict) else value

    for name, text in metadata(manifests, plan["fingerprint"], layout, plan["settings"]).items():
        if known(read_json(directory / name)) != known(json.loads(text)):
            bad.append(f"{name} is {'not of these shards' if (directory / name).exists() else 'missing'}")
    return bad


def _fault(path: Path, manifest: Mapping[str, Any], layout: records.Layout, every_record: bool) -> str:
    """What is wrong with a shard: its schema, its bytes, or what its records (every one, or the first) hold."""
    if manifest["schema"] != VERSION:
        return f"of schema version {manifest['schema']} (this is {VERSION})"
    try:
        if fault := damaged_length(storage.size(path), manifest["bytes"]):
            return fault
    except FileNotFoundError:
        return "missing"
    with storage.local_copy(path) as file:
        if storage.sha256(file) != manifest["sha256"]:
            return "damaged (its sha256 is not that of its manifest)"
        return _unreadable(file, manifest["records"], layout, every_record)


def _unreadable(file: pathlib.Path, count: int, layout: records.Layout, every_record: bool) -> str:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        if reader.num_records() != count:
            return f"damaged ({reader.num_records()} records, its manifest says {count})"
        for i in range(count if every_record else min(count, 1)):
            try:
                record = reader.read([i])[0]
                found = set(records.decode_example(record))
                if found != set(layout.names()):
                    return f"of another schema (record {i} differs in {', '.join(sorted(found ^ set(layout.names())))})"
                if every_record:
                    records.decode_clip(layout, record)
            except (ValueError, RuntimeError) as error:
                return f"damaged (record {i}: {error})"
    finally:
        reader.close()
    return ""
