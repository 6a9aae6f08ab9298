"""Lists as people have them, and the names under which they keep their videos."""

import json

import numpy as np
import pytest
from PIL import Image

from motif_jax.errors import UserError
from motif_jax.pairs import Pair, find_videos, pair_id, read_pairs, vbench_names


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


@pytest.fixture
def benchmark(tmp_path):
    """Images in the benchmark's folder; the list is the test's."""
    for name in ("dog1.jpg", "dog2.jpg", "sky.png"):
        picture(tmp_path / "TI2V-Bench" / name)
    return tmp_path


HUGGING_FACE = [
    'image,prompt\nTI2V-Bench/dog1.jpg,A dog runs.\nTI2V-Bench/sky.png,"Clouds, slowly."\n',
    "image_path,text\nTI2V-Bench/dog1.jpg,A dog runs.\nTI2V-Bench/sky.png,Clouds, slowly.\n",  # unquoted commas
    'TI2V-Bench/dog1.jpg,A dog runs.\r\nTI2V-Bench/sky.png,"Clouds, slowly."\r\n',  # no header
    ',file,sentence\n0,dog1.jpg,A dog runs.\n1,sky.png,"Clouds,\nslowly."\n',  # numbered lines, unknown names, a broken line
    'prompt,image\nA dog runs.,dog1\n"Clouds, slowly.",sky\n',  # columns swapped, stems only
    '\ufeffid,prompt,scenario,image\ndog1_a_dog_runs,A dog runs.,,dog1.jpg\nsky_clouds_slowly,"Clouds, slowly.",,sky.png\n',
]


@pytest.mark.parametrize("text", HUGGING_FACE)
def test_the_benchmarks_own_layout(benchmark, text):
    (benchmark / "prompt.csv").write_text(text)
    (benchmark / "other.csv").write_text("")
    for given in (benchmark, benchmark / "prompt.csv"):
        found = read_pairs(given)
        assert [(p.id, p.image.name, p.prompt) for p in found] == [
            ("dog1_a_dog_runs", "dog1.jpg", "A dog runs."),
            ("sky_clouds_slowly", "sky.png", "Clouds, slowly."),
        ]
        assert all(p.image.is_file() for p in found)


