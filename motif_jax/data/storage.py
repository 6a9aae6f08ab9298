"""Where a dataset or a run lies: on a disk, or in an object store that fsspec knows (gs://, s3://, ...).

`location` gives a `pathlib.Path` or a `RemotePath`, which has the few methods of it that they need. Objects appear whole or
not at all, so that they need no renaming.
"""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import logging
import os
import pathlib
import posixpath
import re
import shutil
import socket
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from motif_jax.errors import StoreError, UserError

_REQUESTS = 32  # at once
_NOT_GIVEN = (401, 403, 410, 451)  # what a web server answers to who asks for one of its files: forbidden, gone
_BYTES_AT_ONCE = 2**26  # of a file in an archive
_END = 2**16  # bytes at each end of a file that tell it from others
_VERSIONS = ("generation", "ETag")  # what a store calls the version of an object
_STALE_SECONDS = 24 * 3600
BUCKETS = ("gs://", "gcs://")  # names of the store that training reads and writes


@dataclass(frozen=True)
class RemotePath:
    """An object, or the prefix of many, in `files`, an fsspec file system."""

    files: Any
    path: str

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.files, f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.files.unstrip_protocol(self.path)

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.files, posixpath.dirname(self.path))

    def absolute(self) -> "RemotePath":
        return self

    def resolve(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        return _ask(self.files.exists, self.path)

    def is_dir(self) -> bool:
        return _ask(self.files.isdir, self.path)

    def is_file(self) -> bool:
        return _ask(self.files.isfile, self.path)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object's name brings its directories."""

    def glob(self, pattern: str) -> list["RemotePath"]:
        try:
            return [RemotePath(self.files, path) for path in _ask(self.files.glob, f"{glob.escape(self.path)}/{pattern}")]
        except FileNotFoundError:  # not even a bucket
            return []

    def find(self) -> list[str]:
        """The names of all objects below, from here."""
        return [path.removeprefix(self.path + "/") for path in _ask(self.files.find, self.path)]

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return _ask(self.files.cat_file, self.path).decode(encoding, errors)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        _ask(self.files.pipe_file, self.path, text.encode(encoding))

    def replace(self, target: "RemotePath") -> "RemotePath":
        """Moves an object, or all below a prefix, to where nothing is yet."""
        objects = _ask(self.files.find, self.path)
        for found in objects:
            _ask(self.files.cp_file, found, target.path + found.removeprefix(self.path))
        for found in objects:  # not `rm`, which takes a name for a pattern, and removes what else it matches
            _ask(self.files.rm_file, found)
        return target

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _ask(self.files.rm_file, self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise


Path = pathlib.Path | RemotePath


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar archive: `size` bytes from `offset` on."""

    archive: Path
    name: str
    offset: int
    size: int


File = Path | Member


def _ask(request: Callable[..., Any], path: str, *arguments: Any) -> Any:
    """What a store answers. Raises FileNotFoundError, tarfile.TarError, and StoreError for whatever else its client raises."""
    try:
        return request(path, *arguments)
    except (FileNotFoundError, tarfile.TarError):
        raise
    except Exception as error:
        if getattr(error, "status", None) in _NOT_GIVEN:
            raise FileNotFoundError(f"{path}: {error}") from error
        raise StoreError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def side_by_side(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """function(item) of each, in their order: a store answers many requests in the time of one."""
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(function, items))


def local_path(name: str) -> pathlib.Path | None:
    """What a path or file:///PATH names on this machine; None for another URL. Raises UserError for another host's file."""
    if not name.startswith("file://"):
        return None if "://" in name else pathlib.Path(name)
    path = name.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise UserError(f"{name}: names a file of another machine; for one of this machine write file:///PATH, or the path alone")
    return pathlib.Path(path)


def here(name: str) -> pathlib.Path:
    """`local_path` for what only a path of this machine can be. Raises UserError for a URL, which would be taken for a folder `gs:`."""
    if (path := local_path(name)) is None:
        raise UserError(f"{name}: must be a path of this machine, not a URL; copy to or from the store")
    return path


def run_location(name: str | Path) -> Path:
    """The directory of a run, of weights or of a dataset to train on: a path, or a URL of gs:// (also gcs://). Raises UserError.

    Orbax writes to no other store, and ArrayRecord reads from none.
    """
    if not isinstance(name, str):
        return name
    if (path := local_path(name)) is not None:
        return path
    if not name.startswith(BUCKETS):
        raise UserError(f"{name}: training reads and writes file systems and gs:// alone; mount the store, and name the directory there")
    return location(name)


def location(name: str, look: bool = True) -> Path:
    """The directory or file `name`, a path or a URL.

    Raises UserError when it is not UTF-8, the store's package is missing, or, with `look`, the store cannot be reached.
    """
    if name.encode(errors="replace").decode() != name:
        raise UserError(f"{name!a}: its name is not UTF-8, which the shards' writer needs; use another directory")
    if (path := local_path(name)) is not None:
        return path
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of its own for what is raised, too
    # Others write beside us, and Orbax through a client of its own: a remembered listing would hide what they have done.
    fsspec.config.conf.setdefault(name.partition("://")[0], {})["use_listings_cache"] = False
    try:
        files, path = fsspec.core.url_to_fs(name)
        if look:
            files.exists(path)
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install -e '.[gs]' or '.[s3]'") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}; write a path, or a URL of gs://, s3:// or another store of fsspec") from error
    except Exception as error:  # the stores' clients share no class of errors (no credentials, no such host, ...)
        raise UserError(f"{name} cannot be reached: {type(error).__name__}: {error}") from error
    return RemotePath(files, path.rstrip("/"))


def machine() -> str:
    """Where a process number means one process: the host, and the namespace of a container that may share its name."""
    namespace = pathlib.Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}.{namespace.stat().st_ino if namespace.exists() else 0}"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[pathlib.Path]:
    """An absolute path on a disk to write to. When the block succeeds the file is renamed to `path`, or uploaded there; else it is removed.

    Bytes are synced before the rename and the directory after it, so that a power cut leaves no partial file. The temporary name,
    .tmp-PID@MACHINE@ and the end of the file's own, is hidden and no other process uses it; of a killed one, `sweep` removes it.
    """
    path = path if isinstance(path, RemotePath) else pathlib.Path(path).absolute()
    directory = pathlib.Path(tempfile.gettempdir()) if isinstance(path, RemotePath) else path.parent
    temporary = directory / f"{_mine()}{path.name[-40:]}"  # a name has 255 bytes at most
    try:
        yield temporary
        if isinstance(path, RemotePath):
            upload(temporary, path)
        else:
            _sync(temporary)
            temporary.replace(path)
            _sync(directory)
    finally:
        temporary.unlink(missing_ok=True)


