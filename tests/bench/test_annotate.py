"""`annotate build` and `export`: what a study folder holds, what it gives away, and which mistakes it names."""

import csv
import json
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from motif_jax.bench import __main__ as bench
from motif_jax.bench import study, study_clips
from motif_jax.data import videos


def annotate(*arguments) -> None:
    bench.main(["annotate", *map(str, arguments)])


def probe(path) -> tuple:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        metadata = {**container.metadata, **stream.metadata}
        return stream.codec_context.name, stream.width, stream.height, stream.frames, stream.average_rate, tuple(sorted(metadata.items()))


def test_all_videos_differ_in_nothing_but_what_they_show(small_study):
    files = sorted((small_study / "page" / "media").iterdir())
    clips = [f for f in files if f.suffix == ".mp4"]
    assert len(clips) == 6 + 4 + 3 and len(files) == len(clips) + 3
    assert len({probe(f) for f in clips}) == 1
    codec, width, height, frames, rate, _ = probe(clips[0])
    assert (codec, width, height, frames, rate) == ("h264", 64, 64, 8, 8)
    assert {f.stat().st_mtime for f in files} == {0}
    assert all(len(f.stem) == 16 and set(f.stem) <= set("0123456789abcdef") for f in files)


def test_clips_show_what_the_key_says(small_study, material):
    """The first second of both systems, the faster one thinned to 8 frames a second; 30 dB: two generations of H.264 at crf 17."""
    key = study.load(small_study)
    originals = {
        "zebrafish": lambda p: videos.read_clip(material.folder / "zebrafish" / f"{p}_0.mp4", 8, 64, 64, lambda _: (0, 1)).frames,
        "quokka": lambda p: videos.read_clip(material.folder / "quokka" / f"{p}.gif", 8, 64, 64, lambda _: (0, 2)).frames,
    }
    checked = 0
    for name, clip in key.clips.items():
        shown = videos.read_clip(small_study / "page" / "media" / name, 8, 64, 64, lambda _: (0, 1)).frames
        wanted = originals[clip.model](clip.pair)
        mse = np.square(shown.astype(float) - wanted).mean()
        psnr = 10 * math.log10(255**2 / mse)
        assert (psnr > 30) == (not clip.damage), (clip, psnr)
        checked += not clip.damage
    assert checked == 6


def test_nothing_that_is_shipped_names_a_system(small_study, material):
    secrets = [*material.systems, "pair0", "squares", str(material.folder), "secret"]
    for path in (small_study / "page").rglob("*"):
        assert not any(s in path.name for s in secrets)
        if path.is_file():
            data = path.read_bytes()
            assert not [s for s in secrets if s.encode() in data], path
    key = json.loads((small_study / "key.json").read_text())
    assert key["models"] == list(material.systems)


def test_examples_and_gold_items_have_a_damaged_video(small_study):
    key = study.load(small_study)
    assert [t.reason for t in key.training] == list(study.REASONS) and {t.better for t in key.training} == {"left", "right"}
    golds = [t for tasks in key.sheets.values() for t in tasks if t.kind == "gold"]
    for t in [*key.training, *golds]:
        damaged, sound = (t.right, t.left) if t.better == "left" else (t.left, t.right)
        assert key.clips[damaged].damage and not key.clips[sound].damage
        assert key.clips[damaged].pair == key.clips[sound].pair == key.pairs[t.pair].id
    assert len({key.clips[t.left].model for t in key.training}) == 2


def test_golds_are_of_all_systems_and_the_lowest_seed_is_shown(material, tmp_path):
    """pair0 has a second seed that is a still."""
    shutil.copytree(material.folder / "zebrafish", tmp_path / "zebrafish")
    clip = videos.read_video(tmp_path / "zebrafish" / "pair0_0.mp4").frames
    videos.save_video(tmp_path / "zebrafish" / "pair0_1.mp4", np.repeat(clip[:1], len(clip), axis=0), 8)
    given = [f"--videos={name}={folder / name}" for name, folder in (("zebrafish", tmp_path), ("quokka", material.folder))]
    annotate("build", f"--list={material.folder / 'list.jsonl'}", *given, f"--output={tmp_path / 'study'}", "--size=64", "--no_training")
    key = study.load(tmp_path / "study")
    assert {clip.model for clip in key.clips.values() if clip.damage} == {"zebrafish", "quokka"}
    (name,) = (n for n, c in key.clips.items() if (c.model, c.pair, c.damage) == ("zebrafish", "pair0", ""))
    shown = videos.read_video(tmp_path / "study" / "page" / "media" / name).frames.astype(float)
    assert np.abs(shown[-1] - shown[0]).mean() > 2


