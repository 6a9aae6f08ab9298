"""Votes of a study: what the page sends in; checked records, unblinded votes, and files of them out.

A record is what an annotator did on one task and names no system. A vote is the same with the key applied: the row that
`annotate export` writes and `report` reads, in JSON or CSV. Text of annotators is data everywhere: checked for its length,
bound as a parameter, escaped when shown.
"""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from motif_jax.bench.study import REASONS, SIDES, Key, load
from motif_jax.errors import UserError
from motif_jax.pairs import plain_name

MAX_ANNOTATOR = 100
MAX_COMMENT = 1000


@dataclass(frozen=True)
class Vote:
    """One judgement with the systems' names. Only the first five are needed; `choice` is "left", "right" or "tie".

    kind: "pair", or "repeat" (of the same annotator's task `repeats`, or of their vote on the same pair and systems), "gold" (`better` is
    the right answer), "training".
    """

    pair: str
    annotator: str
    left: str
    right: str
    choice: str
    reasons: tuple[str, ...] = ()
    kind: str = "pair"
    image: str = ""
    scenario: str = ""
    prompt: str = ""
    task: str = ""
    repeats: str = ""
    better: str = ""
    sheet: str = ""
    seconds: float | None = None
    plays: int = 0
    comment: str = ""
    time: str = ""

    @property
    def subject(self) -> tuple[str, frozenset[str]]:
        """What was compared: the pair and the two systems."""
        return self.pair, frozenset((self.left, self.right))


FIELDS = tuple(field.name for field in dataclasses.fields(Vote))
NEEDED = FIELDS[:5]
KINDS = ("pair", "repeat", "gold", "training")


def _text(value: Any, what: str, longest: int, shortest: int = 0) -> str:
    if not isinstance(value, str) or not shortest <= len(value.strip()) <= len(value) <= longest:
        raise ValueError(f"{what}: expected {shortest} to {longest} characters of text")
    # Lone surrogates, which JSON can spell, exist in no encoding; control characters have no business in a name.
    if any(0xD800 <= ord(c) < 0xE000 or (ord(c) < 32 and c not in "\n\t") for c in value):
        raise ValueError(f"{what}: holds characters that are no text")
    return value


def _number(value: Any, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{what}: expected a number from {low} to {high}")
    return value


def check_annotator(value: Any) -> str:
    """The annotator's name, any text of 1 to 100 characters, as `plain_name` has it. Raises ValueError."""
    return plain_name(_text(value, "annotator", MAX_ANNOTATOR, 1))


def check_reasons(value: Any) -> Sequence[str]:
    """Any of the four reasons, or none. Raises ValueError."""
    if not isinstance(value, (list, tuple)) or not all(reason in tuple(REASONS) for reason in value):
        raise ValueError(f"reasons: expected some of {', '.join(REASONS)}")
    return value


def check_record(record: Any, key: Key) -> dict[str, Any]:
    """A record as the page sends it, with exactly the known fields: a choice needs at least one of the four reasons, a tie, where the study
    allows one, needs none. Raises ValueError naming the field that is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    task = key.tasks.get(record["task"]) if isinstance(record.get("task"), str) else None
    if task is None:
        raise ValueError("task: no such task in this study")
    sheet = record.get("sheet")
    if not isinstance(sheet, str) or sheet not in key.sheets or (task.kind != "training" and task not in key.sheets[sheet]):
        raise ValueError("sheet: the task is not on it")
    choice, reasons = record.get("choice"), check_reasons(record.get("reasons"))
    if choice not in (*SIDES, *(["tie"] if key.ties else [])):
        raise ValueError(f"choice: expected left or right{' or tie' if key.ties else ''}")
    if choice != "tie" and not reasons:
        raise ValueError("reasons: at least one is needed")
    return {
        "task": task.id,
        "annotator": check_annotator(record.get("annotator")),
        "sheet": sheet,
        "choice": choice,
        "reasons": [name for name in REASONS if name in reasons],
        "comment": _text(record.get("comment", ""), "comment", MAX_COMMENT),
        "seconds": round(_number(record.get("seconds"), "seconds", 0, 1e6), 2),
        "plays": int(_number(record.get("plays"), "plays: both videos must be watched to the end", 1, 1e6)),
        "time": _text(record.get("time", ""), "time", 40),
    }


def unblind(record: dict[str, Any], key: Key) -> Vote:
    """A checked record -> the vote with the systems' names."""
    task = key.tasks[record["task"]]
    entry = key.pairs[task.pair]
    clips = (key.clips[name] for name in (task.left, task.right))
    left, right = (f"{clip.model} ({clip.damage})" if clip.damage else clip.model for clip in clips)
    return Vote(
        **record | {"reasons": tuple(record["reasons"])},
        pair=entry.id,
        left=left,
        right=right,
        kind=task.kind,
        image=entry.image_id,
        scenario=entry.scenario,
        prompt=entry.prompt,
        repeats=task.repeats,
        better=task.better,
    )


def check_vote(row: Any) -> Vote:
    """A row of an exported file, or of anybody's own table with the same columns, where pairs and annotators may be whole numbers.

    Names become what `plain_name` makes of them. Raises ValueError naming the column.
    """
    if isinstance(row, dict):
        row = {name: plain_name(value) if isinstance(value, str) and name != "comment" else value for name, value in row.items()}
    if not isinstance(row, dict) or (missing := [name for name in NEEDED if row.get(name) in (None, "")]):
        raise ValueError(f"needs the columns {', '.join(NEEDED)}" + (f"; {', '.join(missing)} missing" if isinstance(row, dict) else ""))
    given = {name: value for name, value in row.items() if name in FIELDS and value not in (None, "")}
    given |= {name: str(value) for name, value in given.items() if type(value) is int and name not in ("seconds", "plays", "reasons")}
    reasons = given.get("reasons", [])
    reasons = check_reasons(reasons.split("|") if isinstance(reasons, str) else reasons)
    try:
        seconds, plays = float(given.get("seconds", math.nan)), float(given.get("plays", 0))  # a table may spell "nan"
    except (TypeError, ValueError, OverflowError):
        seconds = plays = math.inf
    if math.isinf(seconds) or not plays.is_integer():
        raise ValueError("seconds, plays: expected a number and a whole number")
    vote = Vote(**given | {"reasons": tuple(reasons), "seconds": None if math.isnan(seconds) else seconds, "plays": int(plays)})
    for name in set(FIELDS) - {"seconds", "plays", "reasons", "comment", "prompt"}:
        _text(getattr(vote, name), name, 500)
    _text(vote.comment, "comment", MAX_COMMENT)
    _text(vote.prompt, "prompt", 10_000)
    if vote.kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}")
    if vote.choice not in (*SIDES, "tie"):
        raise ValueError("choice: expected left, right or tie")
    if vote.kind == "gold" and vote.better not in SIDES:
        raise ValueError("better: a gold item needs its right answer, left or right")
    if vote.left == vote.right:
        raise ValueError("left, right: expected two different systems")
    return vote