def _mine() -> str:
    return f".tmp-{os.getpid()}@{machine()}@"


def sweep(directory: Path) -> None:
    """Removes the temporary files of processes that are gone: dead on this machine, or silent for a day on another one.

    Of `directory`, and of the system's directory for temporary files, where copies of remote files lie (`local_copy`), and files to upload.
    """
    places = {pathlib.Path(tempfile.gettempdir()), *([directory] if isinstance(directory, pathlib.Path) else [])}
    for path in [path for place in places for path in place.glob(".tmp-*@*@*")]:
        owner = re.match(r"\.tmp-(\d+)@(.+?)@", path.name)
        dead = owner and owner[2] == machine() and not _alive(int(owner[1]))
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another task swept it; it is another user's
            if dead or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there whole, or as it was before."""
    if isinstance(path, RemotePath):
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def size(path: File) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if isinstance(path, Member):
        return path.size
    if isinstance(path, pathlib.Path):
        return path.stat().st_size
    told = _ask(path.files.info, path.path)["size"]
    return len(read_part(path)) if told is None else told  # many a web server does not say


def sizes(directory: Path) -> dict[str, int]:
    """{name: bytes} of the files in a directory, which a store lists at once. Raises FileNotFoundError, StoreError."""
    if isinstance(directory, pathlib.Path):
        found: dict[str, int] = {}
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):  # another process has renamed its temporary file
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
        return found
    listed = _ask(functools.partial(directory.files.ls, detail=True), directory.path)
    return {posixpath.basename(entry["name"]): entry["size"] for entry in listed if entry["type"] == "file"}


def ends(path: File) -> list[Any]:
    """What tells a file from others, wherever it lies: its size, and the sha256 of its first and last 64 KiB. Raises OSError."""
    found = size(path)
    first = read_part(path, 0, min(found, _END))
    return [found, hashlib.sha256(first + read_part(path, max(0, found - _END), found)).hexdigest()]


def sha256(path: str | pathlib.Path) -> str:
    """The SHA-256 of a file on a disk, hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_part(path: File, start: int = 0, end: int | None = None) -> bytes:
    """The bytes of a file from `start` up to `end` (default: its own), fewer where it ends before. Raises OSError."""
    if isinstance(path, Member):
        return read_part(path.archive, path.offset + start, path.offset + min(path.size, path.size if end is None else end))
    if isinstance(path, RemotePath):
        if end is not None and end <= start:  # stores take such a range for none, and send the whole object
            return b""
        return _ask(functools.partial(path.files.cat_file, start=start, end=end), path.path)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(-1 if end is None else end - start)


