"""Object stores: the same bytes as on a disk, continued after damage, read back whole."""

import collections
import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest

from motif_jax import preparation
from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import pipeline, shards, storage
from motif_jax.data.storage import Member, location, read_part, write_whole
from motif_jax.data.verification import verify
from motif_jax.data.videos import save_video
from motif_jax.errors import StoreError, UserError

CONFIG = Config(
    data=DataConfig(frames=2, height=16, width=16),
    prepare=PrepareConfig(flow="exact", image_format="png", clips_per_shard=5, validation_share=0.2),
)


def prepare(directory, **options) -> preparation.Summary:
    return preparation.prepare(CONFIG, "synthetic:shapes:30", directory, log=lambda line: None, **options)


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on this machine."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield "s3://bucket"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def gs(bucket):
    return "gs://bucket"


@pytest.fixture
def memory():
    return "memory://"


@pytest.mark.parametrize("kind", ["memory", "gs", "s3"])
def test_an_object_store_holds_what_a_disk_would(tmp_path, kind, request):
    url = f"{request.getfixturevalue(kind)}/{uuid.uuid4().hex}/data"
    on_disk = prepare(tmp_path / "disk")
    assert [prepare(url, task_index=i, task_count=2).missing > 0 for i in (0, 1)] == [True, False]
    store = location(url)
    store.files.get(store.path, str(tmp_path / "copy"), recursive=True)

    def files(directory: pathlib.Path):
        return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    assert files(tmp_path / "copy") == files(tmp_path / "disk") and verify(store) == []
    copy = pipeline.open_dataset(DataConfig(path=str(tmp_path / "copy"), frames=2, height=16, width=16))
    assert len(copy) == on_disk.clips["train"] and copy[0].frames.shape == (2, 16, 16, 3)
    if kind != "gs":
        with pytest.raises(UserError, match=r"training reads and writes file systems and gs:// alone"):
            shards.read_manifest(url)

    name = sorted(p.name for p in store.glob("motif-train*"))[1]
    whole = store.files.cat_file(f"{store.path}/{name}")
    for damaged, words in ((whole[:-9], "truncated"), (whole[:5000] + b"?" + whole[5001:], "sha256")):
        store.files.pipe_file(f"{store.path}/{name}", damaged)
        (line,) = verify(store)
        assert line.startswith(name) and words in line
        assert prepare(url).written == 1 and verify(store) == []
    (store / name).unlink()
    (store / name).unlink(missing_ok=True)
    assert verify(store) == [f"{name} is missing"]


def test_a_dataset_is_read_from_a_bucket(tmp_path, gs, bucket, monkeypatch):
    """Its records alone and beside others on a disk, in this process and as workers get it; and what is wrong with it."""
    prefix = uuid.uuid4().hex
    url = f"{gs}/{prefix}"
    prepare(tmp_path)
    with pytest.raises(UserError, match=f"no dataset in '{url}' .*there is no dataset.json"):
        shards.read_manifest(url)
    with pytest.raises(UserError, match=f"data.path={url}#1: ArrayRecord takes what follows a #"):
        shards.read_manifest(f"{url}#1")
    (tmp_path / "dataset.json").rename(tmp_path / "later.json")
    location(url).files.put(f"{tmp_path}/", f"{url}/", recursive=True)
    with pytest.raises(UserError, match=rf"dataset {url} is not finished \(7 shards are there\)"):
        shards.read_manifest(url)
    bucket.put(f"{prefix}/dataset.json", (tmp_path / "later.json").read_bytes())
    (tmp_path / "later.json").rename(tmp_path / "dataset.json")

    paths = (str(tmp_path), url, f"{url},{tmp_path}")
    disk, there, both = (pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=path)) for path in paths)
    assert list(disk.source) == list(there.source) and list(both.source) == 2 * list(disk.source)
    assert pickle.loads(pickle.dumps(both.source))[len(disk) - 1] == disk.source[len(disk) - 1]
    assert there.fingerprint == disk.fingerprint
    batches = [next(pipeline.make_iterator(data, 4, 0, 3, len_of_words)) for data in (disk, there)]
    for name, array in batches[0].items():
        np.testing.assert_array_equal(batches[1][name], array)

    with monkeypatch.context() as patched:
        raised, least, most = [], 512 + 7 + 3 * 7, 512 + 7 + 3 * 6 * 7  # of others, of the disk's shards, and of the bucket's
        patched.setattr(resource, "setrlimit", lambda what, limits: raised.append(limits))
        for hard in (least - 1, least, most + 1, resource.RLIM_INFINITY):
            patched.setattr(resource, "getrlimit", lambda what, hard=hard: (100, hard))
            refused = pytest.raises(UserError, match=f"has 14 shards.*may open {hard} files.*ulimit -Hn.* to {most}")
            with refused if hard == least - 1 else contextlib.nullcontext():
                pipeline.open_dataset(dataclasses.replace(both.data, threads=6))
        assert raised == [(least, least), (most, most + 1), (most, resource.RLIM_INFINITY)]

    name = "motif-train.array_record-00001-of-00005"
    whole = bucket.objects[f"{prefix}/{name}"][0]
    bucket.put(f"{prefix}/{name}", bytes(len(whole)))
    again = pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=url))
    with pytest.raises(UserError, match=rf"dataset {url}: split train, shard {name} cannot be read .*if the store lets you read it, run"):
        again.source[7]
    again = pipeline.open_dataset(again.data)
    try:
        bucket.failing = name
        with pytest.raises(UserError, match=rf"{name} cannot be read \(.*no permission.*\): if the store") as caught:
            again.source[7]
        assert "\n" not in str(caught.value)
    finally:
        bucket.failing = None
    bucket.put(f"{prefix}/{name}", whole[:-9])
    with pytest.raises(UserError, match=f"dataset {url}: {name} is truncated"):
        shards.read_manifest(url)
    del bucket.objects[f"{prefix}/{name}"]
    with pytest.raises(UserError, match=f"dataset {url}: {name} is missing"):
        shards.read_manifest(url)
    try:
        bucket.failing = "dataset.json"
        with pytest.raises(StoreError, match=r"dataset\.json: .*no permission"):
            shards.read_manifest(url)
    finally:
        bucket.failing = None