def test_jsonl(benchmark):
    rows = [{"image": "dog1", "image_file": "TI2V-Bench/dog1.jpg", "prompt": "run", "id": "a", "scenario": "dog"}]
    rows += [{"image": "TI2V-Bench/sky.png", "prompt": " Clouds\n drift. ", "id": None, "scenario": None}]
    rows[1]["prompt"] += "\u2028Down.\x85"  # line ends of Unicode, not of the file
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    (benchmark / "list.jsonl").write_bytes("\r\n\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    first, second = read_pairs(benchmark)
    assert (first.id, first.prompt, first.scenario) == ("a", "run", "dog")
    assert (second.id, second.prompt, second.scenario) == ("sky_clouds_drift_down", "Clouds drift. Down.", "")


def test_values_that_are_no_text_are_refused(benchmark):
    """But for a number as id."""
    lines = ['{"image": "sky", "prompt": ["x"]}', '{"image": "sky", "prompt": "x", "id": 7}', '{"image": 5, "prompt": "x"}']
    (benchmark / "list.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r'line 1: prompt must be text, not \["x"\]; line 3: image must be text, not 5$'):
        read_pairs(benchmark)
    (benchmark / "list.jsonl").write_text(lines[1])
    assert read_pairs(benchmark)[0].id == "7"


def test_every_bad_line_is_told(benchmark):
    lines = ['{"image": "dog1"}', "nonsense", '{"prompt": "x"}', '{"image": "cat", "prompt": "x"}', '{"image": "sky", "prompt": " "}']
    lines += ['{"image": "sky", "prompt": "x", "id": "a/b"}'] + 2 * ['{"image": "sky", "prompt": "x", "id": "twice"}']
    lines += [r'{"image": "sky", "prompt": "x", "id": "a\u0000"}', r'{"image": "sky", "prompt": "\ud800"}']
    lines += ['{"image": null, "prompt": "x"}', '{"image": "sky", "prompt": null}']
    (benchmark / "list.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as told:
        read_pairs(benchmark)
    for part in (
        "line 1: no key 'prompt'",
        "line 2: Expecting value",
        "line 3: no key 'image'",
        "line 4: no image 'cat'",
        "line 5: no prompt",
        "line 6: id 'a/b' is no file name",
        "line 9: id 'a\\x00' holds control characters",
        "line 10: prompt '\\ud800' holds control characters",
        "line 11: no image ''",
        "line 12: no prompt",
        "1 more",
    ):
        assert part in str(told.value)


def test_lists_and_videos_are_files_of_this_machine(tmp_path):
    for read in (read_pairs, lambda url: find_videos(url, [])):
        with pytest.raises(UserError, match=r"^gs://bucket/list\.jsonl: must be a path of this machine, not a URL"):
            read("gs://bucket/list.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "", "needs a column of images and one of prompts"),
        ("list.csv", "image,prompt\n", "holds no pair"),
        ("list.csv", "gone.png,It moves.\n{image},It stays.\n", "line 1: no image 'gone.png'"),  # no header
        ("list.csv", "image,prompt,id\n{image},It moves.,x\n{image},It stays.\n", "line 3: 2 columns, the header has 3"),
        ("list.csv", "image,id,prompt\n{image},x\n", "line 2: 2 columns, the header has 3"),
        ("list.csv", "image,prompt,id\n{image},It moves.,.x\n", r"line 2: id '\.x' is no file name that is shown$"),
        ("list.csv", "image,prompt\n{image},x\ngs://b/a.png,y\n", "line 3: no image 'gs://b/a.png'; copy it to this machine$"),
        ("list.jsonl", "", "holds no pair"),
        ("list.jsonl", "[1]", "line 1: is no object with the keys image and prompt"),
        ("list.jsonl", "here.png,x\n" * 300, r"line 10: Expecting[^;]*; and 290 more$"),
        ("list.txt", "x", "a folder needs a prompt.csv, or one .csv or .jsonl file; found none"),
    ],
)
def test_lists_that_are_none(tmp_path, name, text, message):
    picture(tmp_path / "here.png")
    (tmp_path / name).write_text(text.format(image="here.png"))
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "nothing.csv")


@pytest.mark.parametrize("odd", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_lines_that_json_cannot_hold_are_named(tmp_path, odd):
    picture(tmp_path / "here.png")
    (tmp_path / "list.jsonl").write_text('{"image": "here.png", "prompt": "x", "id": ' + odd + "}")
    with pytest.raises(UserError, match="line 1: "):
        read_pairs(tmp_path / "list.jsonl")


def test_an_empty_sentence_is_refused_unless_it_will_do(tmp_path):
    picture(tmp_path / "here.png")
    (tmp_path / "list.jsonl").write_text('{"image": "here.png", "prompt": " ", "id": "1"}')
    with pytest.raises(UserError, match="line 1: no prompt"):
        read_pairs(tmp_path / "list.jsonl")
    assert read_pairs(tmp_path / "list.jsonl", blank=True) == [Pair("1", tmp_path / "here.png", "")]


def test_long_sentences_still_make_different_file_names(tmp_path):
    picture(tmp_path / "here.png")
    (tmp_path / "list.csv").write_text(f"here.png,{'word ' * 80}\n{'x' * 400},A path that is too long.\nhere,It stays.\n")
    with pytest.raises(UserError, match=r"line 2: no image 'x*'$"):
        read_pairs(tmp_path)
    ids = {pair_id("image", "word " * 100 + last) for last in ("left.", "right.")}
    assert len(ids) == 2 and all(len(i.encode()) <= 200 for i in ids)
    assert len(pair_id("image", "動" * 300).encode()) <= 200


PAIRS = [
    Pair("dog1_a_dog_runs", "dog1.jpg", "A dog runs."),
    Pair("dog2_a_dog_runs", "dog2.jpg", "A dog runs."),
    Pair("clip_1", "sky.png", "Up/down."),
]


def test_file_names(tmp_path):
    from pathlib import Path

    pairs = [Pair(p.id, Path(p.image), p.prompt) for p in PAIRS]
    assert vbench_names(pairs) == ["A dog runs. (dog1)", "A dog runs. (dog2)", "Up down."]
    expected = {
        "dog1_a_dog_runs_0.mp4": ("dog1_a_dog_runs", 0),  # the project page
        "dog1_a_dog_runs-12.webm": ("dog1_a_dog_runs", 12),
        "dog2_a_dog_runs.gif": ("dog2_a_dog_runs", 0),
        "A dog runs. (dog2)-3.mp4": ("dog2_a_dog_runs", 3),
        "Up down.-1.mp4": ("clip_1", 1),
        "clip_1.mp4": ("clip_1", 0),
    }
    for name in expected:
        (tmp_path / name).touch()
    picture(tmp_path / "dog2_a_dog_runs_7" / "0001.png")  # a folder of frames
    (tmp_path / "clip_1_0.mov").touch()
    (tmp_path / "cat.mp4").touch()
    picture(tmp_path / "images" / "A dog runs. (dog1).jpg")  # of `generate --vbench`
    (tmp_path / "notes.txt").touch()
    found = find_videos(tmp_path, pairs)
    assert {p.name: key for key, p in found.videos.items()} == expected | {"dog2_a_dog_runs_7": ("dog2_a_dog_runs", 7)}
    assert [p.name for p in found.strays] == ["cat.mp4"] and [p.name for p in found.doubles] == ["clip_1_0.mov"]
    # A manifest knows better than the name.
    (tmp_path / "manifest.json").write_text(json.dumps({"videos": [{"file": "cat.mp4", "id": "clip_1", "seed": 5}]}))
    assert find_videos(tmp_path, pairs).videos["clip_1", 5].name == "cat.mp4"
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is no manifest"):
        find_videos(tmp_path, pairs)
    with pytest.raises(UserError, match="is no folder"):
        find_videos(tmp_path / "none", pairs)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # All with seeds: dog_1 is of dog, since dog_1_0 is of dog_1.
        (("dog_0", "dog_1", "dog_1_0", "dog_1_1"), [("dog", 0), ("dog", 1), ("dog_1", 0), ("dog_1", 1)]),
        (("dog-0", "dog_1", "dog_1-3"), [("dog", 0), ("dog", 1), ("dog_1", 3)]),
        (("dog", "dog_1"), [("dog", 0), ("dog_1", 0)]),  # all without
        (("dog_1",), [("dog_1", 0)]),
        (("dog_01", "dog_1_0"), [("dog", 1), ("dog_1", 0)]),
        (("dog_0", "dog_1"), r"dog_1\.mp4 may be seed 1 of dog or the video of dog_1; name it dog_01\.mp4 or dog_1_0\.mp4$"),
    ],
)
def test_ids_that_end_in_a_number(tmp_path, files, expected):
    pairs = [Pair(i, tmp_path / "sky.png", f"See {i}.") for i in ("dog", "dog_1")]
    for name in files:
        (tmp_path / f"{name}.mp4").touch()
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            find_videos(tmp_path, pairs)
        expected = [("dog", 0), ("dog", 1)]
        videos = [{"file": f"{name}.mp4", "id": i, "seed": seed} for name, (i, seed) in zip(files, expected, strict=True)]
        (tmp_path / "manifest.json").write_text(json.dumps({"videos": videos}))
    found = find_videos(tmp_path, pairs)
    assert {path.stem: key for key, path in found.videos.items()} == dict(zip(files, expected, strict=True))
    assert not found.strays + found.doubles


