"""Lists of image-text pairs, and which file of a folder shows which pair.

In: TI2V-Bench as it lies on Hugging Face (images and prompt.csv), a jsonl file, or anybody's csv. Out: `Pair`s with an id each.
"""

import csv
import io
import json
import os
import pathlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from motif_jax.data.storage import here
from motif_jax.errors import UserError, enumerate_first
from motif_jax.requested import LONGEST_NAME, MANIFEST, Pair

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".mkv", ".avi")
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and lone surrogates, which JSON can spell


def plain_name(text: str) -> str:
    """A name as names are compared: without blanks around it, composed (NFC). Some systems write an accent as a character of its own."""
    return unicodedata.normalize("NFC", text).strip()


def pair_id(image: str, prompt: str) -> str:
    """The benchmark's own file names: stem of the image, then the sentence in lower case without punctuation."""
    words = re.sub(r"[^\w\s]", "", prompt.lower()).split()
    return _short("_".join([image, *words]))


def vbench_names(pairs: Sequence[Pair]) -> list[str]:
    """What VBench wants in front of "-<index>.mp4": the sentence, and where several images share it, the image too."""
    shared = Counter(p.prompt for p in pairs)
    return [_short((p.prompt + (f" ({p.image.stem})" if shared[p.prompt] > 1 else "")).replace("/", " ")) for p in pairs]


def _short(name: str) -> str:
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}_{zlib.crc32(name.encode()):08x}"