def test_a_temporary_file_that_is_renamed_meanwhile(tmp_path, monkeypatch):
    """Another process repairs the directory while its files are counted."""
    (tmp_path / "shard").write_bytes(b"12")
    (tmp_path / ".tmp-1").touch()
    scandir = os.scandir

    def then_renamed(directory):
        entries = [*scandir(directory)]
        (tmp_path / ".tmp-1").unlink()
        return entries

    monkeypatch.setattr(os, "scandir", then_renamed)
    assert storage.sizes(tmp_path) == {"shard": 2}


@pytest.mark.parametrize("remote", [False, True])
def test_sweep_takes_only_what_nobody_writes(tmp_path, monkeypatch, remote):
    """Of a store: in the directory for temporary files, which belongs to others, too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if remote else tmp_path.parent))
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = {
        "dead": f".tmp-{gone.pid}@{storage.machine()}@motif-train",
        "mine": f".tmp-{os.getpid()}@{storage.machine()}@motif-train",
        "elsewhere": f".tmp-{gone.pid}@elsewhere@motif-train",
        "old": ".tmp-1@elsewhere@motif-old",
        "not ours": ".tmp-of-another-program",
    }
    for name in names.values():
        (tmp_path / name).write_text("")
    for name in ("old", "not ours"):
        os.utime(tmp_path / names[name], (time.time() - 25 * 3600, time.time() - 25 * 3600))
    (tmp_path / f".tmp-{gone.pid}@{storage.machine()}@folder").mkdir()
    (tmp_path / f".tmp-{gone.pid}@{storage.machine()}@folder/a.mp4").write_text("")
    storage.sweep(location("memory://somewhere") if remote else tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[key] for key in ("mine", "elsewhere", "not ours")}


@pytest.mark.parametrize("kind", ["tar", "store"])
def test_copies_of_a_killed_process_are_swept(tmp_path, monkeypatch, kind):
    """Of a video in an archive or a store; and the half of a download, by the next one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a.tar").write_bytes(bytes(9))
    name = f"memory://{uuid.uuid4().hex}/a.mp4"
    code = f"""
import os, pathlib, fsspec
from motif_jax.data import storage
file = storage.Member(pathlib.Path({str(tmp_path / "a.tar")!r}), "a.mp4", 0, 9)
if {kind == "store"}:
    fsspec.filesystem("memory").pipe_file({name!r}, bytes(9))
    file = storage.location({name!r})
    storage.download = lambda path, local: local.write_bytes(b"half") and os._exit(9)
    storage.on_disk(file)
with storage.local_copy(file):
    os._exit(9)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    (left,) = tmp_path.rglob(".tmp-*")
    if kind == "store":
        location(name).files.pipe_file(name, bytes(9))
        copy = storage.on_disk(name)
        assert copy.read_bytes() == bytes(9) and copy.parent == left.parent
    else:
        storage.sweep(tmp_path / "data")
    assert not left.exists()


def len_of_words(captions) -> np.ndarray:
    return np.array([[len(caption.split())] for caption in captions])


def test_files_of_a_store_are_copied_once(tmp_path, gs, bucket, monkeypatch):
    """Also by several processes at once; and anew when the object is another, even of the same length. A path is itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copied, download = [], storage.download
    monkeypatch.setattr(storage, "download", lambda path, local: copied.append(path) or time.sleep(0.2) or download(path, local))
    name = f"{uuid.uuid4().hex}/raft.pth"
    url = f"{gs}/{name}"
    bucket.put(f"{name}/other", b"")
    for nothing in (f"{url}x", url):
        with pytest.raises(FileNotFoundError, match=f"there is no file {nothing}$"):
            storage.on_disk(nothing)
    bucket.put(name, b"one")
    first, *others = storage.side_by_side(storage.on_disk, 4 * [url])
    assert first.name == "raft.pth" and first.read_bytes() == b"one" and set(others) == {first}
    assert storage.on_disk(location(url)) == first and copied == [location(url)]
    bucket.put(name, b"two")
    assert storage.on_disk(url).read_bytes() == b"two"
    for middle in (b"one", b"two"):  # as of weights of which a part was trained further
        bucket.put(name, bytes(2**17) + middle + bytes(2**17))
        assert storage.on_disk(url).read_bytes()[2**17 :][:3] == middle
    monkeypatch.setenv("XDG_CACHE_HOME", str(first))  # a file
    with pytest.raises(StoreError, match=rf"{url} cannot be copied to {first}/motif_jax \(set XDG_CACHE_HOME for another place\)"):
        storage.on_disk(url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket.put(f"{name}?download=true", b"three")
    assert storage.on_disk(f"{url}?download=true").name == "raft.pth"
    assert storage.on_disk(str(first)) == storage.on_disk(first) == first


@pytest.mark.parametrize("kind", ["memory", "gs", "s3"])
def test_videos_in_an_object_store_give_what_those_on_a_disk_give(tmp_path, kind, request):
    """Byte for byte: by a list, by a folder, and continued by the other. One that is named but not there is a skipped clip."""
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, flow="dis", clips_per_shard=2, validation_share=0.0))
    disk, url = tmp_path / "disk", f"{request.getfixturevalue(kind)}/{uuid.uuid4().hex}"
    (disk / "more").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "b.mp4", "more/c.mp4")):
        frames = np.zeros((8, 24, 24, 3), np.uint8)
        for t in range(8):
            frames[t, 4:12, 2 * t : 2 * t + 8, i] = 255
        save_video(disk / name, frames, 8)
        (disk / name).with_suffix(".txt").write_text(f"number {i}")
    (disk / "more/left.txt").write_text("without a video")
    (disk / "list.csv").write_text("video,caption\na.mp4,number 0\nmore/c.mp4,number 2\ngone.mp4,number 3\n")
    store = location(url)
    store.files.put(f"{disk}/", f"{store.path}/", recursive=True)

    def prepared(source, name):
        lines = []
        preparation.prepare(config, source, tmp_path / name, log=lines.append)
        files = {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        return files, [line for line in lines if line.startswith("skipped")], lines[-1]

    for source in ("", "/list.csv"):
        here = prepared(f"{disk}{source}", f"here{len(source)}")
        there = prepared(f"{url}{source}", f"there{len(source)}")
        assert here[:2] == there[:2] and len(here[1]) == 1
        assert "0 shards written" in prepared(f"{url}{source}", f"here{len(source)}")[2]
    lines = json.dumps({"video": f"{url}/b.mp4", "caption": "by its URL"}), json.dumps({"video": str(disk / "b.mp4"), "caption": "a path"})
    (tmp_path / "urls.jsonl").write_text("\n".join(lines))
    prepared(str(tmp_path / "urls.jsonl"), "urls")
    clips = pipeline.open_dataset(DataConfig(path=str(tmp_path / "urls"), frames=2, height=16, width=16))
    assert sorted(clip.caption for clip in clips) == ["a path", "by its URL"]


@pytest.mark.parametrize("kind", ["disk", "memory", "gs"])
def test_a_tar_archive_is_a_folder_of_its_name(tmp_path, kind, request, monkeypatch):
    monkeypatch.setattr(storage, "_BYTES_AT_ONCE", 500)  # a video is copied in many parts
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, flow="dis"))
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    (folder / "0.tar/sub").mkdir(parents=True)
    packed.mkdir()
    for i, name in enumerate(("a", "0.tar/b", "0.tar/sub/c")):
        save_video(folder / f"{name}.mp4", np.full((9, 24, 32, 3), 60 * i, np.uint8), 8)
        (folder / f"{name}.txt").write_text(f"number {i}")
    for name in ("a.mp4", "a.txt"):
        shutil.copy(folder / name, packed / name)
    (folder / "0.tar/d.mp4").hardlink_to(folder / "0.tar/b.mp4")
    (folder / "0.tar/d.txt").write_text("b once more")
    with tarfile.open(packed / "0.tar", "w") as archive:  # in an order of its own, with what is no file, twice there, hidden or in pieces
        archive.add(folder / "0.tar/d.txt", "./b.txt")
        for name in ("sub", "b.txt", "b.mp4", "d.txt", "d.mp4"):
            archive.add(folder / "0.tar" / name, f"./{name}")
        sparse = tarfile.TarInfo("sparse.mp4")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
        archive.add(folder / "0.tar/b.mp4", ".hidden.mp4")
    source = str(packed)
    if kind != "disk":
        source = f"{request.getfixturevalue(kind)}/{uuid.uuid4().hex}"
        location(source).files.put(f"{packed}/", f"{location(source).path}/", recursive=True)

    def prepared(source, name):
        summary = preparation.prepare(config, source, tmp_path / name, log=str)
        assert sum(summary.clips.values()) == 4 and not summary.skipped
        return {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}, summary.written

    assert prepared(str(folder), "one")[0] == prepared(source, "two")[0]
    assert prepared(source, "one")[1] == 0


