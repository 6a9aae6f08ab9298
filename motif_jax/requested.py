"""Videos that somebody asks for: of which image and sentence, into which file, and the manifest of those that are made."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from motif_jax.data.storage import write_whole
from motif_jax.errors import UserError, enumerate_first

MANIFEST = "manifest.json"  # which file is which pair and seed
LONGEST_NAME = 200  # bytes; file systems take 255, and a seed and an ending follow


@dataclass(frozen=True)
class Pair:
    """An image, what shall happen to it, and the name under which its videos are filed."""

    id: str
    image: pathlib.Path
    prompt: str
    scenario: str = ""


@dataclass(frozen=True)
class Request:
    """One video to make."""

    pair: Pair
    seed: int
    file: str


@contextlib.contextmanager
def writing(output: pathlib.Path) -> Iterator[None]:
    """Makes a UserError of what cannot be written there."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error}") from error


def make_output(output: pathlib.Path) -> None:
    """Makes the directory and tries it, for before weights are loaded. Raises UserError."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()


def check_made(output: pathlib.Path, requests: Sequence[Request]) -> None:
    """Raises UserError for a requested file that is there though the manifest gives it another image or sentence, or does not know it.

    Images are compared by the names of their files: a list may be mounted elsewhere tomorrow.
    """
    present = [r for r in requests if (output / r.file).exists()]  # before the manifest, which another task writes before its clips
    try:
        made = {v["file"]: (pathlib.Path(v["image"]).name, v["prompt"]) for v in json.loads((output / MANIFEST).read_bytes())["videos"]}
    except FileNotFoundError:
        made = {}
    except (OSError, ValueError, KeyError, TypeError):
        return  # `write_manifest` names its fault
    for r in present:
        if made.get(r.file) != (r.pair.image.name, r.pair.prompt):
            fault = "shows another image or prompt" if r.file in made else f"is not in {MANIFEST}, which says how clips were made"
            raise UserError(f"--output={output}: {r.file} there {fault}; delete it, or choose another --output")


def check_images(output: pathlib.Path, requests: Sequence[Request]) -> None:
    """Raises UserError that lists the images of videos still to be made that cannot be read, for before weights are loaded."""
    from motif_jax.data.images import MediaError, read_image  # not needed to read a list

    bad = []
    for image, name in {r.pair.image: r.pair.id for r in requests if not (output / r.file).exists()}.items():
        try:
            read_image(str(image))
        except MediaError as error:
            bad.append(f"{image} (of {name}): {error}")
    if bad:
        raise UserError(f"images that cannot be read: {enumerate_first(bad)}; mend them, or take them off the list")


def write_manifest(output: pathlib.Path, requests: Sequence[Request], settings: dict[str, Any]) -> None:
    """Which file shows what, and how all were made; earlier entries are kept. Raises UserError if those were made otherwise, OSError."""
    path, earlier = output / MANIFEST, {}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, earlier = found["settings"], {v["file"]: v for v in found["videos"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is no manifest of videos: {error!r}; restore it, or choose another --output") from error
        differ = [f"{k}: {before.get(k)!r} there, {v!r} now" for k, v in settings.items() if before.get(k) != v]
        if differ:
            raise UserError(f"{output} holds videos made otherwise ({'; '.join(differ)}); choose another --output")
    for r in requests:
        pair = {"id": r.pair.id, "image": str(r.pair.image.absolute()), "prompt": r.pair.prompt, "scenario": r.pair.scenario}
        earlier[r.file] = {"file": r.file, "seed": r.seed, **pair}
    write_json(path, {"settings": settings, "videos": list(earlier.values())})


def write_json(path: pathlib.Path, content: Any) -> None:
    """At once or not at all; other jobs write the same file."""
    write_whole(path, json.dumps(content, indent=1) + "\n")
