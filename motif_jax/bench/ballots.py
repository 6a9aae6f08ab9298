"""The server's ballot box, one SQLite file: hands out sheets and keeps records. What `vote` has returned for is on the disk.

A sheet belongs to one annotator at a time, for as long as they keep voting; after `lease` seconds without a vote (FIRST_LEASE as
long as there is none of theirs) somebody else may take what is left of it. Nobody gets two copies of the same sheet, and no task is
answered twice.
"""

import contextlib
import json
import pathlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from motif_jax.bench.study import Key
from motif_jax.errors import UserError
from motif_jax.pairs import plain_name

FIRST_LEASE = 300.0  # seconds: names mistyped or given out of curiosity must not hold up a study
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id TEXT NOT NULL, token TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sheets (sheet TEXT PRIMARY KEY, annotator TEXT, seen REAL);
CREATE TABLE IF NOT EXISTS votes (
    task TEXT NOT NULL, annotator TEXT NOT NULL, sheet TEXT NOT NULL, training INTEGER NOT NULL, record TEXT NOT NULL,
    received REAL NOT NULL, PRIMARY KEY (task, annotator)
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON votes (task) WHERE NOT training;
"""


class Taken(Exception):
    """The vote was not stored: the sheet went to somebody else, or the task has another answer already."""


def number(sheet: str) -> str:
    """What the copies of a sheet have in common: "3" of "3-2"."""
    return sheet.partition("-")[0]


def person(name: str) -> str:
    """What is the same in all spellings of a person's name: phones begin it with a capital, and write accents in their own way."""
    return plain_name(name).casefold()


class Ballots:
    """Opens or makes the file. Raises UserError when it holds another study's votes or is no such file."""

    def __init__(self, path: pathlib.Path, key: Key, lease: float = 3600.0, clock: Callable[[], float] = time.time) -> None:
        self.key, self.lease, self.clock = key, lease, clock
        self._tasks = key.tasks
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.create_function("person", 1, person, deterministic=True)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # with NORMAL a power cut may take the last acknowledged votes
            self._db.executescript(SCHEMA)
            if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged: put a sound copy in its place")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                if (row := self._db.execute("SELECT id FROM study").fetchone()) is None:
                    self._db.execute("INSERT INTO study VALUES (?, ?)", (key.id, secrets.token_urlsafe(16)))
                    self._db.executemany("INSERT INTO sheets VALUES (?, NULL, NULL)", [(s,) for s in key.sheets])
                elif row[0] != key.id:
                    raise UserError(f"{path}: holds the votes of another study ({row[0]}, not {key.id})")
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used for votes ({error})") from error

    @property
    def token(self) -> str:
        """The study's token: made with the file, so that links stay valid when the server starts again."""
        return self._db.execute("SELECT token FROM study").fetchone()[0]

    def progress(self) -> str:
        """See `Key.progress`."""
        with self._lock:
            return self.key.progress(task for (task,) in self._db.execute("SELECT task FROM votes"))

    def close(self) -> None:
        """Leaves everything in the one file: until then the newest votes are in its write-ahead log beside it."""
        with self._lock:
            self._db.close()

    def claim(self, annotator: str) -> dict[str, Any]:
        """The sheet to work on: {"sheet", "done": tasks answered already, "trained"}; sheet is None when there is none for them now, and
        "later" says then whether there may be one, because others have not finished theirs.

        First their own unfinished one, then the unfinished one that has most answers, so that sheets get completed. Who has voted under
        another spelling of the name (see `person`) goes on under that one.
        """
        who = person(annotator)
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            now = self.clock()
            names, trained = [], set()
            answered: dict[str, list[str]] = {sheet: [] for sheet in self.key.sheets}
            begun: dict[str, str] = {}  # which copy of a sheet they have seen; another one they may not
            active = set()  # (sheet, who has voted on it)
            for task, voter, sheet, training in self._db.execute("SELECT task, annotator, sheet, training FROM votes ORDER BY rowid"):
                active.add((sheet, person(voter)))
                if not training:
                    answered[sheet].append(task)
                if person(voter) == who:
                    names.append(voter)
                    if training:
                        trained.add(task)
                    else:
                        begun[number(sheet)] = sheet
            free, later = [], False
            for sheet, holder, seen in self._db.execute("SELECT sheet, annotator, seen FROM sheets"):
                if len(answered[sheet]) == len(self.key.sheets[sheet]) or begun.get(number(sheet), sheet) != sheet:
                    continue
                later = True
                own = holder is not None and person(holder) == who
                lease = self.lease if holder and (sheet, person(holder)) in active else min(self.lease, FIRST_LEASE)
                if own or holder is None or now - seen > lease:
                    free.append((own, len(answered[sheet]), sheet))
            if not free:
                return {"sheet": None, "done": [], "trained": sorted(trained), "later": later}
            *_, sheet = max(free, key=lambda found: found[:2])
            self._db.execute("UPDATE sheets SET annotator = ?, seen = ? WHERE sheet = ?", ([*names, annotator][0], now, sheet))
            return {"sheet": sheet, "done": answered[sheet], "trained": sorted(trained)}

    def vote(self, record: dict[str, Any]) -> None:
        """Stores a checked record for good. The same answer again is fine (its acknowledgement was lost); raises Taken otherwise."""
        task = self._tasks[record["task"]]
        training = task.kind == "training"
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            holder = self._db.execute("SELECT annotator FROM sheets WHERE sheet = ?", (record["sheet"],)).fetchone()[0]
            who = person(record["annotator"])
            if own := holder is not None and person(holder) == who:
                record = record | {"annotator": holder}
            before = self._db.execute(
                "SELECT record FROM votes WHERE task = ? AND (person(annotator) = ? OR NOT training)", (task.id, who)
            ).fetchone()
            if before is not None:
                if json.loads(before[0]) == record:
                    return
                raise Taken("this task has an answer already")
            if not own:
                raise Taken("this sheet is somebody else's now")
            now = self.clock()
            row = (task.id, record["annotator"], record["sheet"], training, json.dumps(record), now)
            self._db.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", row)
            self._db.execute("UPDATE sheets SET seen = ? WHERE sheet = ?", (now, record["sheet"]))


def read_records(path: pathlib.Path, key: Key) -> list[Any]:
    """All records of a ballot box in the order of their arrival; the server may be running. A damaged one is None.

    Raises UserError as `Ballots` does.
    """

    def parsed(record: bytes) -> Any:
        try:
            return json.loads(record)
        except ValueError:
            return None

    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            if (found := db.execute("SELECT id FROM study").fetchone()) != (key.id,):
                raise UserError(f"{path}: holds the votes of another study ({found and found[0]}, not {key.id})")
            # As bytes, because SQLite gives up at text that is no UTF-8.
            return [parsed(record) for (record,) in db.execute("SELECT CAST(record AS BLOB) FROM votes ORDER BY received, rowid")]
    except sqlite3.Error as error:
        raise UserError(f"{path}: no file of votes of `annotate serve` ({error})") from error
