"""Captions files and folders: what is read, what is left out and said, what is refused."""

import json

import pytest

from motif_jax.config import UserError
from motif_jax.data.captions import read_source


def listed(path) -> list[tuple[str, str]]:
    return [(e.video, e.caption) for e in read_source(str(path))[0]]


def reasons(path) -> dict[str, str]:
    return {p.video: p.kind for p in read_source(str(path))[1]}


def test_csv(tmp_path):
    """As spreadsheets write it: a byte order mark, quotes, line breaks and commas in a cell, other columns, odd spaces."""
    path = tmp_path / "list.csv"
    path.write_text('\ufeffid, Video ,CAPTION\r\n1,b/x.mp4,"a cat, ""Tom"",\nruns"\r\n2,./a.mp4, été \r\n', newline="")
    entries, problems = read_source(str(path))
    assert [(e.video, e.caption) for e in entries] == [("b/x.mp4", 'a cat, "Tom", runs'), ("a.mp4", "été")]
    assert entries[0].path == tmp_path / "b/x.mp4" and entries[0].mask is None
    assert problems == []


def test_jsonl_equals_csv(tmp_path):
    rows = [("a.mp4", "one\u2028two"), ("/data/b.mp4", "x, y")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"video": v, "caption": c}, ensure_ascii=False) for v, c in rows) + "\n\n")
    assert listed(tmp_path / "a.jsonl") == [("a.mp4", "one two"), ("/data/b.mp4", "x, y")]
    assert str(read_source(str(tmp_path / "a.jsonl"))[0][1].path) == "/data/b.mp4"


def test_lines_that_give_no_clip_are_named(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("video,caption\na.mp4,\nb.mp4,   \n,a cat\nc.mp4\nd.mp4,x\n./d.mp4,x\nd.mp4,y\n")
    assert reasons(path) == {
        "a.mp4": "empty caption",
        "b.mp4": "empty caption",
        "line 4": "no video",
        "c.mp4": "empty caption",
        "d.mp4": "repeated line",
    }
    assert listed(path) == [("d.mp4", "x"), ("d.mp4", "y")]


def test_mask_column(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("video,caption,mask\na.mp4,x,m/a.mp4\nb.mp4,y,\n")
    assert [e.mask for e in read_source(str(path))[0]] == [tmp_path / "m/a.mp4", None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "file,text\na,b\n", "no column video and caption.*'file,text'"),
        ("a.csv", "video;caption\na;b\n", "no column"),
        ("a.csv", "", "no column"),
        ("a.csv", "video,caption\n", "lists no videos"),
        ("a.csv", "video,caption\na.mp4,a cat, running\n", "line 2: more cells"),
        ("a.csv", 'video,caption\na.mp4,"a cat\n', "from line 2 on.*double quote"),
        ("a.csv", b"\xff\xfe\x00\x01", "cannot be read"),
        ("a.jsonl", '{"video": "a.mp4"\n', "line 1: not JSON"),
        ("a.jsonl", '["a.mp4", "x"]\n', "line 1: must be an object"),
        ("a.jsonl", '{"video": "a.mp4", "caption": 3}\n', "line 1: must be an object"),
        ("a.txt", "x", "must be a .csv"),
    ],
)
def test_unusable_lists(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path / name))


def test_missing_source(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv.*cannot be read"):
        read_source(str(tmp_path / "nowhere.csv"))
    with pytest.raises(UserError, match=r"must be a \.csv"):
        read_source(str(tmp_path / "nowhere"))


def test_folder(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "silent.mp4", "empty.mp4", ".hidden.mp4", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, text in {"b": "bee\n", "a": "ay", "sub/c": "sea", "alone": "?", "empty": "\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert listed(tmp_path) == [("a.MKV", "ay"), ("b.mp4", "bee"), ("sub/c.webm", "sea")]
    assert reasons(tmp_path) == {"alone.txt": "caption without video", "silent.mp4": "no caption", "empty.mp4": "empty caption"}


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no videos"):
        read_source(str(tmp_path))
