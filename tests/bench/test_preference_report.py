"""The report of simulated votes: the paper's figure 4 again, numbers worked out by hand, and votes that are no votes."""

import csv
import json
import math
import pathlib
import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from motif_jax.bench import __main__ as bench
from motif_jax.bench import preference_report, study
from motif_jax.bench.preference import bradley_terry, minimum_detectable
from motif_jax.bench.preference_analysis import analyse
from motif_jax.bench.votes import Vote, check_vote
from motif_jax.errors import UserError

REASONS = ("image_alignment", "text_alignment", "object_motion", "overall_quality")
FIGURE4 = json.loads((pathlib.Path(__file__).parents[1] / "testdata" / "figure4.json").read_text())
PAIRS, RATERS, IMAGES = 320, 5, 88


def counts_of(shares: list[float], total: int) -> tuple[int, int]:
    """Whole votes (won, lost) of `total` whose shares (won, neither, lost) print as the published ones."""
    won, neither, lost = shares
    for k in range(math.floor(won * total / 100) - 1, math.ceil(won * total / 100) + 2):
        for m in range(math.floor(lost * total / 100) - 1, math.ceil(lost * total / 100) + 2):
            if all(abs(100 * x / total - y) < 0.0499 for x, y in zip((k, total - k - m, m), (won, neither, lost), strict=True)):
                return k, m
    raise AssertionError(f"{shares} are no shares of {total} votes")


def simulated_votes(baseline: str, published: dict, rng: np.random.Generator) -> list[dict]:
    """1,600 single votes on 320 pairs: MotiF has the majority of exactly `wins` pairs, reasons have the published shares, every vote
    has a reason, sides and annotators are random."""
    ticks = {r: counts_of(published[r], PAIRS * RATERS) for r in REASONS if r in published}
    ticks |= {r: (400, 100) for r in REASONS if r not in published}  # the figure is wrong there
    wins = published["wins"]
    lowest = max(3 * wins, *(k for k, _ in ticks.values()), PAIRS * RATERS - sum(m for _, m in ticks.values()))
    highest = min(RATERS * wins + 2 * (PAIRS - wins), sum(k for k, _ in ticks.values()), PAIRS * RATERS - max(m for _, m in ticks.values()))
    assert lowest <= highest
    for_motif = np.zeros(PAIRS, int)
    won = rng.permutation(PAIRS)[:wins]
    for_motif[won] = 3
    ceiling = np.full(PAIRS, 2)
    ceiling[won] = 5
    while for_motif.sum() < (lowest + highest) // 2:
        i = rng.integers(PAIRS)
        for_motif[i] += for_motif[i] < ceiling[i]
    rows = []
    for i in range(PAIRS):
        raters = rng.choice(20, RATERS, replace=False)
        for n in range(RATERS):
            left, right = ("MotiF", baseline) if rng.random() < 0.5 else (baseline, "MotiF")
            choice = "left" if (left == "MotiF") == (n < for_motif[i]) else "right"
            row = {"pair": f"pair{i}", "annotator": f"rater {raters[n]}", "left": left, "right": right, "choice": choice}
            rows.append(row | {"image": f"image{i % IMAGES}", "seconds": f"{rng.uniform(10, 40):.1f}", "reasons": []})
    for mine, side in ((True, 0), (False, 1)):
        chosen = [r for r in rows if (r[r["choice"]] == "MotiF") == mine]
        chosen = [chosen[k] for k in rng.permutation(len(chosen))]
        position = 0
        for reason, both in ticks.items():  # in turn, so that everybody gets one
            for _ in range(both[side]):
                chosen[position % len(chosen)]["reasons"].append(reason)
                position += 1
    assert all(r["reasons"] for r in rows)
    return [r | {"reasons": "|".join(r["reasons"])} for r in rows]