@pytest.mark.parametrize("kind", ["memory", "gs"])
def test_a_store_s_directory_may_have_brackets_in_its_name(kind, request):
    url = f"{request.getfixturevalue(kind)}/{uuid.uuid4().hex}/data[1]*"
    assert prepare(url).missing == 0 and verify(location(url)) == []


@pytest.mark.parametrize("kind", ["memory", "gs"])
def test_a_move_takes_no_name_for_a_pattern(kind, request):
    store = location(f"{request.getfixturevalue(kind)}/{uuid.uuid4().hex}")
    for name in ("run?/5/a", "run?/5/b", "run1/5/a"):
        write_whole(store / name, name)
    (store / "run?/5").replace(store / "run?/damaged")
    assert sorted(store.find()) == ["run1/5/a", "run?/damaged/a", "run?/damaged/b"]
    assert (store / "run?/damaged/b").read_text() == "run?/5/b"


def test_an_empty_file_of_an_archive_in_a_store_is_empty(monkeypatch):
    """Where a range ends before it begins, as that of no bytes does, S3 sends the whole object."""
    store = location(f"memory://{uuid.uuid4().hex}")
    cat_file = type(store.files).cat_file

    def as_s3(files, path, start=None, end=None):
        return cat_file(files, path) if start is not None and start == end else cat_file(files, path, start, end)

    monkeypatch.setattr(type(store.files), "cat_file", as_s3)
    write_whole(store / "a.tar", "header" * 100)
    assert read_part(Member(store / "a.tar", "empty.txt", 512, 0)) == b"" == read_part(store / "a.tar", 5, 5)
    assert read_part(Member(store / "a.tar", "full.txt", 6, 6)) == b"header"


