"""The server of a study: who gets which sheet, what is refused, and that no acknowledged vote is ever lost."""

import asyncio
import dataclasses
import json
import pathlib
import random
import re
import shutil
import signal
import threading
from collections import Counter

import pytest

from motif_jax.bench import study, votes
from motif_jax.bench.ballots import Ballots, Taken, number, read_records
from motif_jax.bench.server import HEADERS, application
from motif_jax.errors import UserError

TOKEN = "letters-and-digits"


def make_study(folder, pairs=20, annotators=5, per_sheet=2):
    """A study folder without media: sheets of `per_sheet` pairs, a repeat and a gold item; one example."""
    media = {(n, m): f"{m}{n}.mp4" for n in range(pairs) for m in "AB"}
    clips = {name: study.Clip(f"system {m}", f"p{n}") for (n, m), name in media.items()} | {"x.mp4": study.Clip("system A", "p0", "gold")}
    sheets = study.deal(media, [("A", "B")], [(0, "A0.mp4", "x.mp4")], annotators, per_sheet, 1, 1, 0)
    training = [study.Task(study.opaque(), "training", 0, "A0.mp4", "x.mp4", better="left", reason="overall_quality")]
    entries = [study.Entry(f"p{n}", f"i{n}", "It moves.", "i.jpg") for n in range(pairs)]
    models = ["system A", "system B"]
    key = study.Key("study", "Title", False, models, [tuple(models)], 8, 8.0, 64, 64, entries, clips, training, sheets)
    (folder / "page").mkdir(parents=True)
    (folder / "page" / "index.html").write_text("<title>page</title>")
    study.save(key, folder)
    return key


def answer(task: str, annotator: str, sheet: str, **more) -> dict:
    record = {"task": task, "annotator": annotator, "sheet": sheet, "choice": "left", "reasons": ["text_alignment"]}
    return record | {"comment": "", "seconds": 12.5, "plays": 1, "time": "2026-01-01T00:00:00Z"} | more


@pytest.fixture
def key(tmp_path):
    return make_study(tmp_path / "study")


@pytest.fixture
def client(tmp_path, key):
    from starlette.testclient import TestClient

    with TestClient(application(tmp_path / "study", Ballots(tmp_path / "v.sqlite", key), TOKEN), f"http://study/{TOKEN}/") as client:
        yield client


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_everybody_gets_a_sheet_and_nobody_two_copies_of_one(tmp_path):
    key = make_study(tmp_path / "s", pairs=4, annotators=2)  # two sheets in two copies
    box = Ballots(tmp_path / "v.sqlite", key)
    claims = {name: box.claim(name)["sheet"] for name in ("a", "b", "c", "d")}
    assert sorted(claims.values()) == sorted(key.sheets)
    assert box.claim("a")["sheet"] == claims["a"]  # again the same, not another one
    assert box.claim("e") == {"sheet": None, "done": [], "trained": [], "later": True}
    for task in key.sheets[claims["a"]]:
        box.vote(answer(task.id, "a", claims["a"]))
    assert box.claim("a")["sheet"] is None  # all others are taken
    for name in "bcd":
        for task in key.sheets[claims[name]]:
            box.vote(answer(task.id, name, claims[name]))
    assert not any(box.claim(name)["later"] for name in "ae")  # all is done
    assert box.claim("e")["sheet"] is None


@pytest.fixture
def two_copies(tmp_path):
    """(key, ballots, clock) of a study of one sheet in two copies, with a lease of 60 seconds."""
    key, clock = make_study(tmp_path / "s", pairs=2, annotators=2), Clock()
    return key, Ballots(tmp_path / "v.sqlite", key, lease=60, clock=clock), clock


