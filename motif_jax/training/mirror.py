"""Keeps files that grow line by line, or that libraries write, on a local disk and copies them into the bucket of the run.

Configuration, marks and checkpoints bypass this module: each of them is written whole (`data.storage`, `training.checkpoint`).
"""

import concurrent.futures
import contextlib
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from motif_jax.data.storage import Path, RemotePath, download, upload
from motif_jax.errors import StoreError

METRICS = ("metrics.jsonl",)  # what a continued run adds to
REPORT = (*METRICS, "config.json", "synthetic.json", "synthetic/*")  # what `report.write` reads, besides the newest samples
SECONDS = 60  # between two copies


class Mirror:
    """`local` stands for the work directory: the directory itself where it is on a disk (then nothing is copied), else a temporary one."""

    def __init__(self, workdir: Path) -> None:
        self._workdir, self._lock = workdir, threading.Lock()
        self._remote = isinstance(workdir, RemotePath)
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="motif_jax-")) if self._remote else workdir
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of change
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mirror")
        self._copying: concurrent.futures.Future | None = None
        self._began = time.monotonic()

    def fetch(self, patterns: tuple[str, ...]) -> None:
        """Brings what is there by these names. Raises StoreError."""
        if not self._remote:
            return
        for pattern in patterns:
            for path in self._workdir.glob(pattern):
                name = str(path).removeprefix(f"{self._workdir}/")
                download(path, self.local / name)
                self._copied[name] = self._stamp(self.local / name)

    def fetch_report(self) -> None:
        """Brings what `report.write` reads. Raises StoreError."""
        self.fetch(REPORT)
        if self._remote:
            steps = [int(path.parent.name) for path in self._workdir.glob("samples/*/captions.json") if path.parent.name.isdigit()]
            self.fetch((f"samples/{max(steps)}/*",) if steps else ())

    def copy(self) -> None:
        """Copies what has changed since the last time, and returns when it is there. Raises StoreError."""
        if not self._remote:
            return
        with self._lock:
            for path in sorted(self.local.rglob("*")):
                name = path.relative_to(self.local)
                unfinished = any(part.startswith(".") for part in name.parts)
                if unfinished or not path.is_file() or self._copied.get(str(name)) == (stamp := self._stamp(path)):
                    continue
                upload(path, self._workdir / name.as_posix())
                self._copied[str(name)] = stamp

    def copy_sometimes(self) -> None:
        """Starts `try_to_copy` in another thread, once in SECONDS."""
        if self._remote and time.monotonic() - self._began >= SECONDS and (self._copying is None or self._copying.done()):
            self._began = time.monotonic()
            self._copying = self._thread.submit(self.try_to_copy)

    def copy_first(self) -> None:
        """Starts `try_to_copy` and gives it SECONDS: other processes wait for what comes after it, and not for ever."""
        if self._remote:
            concurrent.futures.wait([self._thread.submit(self.try_to_copy)], SECONDS)

    def try_to_copy(self) -> None:
        """A copy whose failure is told, and made good by the next."""
        try:
            self.copy()
        except OSError as error:  # also of a file that was replaced meanwhile
            print(f"{self._workdir}: metrics and samples cannot be copied there now: {error}", flush=True)

    @staticmethod
    def _stamp(path: pathlib.Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns

    def close(self) -> None:
        """The last copy; the temporary directory goes, unless that fails. Raises StoreError, or tells it after another error."""
        other = sys.exception()
        self._thread.shutdown()
        try:
            self.copy()
        except StoreError as error:
            text = f"{self._workdir}: the last metrics and samples cannot be copied there, and are in {self.local}; {error}"
            if other is None:
                raise StoreError(text) from error
            print(text, flush=True)
            return
        if self._remote:
            shutil.rmtree(self.local, ignore_errors=True)


@contextlib.contextmanager
def mirrored(workdir: Path) -> Iterator[pathlib.Path]:
    """A directory on a disk with what `report.write` reads of a work directory; what is written there goes to that directory afterwards."""
    mirror = Mirror(workdir)
    try:
        mirror.fetch_report()
        yield mirror.local
    finally:
        mirror.close()
