"""Lists of videos with their captions: a .csv, a .jsonl or a folder in; entries, and what had to be left out, back."""

import collections
import csv
import io
import itertools
import json
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from motif_jax.data.storage import File, RemotePath, beside, location, members, read_part, side_by_side
from motif_jax.errors import StoreError, UserError

Files = dict[pathlib.PurePosixPath, File]  # by name, relative to the source

VIDEO_ENDINGS = frozenset(
    ".3gp .asf .avi .flv .gif .h264 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .nut .ogv .ts .vob .webm .wmv .y4m".split()
)

_UNREADABLE_NAME = ("unreadable name", "it is not UTF-8; rename the file")


@dataclass(frozen=True, slots=True)
class Entry:
    """A video and its sentence. `video` names it in the list (stable wherever the list lies), `path` finds it."""

    video: str
    path: File
    caption: str
    mask: File | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something of the list that gives no entry."""

    video: str
    kind: str
    reason: str


def read_source(source: str) -> tuple[list[Entry], list[Problem]]:
    """Entries in the order of the list (a folder: of the names), and lines or files that give none.

    `source` is a .csv with the columns video, caption and optionally mask (a video of the same frames, white where the loss shall
    look), a .jsonl with the same keys, or a folder of videos with same-named .txt captions, searched with its subfolders and .tar
    files; a path or a URL (gs://, s3://). Lists name videos by paths relative to them, or by URLs. Raises UserError when the source
    as a whole cannot be used.
    """
    path = location(source) if "://" in source else pathlib.Path(source)
    if path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path):
        return _read_pairs(source, *(_search(path) if isinstance(path, pathlib.Path) else _search_store(path)))
    kinds = "a .csv or .jsonl file, a folder of videos or of .tar files with videos, or synthetic:NAME[:count]"
    if not (path.exists() if isinstance(path, RemotePath) else os.path.exists(path)):
        raise UserError(f"source {source!r} does not exist; give {kinds}")
    ending = posixpath.splitext(path.name)[1].lower()
    if ending not in (".csv", ".jsonl"):
        raise UserError(f"source {source!r}: must be {kinds}")
    try:
        text = _read_text(path)
    except UnicodeDecodeError as error:
        raise UserError(f"source {source!r} cannot be read: {error}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"source {source!r} cannot be read: {error}") from error
    rows = _csv_rows(source, text) if ending == ".csv" else _jsonl_rows(source, text)
    entries, problems, seen = [], [], set()
    for line, row in rows:
        video, caption, mask = (
            " ".join((row.get(key) or "").split()) if key == "caption" else (row.get(key) or "").strip()
            for key in ("video", "caption", "mask")
        )
        name = printable(video if "://" in video else posixpath.normpath(video)) if video else f"line {line}"
        if printable(video + mask) != video + mask:
            problems.append(Problem(name, *_UNREADABLE_NAME))
        elif not video:
            problems.append(Problem(name, "no video", f"line {line} of {source} names no video"))
        elif not caption:
            problems.append(Problem(name, "empty caption", f"line {line} of {source}"))
        elif (name, caption) in seen:
            problems.append(Problem(name, "repeated line", f"line {line} of {source} says what an earlier line said"))
        else:
            seen.add((name, caption))
            caption = caption.encode(errors="replace").decode()  # JSON can escape halves of characters
            entries.append(Entry(name, beside(path.parent, video), caption, beside(path.parent, mask) if mask else None))
    if not entries and all(p.kind == "no video" for p in problems):
        raise UserError(f"source {source!r} lists no videos: no line has a value for 'video'")
    return entries, problems


def _csv_rows(source: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    good = 0
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        columns = [c.strip().lower() for c in reader.fieldnames or []]
        missing = [c for c in ("video", "caption") if c not in columns]
        if missing:
            raise UserError(
                f"source {source!r}: no column {' and '.join(missing)}; the first line must name them, it is {','.join(columns)!r}"
            )
        repeated = [c for c in ("video", "caption", "mask") if columns.count(c) > 1]
        if repeated:
            raise UserError(f"source {source!r}: the first line names {' and '.join(repeated)} more than once; keep one column of each")
        reader.fieldnames, good = columns, reader.line_num
        for row in reader:
            if any(cell.strip() for cell in row.get(None, ())):
                raise UserError(
                    f"source {source!r}, line {reader.line_num}: more cells than columns; put captions with commas in double quotes"
                )
            good = reader.line_num
            yield good, row
    except csv.Error as error:
        raise UserError(
            f"source {source!r}, from line {good + 1} on: {error}; a cell that begins with a double quote must end with one, "
            'and has those within doubled: """Hello"" he said"'
        ) from error