def test_a_sheet_left_alone_goes_to_somebody_else_and_its_answers_stay(two_copies):
    key, box, clock = two_copies
    sheet = box.claim("gone")["sheet"]
    first, second, *_ = (t.id for t in key.sheets[sheet])
    box.vote(answer(first, "gone", sheet))
    other = box.claim("b")["sheet"]
    for task in key.sheets[other]:
        box.vote(answer(task.id, "b", other))
    clock.now = 61
    assert box.claim("b")["sheet"] is None  # "b" knows these pairs already
    claimed = box.claim("c")
    assert (claimed["sheet"], claimed["done"]) == (sheet, [first])
    with pytest.raises(Taken, match="somebody else"):
        box.vote(answer(second, "gone", sheet))
    with pytest.raises(Taken, match="answer already"):
        box.vote(answer(first, "c", sheet))
    box.vote(answer(second, "c", sheet))
    clock.now = 120  # 59 seconds after the last vote
    assert box.claim("d")["sheet"] is None
    assert box.claim("gone")["sheet"] is None


def test_sheets_that_are_only_opened_come_free_soon(tmp_path):
    key, clock = make_study(tmp_path / "s", pairs=2, annotators=3), Clock()  # one sheet in three copies
    box = Ballots(tmp_path / "v.sqlite", key, lease=3600, clock=clock)
    sheets = {name: box.claim(name)["sheet"] for name in ("anna", "ben", "curious")}
    assert box.claim("dora") == {"sheet": None, "done": [], "trained": [], "later": True}
    clock.now = 200
    box.vote(answer(key.sheets[sheets["anna"]][0].id, "anna", sheets["anna"]))
    box.vote(answer(key.training[0].id, "ben", sheets["ben"]))  # an example counts
    clock.now = 301
    assert box.claim("dora")["sheet"] == sheets["curious"]
    assert box.claim("emil")["later"]
    clock.now = 601  # dora has not begun; anna and ben have, and keep theirs for the whole hour
    assert box.claim("emil")["sheet"] is None
    clock.now = 602
    assert box.claim("emil")["sheet"] == sheets["curious"] and box.claim("frida")["sheet"] is None
    clock.now = 3800
    assert box.claim("frida")["sheet"] == sheets["curious"] and box.claim("gil")["later"]
    clock.now = 3801
    assert box.claim("gil")["sheet"] in (sheets["anna"], sheets["ben"])


def test_a_sheet_that_comes_free_again_may_go_back_to_who_began_it(two_copies):
    """Somebody took it over and did nothing: it is no second copy."""
    key, box, clock = two_copies
    sheet = box.claim("a")["sheet"]
    first, second, *_ = (t.id for t in key.sheets[sheet])
    box.vote(answer(first, "a", sheet))
    clock.now = 61
    assert box.claim("idle")["sheet"] == sheet and box.claim("a")["sheet"] is None
    clock.now = 122
    assert box.claim("a") == {"sheet": sheet, "done": [first], "trained": []}
    box.vote(answer(second, "a", sheet))


def test_the_same_answer_twice_is_one_vote_and_another_one_is_refused(tmp_path, key):
    box = Ballots(tmp_path / "v.sqlite", key)
    sheet = box.claim("a")["sheet"]
    record = answer(key.sheets[sheet][0].id, "a", sheet)
    box.vote(record)
    box.vote(record)
    with pytest.raises(Taken, match="answer already"):
        box.vote(record | {"choice": "right"})
    assert read_records(tmp_path / "v.sqlite", key) == [record]


SPELLINGS = ("Zo\u00e9", "Zoe\u0301", "zo\u00e9", " ZOE\u0301 ")


def test_all_spellings_of_a_name_are_one_person(tmp_path):
    """They get one sheet of several copies and examples once, and their votes go under the spelling that they first gave."""
    key = make_study(tmp_path / "s", pairs=4, annotators=3)  # two sheets in three copies
    box = Ballots(tmp_path / "v.sqlite", key)
    example = answer(key.training[0].id, SPELLINGS[0], box.claim(SPELLINGS[0])["sheet"])
    box.vote(example)
    for _ in range(2):
        sheet = box.claim(SPELLINGS[1])["sheet"]
        for task, name in zip(key.sheets[sheet], SPELLINGS, strict=True):
            claimed = box.claim(name)
            assert claimed["sheet"] == sheet and claimed["trained"] == [key.training[0].id]
            record = answer(task.id, name, sheet)
            box.vote(record)
            box.vote(record)  # its acknowledgement was lost
    assert box.claim("zo\u00e9") == {"sheet": None, "done": [], "trained": [key.training[0].id], "later": False}
    assert {r["annotator"] for r in read_records(tmp_path / "v.sqlite", key)} == {SPELLINGS[0]}
    assert box.claim("Zoe")["sheet"] is not None  # another name