def read_pairs(path: str | pathlib.Path, flag: str = "list", blank: bool = False) -> list[Pair]:
    """The pairs of a .csv file, of another as jsonl, or of a folder that holds one (`prompt.csv` before others); `flag` named it.

    jsonl: keys `image` (or `image_file`, `file_name`), `prompt`, and perhaps `id` and `scenario`. csv: the column that names image files
    and the one called prompt, text or caption, without such a header the one with most text. Images are looked for beside the list and in
    images/ and TI2V-Bench/ there, with or without their ending. blank: an empty sentence will do. Raises
    UserError listing every bad line.
    """
    file = here(str(path))
    if file.is_dir():
        lists = sorted(p for p in file.iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
        named = [p for p in lists if p.name in ("prompt.csv", "prompts.csv")] or lists
        if len(named) != 1:
            found = ", ".join(p.name for p in lists) or "none"
            raise UserError(f"--{flag}={path}: a folder needs a prompt.csv, or one .csv or .jsonl file; found {found}")
        file = named[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}={path}: cannot be read: {error}") from error
    rows, bad = _csv_rows(text, file.parent) if file.suffix.lower() == ".csv" else _jsonl_rows(text)
    pairs = []
    for number, row in rows:
        image, prompt = _find_image(file.parent, row["image"]), " ".join(row["prompt"].split())
        if odd := [name for name, value in (row | {"prompt": prompt}).items() if NO_TEXT.search(value)]:
            bad.append(f"line {number}: {odd[0]} {row[odd[0]]!r} holds control characters")
            continue
        identity = row["id"] or pair_id(pathlib.Path(row["image"]).stem, prompt)
        if image is None:
            bad.append(f"line {number}: no image {row['image']!r}" + "; copy it to this machine" * ("://" in row["image"]))
        elif not (prompt or blank):
            bad.append(f"line {number}: no prompt")
        elif "/" in identity or identity.startswith(".") or len(identity.encode()) > LONGEST_NAME:
            bad.append(f"line {number}: id {identity!r} is no file name{' that is shown' * identity.startswith('.')}")
        else:
            pairs.append(Pair(identity, image, prompt, row["scenario"]))
    bad += [f"id {i!r} occurs {n} times" for i, n in Counter(plain_name(p.id) for p in pairs).items() if n > 1]
    if bad or not pairs:
        raise UserError(f"--{flag}={path}: {enumerate_first(bad) or 'holds no pair'}")
    return pairs


def _jsonl_rows(text: str) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a sentence may hold Unicode's own line ends
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise TypeError("is no object with the keys image and prompt")
            image = next((k for k in ("image_file", "file_name") if k in found), "image")
            row = {"image": found[image], "prompt": found["prompt"], **{k: found.get(k, "") for k in ("id", "scenario")}}
            for key, value in row.items():
                if not isinstance(value, str | None) and (key != "id" or not isinstance(value, int)):
                    raise TypeError(f"{key} must be text, not {json.dumps(value)[:40]}")
            rows.append((number, {key: "" if value is None else str(value) for key, value in row.items()}))
        except KeyError as error:
            bad.append(f"line {number}: no key {error}")
        except (ValueError, TypeError, RecursionError) as error:  # also of numbers that are too long, and of brackets in brackets
            bad.append(f"line {number}: {error}")
    return rows, bad


def _csv_rows(text: str, folder: pathlib.Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        cells = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        return [], [f"line {reader.line_num}: {error}"]
    columns = min((len(row) for _, row in cells), default=0)
    if columns < 2:
        return [], ["a csv list needs a column of images and one of prompts"]
    is_image = [[_find_image(folder, row[c]) is not None for _, row in cells] for c in range(columns)]
    image = max(range(columns), key=lambda c: sum(is_image[c]))
    names_image = pathlib.Path(cells[0][1][image].strip()).suffix.lower() in IMAGES  # though there may be no such file
    head = [] if is_image[image][0] or names_image else [c.strip().lower() for c in cells[0][1]]
    named = {name: head.index(name) for name in ("prompt", "text", "caption", "id", "scenario") if name in head}
    longest = max((c for c in range(columns) if c != image), key=lambda c: sum(len(row[c]) for _, row in cells))
    prompt = next((named[n] for n in ("prompt", "text", "caption") if n in named), longest)
    rows, bad = [], []
    for number, row in cells[1 if head else 0 :]:
        if len(row) <= max(image, prompt, *named.values()):
            bad.append(f"line {number}: {len(row)} columns, the header has {len(head)}")
            continue
        if prompt == (len(head) or columns) - 1:  # a sentence with commas that nobody quoted
            row = [*row[:prompt], ",".join(row[prompt:])]
        extra = {name: row[named[name]] if name in named else "" for name in ("id", "scenario")}
        rows.append((number, {"image": row[image], "prompt": row[prompt], **extra}))
    return rows, bad


def _find_image(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    bases = (folder, folder / "images", folder / "TI2V-Bench")
    paths = (base / (name.strip() + ending) for base in bases for ending in ("", *IMAGES))
    return next(filter(os.path.isfile, paths), None)  # unlike Path.is_file, False for a sentence too long for a name


@dataclass
class Folder:
    """What a folder of videos holds: `videos[pair id, seed]`, files that are no pair's, and files for which there is another one."""

    videos: dict[tuple[str, int], pathlib.Path] = field(default_factory=dict)
    strays: list[pathlib.Path] = field(default_factory=list)
    doubles: list[pathlib.Path] = field(default_factory=list)


def find_videos(folder: str | pathlib.Path, pairs: Sequence[Pair]) -> Folder:
    """Which file is which pair's: video files, or folders of frames, named <id>, <id>_<seed> (as on the project page), <id>-<seed>
    or as `vbench_names` says; a manifest of `generate` in the folder decides where there is one. Where `dog` and `dog_1` are both ids,
    the other files tell whose `dog_1.mp4` is. Raises UserError where they do not, and without a folder.
    """
    folder = here(str(folder))
    if not folder.is_dir():
        raise UserError(f"--videos: {folder} is no folder")
    ids = {plain_name(p.id): p.id for p in pairs}
    known = {plain_name(name): p.id for name, p in zip(vbench_names(pairs), pairs, strict=True)} | ids
    found, listed = Folder(), {}
    if (folder / MANIFEST).is_file():
        try:
            made = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["videos"]
            listed = {plain_name(v["file"]): (ids.get(plain_name(v["id"])), int(v["seed"])) for v in made}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST}: is no manifest of videos: {error!r}") from error
    stems = {
        path: plain_name(path.name if path.is_dir() else path.stem)
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path.suffix.lower() in VIDEOS or (path.is_dir() and frames_in(path)))
    }
    seeded = {stem: (m[1], int(m[2])) for stem in stems.values() if (m := re.fullmatch(r"(.+)[_-](\d+)", stem)) and m[1] in known}
    with_seeds = {name for stem, (name, _) in seeded.items() if stem not in known}  # beyond doubt
    for path, stem in stems.items():
        name, seed = seeded.get(stem, (stem, 0))
        key = listed.get(plain_name(path.name))
        if key is None and name != stem in known and stem not in with_seeds:  # `stem` is an id too, whose videos may be without a seed
            if name in with_seeds:
                names = f"{name}_0{seed}{path.suffix} or {stem}_0{path.suffix}"
                raise UserError(f"--videos: {path} may be seed {seed} of {name} or the video of {stem}; name it {names}")
            name, seed = stem, 0
        key = key or (known.get(name), seed)
        if key[0] is None:
            if path.name != "images":  # where `generate --vbench` puts the list's images
                found.strays.append(path)
        elif key in found.videos:
            found.doubles.append(path)
        else:
            found.videos[key] = path
    return found


def frames_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images of a folder in any order, without hidden files: macOS leaves a ._1.png beside 1.png on other file systems."""
    return [p for p in folder.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")]
