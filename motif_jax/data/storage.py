"""Where a dataset directory lies: on a disk, or in an object store that fsspec knows (gs://, s3://, ...).

`location` gives a `pathlib.Path` or a `RemotePath`, which has the few methods of it that shards need. Objects appear whole or
not at all, so that they need no renaming.
"""

import contextlib
import pathlib
import posixpath
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from motif_jax.config import UserError


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

    def exists(self) -> bool:
        return _ask(self.files.exists, self.path)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object's name brings its directories."""

    def glob(self, pattern: str) -> list["RemotePath"]:
        return [RemotePath(self.files, path) for path in _ask(self.files.glob, f"{self.path}/{pattern}")]

    def read_text(self) -> str:
        return _ask(self.files.cat_file, self.path).decode()

    def write_text(self, text: str) -> None:
        _ask(self.files.pipe_file, self.path, text.encode())

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            _ask(self.files.rm_file, self.path)
        except FileNotFoundError:
            if not missing_ok:
                raise


Path = pathlib.Path | RemotePath


def _ask(request: Callable[..., Any], *arguments: Any) -> Any:
    """What a store answers. Its client's own errors (a store that went away) become OSError, as those of a disk are."""
    try:
        return request(*arguments)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def local_path(name: str) -> pathlib.Path | None:
    """What a path or file:///PATH names on this machine; None for another URL. Raises UserError for another host's file."""
    if not name.startswith("file://"):
        return None if "://" in name else pathlib.Path(name)
    path = name.removeprefix("file://").removeprefix("localhost")
    if not path.startswith("/"):
        raise UserError(f"{name}: names a file of another machine; for one of this machine write file:///PATH, or the path alone")
    return pathlib.Path(path)


def location(name: str) -> Path:
    """The directory `name`, a path or a URL.

    Raises UserError when it is not UTF-8, the store's package is missing, or the store cannot be reached.
    """
    if name.encode(errors="replace").decode() != name:
        raise UserError(f"{name!a}: its name is not UTF-8, which the shards' writer needs; use another directory")
    if (path := local_path(name)) is not None:
        return path
    import fsspec

    try:
        # Other tasks write beside us: a remembered listing would hide what they have done.
        files, path = fsspec.core.url_to_fs(name, use_listings_cache=False)
        files.exists(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{name}: {error}; pip install 'motif_jax[gs]' or 'motif_jax[s3]'") from error
    except Exception as error:  # the stores' clients share no class of errors (no credentials, no such host, ...)
        raise UserError(f"{name} cannot be reached: {type(error).__name__}: {error}") from error
    return RemotePath(files, path.rstrip("/"))


def size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return path.stat().st_size if isinstance(path, pathlib.Path) else _ask(path.files.info, path.path)["size"]


def upload(local: pathlib.Path, path: RemotePath) -> None:
    """Copies a local file into the store."""
    _ask(path.files.put_file, str(local), path.path)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[pathlib.Path]:
    """The file on a disk: itself, or a copy for the time of the block."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = pathlib.Path(scratch) / path.name
        _ask(path.files.get_file, path.path, str(copy))
        yield copy