def test_votes_stored_decomposed_are_the_same_persons(tmp_path, key):
    """As a file of votes may hold them from before names were composed."""
    old, new = SPELLINGS[1], SPELLINGS[0]
    box = Ballots(tmp_path / "v.sqlite", key)
    sheet = box.claim(old)["sheet"]
    first, second, *_ = key.sheets[sheet]
    box.vote(answer(first.id, old, sheet))
    claimed = box.claim(new)
    assert (claimed["sheet"], claimed["done"]) == (sheet, [first.id])
    box.vote(answer(second.id, new, sheet))
    found, refused = votes.read_all([tmp_path / "v.sqlite"], tmp_path / "study")
    assert [v.annotator for v in found] == [new, new] and not refused


def test_training_is_everybodys(tmp_path, key):
    box = Ballots(tmp_path / "v.sqlite", key)
    for name in ("a", "b"):
        sheet = box.claim(name)["sheet"]
        box.vote(answer(key.training[0].id, name, sheet))
        assert box.claim(name) == {"sheet": sheet, "done": [], "trained": [key.training[0].id]}


def test_votes_of_another_study_are_left_alone(tmp_path, key):
    Ballots(tmp_path / "v.sqlite", key).close()
    with pytest.raises(UserError, match="another study"):
        Ballots(tmp_path / "v.sqlite", dataclasses.replace(key, id="other"))
    (tmp_path / "text.sqlite").write_text("no database, but long enough to be taken for the head of one" * 20)
    with pytest.raises(UserError, match="cannot be used"):
        Ballots(tmp_path / "text.sqlite", key)
    for path, message in (("text.sqlite", "no file of votes"), ("missing.sqlite", "no file of votes")):
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / path, key)
    assert not (tmp_path / "missing.sqlite").exists()


def test_a_damaged_file_of_votes(tmp_path, key):
    """A damaged record costs itself; where more is damaged, the server does not start."""
    box = Ballots(tmp_path / "v.sqlite", key)
    sheet = box.claim("a")["sheet"]
    for task in key.sheets[sheet]:
        box.vote(answer(task.id, "a", sheet))
    box.close()
    sound = (tmp_path / "v.sqlite").read_bytes()
    records = [m.start() for m in re.finditer(b'"choice": "left"', sound)]
    assert len(records) == 4
    for place, byte in ((records[0], b"x"), (records[1] + 11, b"\xff")):  # no JSON, no UTF-8
        (tmp_path / "v.sqlite").write_bytes(sound[:place] + byte + sound[place + 1 :])
        found, refused = votes.read_all([tmp_path / "v.sqlite"], tmp_path / "study")
        assert len(found) == 3 and len(refused) == 1 and "expected an object" in refused[0]
    page = int.from_bytes(sound[16:18], "big")
    for at in range(page, len(sound), page):
        (tmp_path / "v.sqlite").write_bytes(sound[:at] + b"\xaa" * page + sound[at + page :])
        with pytest.raises(UserError, match=r"v\.sqlite: cannot be used for votes"):
            Ballots(tmp_path / "v.sqlite", key)


