"""A real browser does whole studies: on the server with two people at once, and from the file system."""

import json
import re
import shutil

import pytest

from motif_jax.bench import __main__ as bench
from motif_jax.bench import study

sync_api = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

PATIENCE = 20_000  # ms; a video lasts one second
AT = """const play = HTMLMediaElement.prototype.play;
HTMLMediaElement.prototype.play = function () { this.playbackRate = RATE; return play.call(this); };"""
FAST = AT.replace("RATE", "4")
# A sixteenth of the speed until the test says otherwise, so that a busy machine does not see a video to its end by itself.
SLOW = AT.replace("RATE", "sessionStorage.fast ? 4 : 0.0625")
JUMP = """Promise.all([...document.querySelectorAll('#stage video')].map((v) => new Promise((ended) => {
  v.addEventListener('ended', ended);
  v.currentTime = v.duration - 0.01;
})))"""
HOSTILE = "<img src=x onerror=alert(1)>'); DROP TABLE votes; --"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Annotator:
    """A person at a browser of their own. Notes all traffic, errors, and the answers given."""

    def __init__(self, browser, url, name, script="", **screen):
        self.name, self.answers, self.traffic, self.faults = name, [], [], []
        self.page = browser.new_context(**screen).new_page()
        self.page.add_init_script(script)
        self.page.set_default_timeout(PATIENCE)
        self.page.on("response", self._note)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.page.goto(url)

    def _note(self, response):
        self.traffic.append(f"{response.request.method} {response.url} {response.request.post_data} {response.headers}")
        if response.ok and not response.url.startswith(("blob:", "file:")) and response.request.resource_type != "media":
            self.traffic.append(response.text())

    def start(self):
        self.page.get_by_label("Your name or number").fill(self.name)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#work:not([hidden])")

    def place(self) -> str:
        return self.page.inner_text("#count")

    def locked(self) -> bool:
        return self.page.get_by_role("radio", name="Video 1").is_disabled()

    def watch(self):
        self.page.wait_for_selector("#choices:not([disabled])")

    def media(self) -> tuple[str, str]:
        """File names of the two videos on the screen."""
        return tuple(self.page.get_attribute(f"#{side}", "src").split("/")[-1] for side in study.SIDES)

    def answer(self, key: str, reasons: str) -> None:
        """By keyboard, and on to the next task, past the explanation of an example."""
        before, example = self.place(), self.page.is_visible("#example")
        for k in key + reasons:
            self.page.keyboard.press(k)
        self.answers.append((*self.media(), key))
        self.page.keyboard.press("Enter")
        if example:
            self.page.wait_for_selector("#lesson:not([hidden])")
            self.page.keyboard.press("Enter")
        self.page.wait_for_selector(f"#end:not([hidden]), #count:not(:text-is('{before}'))", state="attached")

    def finished(self) -> bool:
        return self.page.is_visible("#end")


def rows_of(answers, key) -> list[tuple[str, str, str]]:
    """(left, right, choice) as they must come out of an export, from what was on the screen."""
    names = {n: c.model + (f" ({c.damage})" if c.damage else "") for n, c in key.clips.items()}
    return [(names[left], names[right], {"1": "left", "2": "right"}[choice]) for left, right, choice in answers]


