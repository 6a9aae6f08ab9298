"""The plan of a human A/B study: pairs and systems in; sheets of tasks and the key that says what they show out.

A study folder has two parts: `page/` is all that annotators get and names no system; `key.json` stays with the researcher.
A sheet is one sitting of one annotator. The comparisons are dealt onto sheets, and each sheet is made in as many copies as
every comparison has annotators; a person never gets two copies of one sheet.
"""

import dataclasses
import functools
import json
import pathlib
import random
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from motif_jax.errors import UserError
from motif_jax.pairs import plain_name

QUESTION = "Which video is better overall?"
# The reasons of the paper (its figure 4), what the page says about them, and about the training task that teaches them.
REASONS = {
    "image_alignment": ("It keeps closer to the starting image.", "the other video does not have the colours of the starting image."),
    "text_alignment": (
        "It shows better what the sentence says.",
        "the other video stands still, so nothing that the sentence says happens.",
    ),
    "object_motion": ("The right things move, and move naturally.", "in the other video things jump to and fro instead of moving."),
    "overall_quality": ("It looks better: sharp, steady, without faults.", "the other video is coarse and noisy."),
}
LABELS = {reason: reason.replace("_", " ").capitalize() for reason in REASONS}
SIDES = ("left", "right")


@dataclass(frozen=True)
class Entry:
    """One image and sentence of the study; `image` is the name of its picture in the page's media folder."""

    id: str
    image_id: str
    prompt: str
    image: str
    scenario: str = ""


@dataclass(frozen=True)
class Clip:
    """What a file in the page's media folder is; `damage` is empty for a system's own video."""

    model: str
    pair: str
    damage: str = ""


@dataclass(frozen=True)
class Task:
    """One screen: two media names for a pair (an index into `Key.pairs`).

    kind is "pair", "repeat" (of the task `repeats`, sides swapped), "gold" or "training" (`better` is the side without the
    damage; `reason` is what a training task teaches).
    """

    id: str
    kind: str
    pair: int
    left: str
    right: str
    repeats: str = ""
    better: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Key:
    """Everything about a study; written to `key.json`. sheets: name -> its tasks in order; names are "<number>-<copy>"."""

    id: str
    title: str
    ties: bool
    models: list[str]
    comparisons: list[tuple[str, str]]
    frames: int
    fps: float
    height: int
    width: int
    pairs: list[Entry]
    clips: dict[str, Clip]
    training: list[Task]
    sheets: dict[str, list[Task]]

    @functools.cached_property
    def tasks(self) -> dict[str, Task]:
        """All tasks by their id."""
        return {t.id: t for tasks in (self.training, *self.sheets.values()) for t in tasks}

    def progress(self, answered: Iterable[str]) -> str:
        """How far the study is, by the ids of the tasks that have an answer."""
        planned = {t.id for tasks in self.sheets.values() for t in tasks}
        return f"{len(planned & set(answered))} of the study's {len(planned)} tasks are answered"