@pytest.mark.parametrize("listed", ["caf\u00e9", "cafe\u0301"])
def test_accents_are_found_however_they_are_written(tmp_path, listed):
    """macOS writes a letter and its accent as two characters into names of files; they look the same."""
    pairs = [Pair(listed, tmp_path / "sky.png", f"The {listed} opens.")]
    names = ("caf\u00e9_0.mp4", "cafe\u0301_1.mp4", "The caf\u00e9 opens.-2.mp4", "The cafe\u0301 opens.-3.mp4", "any.mp4")
    for name in names:
        (tmp_path / name).touch()
    manifest = {"videos": [{"file": "any.mp4", "id": "cafe\u0301", "seed": 4}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = find_videos(tmp_path, pairs)
    assert {key: path.name for key, path in found.videos.items()} == {(listed, n): name for n, name in enumerate(names)}
    assert not found.strays + found.doubles


def test_ids_that_look_the_same_are_the_same(tmp_path):
    picture(tmp_path / "sky.png")
    lines = [json.dumps({"image": "sky", "prompt": "x", "id": i}) for i in ("caf\u00e9", "cafe\u0301")]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="occurs 2 times"):
        read_pairs(tmp_path)


def test_the_real_list_and_the_names_of_the_project_page(shared):
    pairs = read_pairs(shared / "ti2v_bench")
    assert len(pairs) == 320 and len({p.image for p in pairs}) == 88 and len({p.scenario for p in pairs}) == 22
    assert all(p.id == pair_id(p.image.stem, p.prompt) for p in pairs)
    for model in ("motif", "dynamicrafter", "cinemo", "cond_leak", "cogvideox"):
        found = find_videos(shared / "ti2v_bench/videos" / model, pairs)
        assert len(found.videos) == 26 and {seed for _, seed in found.videos} == {0} and not found.strays + found.doubles