def test_two_people_do_a_study_on_the_server(browser, small_study, material, serve, tmp_path):
    key, database = study.load(small_study), tmp_path / "votes.sqlite"
    with serve(small_study, database) as server:
        # Nothing can be chosen before both videos were seen, neither by key nor by jumping to their ends.
        anna = Annotator(browser, server.url, "anna", SLOW)
        anna.start()
        anna.page.get_by_role("button", name="Pause").wait_for()  # they play
        for letter, then in (("P", "Play"), ("p", "Pause"), ("P", "Play"), ("R", "Pause")):  # with Caps Lock and without
            anna.page.keyboard.press(letter)
            anna.page.get_by_role("button", name=then, exact=True).wait_for()
        for jump in (False, True):
            if jump:
                anna.page.evaluate(JUMP)
            for k in "1t":
                anna.page.keyboard.press(k)
            assert anna.locked() and not anna.page.get_by_role("radio", name="Video 1").is_checked()
            assert anna.page.get_by_role("button", name="Next").is_disabled() and anna.place() == "Example 1 of 4"
        anna.page.evaluate("sessionStorage.fast = 1")
        anna.page.keyboard.press("r")
        anna.watch()
        anna.page.keyboard.press("1")
        assert anna.page.get_by_role("button", name="Next").is_disabled()  # at least one reason
        anna.answer("2", "iq")
        assert anna.place() == "Example 2 of 4"

        # By finger, on a small screen: everything is within its width and large enough to hit.
        phone = Annotator(browser, server.url, HOSTILE, FAST, viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True)
        phone.start()
        assert phone.place() == "Example 1 of 4"
        phone.watch()
        assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for label in phone.page.locator("#judge .options label, #next").all():
            assert label.bounding_box()["height"] >= 44
        phone.page.get_by_role("radio", name="Video 1").tap()
        phone.page.get_by_role("checkbox", name="Object motion").tap()
        phone.page.get_by_label("Comment (optional)").fill(HOSTILE)
        phone.answers.append((*phone.media(), "1"))
        phone.page.get_by_role("button", name="Next").tap()
        phone.page.get_by_role("button", name="Continue").tap()
        phone.page.wait_for_selector("#count:text-is('Example 2 of 4')")

        # Reloaded in the middle of an answer: nothing is lost, and nothing has to be watched again.
        anna.watch()
        anna.page.keyboard.press("1")
        anna.page.keyboard.press("t")
        before = anna.media()
        anna.page.reload()
        anna.page.wait_for_selector("#work:not([hidden])")
        assert anna.place() == "Example 2 of 4" and anna.media() == before and not anna.locked()
        assert anna.page.get_by_role("radio", name="Video 1").is_checked() and anna.page.get_by_role("checkbox", name="Text").is_checked()
        anna.answer("", "m")
        anna.answers[-1] = (*before, "1")

        for n in range(7):
            for person, choice in ((anna, "12"[n % 2]), (phone, "1")):
                if not person.finished():
                    person.watch()
                    person.answer(choice, "t")
        phone.watch()
        phone.answer("2", "m")
        assert anna.finished() and phone.finished()
        late = Annotator(browser, server.url, "late")
        late.page.get_by_label("Your name or number").fill("late")
        late.page.keyboard.press("Enter")
        late.page.get_by_text("nothing left to judge").wait_for()
        host = server.url.rsplit("/", 2)[0]
    for person in (anna, phone, late):
        assert not person.faults
        assert all(line.split()[1].startswith(host) for line in person.traffic if line.startswith(("GET ", "POST ")))
        seen = "\n".join(person.traffic)
        assert "study.js" in seen and not [s for s in (*material.systems, "pair0", "squares", '"gold', '"repeat') if s in seen]

    # What was chosen on the screen is what comes out, with the systems' names.
    bench.main(["annotate", "export", f"--study={small_study}", f"--votes={database}", f"--output={tmp_path / 'votes.json'}"])
    rows = json.loads((tmp_path / "votes.json").read_text())
    for person in (anna, phone):
        own = [r for r in rows if r["annotator"] == person.name]
        assert [(r["left"], r["right"], r["choice"]) for r in own] == rows_of(person.answers, key)
        assert [r["kind"] for r in own].count("training") == 4 and len(own) == 9
        assert all(r["plays"] >= 1 for r in own)
    assert [r["reasons"] for r in rows if r["annotator"] == "anna"][:2] == [
        ["image_alignment", "overall_quality"],
        ["text_alignment", "object_motion"],
    ]
    assert next(r for r in rows if r["annotator"] == HOSTILE)["comment"] == HOSTILE

    report = tmp_path / "report"
    bench.main(["report", f"--votes={database}", f"--study={small_study}", f"--output={report}", "--samples=100"])
    found = json.loads((report / "report.json").read_text())
    assert found["votes"] == {"training": 8, "pair": 6, "repeat": 2, "gold": 2}
    assert found["comparisons"][0]["votes"] == 6 and found["repeats"]["count"] == 2 and found["gold"]["count"] == 2
    reader = browser.new_page()
    alarms = []
    reader.on("dialog", lambda dialog: alarms.append(dialog.message))
    reader.goto((report / "report.html").as_uri())
    assert HOSTILE in reader.inner_text("body") and not alarms
    assert reader.locator("video").count() == 6
    reader.wait_for_selector("video")
    assert reader.evaluate("[...document.images].every(i => i.naturalWidth > 0)")


def test_who_finds_all_sheets_taken_is_asked_to_come_back(browser, small_study, serve, tmp_path):
    with serve(small_study, tmp_path / "votes.sqlite") as server:
        people = [Annotator(browser, server.url, name) for name in ("anna", "ben", "curious")]
        for person in people[:2]:
            person.start()
        people[2].page.get_by_label("Your name or number").fill("curious")
        people[2].page.keyboard.press("Enter")
        people[2].page.get_by_text("come back in an hour").wait_for()
        assert "Thank you" not in people[2].page.inner_text("body") and not people[2].faults


@pytest.mark.parametrize(
    "fault", ["Object.defineProperty(window, 'localStorage', {get() { throw 0; }})", "Storage.prototype.setItem = () => { throw 0; }"]
)
def test_a_browser_that_stores_nothing_is_told(browser, small_study, fault):
    person = Annotator(browser, (small_study / "page" / "index.html").as_uri(), "anna", fault)
    person.page.get_by_role("status").get_by_text("store nothing").wait_for()
    assert not person.page.is_visible("#start") and not person.faults