def report(*arguments) -> None:
    bench.main(["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def figure4(tmp_path_factory) -> tuple[dict, pathlib.Path]:
    folder = tmp_path_factory.mktemp("figure4")
    rng = np.random.default_rng(4)
    files = []
    for baseline, published in FIGURE4.items():
        files.append(folder / f"{baseline}.csv")
        rows = simulated_votes(baseline, published, rng)
        with files[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    report("--votes", *files, f"--output={folder / 'report'}", "--samples=400")
    return json.loads((folder / "report" / "report.json").read_text()), folder


def test_figure_4_to_one_decimal(figure4):
    found, _ = figure4
    rows = {r["b"]: r for r in found["comparisons"]}
    assert found["reference"] == "MotiF" and set(rows) == set(FIGURE4) and all(r["a"] == "MotiF" for r in rows.values())
    for baseline, published in FIGURE4.items():
        row = rows[baseline]
        rate = row["majority"]["rate"]
        assert row["majority"]["wins"] == published["wins"] and row["votes"] == PAIRS * RATERS and row["images"] == IMAGES
        assert [f"{100 * x:.1f}" for x in (rate, 1 - rate)] == [f"{x:.1f}" for x in published["ti2v_score"]]
        for reason in set(REASONS) & set(published):
            shares = [row["reasons"][reason][k]["rate"] for k in ("win", "none", "lose")]
            assert [f"{100 * x:.1f}" for x in shares] == [f"{x:.1f}" for x in published[reason]], (baseline, reason)
    assert f"{100 * np.mean([r['majority']['rate'] for r in rows.values()]):.0f}" == "72"


def test_our_numbers_of_figure_4_are_those_of_the_reference_tables(shared):
    tables = json.loads((shared / "ti2v_bench" / "paper_tables.json").read_text())["human_eval_vs_prior_work"]["models"]
    assert set(tables) == set(FIGURE4)
    for name, published in FIGURE4.items():
        assert tables[name]["ti2v_score"]["motif_wins_of_320"] == published["wins"]
        for reason in set(REASONS) & set(published):
            assert [tables[name][reason][k] for k in ("motif", "none", "baseline")] == published[reason]


def test_the_other_numbers_of_figure_4(figure4):
    """Wilson's intervals as published beside the paper's table; p by scipy and sign flips; annotators who vote without regard to sides."""
    found, folder = figure4
    row = {r["b"]: r for r in found["comparisons"]}["DynamiCrafter"]
    assert [f"{100 * x:.1f}" for x in row["majority"]["wilson"]] == ["54.9", "65.5"]
    assert row["majority"]["p"] == pytest.approx(0.000272, abs=2e-5)
    for_motif, image = Counter(), {}
    for v in json.loads((folder / "report" / "votes.json").read_text()):
        if "DynamiCrafter" in (v["left"], v["right"]):
            for_motif[v["pair"]] += 1 if v[v["choice"]] == "MotiF" else -1
            image[v["pair"]] = v["image"]
    sums = Counter()
    for pair, lead in for_motif.items():
        sums[image[pair]] += np.sign(lead)
    flips = np.random.default_rng(0).choice([-1, 1], (100_000, len(sums))) @ np.array([*sums.values()])
    share = np.mean(np.abs(flips) >= sum(sums.values()))
    # Three standard errors of a share of 100,000.
    assert row["majority"]["p_images"] == pytest.approx(share, abs=3 * math.sqrt(share / 100_000))
    for p in ("p", "p_images"):
        assert row["majority"][f"{p}_holm"] == row["majority"][p]  # the largest of nine
    low, high = row["majority"]["bootstrap"]
    assert low < row["majority"]["rate"] < high
    assert row["detectable"]["independent"] == pytest.approx(0.581, abs=1e-3)
    assert found["side"]["low"] < 0.5 < found["side"]["high"]
    assert found["seconds"]["quartiles"] == pytest.approx([17.5, 25, 32.5], abs=0.5)
    assert found["bradley_terry"][0]["model"] == "MotiF" and found["bradley_terry"][-1]["model"] == "VideoCrafter"


def test_raw_votes_stay_beside_the_report(figure4):
    _, folder = figure4
    with (folder / "report" / "votes.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    given = []
    for name in FIGURE4:
        with (folder / f"{name}.csv").open(newline="") as file:
            given += list(csv.DictReader(file))
    columns = list(given[0])
    assert [{c: row[c] for c in columns} for row in kept] == given
    page = (folder / "report" / "report.html").read_text()
    assert "hold for these annotators" in page and page.count("<th scope=col>over images and annotators") == 2
    assert "60.3" in page and "rater 7" in page and page.count("data:image/svg+xml") == 2


def vote(pair, annotator, winner, loser="B", left=None, reasons=("object_motion",), **more) -> Vote:
    left = left or winner
    right = loser if left == winner else winner
    return Vote(pair, annotator, left, right, "left" if left == winner else "right", tuple(reasons), **more)


def test_majorities_ties_and_shares_by_hand():
    votes = [
        *[vote("p1", f"r{n}", "A") for n in range(2)],
        vote("p1", "r2", "B", "A"),
        *[vote("p2", f"r{n}", "B", "A", reasons=("image_alignment", "text_alignment")) for n in range(3)],
        vote("p3", "r0", "A"),
        vote("p3", "r1", "B", "A"),
        Vote("p3", "r2", "A", "B", "tie"),
    ]
    row = analyse(votes, reference="A", samples=100)["comparisons"][0]
    m = row["majority"]
    assert (m["wins"], m["even"], m["losses"], m["rate"], m["p"]) == (1, 1, 1, 0.5, 1.0)
    assert row["vote_share"]["rate"] == pytest.approx(3.5 / 9)
    assert m["bootstrap"] is None  # three images are no sample
    motion = row["reasons"]["object_motion"]
    assert [motion[k]["rate"] for k in ("win", "none", "lose")] == pytest.approx([3 / 9, 4 / 9, 2 / 9])
    assert motion["given_choice"] == {"a": 1.0, "b": 0.4}
    assert row["agreement"]["unanimous"] == pytest.approx(1 / 3) and row["agreement"]["split"] == pytest.approx(2 / 3)
    assert row["agreement"]["kappa_pairs"] == 3 and row["agreement"]["kappa_raters"] == 3


def test_p_leaves_even_pairs_out_and_takes_an_image_for_one():
    """Six wins and two even ones: 2 / 2^6, where two losses would give 0.29. The same on three images: 2 / 2^3."""
    for images, p in ((8, 2 / 2**6), (3, 2 / 2**3)):
        votes = [vote(f"p{n}", "r", "A", image=f"i{n % images}") for n in range(8)]
        votes += [vote(f"p{n}", "s", *("BA" if n > 5 else "AB"), image=f"i{n % images}") for n in range(8)]
        m = analyse(votes, reference="A", samples=100)["comparisons"][0]["majority"]
        assert (m["wins"], m["even"], m["losses"]) == (6, 2, 0)
        assert (m["p_images"], m["p"]) == (pytest.approx(p), pytest.approx(2 / 2**6))


def test_annotators_are_judged_by_gold_repeats_and_the_others():
    votes = []
    for n in range(4):
        votes += [vote(f"p{n}", name, "A", left="A", task=f"{name}{n}", seconds=10.0) for name in ("good", "fair")]
        votes.append(vote(f"p{n}", "bad", "B", "A", left="B", task=f"bad{n}", seconds=2.0))  # always left, against the others
    votes.append(vote("p0", "good", "A", left="B", kind="repeat", repeats="good0"))
    votes.append(vote("p0", "bad", "A", left="A", kind="repeat", repeats="bad0"))
    votes.append(vote("p1", "bad", "B", "A", kind="repeat", repeats="good1"))  # of somebody else's task: tells nothing
    votes.append(vote("p9", "bad", "A", kind="repeat"))  # of a pair that they never judged
    votes += [
        Vote("p0", name, "A", "A (gold)", choice, kind="gold", better="left") for name, choice in (("good", "left"), ("bad", "right"))
    ]
    found = analyse(votes, reference="A", samples=100)
    rows = {r["annotator"]: r for r in found["annotators"]}
    assert found["repeats"]["rate"] == 0.5 and found["repeats"]["count"] == 2
    assert [rows[n]["gold"]["rate"] for n in ("good", "bad")] == [1, 0] and rows["fair"]["gold"]["rate"] is None
    assert rows["good"]["repeats"]["rate"] == 1 and rows["bad"]["repeats"]["rate"] == 0
    assert rows["bad"]["agreement"]["rate"] == 0 and rows["good"]["agreement"]["count"] == 0  # one against one is no majority
    assert rows["bad"]["median_seconds"] == 2 and rows["bad"]["left"]["rate"] == 1
    assert found["side"]["rate"] == 1 and found["side"]["p"] == pytest.approx(2 * 0.5**12)
    assert found["comparisons"][0]["votes"] == 12  # nothing but pairs counts


def test_repeats_of_a_table_without_tasks():
    """The first vote is the one on the same pair and systems, whatever else the annotator judged before or after."""
    votes = [vote("p", "r", "A"), vote("q", "r", "B", "A"), vote("p", "r", "C"), vote("q", "s", "B", "A")]
    again = [vote("p", "r", "A", left="B", kind="repeat"), vote("q", "r", "A", kind="repeat")]
    for order in (votes, votes[::-1]):
        found = analyse([*order, *again], samples=100)["repeats"]
        assert (found["rate"], found["count"]) == (0.5, 2)


def test_votes_without_reasons_have_no_shares_of_reasons(tmp_path):
    """As a table from elsewhere that does not ask for any; beside one that does, both are in the report."""
    rows = [ROW | {"pair": f"p{n}", "reasons": ""} for n in range(6)]
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100")
    assert json.loads((tmp_path / "report.json").read_text())["comparisons"][0]["reasons"] == {}
    page = (tmp_path / "report.html").read_text()
    assert "give no reasons" in page and "Text alignment" not in page and page.count("data:image/svg+xml") == 1
    rows += [ROW | {"right": "C"}]
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<td>A against B") == 4 and page.count("<td>A against C") == 4 + 4 and page.count("data:image/svg+xml") == 2


@pytest.mark.parametrize("images", [4, 5])
def test_a_few_images_are_no_sample(tmp_path, images):
    rows = [ROW | {"pair": f"p{n}", "annotator": f"r{m}", "image": f"i{n % images}"} for n in range(20) for m in range(2)]
    rows += [row | {"left": "C"} for row in rows] + [ROW | {"pair": "p0", "annotator": "s", "choice": "right", "image": "i0"}]
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100")
    found = json.loads((tmp_path / "report.json").read_text())
    row = next(r for r in found["comparisons"] if r["votes"] == 41)
    intervals = [row["reasons"]["text_alignment"]["win"][k] for k in ("low", "high")] + row["agreement"]["alpha_interval"]
    intervals += [found["bradley_terry"][0][k] for k in ("low", "high")]
    assert [x is None for x in intervals] == [images < 5] * 6
    assert (row["majority"]["bootstrap"] is None) == (images < 5) and "nan" not in re.sub(
        'unanim|base64,[^"]*', "", (tmp_path / "report.html").read_text()
    )


def test_a_system_that_wins_everything_may_still_lose():
    """30 of 30: Wilson's interval as published in textbooks, 88.6 to 100 %; of ten images, Wilson's of 10 of 10, 72.2 to 100 %."""
    for images, low in ((30, 0.886), (10, 0.722)):
        row = analyse([vote(f"p{n}", "r", "A", image=f"i{n % images}") for n in range(30)], samples=100)["comparisons"][0]
        for found in (row["majority"]["bootstrap"], row["vote_share"]["bootstrap"]):
            assert found == [pytest.approx(low, abs=5e-4), 1.0]
        motion = row["reasons"]["object_motion"]
        assert motion["win"]["low"] == pytest.approx(low, abs=5e-4) and motion["lose"]["high"] == pytest.approx(1 - low, abs=5e-4)


def test_intervals_of_single_votes_know_of_people():
    """Three of five people choose A on every one of 40 images, two never: drawn again, 0 to 5 of five, with scipy's quantiles. Over images
    there is next to nothing to draw. Four people are too few."""
    votes = [vote(f"p{n}", f"r{m}", *("AB" if m < 3 else "BA")) for n in range(40) for m in range(5)]
    row = analyse(votes, reference="A", samples=4000)["comparisons"][0]
    share = row["vote_share"]
    assert share["bootstrap_annotators"] == [pytest.approx(stats.binom.ppf(q, 5, 0.6) / 5) for q in (0.025, 0.975)]
    assert share["bootstrap"][1] - share["bootstrap"][0] < 0.1 and row["annotators"] == 5
    few = analyse([v for v in votes if v.annotator != "r4"], reference="A", samples=100)["comparisons"][0]["vote_share"]
    assert few["bootstrap_annotators"] is None and few["bootstrap"] is not None


def test_too_few_people_are_named_under_the_plot(tmp_path):
    rows = [
        ROW | {"pair": f"p{n}", "annotator": f"r{m}", "right": name}
        for n in range(6)
        for name, few in (("B", 4), ("C", 5))
        for m in range(few)
    ]
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100")
    assert "With too few of either, over images alone or Wilson's: A against B.</p>" in (tmp_path / "report.html").read_text()


def test_scenarios_are_no_images():
    """80 pairs on 80 images, eight of a scenario, which go one way: over scenarios sqrt(8) times as wide as over images."""
    verdicts = np.repeat([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], 8)
    votes = [vote(f"p{n}", "r", *("AB" if win else "BA"), image=f"i{n}", scenario=f"s{n // 8}") for n, win in enumerate(verdicts)]
    found = analyse(votes, reference="A", samples=4000)["comparisons"][0]["majority"]
    widths = [found[k][1] - found[k][0] for k in ("bootstrap_scenarios", "bootstrap")]
    assert widths[0] == pytest.approx(math.sqrt(8) * widths[1], rel=0.1)  # both in steps of a tenth and an eightieth


def test_what_a_study_detects_given_how_alike_pairs_of_an_image_are():
    """Four alike pairs an image are worth one: 25 images detect what 25 independent pairs would."""
    wins = np.random.default_rng(0).permutation(24) < 12
    votes = [vote(f"p{n}", "r", *("AB" if wins[n // 4] else "BA"), image=f"i{n // 4}") for n in range(96)]
    found = analyse(votes, samples=4000)["comparisons"][0]["detectable"]
    assert found["design_effect"] == pytest.approx(4, rel=0.08)
    assert found["independent"] == minimum_detectable(96)
    assert minimum_detectable(27) < found["clustered"] <= minimum_detectable(21)


def test_a_few_images_do_not_tell_how_alike_their_pairs_are():
    """40 pairs of one image, half of them won: not as good as 40 independent ones."""
    votes = [vote(f"p{n}", "r", *("AB" if n % 2 else "BA"), image="i") for n in range(40)]
    found = analyse(votes, samples=100)["comparisons"][0]["detectable"]
    assert found == {"independent": minimum_detectable(40), "clustered": None, "design_effect": None}


def test_intervals_of_agreement_are_of_images():
    """Two people agree on every pair of 12 images and never on those of 8: alpha and kappa over drawn images, worked out here."""
    votes = []
    for n in range(40):
        votes.append(vote(f"p{n}", "r", *("AB" if n % 2 else "BA"), image=f"i{n // 2}"))
        votes.append(vote(f"p{n}", "s", *("AB" if (n % 2 == 1) == (n < 24) else "BA"), image=f"i{n // 2}"))
    found = analyse(votes, samples=4000)["comparisons"][0]["agreement"]
    agreeing = stats.binom.ppf([0.025, 0.975], 20, 0.6) / 20  # observed; as many choose A as B in every draw, so one half by chance
    assert found["kappa_interval"] == pytest.approx(2 * agreeing - 1, abs=0.11)  # one image more or less
    chance = 0.5 * 80 / 79
    assert found["alpha_interval"] == pytest.approx(1 - (1 - agreeing) / chance, abs=0.11)


def test_agreement_on_reasons():
    """Both give the same reason for the same system, except text alignment, which one of them never gives: below chance."""
    votes = []
    for n in range(10):
        winner, loser = "AB" if n % 2 else "BA"
        votes += [vote(f"p{n}", name, winner, loser, reasons=given) for name, given in (("r", REASONS[1:3]), ("s", REASONS[2:3]))]
    found = analyse(votes, samples=100)["comparisons"][0]["reasons"]
    assert found["object_motion"]["alpha"] == 1 and found["text_alignment"]["alpha"] < 0


def test_ties_are_on_neither_side():
    votes = [vote(f"p{n}", "r", "A", left="A" if n < 3 else "B") for n in range(4)] + [Vote("p9", "r", "A", "B", "tie")]
    side = analyse(votes, samples=100)["side"]
    assert (side["rate"], side["count"], side["p"]) == (0.75, 4, pytest.approx(stats.binomtest(3, 4).pvalue))


def test_low_agreement_is_named(tmp_path):
    """Two people who never agree on B, and always on C."""
    rows = []
    for n in range(6):
        for name in "rs":
            rows.append(ROW | {"pair": f"p{n}", "annotator": name, "choice": "left" if (n % 2 == 0) == (name == "r") else "right"})
            rows.append(ROW | {"pair": f"p{n}", "annotator": name, "choice": "left" if n % 2 else "right", "right": "C"})
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100", "--reference= A")
    assert "Agreement below 0.2 in: A against B. A majority" in (tmp_path / "report.html").read_text()


def test_the_plot_has_the_intervals_of_the_tables(tmp_path, monkeypatch):
    """Of the majority over images; of single votes over images and people."""
    figures = []
    monkeypatch.setattr(preference_report.html, "plot", lambda figure, *_: figures.append(figure) or "")
    votes = [vote(f"p{n}", f"r{m}", *("AB" if n < 5 or m == 0 else "BA")) for n in range(8) for m in range(5)]
    found = analyse(votes, reference="A", samples=400)
    preference_report.page(found, votes)
    row = found["comparisons"][0]
    for container, wanted in zip(
        figures[0].axes[0].containers, (row["majority"]["bootstrap"], row["vote_share"]["bootstrap_annotators"]), strict=True
    ):
        ((start, end),) = container.lines[2][0].get_segments()
        assert [start[0], end[0]] == pytest.approx([100 * x for x in wanted]) and end[0] - start[0] > 10


def test_the_ranking_knows_of_images():
    """40 images whose four pairs go one way each have twice the interval of 160 single pairs; a standard error of that width is 2 %."""
    winners = np.random.default_rng(5).random((40, 3)) < 0.6
    widths = []
    for shared in (True, False):
        votes = [
            vote(f"p{n}", "r", *(pair if winners[n // 4, k] else pair[::-1]), image=f"i{n // 4 if shared else n}")
            for n in range(160)
            for k, pair in enumerate(("AB", "AC", "BC"))
        ]
        row = next(r for r in analyse(votes, samples=4000)["bradley_terry"] if r["model"] == "A")
        widths.append(row["high"] - row["low"])
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.08) and widths[1] > 10


def test_the_ranking_knows_of_people():
    """Three of five always prefer A to B to C, two the reverse: over images all draws are alike, over people 1 to 5 of five prefer A."""
    votes = []
    for n in range(40):
        for m in range(5):
            votes += [vote(f"p{n}", f"r{m}", *(pair if m < 3 else pair[::-1])) for pair in ("AB", "AC", "BC")]
    row = next(r for r in analyse(votes, samples=4000)["bradley_terry"] if r["model"] == "A")
    limits = []
    for people in (1, 5):
        wins = np.triu(np.full((3, 3), 40.0 * people), 1) + np.tril(np.full((3, 3), 40.0 * (5 - people)), -1)
        limits.append(400 / math.log(10) * bradley_terry(wins)[0])
    assert row["bootstrap_annotators"] == pytest.approx(limits) and row["low"] == pytest.approx(row["high"])


def test_ties_count_half_in_the_ranking():
    """As many wins each way as ties: equal strengths."""
    votes = [Vote(f"p{n}", "r", a, b, "tie") for n in range(9) for a, b in ("AB", "AC", "BC")]
    assert [r["points"] for r in analyse(votes, samples=100)["bradley_terry"]] == pytest.approx([0, 0, 0], abs=1e-9)


def test_systems_that_never_met_are_not_ranked():
    votes = [vote("p", "r", "A"), vote("p", "r", "C", "D")]
    assert analyse(votes, samples=100)["bradley_terry"] is None


def test_hostile_votes_change_nothing(tmp_path, capsys):
    """Text of annotators is shown as text; what is too long is refused and named."""
    attack = "<script>alert(1)</script>'); DROP TABLE votes; --"
    rows = [
        {"pair": "p1", "annotator": attack, "left": "A", "right": "B", "choice": "left", "reasons": ["text_alignment"], "comment": attack},
        {"pair": "p1", "annotator": "x" * 10_000_000, "left": "A", "right": "B", "choice": "right", "reasons": ["text_alignment"]},
        {"pair": "p1", "annotator": "long", "left": "A", "right": "B", "choice": "right", "reasons": [], "comment": "x" * 10_000_000},
        {"pair": "p1", "annotator": "r", "left": "A", "right": "B", "choice": "right", "reasons": ["charm"]},
        "nothing",
    ]
    (tmp_path / "votes.json").write_text(json.dumps(rows))
    report(f"--votes={tmp_path / 'votes.json'}", f"--output={tmp_path / 'out'}", "--samples=100")
    assert "4 votes were refused" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and len(page) < 200_000
    kept = json.loads((tmp_path / "out" / "votes.json").read_text())
    assert len(kept) == 1 and kept[0]["annotator"] == kept[0]["comment"] == attack
    assert json.loads((tmp_path / "out" / "report.json").read_text())["comparisons"][0]["votes"] == 1


ROW = {"pair": "p", "annotator": "r", "left": "A", "right": "B", "choice": "left", "reasons": "text_alignment"}


def test_a_huge_field_of_a_table_costs_its_vote_only(tmp_path, capsys):
    (tmp_path / "votes.csv").write_text(f"{','.join(ROW)}\n{','.join(ROW.values())}\np,{'x' * 10_000_000},A,B,left,\n")
    report(f"--votes={tmp_path / 'votes.csv'}", f"--output={tmp_path / 'out'}", "--samples=100")
    assert "1 votes were refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no votes on pairs"),
        ("{", "cannot be read"),
        ('{"study": "s", "votes": []}', "--study"),
        ('[{"Pair": "p"}, {"pair;annotator": "p;r"}]', r"no votes on pairs among 0 votes; 2 refused, the first: .* missing"),
    ],
)
def test_files_without_votes(tmp_path, content, message):
    (tmp_path / "votes.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        report(f"--votes={tmp_path / 'votes.json'}", f"--output={tmp_path / 'out'}")


def saved(path: pathlib.Path, *rows) -> pathlib.Path:
    path.write_text(json.dumps(rows))
    return path


def test_files_of_several_options_all_count(tmp_path):
    files = [saved(tmp_path / f"{n}.json", ROW | {"annotator": f"r{n}"}) for n in range(3)]
    report(f"--votes={files[0]}", "--votes", *files[1:], f"--output={tmp_path}", "--samples=100")
    assert json.loads((tmp_path / "report.json").read_text())["votes"] == {"pair": 3}


def test_a_file_of_votes_is_never_overwritten(tmp_path, monkeypatch):
    """Its other columns and refused votes would be lost."""
    table = "pair,annotator,left,right,choice,age\np,r,A,B,left,33\np,r,A,B,right,33\n"
    (tmp_path / "votes.csv").write_text(table)
    monkeypatch.chdir(tmp_path)
    report("--votes=votes.csv", f"--output={tmp_path}", "--samples=100")
    assert (tmp_path / "votes.csv").read_text() == table and len(json.loads((tmp_path / "votes.json").read_text())) == 1


@pytest.mark.parametrize("output", ["votes.json", "votes.json/below", "taken"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, output):
    votes = saved(tmp_path / "votes.json", ROW)
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    with pytest.raises(SystemExit, match=rf"motif_jax\.bench report: .*{output}"):
        report(f"--votes={votes}", f"--output={tmp_path / output}", "--samples=100")


def test_a_negative_seed_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="argument --seed: -1: must be at least 0"):
        report(f"--votes={saved(tmp_path / 'votes.json', ROW)}", f"--output={tmp_path}", "--seed=-1")


def test_the_printed_p_values_are_those_of_the_page(tmp_path, capsys):
    """Of two comparisons with five and six wins: 2 / 2^5 and 2 / 2^6, the smaller one doubled by Holm."""
    rows = [ROW | {"pair": f"p{i}", "right": name} for name, wins in (("B", 5), ("C", 6)) for i in range(wins)]
    report("--votes", saved(tmp_path / "votes.json", *rows), f"--output={tmp_path}", "--samples=100", "--reference=A")
    said = capsys.readouterr().out
    assert "p = 0.062, by Holm 0.062" in said and "p = 0.031, by Holm 0.062" in said


SCORES = {"dynamic_degree": (0.9, 0.7, 1.0), "mean_flow": (1.25, 1.0, 1.5), "ssim0_image": (0.8, 0.75, 0.85), "ssim_image": (0.6, 0.5, 0.7)}


def scores(path: pathlib.Path, *models: str) -> pathlib.Path:
    measures = {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in SCORES.items()}
    still = measures | {"mean_flow": {"value": 0.0, "low": None, "high": None}, "ssim_image": None}
    path.write_text(json.dumps({"models": {m: {"metrics": still if m == "static" else measures} for m in models}}))
    return path


def test_votes_stand_beside_scores(tmp_path):
    """Three of four verdicts for A; the table has a row for each system and the still image, in per cent where METRICS says so."""
    rows = [ROW | {"pair": f"p{i}", "choice": "left" if i else "right"} for i in range(4)]
    votes, measured = saved(tmp_path / "votes.json", *rows), scores(tmp_path / "scores.json", "A", "B", "other", "static")
    report(f"--votes={votes}", f"--output={tmp_path / 'out'}", "--samples=100", "--reference=A", f"--scores={measured}")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]
    assert list(found) == ["A", "B", "static"] and found["B"]["mean_flow"] == {"value": 1.25, "low": 1.0, "high": 1.5}
    page = (tmp_path / "out" / "report.html").read_text()
    same = "<td>90.0 [70.0, 100.0]<td>1.25 [1.00, 1.50]<td>0.800 [0.750, 0.850]"
    assert "<th scope=col>preferred to A %<th scope=col>dynamic degree %<th scope=col>mean flow px<th scope=col>SSIM frame 0" in page
    assert f"<td>A<td>-{same}" in page and f"<td>B<td>25.0{same}" in page
    assert "<td>static<td>-<td>90.0 [70.0, 100.0]<td>0.00<td>0.800 [0.750, 0.850]<td>-</table>" in page


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("[]", "not a scores.json"), ('{"models": {"A": {}}}', "not a scores.json"), ("A", "no B, only A, static")],
)
def test_scores_of_something_else_are_one_line(tmp_path, content, message):
    path = tmp_path / "scores.json"
    if content == "A":
        scores(path, "A", "static")
    elif content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"--scores=.*{message}"):
        report(f"--votes={saved(tmp_path / 'votes.json', ROW)}", f"--output={tmp_path}", "--samples=100", f"--scores={path}")


def test_sides_that_were_never_drawn_are_named(tmp_path, capsys):
    """A always on the left of B, in three of ten votes on the left of C, in two of five on the left of D, which is balanced enough."""
    rows = [ROW | {"pair": f"p{n}"} for n in range(10)]
    rows += [ROW | {"pair": f"p{n}", "right": "C"} | ({} if n < 3 else {"left": "C", "right": "A"}) for n in range(10)]
    rows += [ROW | {"pair": f"p{n}", "right": "D", "choice": "tie"} | ({} if n < 4 else {"left": "D", "right": "A"}) for n in range(10)]
    report(f"--votes={saved(tmp_path / 'votes.json', *rows)}", f"--output={tmp_path}", "--samples=100", "--reference=A")
    found = {r["b"]: r["sides"] for r in json.loads((tmp_path / "report.json").read_text())["comparisons"]}
    assert found == {
        "B": {"a_left": 1.0, "when_left": 1.0, "when_right": None},
        "C": {"a_left": 0.3, "when_left": 1.0, "when_right": 0.0},
        "D": {"a_left": 0.4, "when_left": 0.5, "when_right": 0.5},
    }
    notes = [
        "A against B: A was on the left in 100 % of the votes; side and system cannot be separated",
        "A against C: A was on the left in 30 % of the votes; compare the shares by side",
    ]
    page, said = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert all(note in page and note in said for note in notes) and said.count("on the left") == page.count("was on the left") == 2
    assert "<td>A against C<td>30.0<td>100.0<td>0.0" in page


def test_the_clearest_pairs_are_not_those_with_the_fewest_votes():
    shares = {
        "one": (1, 1),
        "four": (4, 5),
        "five": (5, 5),
        "half": (1, 2),
        "even": (3, 6),
        "none": (0, 1),
        "never": (0, 4),
        "tie": (2.5, 6),
    }
    assert preference_report.clearest(shares, 1) == ["five", "even", "never"]
    assert preference_report.clearest(shares, 2) == ["five", "four", "even", "half", "never", "tie"]


def test_a_report_of_a_study_says_how_far_it_is(small_study, tmp_path, capsys):
    """Two answers on one pair and one on another, of two copies of three comparisons; examples from the most to the least preferred pair,
    the first system's video on the left."""
    key = study.load(small_study)
    rows = []
    for sheet, wanted in (("1-1", {"pair2": True, "pair0": False}), ("1-2", {"pair2": True})):
        for task in key.sheets[sheet]:
            if task.kind == "pair" and (pair := key.pairs[task.pair].id) in wanted:
                left, right = (key.clips[name].model for name in (task.left, task.right))
                choice = "left" if (left == "zebrafish") == wanted[pair] else "right"
                rows.append({"pair": pair, "annotator": sheet, "left": left, "right": right, "choice": choice, "task": task.id})
    report(f"--votes={saved(tmp_path / 'given.json', *rows)}", f"--output={tmp_path}", f"--study={small_study}", "--samples=100")
    found, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    assert found["tasks"] == {"answered": 3, "all": 6} and found["comparisons"][0]["votes_per_pair"] == [1, 2]
    said = "3 of the study's 6 comparisons to be judged are answered"
    assert said in page and said in capsys.readouterr().out and "<td>1 / 0 / 1<td>1 to 2<td>50.0" in page
    assert re.findall(r"square (.) moves. <small>\((.*?) votes for the left", page) == [("2", "2 of 2"), ("0", "0 of 1")]
    shown = [key.clips[name] for name in re.findall(r"video src=media/(\S+)", page)]
    assert [(clip.model, clip.pair) for clip in shown] == [(m, p) for p in ("pair2", "pair0") for m in ("zebrafish", "quokka")]
    without = saved(tmp_path / "given.json", *({k: v for k, v in row.items() if k != "task"} for row in rows))
    report(f"--votes={without}", f"--output={tmp_path}", f"--study={small_study}", "--samples=100")
    assert "tasks" not in json.loads((tmp_path / "report.json").read_text())


def test_nobody_is_two_raters(tmp_path, capsys):
    """Tables without tasks: the same file twice, a vote changed later, and another task for the same pair. Repeats are no second votes."""
    pair, swapped = ROW, ROW | {"left": "B", "right": "A"}
    again, gold = swapped | {"kind": "repeat", "choice": "right"}, ROW | {"right": "A (gold)", "kind": "gold", "better": "left"}
    others = [ROW | {"annotator": "s"}, ROW | {"pair": "q"}, ROW | {"right": "C"}]
    first = saved(tmp_path / "first.json", pair, again, gold, *others)
    second = saved(tmp_path / "second.json", swapped, ROW | {"task": "t"})
    report("--votes", first, first, second, f"--output={tmp_path}", "--samples=100")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["votes"] == {"pair": 4, "repeat": 1, "gold": 1} and len(found["refused"]) == 6 + 2
    assert f"8 votes were refused, the first: {first}, vote 1: second vote of r on pair p" in capsys.readouterr().out
    assert found["refused"][-1] == f"{second}, vote 2: second vote of r on pair p"


def test_an_unknown_reference_is_one_line():
    with pytest.raises(UserError, match="Z: has no votes; the systems are A, B"):
        analyse([vote("p", "r", "A")], reference="Z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": "both"}, "choice"),
        ({"right": "A"}, "two different systems"),
        ({"kind": "vote"}, "kind"),
        ({"kind": "gold"}, "better"),
        ({"kind": "gold", "better": "A"}, "better"),
        ({"pair": 1.5}, "pair: expected .* text"),
        ({"seconds": "soon"}, "seconds"),
        ({"seconds": math.inf}, "seconds"),
        ({"plays": math.inf}, "plays"),
        ({"plays": 10**400}, "plays"),
        ({"plays": "1.5"}, "plays"),
        ({"annotator": ""}, "annotator missing"),
        ({"reasons": "text_alignment|charm"}, "reasons"),
        ({"reasons": 5}, "reasons"),
        ({"reasons": [{"a": 1}]}, "reasons"),
    ],
)
def test_rows_that_are_no_votes(change, message):
    assert check_vote(ROW).reasons == ("text_alignment",) and check_vote(ROW | {"plays": "1.0"}).plays == 1
    assert check_vote(ROW | {"annotator": 7, "pair": 0}) == check_vote(ROW | {"annotator": "7", "pair": "0"})
    with pytest.raises(ValueError, match=message):
        check_vote(ROW | change)