def test_a_server_that_does_not_say_how_long_a_file_is(monkeypatch):
    store = location(f"memory://{uuid.uuid4().hex}")
    write_whole(store / "a.mp4", "header")
    info = type(store.files).info
    monkeypatch.setattr(type(store.files), "info", lambda *a, **k: info(*a, **k) | {"size": None})
    assert storage.size(store / "a.mp4") == 6


@pytest.mark.parametrize(("status", "error"), [(200, None), (403, FileNotFoundError), (410, FileNotFoundError), (503, StoreError)])
def test_a_web_server_that_does_not_give_a_file(status, error):
    """Of a long list of addresses some are always gone, which does not end the job; a server that fails does."""
    pytest.importorskip("aiohttp")

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"video")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        video = location(f"http://127.0.0.1:{server.server_port}/a.mp4?key=1", look=False)
        with pytest.raises(error) if error else contextlib.nullcontext():
            assert read_part(video) == b"video"
        server.shutdown()


@pytest.mark.parametrize("store", ["memory:///a/b", "http://localhost:1/a/b"])
def test_what_a_list_in_a_store_names_lies_beside_it(store):
    pytest.importorskip("aiohttp")
    folder = location(f"{store}/list.csv", look=False).parent
    wanted = {"x/c d.mp4": f"{store}/x/c d.mp4", "../c.mp4": f"{store[:-2]}/c.mp4", "/c.mp4": "/c.mp4"}
    assert {name: str(storage.beside(folder, name)) for name in wanted} == wanted


