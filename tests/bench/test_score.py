"""Folders of videos through the command: numbers, problems told, work not done twice; and the orders known of real models."""

import csv
import dataclasses
import html.parser
import json
import math
import pathlib
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from motif_jax.bench import score as module
from motif_jax.bench import score_page
from motif_jax.bench.arguments import Parser
from motif_jax.bench.standings import standings
from motif_jax.data.videos import save_video
from motif_jax.errors import UserError
from motif_jax.pairs import Pair, read_pairs

SIDE, FRAMES = 48, 6


def run(**options):
    """The command with --name=value options; a list gives an option several times."""
    parser = Parser()
    module.add_arguments(parser)
    given = [f"--{k}={one}" for k, v in options.items() for one in (v if isinstance(v, list) else [v])]
    module.run(parser.parse_args(given))
    return json.loads((options["output"] / "scores.json").read_text())


def texture(seed, side=2 * SIDE):
    rough = np.random.default_rng(seed).integers(0, 256, (side // 6, side // 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC))


def pan(seed, step):
    """A window that moves by `step` pixels a frame over the picture that starts as the pair's image."""
    return np.stack([texture(seed)[:SIDE, step * t : step * t + SIDE] for t in range(FRAMES)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four pairs over three images; `slow` has two seeds of everything, `fast` one as GIF, WebM, frames and mp4."""
    root = tmp_path_factory.mktemp("world")
    lines = []
    for n, image in enumerate((0, 0, 1, 2)):
        Image.fromarray(texture(image)[:SIDE, :SIDE]).save(root / f"image{image}.png")
        lines.append(json.dumps({"image": f"image{image}.png", "prompt": f"thing {n} moves", "id": f"pair{n}"}))
        for seed in (0, 1):
            (root / "slow").mkdir(exist_ok=True)
            save_video(root / "slow" / f"pair{n}_{seed}.mp4", pan(image, 1), 8)
    (root / "list.jsonl").write_text("\n".join(lines))
    (root / "fast" / "pair2").mkdir(parents=True)
    save_video(root / "fast" / "pair0.gif", pan(0, 4), 8)
    save_webm(root / "fast" / "pair1-0.webm", pan(0, 4))
    for t, frame in enumerate(pan(1, 4)):
        Image.fromarray(frame).save(root / "fast" / "pair2" / f"frame{t + 8}.png")  # frame10 comes after frame9
    save_video(root / "fast" / "thing 3 moves-0.mp4", pan(2, 4), 8)
    return root


def save_webm(path, frames):
    import av

    with av.open(str(path), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored")
    return output, run(list=world / "list.jsonl", videos=[f"slow={world / 'slow'}", f"fast={world / 'fast'}"], output=output)


def value(result, model, metric):
    return result["models"][model]["metrics"][metric]["value"]


def test_every_kind_of_file_is_read(scored):
    _, result = scored
    assert list(result["models"]) == ["slow", "fast", "static"]
    assert {m: (v["videos"], v["pairs"], v["images"]) for m, v in result["models"].items()} == {
        "slow": (8, 4, 3),
        "fast": (4, 4, 3),
        "static": (4, 4, 3),
    }
    assert result["problems"] == []
    assert value(result, "slow", "mean_flow") == pytest.approx(1, abs=0.15)
    assert value(result, "fast", "mean_flow") == pytest.approx(4, abs=0.6)
    assert value(result, "fast", "dynamic_degree") == 1 and value(result, "slow", "dynamic_degree") == 0
    # They all start at the image; GIF, H.264 and VP9 cost a little.
    assert value(result, "fast", "ssim0_image") > 0.93


def test_the_still_video_stands_beside_them(scored):
    _, result = scored
    for metric, expected in (("mean_flow", 0), ("dynamic_degree", 0), ("flicker", 1), ("ssim_image", 1), ("ssim_first_5", 1)):
        still = result["models"]["static"]["metrics"][metric]
        assert (still["value"], still["low"], still["high"]) == (expected, None, None)  # three images are no sample
    assert "ssim_first_10" not in result["models"]["static"]["metrics"]


def test_differences_are_of_pairs(scored):
    _, result = scored
    (found,) = [d for d in result["differences"] if (d["a"], d["b"], d["metric"]) == ("slow", "fast", "mean_flow")]
    assert found["value"] == pytest.approx(value(result, "slow", "mean_flow") - value(result, "fast", "mean_flow"))
    assert (found["a_larger"], found["b_larger"], found["pairs"]) == (0, 1, 4)


def test_tables(scored):
    output, result = scored
    with (output / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["model"], r["id"], r["seed"]) for r in rows[:3]] == [("slow", "pair0", "0"), ("slow", "pair0", "1"), ("slow", "pair1", "0")]
    assert len(rows) == 8 + 4 + 4 and {(r["frames"], r["width"], round(float(r["fps"]))) for r in rows} == {("6", "48", 8)}
    mean = np.mean([float(r["mean_flow"]) for r in rows if r["model"] == "slow"])
    assert mean == pytest.approx(value(result, "slow", "mean_flow"))
    with (output / "scores.csv").open() as file:
        table = {(r["model"], r["metric"]): r for r in csv.DictReader(file)}
    assert float(table["slow", "mean_flow"]["value"]) == value(result, "slow", "mean_flow") and table["slow", "mean_flow"]["low"] == ""


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.sources = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(scored):
    output, _ = scored
    page = Page((output / "index.html").read_text())
    assert all(source.startswith("data:image/") for source in page.sources) and "script" not in page.tags
    assert len(page.sources) == 2 + 3  # plots, and the strips of the first three pairs
    for part in ("thing 0 moves", "thing 2 moves", "static", "dynamic degree", "Nothing: every model has every pair"):
        assert part in page.text
    assert "thing 3 moves" not in page.text
    assert "slow minus fast" in page.text and "minus static" not in page.text  # differences to the still video: in the json only


def test_a_difference_is_bold_where_its_interval_excludes_zero():
    cells = [score_page._cell("mean_flow", {"value": 1.0, "low": low, "high": 2.0}, "+") for low in (0.5, 0.0, -0.5, None)]
    assert ["<b>+1.00</b>" in cell for cell in cells] == [True, False, False, False] and all("+1.00" in cell for cell in cells)


def test_work_is_not_done_twice(world, scored, tmp_path, monkeypatch):
    """The same command measures nothing again; a changed video, and no other, is. A line cut off in the cache costs that line."""
    output, before = scored
    (tmp_path / "cache.jsonl").write_bytes(b'5\n{"key": "k", "row": 5}\n\xff\n' + (output / "cache.jsonl").read_bytes()[:-40])
    measured = []
    inner = module.measure
    monkeypatch.setattr(module, "measure", lambda *a: measured.append(a[0].shape) or inner(*a))
    options = {"list": world / "list.jsonl", "videos": [f"slow={world / 'slow'}", f"fast={world / 'fast'}"]}
    assert run(output=output, **options) == before and not measured
    assert run(output=tmp_path, **options) == before and len(measured) == 1
    assert run(output=tmp_path, **options) == before and len(measured) == 1
    run(output=tmp_path, frames=4, **options)
    assert measured[1:] and {shape[0] for shape in measured[1:]} == {4}


def test_whatever_is_wrong_is_named_and_counted(world, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    good = (world / "slow" / "pair0_0.mp4").read_bytes()
    (model / "pair0_0.mp4").write_bytes(good)
    (model / "pair0.mp4").write_bytes(good)
    (model / "pair1_0.mp4").write_bytes(good[: len(good) // 2])
    (model / "pair2_0.mp4").write_bytes(b"")
    (model / "elephant_0.mp4").write_bytes(good)
    save_video(model / "pair3_0.mp4", pan(2, 1)[:1], 8)
    odd = tmp_path / "odd"
    odd.mkdir()
    save_video(odd / "pair0.mp4", pan(0, 1)[:, :32, :40], 8)
    save_video(odd / "pair1.mp4", pan(0, 1)[:4], 12)
    save_video(odd / "pair2.mp4", pan(1, 1), 8)
    result = run(list=world / "list.jsonl", videos=[f"model={model}", f"odd={odd}", f"slow={world / 'slow'}"], output=tmp_path / "out")
    problems = {(p["model"], p["kind"], p["name"]): p["detail"] for p in result["problems"]}
    assert set(problems) == {
        ("model", "double", "pair0_0.mp4"),
        ("model", "unknown", "elephant_0.mp4"),
        ("model", "broken", "pair1_0.mp4"),
        ("model", "broken", "pair2_0.mp4"),
        ("model", "broken", "pair3_0.mp4"),
        ("odd", "missing", "pair3"),
        ("odd", "other size", "pair0.mp4"),
        ("odd", "other length", "pair1.mp4"),
        ("odd", "other frame rate", "pair1.mp4"),
    }
    assert problems["model", "broken", "pair3_0.mp4"] == "too short: 1 frame"
    assert problems["odd", "other size", "pair0.mp4"] == "32x40, most have 48x48"
    counts = {(c["model"], c["kind"]): c["count"] for c in result["problem_counts"]}
    assert counts["model", "broken"] == 3 and sum(counts.values()) == len(problems)
    assert {m: v["videos"] for m, v in result["models"].items()} == {"model": 1, "odd": 3, "slow": 8, "static": 4}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "model: 3 broken" in page and "elephant_0.mp4" in page
    said = "--size=HEIGHTxWIDTH, --rate=FPS and --frames=N bring all to one"
    assert said in page and said in capsys.readouterr().out
    run(list=world / "list.jsonl", videos=[f"slow={world / 'slow'}"], output=tmp_path / "alike")
    assert said not in (tmp_path / "alike" / "index.html").read_text() and said not in capsys.readouterr().out


def test_rows_of_other_pairs_are_said_to_be(world, scored, tmp_path, capsys):
    """`part` has two of the four pairs; every pair of a model counts once, and broken ones do not. Alike models need no sentence."""
    shutil.copytree(world / "slow", tmp_path / "part")
    for name in ("pair2_0.mp4", "pair2_1.mp4", "pair3_0.mp4", "pair3_1.mp4"):
        (tmp_path / "part" / name).write_bytes(b"")
    videos = [f"part={tmp_path / 'part'}", f"slow={world / 'slow'}"]
    result = run(list=world / "list.jsonl", videos=videos, output=tmp_path / "out")
    said = "The rows are not of the same pairs (part 2, slow 4; all have 2) and cannot be compared"
    page = (tmp_path / "out" / "index.html").read_text()
    assert result["common_pairs"] == 2 and said in capsys.readouterr().out and said in page
    assert page.index(said) < page.index("<table")
    output, alike = scored
    assert alike["common_pairs"] == 4 and "not of the same pairs" not in (output / "index.html").read_text()


def test_a_model_of_broken_videos_keeps_its_row_and_nothing_but_broken_ones_is_an_error(world, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "pair0.mp4").write_bytes(b"no video")
    result = run(list=world / "list.jsonl", videos=[f"broken={broken}", f"slow={world / 'slow'}"], output=tmp_path)
    assert list(result["models"]) == ["broken", "slow", "static"]
    assert result["models"]["broken"] == {"videos": 0, "pairs": 0, "images": 0, "metrics": {}}
    assert "| broken | 0 | - |" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no video can be measured, the first being .*broken/pair0\.mp4: "):
        run(list=world / "list.jsonl", videos=f"broken={broken}", output=tmp_path)


def test_the_still_video_has_the_shape_of_the_first_model(world, tmp_path):
    for name, clip in (("first", pan(0, 1)), ("last", pan(0, 1)[:4, :32, :40])):
        (tmp_path / name).mkdir()
        save_video(tmp_path / name / "pair0.mp4", clip, 8)
    run(list=world / "list.jsonl", videos=[f"{n}={tmp_path / n}" for n in ("first", "last")], output=tmp_path)
    with (tmp_path / "videos.csv").open() as file:
        shapes = {r["model"]: (r["frames"], r["height"], r["width"]) for r in csv.DictReader(file)}
    assert shapes["static"] == shapes["first"] == ("6", "48", "48") and shapes["last"] == ("4", "32", "40")


def test_hidden_files_are_no_frames(world, tmp_path):
    """macOS leaves them on foreign disks."""
    shutil.copytree(world / "fast" / "pair2", tmp_path / "model" / "pair2")
    for folder in ("pair2", "pair3"):
        (tmp_path / "model" / folder).mkdir(exist_ok=True)
        (tmp_path / "model" / folder / "._frame8.png").write_bytes(b"Mac OS X")
    result = run(list=world / "list.jsonl", videos=f"model={tmp_path / 'model'}", output=tmp_path)
    assert result["models"]["model"]["videos"] == 1 and {p["kind"] for p in result["problems"]} == {"missing"}


def test_videos_can_be_brought_to_one_shape(world, tmp_path):
    result = run(list=world / "list.jsonl", videos=f"slow={world / 'slow'}", output=tmp_path, frames=4, size="32x40", workers=2)
    assert result["settings"]["size"] == [32, 40] and not result["problems"]
    with (tmp_path / "videos.csv").open() as file:
        assert {(r["frames"], r["height"], r["width"]) for r in csv.DictReader(file)} == {("4", "32", "40")}


def test_faster_videos_can_be_thinned(world, tmp_path, capsys):
    """The same videos at three times the frame rate: told, and with --rate measured like the slow ones; what cannot be thinned is named."""
    for model, pairs, rate in (("slow", 4, 8), ("quick", 3, 24), ("odd", 1, 20)):
        (tmp_path / model).mkdir()
        for n, image in enumerate((0, 0, 1, 2)[:pairs]):
            save_video(tmp_path / model / f"pair{n}.mp4", np.repeat(pan(image, 4), 1 if rate == 8 else 3, axis=0), rate)
    (tmp_path / "quick" / "pair3").mkdir()
    for t, frame in enumerate(np.repeat(pan(2, 4), 3, axis=0)):
        Image.fromarray(frame).save(tmp_path / "quick" / "pair3" / f"{t}.png")
    videos = [f"{model}={tmp_path / model}" for model in ("slow", "quick", "odd")]
    given = {"list": world / "list.jsonl", "videos": videos, "fps": 24, "frames": 6}

    apart = run(output=tmp_path / "apart", **given)
    assert "other frame rate" in {p["kind"] for p in apart["problems"]}
    assert "--rate=FPS" in capsys.readouterr().out and "--rate=FPS" in (tmp_path / "apart" / "index.html").read_text()
    assert value(apart, "quick", "ssim_image") > value(apart, "slow", "ssim_image") + 0.1

    thinned = run(output=tmp_path / "thinned", rate=8, **given)
    assert thinned["settings"]["rate"] == 8 and thinned["models"]["quick"]["videos"] == 4
    assert [(p["model"], p["kind"], p["detail"]) for p in thinned["problems"] if p["kind"] != "missing"] == [
        ("odd", "broken", "other frame rate: 20 frames a second, no whole multiple of --rate=8; choose a common divisor")
    ]
    for metric, near in (("mean_flow", 0.1), ("flicker", 0.005), ("smoothness", 0.005), ("ssim_image", 0.01), ("ssim_first_5", 0.01)):
        assert value(thinned, "quick", metric) == pytest.approx(value(thinned, "slow", metric), abs=near), metric


def test_results_from_before_there_was_a_rate_are_used_again():
    before = [1, {"flow": {"flow": "dis"}, "clip": "", "frames": 4, "size": (32, 40), "frame_rate": 8.0}]
    settings = module.Settings({"flow": "dis"}, "", 4, (32, 40))
    assert settings.key == json.dumps(before, sort_keys=True) != dataclasses.replace(settings, rate=8.0).key


def test_an_image_of_the_list_that_cannot_be_read_is_named(world, tmp_path):
    """And not called a fault of the video alone."""
    shutil.copytree(world, tmp_path / "world")
    image = tmp_path / "world" / "image0.png"
    image.write_bytes(image.read_bytes()[:150])
    result = run(list=tmp_path / "world" / "list.jsonl", videos=f"fast={tmp_path / 'world' / 'fast'}", output=tmp_path)
    details = {p["name"]: p["detail"] for p in result["problems"]}
    assert list(details) == ["pair0.gif", "pair1-0.webm"]
    assert all(detail.startswith(f"unreadable image: {image}: is no image: ") for detail in details.values())


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    """Whatever else is in their names, and in one order where numbers are alike."""
    names = ["1.png", "001.jpg", "001.png", "\u0663.png", "frame9.png", "frame10.png"]
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in module._frame_files(tmp_path)] == ["001.jpg", "001.png", "1.png", "frame9.png", "frame10.png", "\u0663.png"]


@pytest.mark.parametrize("name", ["_ours", "$x", "a very long name that tells all the settings of a run"])
def test_every_model_is_in_the_legend(monkeypatch, name):
    figures = []
    monkeypatch.setattr(score_page.html, "plot", lambda figure, *_: figures.append(figure) or "")
    metrics = {"metrics": {"ssim_first_1": {"value": 0.5}}}
    score_page._decay({name: metrics, "static": metrics})
    first, second = (text.get_text() for text in figures[0].legends[0].get_texts())
    assert second == "static" and len(first) < 40 and name.startswith(first.rstrip("\u2026"))


def test_names_are_written_as_text(world, tmp_path):
    """A model called like a tag, with a dollar sign that a plot would read as a formula."""
    result = run(list=world / "list.jsonl", videos=f"<script>$x={world / 'slow'}", output=tmp_path)
    assert "<script>$x" in result["models"] and "script" not in Page((tmp_path / "index.html").read_text()).tags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"videos": "slow"}, "must be NAME=DIR"),
        ({"videos": ["a={w}/slow", "a={w}/fast"]}, "every NAME once"),
        ({"videos": "static={w}/slow"}, "is taken"),
        ({"videos": "a={w}/none"}, "is no folder"),
        ({"videos": "a={w}"}, "no file there is named by a pair of the list, such as pair0.mp4"),
        ({"size": "big"}, "argument --size: big: must be N or HEIGHTxWIDTH, each from 11 to 4096 in steps of 1"),
        ({"frames": 1}, "argument --frames: 1: must be at least 2"),
        ({"rate": 0}, "argument --rate: 0: must be positive and finite"),
        ({"fps": "inf"}, "argument --fps: inf: must be positive and finite"),
        ({"flow": "raft_small"}, "needs --flow_weights"),
        ({"flow_weights": "x"}, "DIS has none"),
        ({"flow": "raft_small", "flow_weights": "none.pth"}, "no RAFT weights at none.pth"),
    ],
)
def test_bad_arguments(world, tmp_path, options, message):
    options = {"list": world / "list.jsonl", "videos": f"a={world / 'slow'}", "output": tmp_path} | options
    if "videos" in options and not isinstance(options["videos"], list):
        options["videos"] = [options["videos"]]
    options["videos"] = [v.format(w=world) for v in options["videos"]]
    with pytest.raises(UserError, match=message):
        run(**options)


def test_intervals_cover_and_know_of_shared_images():
    """Means of 40 images with 4 pairs each whose values are mostly the image's: 95 % intervals over images hold the truth, 0, in about 95 %
    of 200 draws; over pairs they would in far fewer."""
    rng = np.random.default_rng(0)
    held, naive = 0, 0
    for draw in range(200):
        image = np.repeat(rng.normal(size=40), 4)
        values = image + 0.3 * rng.normal(size=160)
        rows = [{"model": "m", "id": str(n), "mean_flow": v} for n, v in enumerate(values)]
        found = standings(rows, {str(n): str(n // 4) for n in range(160)}, seed=draw)["models"]["m"]["metrics"]["mean_flow"]
        held += found["low"] <= 0 <= found["high"]
        low, high = stats.t.interval(0.95, 159, values.mean(), stats.sem(values))
        naive += low <= 0 <= high
    # Three standard deviations of 200 draws are 4.6 %, and percentile intervals of 40 clusters are some 1.5 % too narrow.
    assert 0.89 <= held / 200 <= 1 and naive / 200 < 0.8


def test_seeds_are_averaged_and_gaps_left_out():
    rows = [
        {"model": "m", "id": "a", "mean_flow": 1.0},
        {"model": "m", "id": "a", "mean_flow": 3.0},
        {"model": "m", "id": "b", "mean_flow": 8.0},
    ]
    rows += [{"model": "n", "id": "b", "mean_flow": 5.0}, {"model": "n", "id": "c", "mean_flow": math.nan}]
    result = standings(rows, dict.fromkeys("abc", "image"))
    assert result["models"]["m"]["metrics"]["mean_flow"] == {"value": 5, "low": None, "high": None, "pairs": 2}  # one image
    assert result["models"]["n"]["metrics"]["mean_flow"]["pairs"] == 1
    (gap,) = result["differences"]
    assert (gap["value"], gap["pairs"], gap["a_larger"], gap["b_larger"]) == (3, 1, 1, 0)
    lamps = [{"model": "m", "id": i, "luma_flicker": v} for i, v in zip("abc", (1.0, 2.0, 300.0), strict=True)]
    assert standings(lamps, dict(zip("abc", "abc", strict=True)))["models"]["m"]["metrics"]["luma_flicker"]["value"] == 2


@pytest.mark.parametrize("images", [4, 5])
def test_a_few_images_have_no_interval(images):
    rows = [{"model": m, "id": str(n), "mean_flow": x * n, "luma_flicker": x * n} for m, x in (("m", 1), ("n", 2)) for n in range(12)]
    result = standings(rows, {str(n): str(n % images) for n in range(12)})
    for found in (*result["models"]["m"]["metrics"].values(), *result["differences"]):
        assert (found["low"] is None) == (found["high"] is None) == (images < 5)
        assert images < 5 or found["low"] < found["value"] < found["high"]


def test_no_video_that_moves_is_not_none_of_all():
    """0 of 20 images, twice each: Wilson's interval of 0 of 20 from scipy, but 0 for the still video, which cannot move."""
    rows = [{"model": m, "id": str(n), "dynamic_degree": 0.0, "mean_flow": 0.0} for m in ("m", "n", "static") for n in range(40)]
    result = standings(rows, {str(n): str(n // 2) for n in range(40)})
    high = stats.binomtest(0, 20).proportion_ci(0.95, method="wilson").high
    limits = {m: [v["metrics"]["dynamic_degree"][k] for k in ("low", "high")] for m, v in result["models"].items()}
    assert limits == {"m": [0, pytest.approx(high)], "n": [0, pytest.approx(high)], "static": [0, 0]}
    (gap,) = [d for d in result["differences"] if (d["a"], d["b"], d["metric"]) == ("m", "n", "dynamic_degree")]
    assert [gap["low"], gap["high"]] == [pytest.approx(-high), pytest.approx(high)]


def test_differences_know_of_shared_images():
    """20 images whose four pairs differ alike: the interval of a difference is twice that of as many pairs of single images."""
    gaps = np.repeat(np.random.default_rng(0).normal(size=20), 4)
    rows = [{"model": m, "id": str(n), "mean_flow": x * gaps[n]} for m, x in (("m", 1.0), ("n", 0.0)) for n in range(80)]
    widths = []
    for shared in (4, 1):
        (gap,) = standings(rows, {str(n): str(n // shared) for n in range(80)})["differences"]
        widths.append(gap["high"] - gap["low"])
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.1)  # the standard error of either width is some 3 %


def decoded(path):
    """Straight through PyAV."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def likeness(a, b):
    """SSIM of OpenCV's grey, by scikit-image."""
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (a, b)]
    return structural_similarity(*grey, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)


def test_real_videos_against_numpy_and_scikit_image(shared):
    """Every flow-free number of one clip of each model."""
    root = shared / "ti2v_bench"
    pair = next(p for p in read_pairs(root) if p.id == "dog4_a_dog_standing_and_waving_tail")
    image = np.asarray(Image.open(pair.image))

    def nowhere(frames):
        return np.zeros((len(frames) - 1, *frames.shape[1:3], 2), np.float32)

    for model in ("motif", "dynamicrafter", "cinemo", "cond_leak"):
        path = root / "videos" / model / f"{pair.id}_0.mp4"
        row = module.measure_video(pair, path, module.Settings({}), nowhere)
        x = decoded(path)
        assert (row["frames"], row["height"], row["width"], row["fps"]) == (16, 320, 320, 8)
        luma = np.array([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY).mean() for f in x])
        expected = {
            "flicker": 1 - np.abs(np.diff(x.astype(float), axis=0)).mean() / 255,
            "luma_flicker": np.abs(luma[2:] - 2 * luma[1:-1] + luma[:-2]).mean(),
            "ssim0_image": likeness(x[0], image),
            "ssim_image": np.mean([likeness(f, image) for f in x]),
            "best_ssim": max(likeness(f, image) for f in x),
            "best_frame": np.argmax([likeness(f, image) for f in x]),
            **{f"ssim_first_{k}": likeness(x[k], x[0]) for k in (1, 5, 10, 15)},
            "ssim_first": np.mean([likeness(f, x[0]) for f in x[1:]]),
            "psnr0_image": peak_signal_noise_ratio(image, x[0]),
            "psnr_image": np.mean([peak_signal_noise_ratio(image, f) for f in x]),
            "psnr_first": np.mean([peak_signal_noise_ratio(x[0], f) for f in x[1:]]),
        }
        for name, number in expected.items():
            assert row[name] == pytest.approx(number, abs=1e-3), (model, name)


@pytest.mark.slow
def test_the_known_orders_of_real_models(shared, tmp_path):
    """And the table of docs/evaluate.md, to one unit of the last digit."""
    root = shared / "ti2v_bench"
    pairs = [Pair(p.id, p.image, p.prompt) for p in read_pairs(root) if (root / "videos/motif" / f"{p.id}_0.mp4").exists()]
    lines = [json.dumps({"id": p.id, "image": str(p.image), "prompt": p.prompt}) for p in pairs]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    models = ("dynamicrafter", "cond_leak", "cogvideox", "motif", "cinemo")
    result = run(list=tmp_path / "list.jsonl", videos=[f"{m}={root / 'videos' / m}" for m in models], output=tmp_path)
    assert {m: v["videos"] for m, v in result["models"].items()} == dict.fromkeys([*models, "static"], 26)

    table = (pathlib.Path(__file__).parents[2] / "docs" / "evaluate.md").read_text().split("\n| model | dynamic degree %")[1]
    shown = {c[0]: c[1:] for line in table.split("\n\n")[0].splitlines()[2:] if (c := [x.strip() for x in line.strip("|").split("|")])}
    columns = (
        "dynamic_degree mean_flow top5_flow residual_flow camera_shift flicker luma_flicker smoothness warp_error ssim0_image ssim_image"
    )
    for name, cells in shown.items():
        model = name.lower().replace("-", "_")
        numbers = [*zip(columns.split(), cells[:-1], strict=True)]
        numbers += [(f"ssim_first_{k}", x) for k, x in zip((1, 5, 10, 15), cells[-1].split(" / "), strict=True)]
        for metric, text in numbers:
            unit = 10.0 ** -len(text.partition(".")[2])  # of the last digit: another processor may round otherwise
            assert value(result, model, metric) * score_page.BY_NAME[metric].scale == pytest.approx(float(text), abs=unit), (name, metric)
    assert len(shown) == 6

    def order(metric, *names):
        return [value(result, name, metric) for name in names]

    flow = order("mean_flow", "dynamicrafter", "cond_leak", "motif", "cinemo", "static")
    assert flow == sorted(flow, reverse=True) and flow[-1] == 0
    likeness = order("ssim_image", "static", "cinemo", "motif", "cond_leak", "dynamicrafter")
    assert likeness == sorted(likeness, reverse=True) and likeness[0] == 1
    for metric in ("top5_flow", "dynamic_degree"):
        crafter, motif, cinemo, still = order(metric, "dynamicrafter", "motif", "cinemo", "static")
        assert crafter > motif >= cinemo >= still == 0
    for metric in ("flicker", "smoothness"):
        crafter, motif, cinemo, still = order(metric, "dynamicrafter", "motif", "cinemo", "static")
        assert crafter < motif < cinemo < still == 1
    # DynamiCrafter and Cond-Leak do not start at the image, and the best frame hides it.
    for model in ("dynamicrafter", "cond_leak"):
        assert value(result, model, "ssim0_image") < 0.75 < 0.85 < value(result, model, "best_ssim")
    # Cond-Leak and DynamiCrafter move the camera, MotiF its objects.
    assert value(result, "motif", "camera_shift") < 0.5 * value(result, "cond_leak", "camera_shift")