def test_votes_that_another_program_writes(tmp_path, key, monkeypatch):
    import sqlite3

    connect = sqlite3.connect
    Ballots(tmp_path / "v.sqlite", key).close()
    other = connect(tmp_path / "v.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, timeout=0, **more))
    with pytest.raises(UserError, match=r"cannot be used for votes .*locked"):
        Ballots(tmp_path / "v.sqlite", key)


@pytest.mark.parametrize("path", ["/", "/study.js", "/wrong-token/", "/index.html", f"/{TOKEN}x/", "/..%2f", f"/%2e%2e/{TOKEN}/"])
def test_without_the_token_there_is_nothing(client, path):
    for method in ("GET", "POST"):
        found = client.request(method, f"http://study{path}")
        assert found.status_code == 403 and TOKEN not in found.text and "page" not in found.text


def test_the_page_and_nothing_else_is_served(client):
    found = client.get("")
    assert "<title>page" in found.text and all(found.headers[k] == v for k, v in HEADERS.items())
    assert '"server": true' in client.get("study.js").text and "sheets" not in client.get("study.js").text
    for path in ("key.json", "../key.json", "..%2fkey.json", "%2e%2e/key.json", "media/../../key.json", "v.sqlite"):
        assert client.get(f"http://study/{TOKEN}/{path}").status_code in (403, 404)


def test_a_sheet_of_the_server_names_no_system(client, key):
    found = client.post("claim", json={"annotator": "anna"})
    assert found.status_code == 200 and len(found.json()["tasks"]) == 4
    assert not any(word in found.text for word in ("system", "gold", "repeat", '"better"', '"p1"'))


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("claim", b"x" * 10_000_000, 413),
        ("vote", json.dumps({"annotator": "x" * 10_000_000}).encode(), 413),
        ("vote", json.dumps({"comment": "x" * 10_000_000}).encode(), 413),
        ("claim", json.dumps({"annotator": "x" * 101}).encode(), 400),
        ("claim", b'{"annotator": ""}', 400),
        ("claim", b'{"annotator": 7}', 400),
        ("claim", b'["anna"]', 400),
        ("claim", b"", 400),
        ("claim", b"{", 400),
        ("claim", b"\xff\xfe\x00", 400),
        ("vote", b"[" * 10_000, 400),
        ("vote", b'{"task": "x"}', 400),
        ("vote", b"null", 400),
    ],
)
def test_what_is_no_vote_is_refused(client, path, body, status):
    found = client.post(path, content=body)
    assert found.status_code == status and len(found.text) < 500
    assert client.get("vote").status_code in (404, 405)


def test_hostile_text_is_stored_as_it_is_and_changes_nothing(tmp_path, client, key):
    attack = "<script>alert(1)</script>'); DROP TABLE votes; --"
    sheet = client.post("claim", json={"annotator": attack}).json()["sheet"]
    record = answer(key.sheets[sheet][0].id, attack, sheet, comment=attack, extra="ignored")
    assert client.post("vote", json=record).json() == {"stored": True}
    assert client.post("vote", json=record | {"annotator": "mallory"}).status_code == 409
    found, refused = votes.read_all([tmp_path / "v.sqlite"], tmp_path / "study")
    assert [(v.annotator, v.comment) for v in found] == [(attack, attack)] and not refused


async def annotate(client, name: str, acknowledged: list, rng: random.Random, stop: asyncio.Event | None = None) -> None:
    """Takes sheets and answers them until there is none left or the server is gone; notes what was acknowledged."""
    import httpx

    try:
        while claimed := (await client.post("claim", json={"annotator": name})).raise_for_status().json():
            if claimed["sheet"] is None:
                return
            for task in claimed["tasks"]:
                if task["task"] in claimed["done"]:
                    continue
                record = answer(task["task"], name, claimed["sheet"], choice=rng.choice(["left", "right"]))
                if (await client.post("vote", json=record)).raise_for_status().json() == {"stored": True}:
                    acknowledged.append(record)
    except httpx.TransportError:
        if stop is None:
            raise


async def crowd(url: str, names: list[str], acknowledged: list, stop=None) -> None:
    import httpx

    limits = httpx.Limits(max_connections=len(names))
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        await asyncio.gather(*(annotate(client, name, acknowledged, random.Random(name), stop) for name in names))


def test_a_hundred_annotators_at_once_lose_no_vote(tmp_path, serve):
    """40 pairs in 100 sheets of four tasks, a hundred people: 400 answers, every pair judged by exactly five of them."""
    pytest.importorskip("httpx")
    key = make_study(tmp_path / "study", pairs=40)
    assert len(key.sheets) == 100
    acknowledged = []
    with serve(tmp_path / "study", tmp_path / "v.sqlite") as server:
        asyncio.run(crowd(server.url, [f"annotator {n}" for n in range(100)], acknowledged))
    kept = read_records(tmp_path / "v.sqlite", key)
    assert len(kept) == len(acknowledged) == 400
    assert sorted(kept, key=lambda r: r["task"]) == sorted(acknowledged, key=lambda r: r["task"])
    found, _ = votes.read_all([tmp_path / "v.sqlite"], tmp_path / "study")
    judges = {(v.pair, v.annotator) for v in found if v.kind == "pair"}
    assert Counter(pair for pair, _ in judges) == {f"p{n}": 5 for n in range(40)}  # five different people
    # Nobody had two copies of a sheet.
    seen = {(r["annotator"], number(r["sheet"]), r["sheet"]) for r in kept}
    assert len({s[:2] for s in seen}) == len(seen)


