"""Sheets: who judges what on which side, how often, and what the page gets to know."""

import json
from collections import Counter, defaultdict

import pytest

from motif_jax.bench import study
from motif_jax.errors import UserError

MODELS = ("A", "B", "C")
COMPARISONS = [("A", "B"), ("A", "C"), ("B", "C")]


def dealt(pairs=30, annotators=5, per_sheet=20, repeats=2, gold=2, seed=0):
    media = {(i, m): f"{m}{i}.mp4" for i in range(pairs) for m in MODELS}
    golds = [(i, f"A{i}.mp4", f"damaged{i}.mp4") for i in range(8)]
    return study.deal(media, COMPARISONS, golds, annotators, per_sheet, repeats, gold, seed)


def lefts(tasks):
    """(model on the left, model on the right) of every pair task."""
    return [(t.left[0], t.right[0]) for t in tasks if t.kind == "pair"]


@pytest.mark.parametrize("annotators", [1, 2, 5])
def test_every_comparison_is_judged_by_as_many_people(annotators):
    sheets = dealt(annotators=annotators)
    judged = Counter((t.pair, *sorted((t.left[0], t.right[0]))) for tasks in sheets.values() for t in tasks if t.kind == "pair")
    assert len(judged) == 90 and set(judged.values()) == {annotators}
    copies = defaultdict(list)
    for name, tasks in sheets.items():
        copies[name.split("-")[0]].append({(t.pair, *sorted((t.left[0], t.right[0]))) for t in tasks if t.kind == "pair"})
    assert len(copies) == 5 and all(len(c) == annotators and all(x == c[0] for x in c) for c in copies.values())
    assert all(len(c[0]) == 18 for c in copies.values())
    ids = [t.id for tasks in sheets.values() for t in tasks]
    assert len(ids) == len(set(ids))


def test_sides_are_balanced_for_every_annotator_and_every_model():
    sheets = dealt(pairs=33)
    every = Counter(side for tasks in sheets.values() for side in lefts(tasks))
    for a, b in COMPARISONS:
        assert abs(every[a, b] - every[b, a]) <= 1  # 165 votes of each comparison: an odd number
        for tasks in sheets.values():
            own = Counter(lefts(tasks))
            assert abs(own[a, b] - own[b, a]) <= 1
    for pair in range(33):  # and every single video changes sides from copy to copy
        own = Counter(side for tasks in sheets.values() for side in lefts([t for t in tasks if t.pair == pair]))
        assert sorted(own[c] for c in COMPARISONS for c in (c, c[::-1])) == [2, 2, 2, 3, 3, 3]


def test_repeats_come_late_and_swapped_and_golds_have_a_right_answer():
    for tasks in dealt().values():
        at = {t.id: n for n, t in enumerate(tasks)}
        repeats = [t for t in tasks if t.kind == "repeat"]
        assert len(repeats) == 2
        for t in repeats:
            first = tasks[at[t.repeats]]
            assert (t.left, t.right, t.pair) == (first.right, first.left, first.pair)
            own = [t.id for t in tasks if t.kind == "pair"]
            assert own.index(first.id) < len(own) / 3  # from the first third of the comparisons
            before = [x for x in tasks[: at[t.id]] if x.kind == "pair"]
            assert len(before) >= len(own) / 2 - 1  # in the second half; an earlier repeat may count as one
        golds = [t for t in tasks if t.kind == "gold"]
        assert sorted(t.better for t in golds) == ["left", "right"]
        assert all((t.right if t.better == "left" else t.left).startswith("damaged") for t in golds)


def test_golds_are_anywhere_on_a_sheet():
    """Of 50 gold items on 25 sheets of 22 tasks some lie in the first third, some in the middle and some in the last."""
    places = [3 * n // len(tasks) for tasks in dealt().values() for n, t in enumerate(tasks) if t.kind == "gold"]
    assert len(places) == 50 and all(places.count(third) >= 5 for third in range(3))


def test_order_differs_between_annotators_and_follows_the_seed():
    one, same, other = dealt(seed=1), dealt(seed=1), dealt(seed=2)

    def shown(sheets):
        return [[(t.pair, t.left, t.right) for t in tasks] for tasks in sheets.values()]

    assert shown(one) == shown(same) != shown(other)
    assert {t.id for t in one["1-1"]}.isdisjoint(t.id for t in same["1-1"])  # names are never predictable
    orders = {tuple((t.pair, *sorted((t.left, t.right))) for t in one[f"1-{copy}"] if t.kind == "pair") for copy in range(1, 6)}
    assert len(orders) == 5 and len(set(map(frozenset, orders))) == 1  # the same comparisons for everybody, in another order


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_tiny_studies_can_be_dealt(pairs):
    for tasks in dealt(pairs=pairs, per_sheet=1, annotators=2).values():
        kinds = Counter(t.kind for t in tasks)
        assert kinds == {"pair": 1, "repeat": 1, "gold": 2}
        at = {t.kind: n for n, t in enumerate(tasks)}
        assert at["repeat"] > at["pair"]


def test_comparisons_asked_for():
    assert study.comparisons(list(MODELS), ["all"]) == COMPARISONS
    assert study.comparisons(list(MODELS), ["B:A", "B:C"]) == [("B", "A"), ("B", "C")]
    for asked in (["A:D"], ["A:A"], ["A"], ["A:B", "B:A"], ["all", "A:B"]):
        with pytest.raises(UserError, match="--pairs"):
            study.comparisons(list(MODELS), asked)


def make_key(sheets) -> study.Key:
    clips = {t: study.Clip("secret-" + t[0], f"pair{t[1:-4]}") for tasks in sheets.values() for x in tasks for t in (x.left, x.right)}
    pairs = [study.Entry(f"pair{n}", f"image{n}", f"Sentence {n}.", f"{n}.jpg", "scene") for n in range(30)]
    training = [study.Task("t1", "training", 0, "A0.mp4", "B0.mp4", better="left", reason="object_motion")]
    return study.Key("id", "Title", False, ["A", "B"], COMPARISONS, 16, 8.0, 320, 320, pairs, clips, training, sheets)


def test_the_key_survives_its_file_and_the_page_learns_nothing_from_it(tmp_path):
    key = make_key(dealt())
    (tmp_path / "page").mkdir()
    study.save(key, tmp_path)
    assert study.load(tmp_path) == key
    script = (tmp_path / "page" / "study.js").read_text()
    data = json.loads(script.removeprefix("window.STUDY = ").removesuffix(";\n"))
    assert "secret" not in script and "gold" not in script and "repeat" not in script and "scene" not in script and "pair1" not in script
    assert {tuple(sorted(t)) for tasks in data["sheets"].values() for t in tasks} == {("image", "left", "prompt", "right", "task")}
    assert data["training"][0]["better"] == "left"
    assert "sheets" not in study.page_data(key, server=True)
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(UserError, match=r"key\.json"):
        study.load(tmp_path)