def read_all(paths: list[pathlib.Path], study: pathlib.Path | None) -> tuple[list[Vote], list[str]]:
    """Votes of any mixture of the server's .sqlite, the page's .json, and exported .json or .csv -> (votes, what was refused).

    The first two are blind and need the study. A second vote of an annotator on the same thing (a file given twice) is refused.
    Raises UserError when a file is none of these.
    """
    key = load(study) if study else None
    found, refused = {}, []
    for path in paths:
        rows, blind = _rows(path, key)
        for n, row in enumerate(rows, 1):
            try:
                vote = unblind(check_record(row, key), key) if blind else check_vote(row)
                if found.setdefault(_subject(vote), vote) is not vote:
                    raise ValueError(f"second vote of {vote.annotator} on {vote.kind} {vote.pair}")
            except ValueError as error:
                refused.append(f"{path}, vote {n}: {error}")
    return list(found.values()), refused


def _subject(vote: Vote) -> Any:
    """Who judged what, only once: a comparison of systems on a pair, whatever its task; else a task; without one, all of a row."""
    if vote.kind == "pair":
        return vote.annotator, vote.subject
    return (vote.annotator, vote.task) if vote.task else vote


def _rows(path: pathlib.Path, key: Key | None) -> tuple[list[Any], bool]:
    """What a file holds, and whether it is blind."""
    from motif_jax.bench.ballots import read_records

    if path.suffix not in (".csv", ".json", ".sqlite"):
        raise UserError(f"{path}: votes are read from .csv, .json and .sqlite")
    csv.field_size_limit(2**31 - 1)  # a field longer than its default would cost the whole file
    found, columns = None, []
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file)
                columns = table.fieldnames = [plain_name(name) for name in table.fieldnames or ()]
                found = list(table)
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(columns) == 1 and set(columns[0]) & set(";\t"):
        raise UserError(f"{path}: its first line has no comma; separate columns by commas, not by semicolons or tabs")
    if isinstance(found, list):
        return found, False
    if key is None:
        raise UserError(f"{path}: does not say which system is which; give the study's folder with --study")
    if path.suffix == ".sqlite":
        return read_records(path, key), True
    if not isinstance(found, dict) or not isinstance(found.get("votes"), list):
        raise UserError(f"{path}: expected what the page of a study offers for download, or what `annotate export` writes")
    if found.get("study") != key.id:
        raise UserError(f"{path}: belongs to another study than the one of --study")
    return found["votes"], True


def write_votes(path: pathlib.Path, votes: list[Vote]) -> None:
    """Raw votes as .json (a list of objects) or .csv (reasons joined by "|")."""
    rows = [dataclasses.asdict(v) for v in votes]
    if path.suffix == ".json":
        path.write_text(json.dumps([row | {"reasons": list(row["reasons"])} for row in rows], indent=1) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(row | {"reasons": "|".join(row["reasons"])} for row in rows)
    else:
        raise UserError(f"{path}: votes are written as .json or .csv")