@pytest.mark.parametrize("request_name", ["info", "cat_file", "get_file"])
def test_videos_whose_store_goes_away_are_not_taken_for_missing(tmp_path, monkeypatch, request_name):
    store = location(f"memory://{uuid.uuid4().hex}")
    store.files.pipe_file(f"{store.path}/a.mp4", b"video")
    (tmp_path / "list.csv").write_text(f"video,caption\n{store}/a.mp4,x\n")
    monkeypatch.setattr(type(store.files), request_name, lambda *_, **__: (_ for _ in ()).throw(KeyError("gone")))
    config = dataclasses.replace(CONFIG, prepare=PrepareConfig(flow="dis"))
    with pytest.raises(StoreError, match=r"a\.mp4: KeyError: 'gone'"):
        preparation.prepare(config, str(tmp_path / "list.csv"), tmp_path / "data", log=str)
    assert not list((tmp_path / "data").glob("manifests/*"))


def test_what_a_task_asks_of_a_store_about_the_shards_of_others(monkeypatch):
    """Their manifests side by side, and one listing: tens of thousands one after the other would take longer than the work."""
    config = dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, clips_per_shard=1))
    url, lock = f"memory://{uuid.uuid4().hex}", threading.Lock()
    preparation.prepare(config, "synthetic:shapes:60", url, log=str)
    store, asked, at_once = type(location(url).files), collections.Counter(), collections.Counter()

    def watched(name, call):
        def request(*arguments, **options):
            with lock:
                asked[name] += 1
                at_once["now"] += 1
                at_once["most"] = max(at_once.values())
            time.sleep(0.01)
            try:
                return call(*arguments, **options)
            finally:
                with lock:
                    at_once["now"] -= 1

        return request

    for name in ("cat_file", "exists", "info"):
        monkeypatch.setattr(store, name, watched(name, getattr(store, name)))
    preparation.prepare(config, "synthetic:shapes:60", url, task_index=59, task_count=60, log=str)
    assert asked["cat_file"] > 60 and asked["exists"] + asked["info"] < 20 and at_once["most"] > 8


@pytest.mark.parametrize("request_name", ["exists", "glob", "cat_file", "rm_file", "info", "put_file", "get_file"])
def test_a_store_that_goes_away_is_a_disk_that_does(monkeypatch, request_name):
    """Whatever its client raises: the command names the reason, and what is done is kept."""
    url = f"memory://{uuid.uuid4().hex}"
    prepare(url)
    store = location(url)
    (store / sorted(p.name for p in store.glob("motif-train*"))[0]).unlink()
    with monkeypatch.context() as broken:
        broken.setattr(type(store.files), request_name, lambda *_, **__: (_ for _ in ()).throw(KeyError("gone")))
        with pytest.raises((OSError, UserError), match="KeyError: 'gone'"):
            prepare(url)
    assert prepare(url).missing == 0 and verify(store) == []


def test_stores_that_cannot_be_used():
    with pytest.raises(UserError, match="Protocol not known: nonsense; write a path, or a URL of gs://"):
        location("nonsense://bucket/data")
    with pytest.raises(UserError, match=r"caf\\udce9': its name is not UTF-8"):
        location(os.fsdecode(b"caf\xe9"))
    assert location("here/or/there") == pathlib.Path("here/or/there") and location("file:///tmp/x") == pathlib.Path("/tmp/x")
    assert location("file://localhost/tmp/x") == pathlib.Path("/tmp/x")
    for name in ("file://here/x", "file://", "file://localhost"):
        with pytest.raises(UserError, match="names a file of another machine"):
            location(name)


@pytest.mark.parametrize("name", ["a" * 240 + ".json", "é" * 120 + ".json"])
def test_a_long_name_is_written_whole(tmp_path, name):
    """A name has 255 bytes at most, and that of the temporary file is no longer."""
    for text in ("x", "y"):
        write_whole(tmp_path / name, text)
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text