@pytest.mark.parametrize(("asked", "told"), [("", ""), ("?sheet=99-9", "There is no sheet 99-9"), ("?sheet=toString", "no sheet toString")])
def test_without_a_server_nobody_gets_a_sheet_that_they_did_not_choose(browser, small_study, asked, told):
    person = Annotator(browser, (small_study / "page" / "index.html").as_uri() + asked, "anna")
    assert person.page.input_value("#sheet") == "" and told in person.page.inner_text("#notice") and bool(told) == bool(asked)
    person.page.get_by_label("Your name or number").fill("Zoe\u0301 ")
    person.page.keyboard.press("Enter")
    assert person.page.is_visible("#start") and not person.page.is_visible("#work")
    person.page.get_by_label("Your sheet").select_option("1-2")
    person.page.get_by_role("button", name="Start").click()
    person.page.wait_for_selector("#work:not([hidden])")
    assert person.page.evaluate("session.who") == {"annotator": "Zo\u00e9", "sheet": "1-2"} and not person.faults
    with person.page.expect_download() as download:
        person.page.get_by_role("button", name="Download my answers").click()
    assert download.value.suggested_filename == "votes-Zo\u00e9.json"  # files of several people are collected in one folder


def test_on_a_laptop_videos_keep_their_size_and_explanations_are_seen(browser, material, tmp_path):
    folder = material.build(tmp_path / "study", "--annotators=1", "--size=320", "--repeats=0", "--gold=0")
    screen = {"width": 1366, "height": 650}
    person = Annotator(browser, (folder / "page" / "index.html").as_uri() + "?sheet=1-1", "anna", viewport=screen)
    person.start()
    person.watch()
    assert all(person.page.locator(f"#stage {what}").bounding_box()["width"] >= 320 for what in ("#image", "#left", "#right"))
    for key in ("1", "i", "Enter"):
        person.page.keyboard.press(key)
    person.page.wait_for_selector("#lesson:not([hidden])")
    for part in ("#lesson", "#next"):
        box = person.page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= screen["height"], part
    person.page.keyboard.press("Enter")
    person.page.wait_for_selector("#count:text-is('Example 2 of 4')")
    assert person.page.locator("#prompt").bounding_box()["y"] >= 0 and not person.faults


def test_a_study_from_the_file_system(browser, material, tmp_path):
    folder = material.build(tmp_path / "study", "--annotators=1", "--size=64", "--repeats=0", "--gold=0", "--no_training", "--ties")
    key = study.load(folder)
    person = Annotator(browser, (folder / "page" / "index.html").as_uri() + "?sheet=1-1", HOSTILE)
    person.start()
    page = person.page
    assert person.place() == "1 of 3"
    person.watch()
    # On a French and a Russian keyboard; then the storage is full until somebody frees some.
    for letter, code in (("&", "Digit1"), ("\u0435", "KeyT")):
        page.dispatch_event("body", "keydown", {"key": letter, "code": code})
    assert page.get_by_role("radio", name="Video 1").is_checked() and page.get_by_role("checkbox", name="Text").is_checked()
    page.evaluate("""for (let size = 1 << 22; size; size >>= 1)
        try { localStorage.filler = (localStorage.filler || '') + 'x'.repeat(size); } catch {}""")
    page.keyboard.press("Enter")
    page.get_by_role("status").get_by_text("storage is full").wait_for()
    assert person.place() == "1 of 3"
    page.evaluate("localStorage.removeItem('filler')")
    page.wait_for_selector("#count:text-is('2 of 3')")
    # Closed and opened again in the middle of an answer.
    person.watch()
    page.keyboard.press("2")
    page.keyboard.press("m")
    page.get_by_label("Comment (optional)").fill(HOSTILE)
    # This Enter chooses among the letters that a Japanese keyboard offers.
    page.dispatch_event("#comment", "keydown", {"key": "Enter", "isComposing": True})
    assert person.place() == "2 of 3"
    page.reload()
    page.wait_for_selector("#work:not([hidden])")
    assert person.place() == "2 of 3" and page.get_by_role("radio", name="Video 2").is_checked()
    assert page.get_by_label("Comment (optional)").input_value() == HOSTILE
    person.answer("", "q")
    person.watch()
    page.keyboard.press("3")  # about the same: needs no reason
    assert page.get_by_role("checkbox", name="Object motion").is_disabled()
    page.keyboard.press("Enter")
    page.wait_for_selector("#end:not([hidden])")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download my answers").click()
    download.value.save_as(tmp_path / "votes.json")
    assert not person.faults
    bench.main(["report", f"--votes={tmp_path / 'votes.json'}", f"--study={folder}", f"--output={tmp_path / 'out'}", "--samples=100"])
    kept = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert [v["choice"] for v in kept] == ["left", "right", "tie"]
    assert [v["reasons"] for v in kept] == [["text_alignment"], ["object_motion", "overall_quality"], []]
    assert [v["comment"] for v in kept] == ["", HOSTILE, ""] and {v["annotator"] for v in kept} == {HOSTILE}
    assert all(v["plays"] >= 1 and v["seconds"] > 0.5 for v in kept)
    names = re.findall(r"votes-[\w-]*\.json", download.value.suggested_filename)
    assert names == [download.value.suggested_filename]
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["comparisons"]) == 1
    assert len(key.pairs) == 3