def test_an_interrupt_does_not_wait_for_all_videos(monkeypatch):
    """The first of many jobs is interrupted; the others go on when the pool has been told to shut down."""
    told, done, shutdown = threading.Event(), [], ThreadPoolExecutor.shutdown

    def job(n):
        if n == 0:
            raise KeyboardInterrupt
        told.wait()
        done.append(n)

    def shut(pool, wait=True, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        told.set()
        shutdown(pool)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut)
    with pytest.raises(KeyboardInterrupt):
        study_clips.parallel(job, [(n,) for n in range(4 * os.cpu_count())])
    assert len(done) <= os.cpu_count()


@pytest.mark.parametrize("name", ["recoloured", "frozen", "shuffled", "coarse", "torn"])
def test_damage_is_damage(name):
    """Every damage leaves size and type, and changes a moving picture by far more than an encoder does."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 48, 40, 3), np.uint8)
    coloured = np.concatenate([np.roll(frames, 5 * t, axis=2) for t in range(8)])
    for frames in (coloured, coloured[..., :1].repeat(3, axis=-1)):
        out = getattr(study_clips, name)(frames, np.random.default_rng(1))
        assert out.shape == frames.shape and out.dtype == np.uint8
        assert np.abs(out.astype(float) - frames).mean() > 10
        if name == "frozen":
            assert (out == frames[0]).all()
        if name == "shuffled":
            assert sorted(f.tobytes() for f in out) == sorted(f.tobytes() for f in frames)


def test_three_systems_all_against_all(material, tmp_path):
    options = (f"--videos=third={material.folder / 'quokka'}", "--size=32x48", "--annotators=3", "--no_training", "--gold=0", "--ties")
    key = study.load(material.build(tmp_path / "study", *options))
    assert key.comparisons == [("zebrafish", "quokka"), ("zebrafish", "third"), ("quokka", "third")]
    assert not key.training and key.ties and sum(t.kind == "pair" for tasks in key.sheets.values() for t in tasks) == 3 * 3 * 3
    assert probe(next((tmp_path / "study" / "page" / "media").glob("*.mp4")))[1:3] == (48, 32)


@pytest.mark.parametrize("order", [("still", "moves"), ("moves", "still")])
def test_examples_against_still_videos_show_a_difference(material, tmp_path, order):
    """A system that moves nowhere, the image repeated for one: its video frozen or shuffled is the same video."""
    (tmp_path / "still").mkdir()
    for n in range(3):
        clip = videos.read_video(material.folder / "zebrafish" / f"pair{n}_0.mp4").frames
        videos.save_video(tmp_path / "still" / f"pair{n}.mp4", np.repeat(clip[:1], len(clip), axis=0), 8)
    folders = {"still": tmp_path / "still", "moves": material.folder / "zebrafish"}
    given = [f"--videos={name}={folders[name]}" for name in order]
    annotate("build", f"--list={material.folder / 'list.jsonl'}", *given, f"--output={tmp_path / 'study'}", "--size=64")
    for task in study.load(tmp_path / "study").training:
        left, right = (videos.read_video(tmp_path / "study/page/media" / name).frames.astype(float) for name in (task.left, task.right))
        assert np.abs(left - right).mean() > 2, task.reason


def test_images_of_one_name_in_two_folders_are_two_images(material, tmp_path):
    lines = []
    for n in range(3):
        (tmp_path / "ab"[n % 2]).mkdir(exist_ok=True)
        shutil.copy(material.folder / f"image{n}.png", tmp_path / "ab"[n % 2] / "1.png")
        lines.append(json.dumps({"id": f"pair{n}", "image": f"{'ab'[n % 2]}/1.png", "prompt": "It moves."}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    key = study.load(material.build(tmp_path / "study", f"--list={tmp_path / 'list.jsonl'}", "--size=32", "--no_training", "--gold=0"))
    assert [e.image_id for e in key.pairs] == ["a/1", "b/1", "a/1"] and len({e.image for e in key.pairs}) == 2
    (tmp_path / "b" / "1.png").rename(tmp_path / "a" / "1.jpg")  # the reader goes by what is in a file
    (tmp_path / "list.jsonl").write_text("\n".join(lines).replace("b/1.png", "a/1.jpg"))
    key = study.load(material.build(tmp_path / "other", f"--list={tmp_path / 'list.jsonl'}", "--size=32", "--no_training", "--gold=0"))
    assert [e.image_id for e in key.pairs] == ["1.png", "1.jpg", "1.png"]


def test_pairs_without_any_video_are_left_out(material, tmp_path, capsys):
    """As with the published samples: 51 of the benchmark's 320 pairs."""
    lines = (material.folder / "list.jsonl").read_text()
    longer = material.folder / "longer.jsonl"
    longer.write_text(lines + '\n{"id": "other", "image": "image0.png", "prompt": "No video shows this."}')
    key = study.load(material.build(tmp_path / "study", f"--list={longer}", "--size=32", "--no_training"))
    assert [e.id for e in key.pairs] == ["pair0", "pair1", "pair2"]
    assert "1 of 4 pairs are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--list={folder}/none.jsonl"], "no folder has a video of any of the 1 pairs"),
        (["--frames=11"], r"--frames=11: .*pair0_0.mp4 has only 8"),
        (["--fps=5"], "no whole multiple"),
        (["--fps=16"], "no whole multiple"),
        (["--size=33"], "argument --size: 33: must be N or HEIGHTxWIDTH, each from 16 to 4096 in steps of 2"),
        (["--annotators=0"], "argument --annotators: 0: must be at least 1"),
        (["--pairs=zebrafish:nobody"], "--pairs=zebrafish:nobody"),
        (["--videos=quokka=elsewhere"], "every NAME once"),
        (["--output={folder}/list.jsonl/study"], "motif_jax.bench annotate: .*list.jsonl"),
        (["--frames=1"], "argument --frames: 1: must be at least 2"),
        (["--frames=-3"], "argument --frames: -3: must be at least 2"),
        (["--fps=0"], "argument --fps: 0: must be positive"),
        (["--seed=-1"], "argument --seed: -1: must be at least 0"),
        (["--videos=third={folder}/empty"], "3 of 9 videos are missing: third has none of pair0.*; make them, or take their pairs out"),
        (["--videos=third={folder}/broken"], r"2 of 9 files cannot be used: .*pair1.mp4: cannot be read"),
    ],
)
def test_mistakes_are_one_line(material, tmp_path, options, message):
    (material.folder / "empty").mkdir(exist_ok=True)
    (material.folder / "none.jsonl").write_text('{"id": "other", "image": "image0.png", "prompt": "No video shows this."}')
    broken = material.folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "pair0.mp4").write_bytes((material.folder / "zebrafish" / "pair0_0.mp4").read_bytes())
    for n in (1, 2):
        (broken / f"pair{n}.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=message):
        material.build(tmp_path / "study", *(o.format(folder=material.folder) for o in options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "rate", "option", "made"),
    [(3, 8, "--frames=3", (3, 8)), (8, 2, "--fps=2", (2, 2))],
)
def test_a_few_videos_do_not_shrink_a_study_unasked(material, tmp_path, frames, rate, option, made):
    """One of three is short, or slow: named, with the option that says it is meant. A system that is so throughout sets the format."""
    shutil.copytree(material.folder / "zebrafish", tmp_path / "third")
    odd = tmp_path / "third" / "pair1_0.mp4"
    clip = videos.read_video(odd).frames
    videos.save_video(odd, clip[:frames], rate)
    given = (f"--videos=third={tmp_path / 'third'}", "--size=32", "--no_training", "--gold=0")
    with pytest.raises(SystemExit, match=rf"1 of 9 videos would .* {option} \({odd}\); make them anew, .* or give {option} if"):
        material.build(tmp_path / "study", *given)
    key = study.load(material.build(tmp_path / "asked", *given, option))
    assert (key.frames, key.fps) == made
    for n in (0, 2):
        videos.save_video(tmp_path / "third" / f"pair{n}_0.mp4", clip[:frames], rate)
    key = study.load(material.build(tmp_path / "study", *given))
    assert (key.frames, key.fps) == made


def test_a_study_is_never_overwritten(small_study, material):
    with pytest.raises(SystemExit, match="exists already"):
        material.build(small_study)


def test_an_output_that_cannot_be_written_is_named(small_study, material, tmp_path):
    key = study.load(small_study)
    votes = tmp_path / "anna.json"
    votes.write_text(json.dumps({"study": key.id, "annotator": "anna", "votes": [answer(t) for t in key.sheets["1-1"]]}))
    output = votes / "out.csv"  # below a file
    given = (f"--study={small_study}", f"--votes={votes}", f"--output={output}")
    for call in (
        lambda: material.build(output),
        lambda: annotate("export", *given),
        lambda: bench.main(["report", *given, "--samples=100"]),
    ):
        with pytest.raises(SystemExit, match=r"--output=.*out\.csv: cannot be written"):
            call()


def test_an_unknown_command_is_one_line():
    with pytest.raises(SystemExit, match=r"^motif_jax\.bench: argument COMMAND: invalid choice: 'foo'"):
        bench.main(["foo"])


def answer(task, annotator="anna", sheet="1-1", **more) -> dict:
    record = {"task": task.id, "annotator": annotator, "sheet": sheet, "choice": "left", "reasons": ["text_alignment"]}
    return record | {"comment": "", "seconds": 12.5, "plays": 2, "time": "2026-01-01T00:00:00Z"} | more


def test_export_says_which_system_won(small_study, tmp_path):
    key = study.load(small_study)
    tasks = key.sheets["1-1"]
    downloaded = {"study": key.id, "annotator": "anna", "votes": [answer(t) for t in [*key.training, *tasks]]}
    (tmp_path / "anna.json").write_text(json.dumps(downloaded))
    for name in ("votes.csv", "votes.json"):  # the same file twice counts once
        twice = ["--votes", tmp_path / "anna.json", tmp_path / "anna.json"]
        annotate("export", f"--study={small_study}", *twice, f"--output={tmp_path / name}")
    (tmp_path / "nobody.json").write_text("[]")
    annotate(
        "export",
        f"--votes={tmp_path / 'anna.json'}",
        f"--votes={tmp_path / 'nobody.json'}",
        f"--study={small_study}",
        f"--output={tmp_path / 'several.json'}",
    )
    assert (tmp_path / "several.json").read_text() == (tmp_path / "votes.json").read_text()
    with pytest.raises(SystemExit, match=r"--output=.*nobody\.json: is one of --votes"):
        annotate("export", f"--study={small_study}", f"--votes={tmp_path / 'nobody.json'}", f"--output={tmp_path / 'nobody.json'}")
    rows = json.loads((tmp_path / "votes.json").read_text())
    with (tmp_path / "votes.csv").open(newline="") as file:
        assert [r["pair"] for r in csv.DictReader(file)] == [r["pair"] for r in rows]
    assert len(rows) == len(key.training) + len(tasks)
    for row, task in zip(rows[len(key.training) :], tasks, strict=True):
        assert row["task"] == task.id and row["kind"] == task.kind and row["seconds"] == 12.5
        assert (row["left"], row["right"]) == tuple(
            key.clips[n].model + (" (gold)" if key.clips[n].damage else "") for n in (task.left, task.right)
        )
        assert row["image"] == row["pair"].replace("pair", "image") and row["scenario"] == "squares"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comment": "x" * 10_000_000}, "comment: expected 0 to 1000"),
        ({"annotator": "x" * 10_000_000}, "annotator: expected 1 to 100"),
        ({"annotator": " "}, "annotator"),
        ({"annotator": "a\x00b"}, "no text"),
        ({"comment": "\ud800"}, "no text"),
        ({"task": "'; DROP TABLE votes"}, "no such task"),
        ({"task": ["x"]}, "no such task"),
        ({"sheet": "9-9"}, "sheet"),
        ({"choice": "tie"}, "choice: expected left or right"),
        ({"choice": ["left"]}, "choice"),
        ({"reasons": []}, "at least one"),
        ({"reasons": ["charm"]}, "reasons"),
        ({"reasons": "text_alignment"}, "reasons"),
        ({"plays": 0}, "watched to the end"),
        ({"plays": True}, "plays"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "12"}, "seconds"),
    ],
)
def test_a_downloaded_file_with_a_bad_vote_loses_that_vote_only(small_study, tmp_path, capsys, change, message):
    key = study.load(small_study)
    first, second = key.sheets["1-1"][:2]
    (tmp_path / "v.json").write_text(json.dumps({"study": key.id, "votes": [answer(first) | change, answer(second), "nonsense"]}))
    annotate("export", f"--study={small_study}", f"--votes={tmp_path / 'v.json'}", f"--output={tmp_path / 'out.json'}")
    said = capsys.readouterr().out
    assert message in said and len(said) < 2000
    assert [v["task"] for v in json.loads((tmp_path / "out.json").read_text())] == [second.id]
    assert "1 votes of 1 annotators; 1 of the study's 10 tasks are answered" in said