def members(archive: Path) -> list[Member]:
    """The files in an uncompressed tar archive, of which only the headers are read. Raises tarfile.TarError, OSError.

    Of two with one name the later one counts. Symbolic links and sparse files (tar -S, whose bytes lie in pieces) are left out.
    """

    def read(file: BinaryIO) -> list[Member]:
        inside: dict[str, Member] = {}
        with file, tarfile.open(fileobj=file, mode="r:") as tar:
            for found in tar:
                if found.islnk() and found.linkname in inside:
                    inside[found.name] = dataclasses.replace(inside[found.linkname], name=found.name)
                elif found.isreg() and not found.issparse():
                    inside[found.name] = Member(archive, found.name, found.offset_data, found.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # or the last ones would be left out without a word
                raise tarfile.ReadError("cut off")
            return list(inside.values())

    if isinstance(archive, pathlib.Path):
        return read(archive.open("rb"))
    return _ask(lambda path: read(archive.files.open(path, block_size=2**16)), archive.path)


def beside(directory: Path, name: str) -> Path:
    """The file that a list in `directory` calls `name`: by its URL, or its path from there. Raises UserError, as `location` does."""
    if "://" in name:
        return location(name, look=False)
    if isinstance(directory, pathlib.Path):
        return directory / name
    if name.startswith("/"):
        return pathlib.Path(name)
    protocol, sign, path = directory.path.rpartition("://")  # which a web server's paths keep
    return RemotePath(directory.files, protocol + sign + posixpath.normpath(f"{path}/{name}"))


def upload(local: pathlib.Path, path: RemotePath) -> None:
    """Copies a local file into the store."""
    _ask(lambda target: path.files.put_file(str(local), target), path.path)


def download(path: RemotePath, local: pathlib.Path) -> None:
    """Copies a file of the store to a disk."""
    local.parent.mkdir(parents=True, exist_ok=True)
    _ask(path.files.get_file, path.path, str(local))


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Waits until no other process is in this block. On a file system without locks nothing is held."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def on_disk(file: str | Path) -> pathlib.Path:
    """A file of this machine: the one that is named by a path, or the copy of one in a store, which later runs find again.

    Copies are in `motif_jax` below $XDG_CACHE_HOME or ~/.cache; of several processes one makes them. Raises FileNotFoundError, UserError,
    StoreError.
    """
    path = location(file) if isinstance(file, str) else file
    if isinstance(path, pathlib.Path):
        return path
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = pathlib.Path(tempfile.gettempdir() if home.startswith("~") else home) / "motif_jax"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    about = _ask(path.files.info, path.path)  # the ends alone miss weights of which some in the middle were trained further
    known = hashlib.sha256(repr([str(path), ends(path), *map(about.get, _VERSIONS)]).encode()).hexdigest()
    copy = cache / known[:16] / path.name.partition("?")[0]  # links to download from the web end in a query
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy.parent):
            sweep(copy.parent)
            if not copy.exists():
                with replacing(copy) as temporary:
                    download(path, temporary)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be copied to {cache} (set XDG_CACHE_HOME for another place): {error}") from error
    return copy


@contextlib.contextmanager
def local_copy(path: File) -> Iterator[pathlib.Path]:
    """The file on a disk: itself, or a copy for the time of the block."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=_mine()) as scratch:
        copy = pathlib.Path(scratch) / posixpath.basename(path.name)[-40:]
        if isinstance(path, Member):
            with copy.open("wb") as file:
                for start in range(0, path.size, _BYTES_AT_ONCE):
                    file.write(read_part(path, start, start + _BYTES_AT_ONCE))
        else:
            download(path, copy)
        yield copy
