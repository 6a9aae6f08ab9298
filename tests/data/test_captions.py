"""Captions files and folders: what is read, what is left out and said, what is refused."""

import json
import os
import tarfile

import pytest

from motif_jax.data.captions import read_source
from motif_jax.errors import UserError


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


def test_a_value_that_is_no_text_is_refused_whatever_case_its_key_has(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"Video": "a.mp4", "Caption": 5}')
    with pytest.raises(UserError, match="line 1: must be an object like"):
        read_source(str(tmp_path / "list.jsonl"))


def test_archives_that_cannot_be_read_are_named(tmp_path):
    """Cut off, compressed, no archive at all: what others hold is used."""
    (tmp_path / "x.mp4").write_bytes(bytes(3000))
    (tmp_path / "x.txt").write_text("a cat")
    for name, mode in (("good.tar", "w"), ("zipped.TAR", "w:gz"), ("cut.tar", "w")):
        with tarfile.open(tmp_path / name, mode) as archive:
            for member in ("x.txt", "x.mp4"):
                archive.add(tmp_path / member, member)
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])  # within the video
    (tmp_path / "cut2.tar").write_bytes(whole[:2500])  # within a header
    (tmp_path / "none.tar").write_text("no archive")
    assert listed(tmp_path) == [("good.tar/x.mp4", "a cat"), ("x.mp4", "a cat")]
    assert reasons(tmp_path) == dict.fromkeys(("zipped.TAR", "cut.tar", "cut2.tar", "none.tar"), "unreadable archive")


def test_spaces_before_quotes_and_empty_cells_behind(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text('video, caption,\na.mp4, "x, y",\nb.mp4,z,, \n')
    assert listed(path) == [("a.mp4", "x, y"), ("b.mp4", "z")]


def test_what_utf8_cannot_write(tmp_path):
    """JSON escapes halves of characters, which nothing can store; a caption loses them, a name is of no file."""
    path = tmp_path / "list.jsonl"
    path.write_text('{"video": "a.mp4", "caption": "a \\ud800 cat"}\n{"video": "b\\udce9.mp4", "caption": "x"}\n')
    assert listed(path) == [("a.mp4", "a ? cat")] and reasons(path) == {r"b\udce9.mp4": "unreadable name"}


def test_a_long_caption(tmp_path):
    (tmp_path / "list.csv").write_text(f"video,caption\na.mp4,{'x' * 200_000}\n")
    assert len(listed(tmp_path / "list.csv")[0][1]) == 200_000


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
        ("a.csv", 'video,caption\na.mp4,"a cat\n', "from line 2 on.*double quote must end with one"),
        ("a.csv", 'video,caption\na.mp4,x\nb.mp4, "Hello" he said\n', 'from line 3 on.*those within doubled: """Hello"" he said"'),
        ("a.csv", "video,caption\na,b\n".encode("utf-16"), "cannot be read.*save it as UTF-8"),
        ("a.jsonl", '{"path": "a.mp4", "text": "x"}\n' * 3, "no line has the key video or caption; the keys are path, text"),
        ("a.jsonl", '{"video": "a.mp4", "text": "x"}\n', "no line has the key caption; the keys are text, video"),
        ("a.jsonl", '{"Video": "", "Caption": "x"}\n', "lists no videos: no line has a value for 'video'"),
        ("a.jsonl", '{"video": "a.mp4"\n', "line 1: not JSON"),
        ("a.jsonl", '{"video": ' + "9" * 5000 + "}\n", "line 1: not JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
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
    for name in ("nowhere.csv", "nowhere", "x" * 300):
        with pytest.raises(UserError, match=rf"{name}' does not exist; give a \.csv"):
            read_source(str(tmp_path / name))


def test_folder(tmp_path):
    for name in ("b.mp4", "a.MKV", "sub/c.webm", "silent.mp4", "empty.mp4", ".hidden.mp4", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name, text in {"b": "bee\n", "a": "ay", "sub/c": "sea", "alone": "?", "empty": "\n"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert listed(tmp_path) == [("a.MKV", "ay"), ("b.mp4", "bee"), ("sub/c.webm", "sea")]
    assert reasons(tmp_path) == {"alone.txt": "caption without video", "silent.mp4": "no caption", "empty.mp4": "empty caption"}


def test_a_folder_with_links(tmp_path):
    """To folders, also in a loop or to one that is there anyway; to a file that is gone."""
    for name in ("here/b/x", "elsewhere/y"):
        (tmp_path / name).parent.mkdir(parents=True)
        for ending in (".mp4", ".txt"):
            (tmp_path / (name + ending)).write_text("text")
    for link, target in (("a", "here/b"), ("b/loop", "here"), ("c", "elsewhere"), ("dead.mp4", "nowhere"), ("mute.mp4", "nowhere")):
        (tmp_path / "here" / link).symlink_to(tmp_path / target)
    (tmp_path / "here/dead.txt").write_text("text")
    assert listed(tmp_path / "here") == [("b/x.mp4", "text"), ("c/y.mp4", "text"), ("dead.mp4", "text")]
    assert reasons(tmp_path / "here") == {"mute.mp4": "no caption"}


def test_a_folder_with_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    for name in ("locked.mp4", "locked.txt", os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"\xe9.txt")):
        (tmp_path / name).touch()
    (tmp_path / "shut").mkdir()
    monkeypatch.setattr(type(tmp_path), "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "locked")))
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda p: listdir(p if p == tmp_path else tmp_path / "nowhere"))
    assert reasons(tmp_path) == {
        r"caf\udce9.mp4": "unreadable name",
        "locked.mp4": "unreadable caption",
        r"\udce9.txt": "caption without video",
        "shut": "unreadable folder",
    }


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no videos"):
        read_source(str(tmp_path))