def test_kill_9_loses_no_acknowledged_vote_and_the_study_goes_on(tmp_path, serve):
    """Killed three times in the middle of 20 people's work, each time after some more answers; then they finish."""
    pytest.importorskip("httpx")
    key = make_study(tmp_path / "study", pairs=40)
    acknowledged, names, urls = [], [f"annotator {n}" for n in range(20)], []
    for enough in (40, 90, 150):
        with serve(tmp_path / "study", tmp_path / "v.sqlite") as server:
            urls.append(re.sub(r":\d+/", ":/", server.url))

            async def work_until_killed(server=server, enough=enough):
                stop = asyncio.Event()

                async def killer():
                    while len(acknowledged) < enough:
                        await asyncio.sleep(0.001)
                    threading.Thread(target=server.kill).start()
                    stop.set()

                await asyncio.gather(killer(), crowd(server.url, names, acknowledged, stop))

            asyncio.run(work_until_killed())
        kept = {r["task"]: r for r in read_records(tmp_path / "v.sqlite", key)}
        assert len(acknowledged) >= enough and all(kept[r["task"]] == r for r in acknowledged)
    assert len(set(urls)) == 1  # the link stays the same
    with serve(tmp_path / "study", tmp_path / "v.sqlite") as server:
        asyncio.run(crowd(server.url, names, acknowledged))
    kept = read_records(tmp_path / "v.sqlite", key)
    assert len(kept) == len({r["task"] for r in kept}) == 400


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_says_nothing_and_leaves_all_votes_in_one_file(tmp_path, serve, sign):
    httpx = pytest.importorskip("httpx")
    key = make_study(tmp_path / "study")
    with serve(tmp_path / "study", tmp_path / "v.sqlite") as server, httpx.Client(base_url=server.url) as client:
        sheet = client.post("claim", json={"annotator": "a"}).json()["sheet"]
        record = answer(key.sheets[sheet][0].id, "a", sheet)
        assert client.post("vote", json=record).json() == {"stored": True}
        assert server.stop(sign) == "" and server.said == "0 of the study's 200 tasks are answered\n"
    shutil.copy(tmp_path / "v.sqlite", tmp_path / "copy.sqlite")
    assert read_records(tmp_path / "copy.sqlite", key) == [record]
    with serve(tmp_path / "study", tmp_path / "v.sqlite") as server:
        assert httpx.get(server.url).is_success
        assert server.stop(sign) == "" and server.said == "1 of the study's 200 tasks are answered\n"


@pytest.mark.skipif(not pathlib.Path("/proc/net/tcp").exists(), reason="reads the kernel's table of sockets")
def test_it_listens_to_this_machine_only_unless_told_otherwise(tmp_path, key, serve):
    with serve(tmp_path / "study", tmp_path / "v.sqlite", "--token=chosen-by-hand") as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/chosen-by-hand/", server.url)
        port = int(server.url.split(":")[2].split("/")[0])
        with open("/proc/net/tcp") as table:
            listening = {line.split()[1] for line in table if line.split()[3] == "0A"}
        assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token=short"], "--token"),
        (["--host=203.0.113.1"], "cannot listen"),
        (["--lease=0"], "argument --lease: 0: must be positive"),
        (["--lease=nan"], "argument --lease: nan: must be positive"),
        (["--votes=v.db"], "must end in .sqlite"),
        (["--study={folder}/moved"], "index.html: missing"),
    ],
)
def test_mistakes_of_the_server_are_one_line(tmp_path, key, serve, options, message):
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "study" / "key.json", tmp_path / "moved")
    with pytest.raises(AssertionError, match=message):
        serve(tmp_path / "study", tmp_path / "v.sqlite", *(o.format(folder=tmp_path) for o in options))