def _jsonl_rows(source: str, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    found: set[str] = set()
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"source {source!r}, line {line}: not JSON ({error})") from error
        row = {name.lower(): value for name, value in row.items()} if isinstance(row, dict) else None
        if row is None or not all(isinstance(row.get(k) or "", str) for k in ("video", "caption", "mask")):
            raise UserError(f'source {source!r}, line {line}: must be an object like {{"video": "a.mp4", "caption": "a cat walks"}}')
        found |= row.keys()
        yield line, row
    if found and (missing := [name for name in ("video", "caption") if name not in found]):
        raise UserError(f"source {source!r}: no line has the key {' or '.join(missing)}; the keys are {', '.join(sorted(found))}")


def _read_text(file: File) -> str:
    """The text of a UTF-8 file, with line ends of any system. Raises OSError, UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_part(file)), encoding="utf-8-sig").read()  # spreadsheets put a mark in front


def _read_pairs(source: str, files: Files, problems: list[Problem]) -> tuple[list[Entry], list[Problem]]:
    """Videos and the captions beside them, in the order of their names."""
    files = _open_archives(files, problems)
    videos = sorted(name for name in files if name.suffix.lower() in VIDEO_ENDINGS)
    texts = {name.with_suffix(""): name for name in files if name.suffix.lower() == ".txt"}

    def read(video: pathlib.PurePosixPath) -> Entry | Problem:
        name, text = str(video), texts.get(video.with_suffix(""))
        if printable(name) != name:
            return Problem(printable(name), *_UNREADABLE_NAME)
        if text is None:
            return Problem(name, "no caption", f"there is no {video.stem}.txt beside it")
        try:
            caption = " ".join(_read_text(files[text]).split())
        except StoreError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            return Problem(name, "unreadable caption", str(error))
        return Entry(name, files[video], caption) if caption else Problem(name, "empty caption", f"{text.name} is empty")

    found = side_by_side(read, videos)
    entries = [entry for entry in found if isinstance(entry, Entry)]
    problems += [problem for problem in found if isinstance(problem, Problem)]
    lonely = texts.keys() - {video.with_suffix("") for video in videos}
    problems += [Problem(printable(str(texts[stem])), "caption without video", "no video has this name") for stem in sorted(lonely)]
    if not entries and not problems:
        raise UserError(f"source {source!r} holds no videos ({', '.join(sorted(VIDEO_ENDINGS))})")
    return entries, problems


def _open_archives(files: Files, problems: list[Problem]) -> Files:
    """The files with those inside .tar files, as of folders of these names, instead of the .tar files."""
    archives = [name for name in files if name.suffix.lower() == ".tar"]

    def inside(archive: pathlib.PurePosixPath) -> Files | Problem:
        try:
            return {archive / member.name.lstrip("/"): member for member in members(files[archive])}
        except StoreError:
            raise
        except (OSError, tarfile.TarError) as error:
            return Problem(printable(str(archive)), "unreadable archive", str(error))

    opened = side_by_side(inside, archives)
    problems += [found for found in opened if isinstance(found, Problem)]
    everything = [files, *(found for found in opened if not isinstance(found, Problem))]
    pairs = itertools.chain.from_iterable(found.items() for found in everything)
    return {name: file for name, file in pairs if not any(part.startswith(".") for part in name.parts)}


def _search(folder: pathlib.Path) -> tuple[Files, list[Problem]]:
    """The files under a folder, without hidden ones, and folders that cannot be read.

    Linked folders come last, so that a file has the name that it has without them, and each folder once, so that a loop ends.
    """
    files, problems, seen, waiting = {}, [], set(), collections.deque([folder])
    while waiting:
        parent = waiting.popleft()
        real = os.path.realpath(parent)
        if real in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(parent))
        except OSError as error:
            problems.append(Problem(printable(parent.relative_to(folder).as_posix()), "unreadable folder", str(error)))
            continue
        for path in (parent / name for name in names if not name.startswith(".")):
            if not os.path.isdir(path):
                if path.suffix.lower() in VIDEO_ENDINGS or os.path.isfile(path):
                    files[pathlib.PurePosixPath(path.relative_to(folder).as_posix())] = path
            elif os.path.islink(path):
                waiting.append(path)
            else:
                waiting.appendleft(path)
    return files, problems


def _search_store(folder: RemotePath) -> tuple[Files, list[Problem]]:
    return {pathlib.PurePosixPath(name): folder / name for name in folder.find()}, []


def printable(name: str) -> str:
    """A name with what UTF-8 cannot write, such as the bytes of a file name in Latin-1, escaped."""
    return name.encode(errors="backslashreplace").decode()