def test_names_in_tables_are_compared_composed_and_without_blanks(small_study, tmp_path, capsys):
    row = {"pair": "caf\u00e9", "annotator": "Zo\u00e9", "left": "MotiF", "right": "Cinemo", "choice": "left", "comment": " as typed "}
    other = row | {"pair": "cafe\u0301", "annotator": "Zoe\u0301 ", "left": " Cinemo", "right": "MotiF ", "choice": "right "}
    blank = row | {"annotator": " "}
    (tmp_path / "v.json").write_text(json.dumps([row, other, blank, other | {"annotator": "bob "}]))
    annotate("export", f"--study={small_study}", f"--votes={tmp_path / 'v.json'}", f"--output={tmp_path / 'out.json'}")
    said = capsys.readouterr().out
    assert "vote 2: second vote of Zo\u00e9 on pair caf\u00e9" in said and "vote 3: needs the columns" in said
    kept = json.loads((tmp_path / "out.json").read_text())
    assert [(v["annotator"], v["pair"], {v["left"], v["right"]}) for v in kept] == [
        (name, "caf\u00e9", {"MotiF", "Cinemo"}) for name in ("Zo\u00e9", "bob")
    ]
    assert kept[0]["comment"] == " as typed " and kept[1]["choice"] == "right"


@pytest.mark.parametrize(("separator", "named"), [(";", True), ("\t", True), (",", False)])
def test_a_table_without_commas_is_told_the_remedy(small_study, tmp_path, separator, named):
    """As spreadsheets write them in many countries."""
    lines = ["pair,annotator,left,right,choice", "1,anna,MotiF,Cinemo,left"]
    lines = lines if named else [line.replace(",", ", ") for line in lines]  # blanks are no part of a column's name
    (tmp_path / "v.csv").write_text("\n".join(lines).replace(",", separator))
    given = ("export", f"--study={small_study}", f"--votes={tmp_path / 'v.csv'}", f"--output={tmp_path / 'out.csv'}")
    if named:
        with pytest.raises(SystemExit, match=r"annotate: \S+v\.csv: its first line has no comma; separate columns by commas"):
            annotate(*given)
    else:
        annotate(*given)
        assert "1,anna,MotiF,Cinemo,left" in (tmp_path / "out.csv").read_text()


def test_a_study_with_decomposed_names_is_read_composed(small_study, tmp_path):
    """Its votes come out under the same names as a table with them is read."""
    found = json.loads((small_study / "key.json").read_text().replace("zebrafish", "ze\\u0301bra").replace('"pair0"', '"paire\\u0301"'))
    (tmp_path / "key.json").write_text(json.dumps(found))
    key = study.load(tmp_path)
    assert key.models == ["z\u00e9bra", "quokka"] == list(key.comparisons[0])
    assert {c.model for c in key.clips.values()} == set(key.models)
    assert {c.pair for c in key.clips.values()} == {e.id for e in key.pairs} == {"pair\u00e9", "pair1", "pair2"}
    assert study.comparisons(key.models, ["ze\u0301bra: quokka"]) == [("z\u00e9bra", "quokka")]


def test_votes_of_another_study_are_refused(small_study, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps({"study": "other", "votes": []}))
    with pytest.raises(SystemExit, match="another study"):
        annotate("export", f"--study={small_study}", f"--votes={tmp_path / 'v.json'}", f"--output={tmp_path / 'out.json'}")