def opaque() -> str:
    """A name that says nothing and cannot be guessed: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def comparisons(models: list[str], asked: list[str]) -> list[tuple[str, str]]:
    """Pairs of models from --pairs: "all", or any number of NAME:NAME. Raises UserError on anything else."""
    if asked == ["all"]:
        return [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
    found = []
    for text in asked:
        names = tuple(map(plain_name, text.split(":")))
        if len(names) != 2 or names[0] == names[1] or not set(names) <= set(models):
            raise UserError(f"--pairs={text}: expected `all` or NAME:NAME of two different names among {', '.join(models)}")
        if names in found or names[::-1] in found:
            raise UserError(f"--pairs={text}: given twice")
        found.append(names)
    return found


def deal(
    media: dict[tuple[int, str], str],
    pairs: list[tuple[str, str]],
    golds: list[tuple[int, str, str]],
    annotators: int,
    per_sheet: int,
    repeats: int,
    gold: int,
    seed: int,
) -> dict[str, list[Task]]:
    """The sheets: every comparison of `pairs` for every pair of the list, in `annotators` copies, in random order.

    media: (pair, model) -> media name; golds: (pair, good name, damaged name). Over the copies of a comparison the sides
    alternate; within a sheet and within the study each model of a comparison is on the left as often as on the right, give or
    take one. Repeats come from the first third of a sheet and return in its second half. `repeats` and `gold` are per sheet.
    """
    rng = random.Random(seed)
    dealt = []
    for a, b in pairs:
        indices = sorted({index for index, _ in media})
        rng.shuffle(indices)
        dealt += [(index, a, b) for index in indices]
    count = -(-len(dealt) // per_sheet)
    turn = {comparison: rng.randrange(2) for comparison in pairs}
    sheets = {}
    for number in range(count):
        items = dealt[number::count]
        flips = []
        for _, a, b in items:
            flips.append(turn[a, b])
            turn[a, b] += 1
        for copy in range(annotators):
            order = []
            for (index, a, b), flip in zip(items, flips, strict=True):
                left, right = (a, b) if (flip + copy) % 2 == 0 else (b, a)
                order.append(Task(opaque(), "pair", index, media[index, left], media[index, right]))
            rng.shuffle(order)
            again = rng.sample(order[: max(1, len(order) // 3)], min(repeats, max(1, len(order) // 3)))
            for task in again:
                place = rng.randint(-(-len(order) // 2) if len(order) > 1 else 1, len(order))
                swapped = {"left": task.right, "right": task.left, "repeats": task.id}
                order.insert(place, dataclasses.replace(task, id=opaque(), kind="repeat", **swapped))
            for n in range(min(gold, len(golds))):
                index, good, damaged = golds[(number * gold + n) % len(golds)]
                better = SIDES[(copy + n) % 2]
                left, right = (good, damaged) if better == "left" else (damaged, good)
                order.insert(rng.randint(0, len(order)), Task(opaque(), "gold", index, left, right, better=better))
            sheets[f"{number + 1}-{copy + 1}"] = order
    return sheets


def save(key: Key, study: pathlib.Path) -> None:
    """Writes `key.json` and, for the page, `page/study.js`."""
    (study / "key.json").write_text(json.dumps(dataclasses.asdict(key), indent=1) + "\n", encoding="utf-8")
    (study / "page" / "study.js").write_text(script(page_data(key, server=False)), encoding="utf-8")


def load(study: pathlib.Path) -> Key:
    """Reads a study folder, names as `plain_name` has them. Raises UserError when it is none."""
    path = study / "key.json"

    def plain(found: dict[str, str]) -> dict[str, str]:
        return {field: plain_name(text) for field, text in found.items()}

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Key(
            **found
            | {
                "models": [plain_name(m) for m in found["models"]],
                "comparisons": [tuple(map(plain_name, c)) for c in found["comparisons"]],
                "pairs": [Entry(**plain(e)) for e in found["pairs"]],
                "clips": {name: Clip(**plain(c)) for name, c in found["clips"].items()},
                "training": [Task(**t) for t in found["training"]],
                "sheets": {name: [Task(**t) for t in tasks] for name, tasks in found["sheets"].items()},
            }
        )
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; expected a folder made by `annotate build`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a key of this version of `annotate build` ({error})") from error


def page_task(key: Key, task: Task) -> dict[str, Any]:
    """What the page gets to know of a task; only training tells which side is better, because the page explains it."""
    entry = key.pairs[task.pair]
    shown = {"task": task.id, "prompt": entry.prompt, "image": entry.image, "left": task.left, "right": task.right}
    return shown | ({"better": task.better, "reason": task.reason} if task.kind == "training" else {})


def page_data(key: Key, server: bool) -> dict[str, Any]:
    """The study as the page sees it; with a server the sheets come one at a time from there."""
    data = {
        "id": key.id,
        "title": key.title,
        "question": QUESTION,
        "reasons": [{"id": name, "label": LABELS[name], "help": text, "lesson": lesson} for name, (text, lesson) in REASONS.items()],
        "ties": key.ties,
        "aspect": key.width / key.height,
        "width": key.width,
        "server": server,
        "training": [page_task(key, t) for t in key.training],
    }
    if not server:
        data["sheets"] = {name: [page_task(key, t) for t in tasks] for name, tasks in key.sheets.items()}
    return data


def script(data: dict[str, Any]) -> str:
    """`data` as a script: a page opened from a file may load scripts, but no JSON."""
    return f"window.STUDY = {json.dumps(data)};\n"
