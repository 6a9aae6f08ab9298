"""What the votes of a human study say: files of votes in; report.html, report.json and the raw votes out.

Files are the server's .sqlite, what the page offers for download (.json; both need --study), or exported and foreign tables (.csv, .json
with the columns pair, annotator, left, right, choice, and better also reasons, image, scenario, kind, seconds ...).
"""

import argparse
import json
import pathlib
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from motif_jax import html
from motif_jax.bench import study
from motif_jax.bench.arguments import at_least, local
from motif_jax.bench.preference import finite, wilson
from motif_jax.bench.preference_analysis import BALANCED, LOW_AGREEMENT, MIN_CLUSTERS, analyse, score
from motif_jax.bench.standings import METRICS, STATIC
from motif_jax.bench.tables import estimate, interval, number
from motif_jax.bench.votes import Vote, read_all, write_votes
from motif_jax.errors import UserError
from motif_jax.pairs import plain_name
from motif_jax.requested import make_output

BESIDE = ("dynamic_degree", "mean_flow", "ssim0_image", "ssim_image")  # measures shown beside the votes: each alone can be gamed
WON, NEITHER, LOST = "#1f6fb4", "#d9d9de", "#b8560f"  # blue and orange, which all eyes tell apart
STYLE = """td{white-space:nowrap}td:first-child{white-space:normal;min-width:min(14rem,40vw)}.note{color:#8a4b00}
.comments :is(td,th){text-align:left}
.comments td:nth-child(n+3){white-space:pre-wrap}.comments td:last-child{min-width:16rem}
.example{display:inline-block;width:30rem;max-width:100%;margin:.5rem 1rem .5rem 0;vertical-align:top}.example div{display:flex;gap:.4rem}
.example figure{margin:0;flex:1}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--votes", required=True, nargs="+", action="extend", type=local, help="files of votes; a system may be in several")
    parser.add_argument("--output", required=True, type=local, help="folder for report.html, report.json, votes.json and votes.csv")
    parser.add_argument("--study", type=local, help="folder of `annotate build`: key of blind votes, and the videos of the examples")
    reference = "the system whose wins are counted; default: the study's first, or the one that met most others"
    parser.add_argument("--reference", type=plain_name, help=reference)
    parser.add_argument("--scores", type=local, help="scores.json of `bench score` with the same names: shown beside the votes")
    parser.add_argument("--examples", default=2, type=at_least(0), help="pairs shown per comparison and outcome, with --study; default 2")
    parser.add_argument("--samples", default=2000, type=at_least(100), help="bootstrap samples; default 2000")
    parser.add_argument("--seed", default=0, type=at_least(0), help="of the bootstrap")


def run(arguments: argparse.Namespace) -> None:
    votes, refused = read_all(arguments.votes, arguments.study)
    key = study.load(arguments.study) if arguments.study else None
    found = analyse(votes, key.models if key else (), arguments.reference, arguments.samples, arguments.seed, refused)
    if key:
        asked = {task.id for tasks in key.sheets.values() for task in tasks if task.kind == "pair"}
        if answered := asked & {v.task for v in votes}:  # of a table without tasks nothing is known
            found["tasks"] = {"answered": len(answered), "all": len(asked)}
    if arguments.scores:
        found["scores"] = _read_scores(arguments.scores, found["models"])
    make_output(arguments.output)
    given = {path.resolve() for path in arguments.votes}
    for path in (arguments.output / "votes.json", arguments.output / "votes.csv"):
        if path.resolve() not in given:  # somebody's own table may hold more than we keep
            write_votes(path, votes)
    (arguments.output / "report.json").write_text(json.dumps(finite(found), indent=1) + "\n", encoding="utf-8")
    shown = _examples(found, votes, key, arguments.study / "page" / "media", arguments) if key and arguments.examples else ""
    (arguments.output / "report.html").write_text(page(found, votes, shown), encoding="utf-8")
    if "tasks" in found:
        print(_tasks(found))
    for row in found["comparisons"]:
        m = row["majority"]
        rate = f"{_percent(m['rate'])} % of {row['pairs']} pairs {interval(m['bootstrap'] or m['wilson'], '.1f', 100)}"
        print(f"{_names(row)}: {rate}, p = {m['p_images']:.2g}, by Holm {m['p_images_holm']:.2g}")
        for note in side_notes([row]):
            print(note)
    if refused:
        print(f"{len(refused)} votes were refused, the first: {refused[0][:200]}")
    print(arguments.output / "report.html")


def _read_scores(path: pathlib.Path, systems: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{system: its measures of `BESIDE`} of the systems in the votes and of the still image, from `bench score`."""
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        found = {name: {m: models[name]["metrics"].get(m) for m in BESIDE} for name in [*systems, STATIC] if name in models}
    except OSError as error:
        raise UserError(f"--scores={path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--scores={path}: not a scores.json of `bench score`") from error
    if missing := [name for name in systems if name not in found]:
        raise UserError(f"--scores={path}: no {', '.join(missing)}, only {', '.join(models)}; `bench score` must name them as the votes do")
    return found


def page(found: dict[str, Any], votes: Sequence[Vote], examples: str = "") -> str:
    """The whole report as one html text; `examples` is put in as it is."""
    n = found["votes"].get("pair", 0)
    body = [
        f"<h1>{html.escape(found['reference'])} in pairwise votes</h1>",
        f"<p>{n:,} votes of {sum(a['votes'] > 0 for a in found['annotators'])} annotators. {_tasks(found)} "
        "Intervals are 95 %: Wilson's as if all were independent; a bootstrap over images, because pairs that share an image are not; and "
        f"over images and annotators, because votes of one person are not (none of fewer than {MIN_CLUSTERS} of either). Raw votes: "
        "<a href=votes.csv>votes.csv</a>, <a href=votes.json>votes.json</a>; all numbers: <a href=report.json>report.json</a>.</p>",
        "<h2>Who wins</h2>",
        _win_plot(found),
        _win_table(found),
        _beside(found),
        "<h2>Why</h2>",
        *_reasons(found),
        "<h2>Do annotators agree</h2>",
        _agreement_table(found),
        _ranking(found),
        "<h2>Annotators</h2>",
        _annotators(found),
        examples,
        _comments(votes),
        _refused(found["refused"]),
    ]
    return html.page(found["reference"], body, 84, html.NUMBERS + STYLE)


def _tasks(found: dict[str, Any]) -> str:
    tasks = found.get("tasks")
    return f"{tasks['answered']} of the study's {tasks['all']} comparisons to be judged are answered." if tasks else ""


def _names(row: dict[str, Any]) -> str:
    return f"{row['a']} against {row['b']}"


def _percent(x: float | None, form: str = ".1f") -> str:
    return number(x, form, 100)


def _rate_cell(r: dict[str, Any]) -> str:
    return "-" if r["rate"] is None else f"{estimate(r['rate'], (r['low'], r['high']), '.0f', 100)} of {r['count']}"


def _win_table(found: dict[str, Any]) -> str:
    majorities, single = [], []
    intervals = {"wilson": "Wilson", "bootstrap": "over images"}
    if any(r["majority"]["bootstrap_scenarios"] for r in found["comparisons"]):
        intervals["bootstrap_scenarios"] = "over scenarios"
    for r in found["comparisons"]:
        m, v, d = r["majority"], r["vote_share"], r["detectable"]
        counts = f"{m['wins']} / {m['even']} / {m['losses']}", " to ".join(map(str, dict.fromkeys(r["votes_per_pair"])))
        rates, shares = ([_percent(x["rate"]), *(interval(x[kind], ".1f", 100) for kind in intervals)] for x in (m, v))
        ps = (f"{m[p]:.2g}" for p in ("p", "p_images", "p_images_holm"))
        majorities.append((_names(r), *counts, *rates, *ps, *map(_percent, (d["independent"], d["clustered"]))))
        single.append((_names(r), r["votes"], r["annotators"], *shares, interval(v["bootstrap_annotators"], ".1f", 100)))
    tests = ("p", "p over images", "Holm", "detectable %", "clustered %")
    return (
        "<h3>Majority of each pair</h3>"
        + html.table(("", "won / even / lost", "votes a pair", "win rate %", *intervals.values(), *tests), majorities)
        + "<p>An even split is half a win for both, and for neither in the tests. p: exact, two-sided, against one half, as if pairs were "
        "independent; over images: the pairs of an image taken as one; Holm: the latter, adjusted for all comparisons here. Detectable: "
        "the true win rate that this number of pairs shows with 80 % probability, first as if they were independent, then (clustered) "
        "given how alike pairs of one image are. <b>p and all intervals of the majority hold for these annotators</b>: people who lean "
        "to one system make them surer than other people would confirm.</p><h3>Single votes</h3>"
        + html.table(("", "votes", "annotators", "for the first %", *intervals.values(), "over images and annotators"), single)
        + "<p>A tie is half a vote for both. Only the last interval speaks of other people than these.</p><h3>Sides</h3>"
        + _side_table(found)
    )


def side_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on every comparison whose votes were not given with either system on the left about equally often."""
    notes = []
    for r in rows:
        share = r["sides"]["a_left"]
        if not BALANCED[0] <= share <= BALANCED[1]:
            note = f"{_names(r)}: {r['a']} was on the left in {_percent(share, '.0f')} % of the votes; "
            notes.append(note + ("side and system cannot be separated" if share in (0, 1) else "compare the shares by side"))
    return notes


def _side_table(found: dict[str, Any]) -> str:
    rows = [(_names(r), *(_percent(r["sides"][k]) for k in ("a_left", "when_left", "when_right"))) for r in found["comparisons"]]
    notes = "".join(f"<p class=note>{html.escape(note)}.</p>" for note in side_notes(found["comparisons"]))
    return html.table(("", "first on the left %", "for it there %", "for it on the right %"), rows) + notes


def _beside(found: dict[str, Any]) -> str:
    """Votes, motion and likeness to the image in one table, with the still image, which would win every measure of likeness."""
    if "scores" not in found:
        return ""
    against = {r["b"]: 1 - r["majority"]["rate"] for r in found["comparisons"] if r["a"] == found["reference"]}
    shown = [metric for metric in METRICS if metric.name in BESIDE]
    rows = []
    for system, measures in found["scores"].items():
        cells = []
        for metric in shown:
            m = measures[metric.name] or dict.fromkeys(("value", "low", "high"))
            cells.append(estimate(m["value"], (m["low"], m["high"]), f".{metric.digits}f", metric.scale))
        rows.append((system, _percent(against.get(system)), *cells))
    return (
        "<h3>Beside what can be measured</h3>"
        + html.table(("", f"preferred to {found['reference']} %", *(metric.label for metric in shown)), rows)
        + f"<p>Each number alone can be gamed: {STATIC}, the image repeated, is most like the image; shaking raises the dynamic degree.</p>"
    )


def _reasons(found: dict[str, Any]) -> list[str]:
    if not any(r["reasons"] for r in found["comparisons"]):
        return ["<p>The votes give no reasons.</p>"]
    rows = []
    for r in found["comparisons"]:
        for name, x in r["reasons"].items():
            shares = [estimate(x[k]["rate"], (x[k]["low"], x[k]["high"]), ".1f", 100) for k in ("win", "none", "lose")]
            given = [_percent(x["given_choice"][k], ".0f") for k in ("a", "b")]
            rows.append((_names(r), study.LABELS[name], *shares, *given, number(x["alpha"])))
    note = "<p>Shares of single votes, in per cent: won for this reason, neither, lost for it. A vote may have several reasons.</p>"
    head = ("", "reason", "won", "neither", "lost", "of its voters %", "of the other's %", "alpha")
    return [_reason_plots(found), note, html.table(head, rows)]


def _agreement_table(found: dict[str, Any]) -> str:
    rows, low = [], []
    for r in found["comparisons"]:
        a = r["agreement"]
        if a["alpha"] is None:
            rows.append((_names(r), *["-"] * 4))
            continue
        alpha, kappa = (estimate(a[k], a[f"{k}_interval"]) for k in ("alpha", "kappa"))
        raters = f"{kappa} ({a['kappa_pairs']} pairs with {a['kappa_raters']} votes)"
        rows.append((_names(r), alpha, raters, _percent(a["unanimous"]), _percent(a["split"])))
        low += [_names(r)] if a["alpha"] < LOW_AGREEMENT else []
    table = html.table(("", "Krippendorff's alpha", "Fleiss' kappa", "unanimous %", "decided by one vote or even %"), rows)
    if low:
        table += (
            f"<p class=note>Agreement below {LOW_AGREEMENT} in: {html.escape(', '.join(low))}. A majority makes such preferences look "
            "stronger than single votes do; read the share of votes.</p>"
        )
    return table


def _ranking(found: dict[str, Any]) -> str:
    if len(found["models"]) < 3:
        return ""
    if found["bradley_terry"] is None:
        return "<h2>Ranking</h2><p>None: some systems never met, not even through others.</p>"
    rows = []
    for r in found["bradley_terry"]:
        intervals = (interval(limits, ".0f") for limits in ((r["low"], r["high"]), r["bootstrap_annotators"]))
        rows.append((r["model"], f"{r['points']:.0f}", *intervals, f"{r['votes']:.0f}"))
    note = "<p>Bradley-Terry over all votes: 400 points are odds of ten to one, the mean is zero; intervals: bootstrap.</p>"
    return "<h2>Ranking</h2>" + html.table(("system", "points", "over images", "over images and annotators", "votes"), rows) + note


def _annotators(found: dict[str, Any]) -> str:
    side, time = found["side"], found["seconds"]
    text = f"<p>Left video chosen, %: {_rate_cell(side)} (p = {side['p']:.2g}). Same choice again with sides swapped, %: "
    text += f"{_rate_cell(found['repeats'])}. Gold items right, %: {_rate_cell(found['gold'])}."
    if time:
        low, middle, high = time["quartiles"]
        text += f" Seconds per pair: median {middle:.0f}, quartiles {low:.0f} and {high:.0f}; {time['hours']:.1f} hours for all pairs."
    rows = []
    for a in found["annotators"]:
        rates = (_rate_cell(a[k]) for k in ("left", "gold", "repeats", "agreement"))
        rows.append((a["annotator"], a["votes"], number(a["median_seconds"], ".0f"), *rates))
    head = ("annotator", "votes", "median s", "left %", "gold right %", "same again %", "with the others' majority %")
    return text + "</p>" + html.table(head, rows)


def _comments(votes: Sequence[Vote]) -> str:
    rows = [(v.annotator, v.pair, f"{v.left} | {v.right}", v.choice, v.comment) for v in votes if v.comment.strip()]
    table = html.table(("annotator", "pair", "left | right", "choice", "comment"), rows)
    return f"<h2>Comments</h2><div class=comments>{table}</div>" if rows else ""


def _refused(refused: list[str]) -> str:
    shown = "".join(f"<li>{html.escape(line[:300])}" for line in refused[:20])
    return f"<h2>Refused</h2><p>{len(refused)} votes do not count:</p><ul>{shown}</ul>" if refused else ""


def _win_plot(found: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    rows = found["comparisons"]
    bars = (-0.13, "majority", "#0b57a4", "majority of each pair"), (0.13, "vote_share", "#c77700", "single votes")
    figure = Figure(figsize=(9, 0.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for shift, key, colour, label in bars:
            r = row[key]
            low, high = r.get("bootstrap_annotators") or r["bootstrap"] or r["wilson"]
            error = [[max(0.0, 100 * (r["rate"] - low))], [max(0.0, 100 * (high - r["rate"]))]]
            axes.errorbar(100 * r["rate"], y + shift, xerr=error, fmt="o", color=colour, capsize=3, label=None if y else label)
    axes.axvline(50, color="#777", linewidth=1, linestyle="--")
    axes.set(xlim=(-1, 101), xlabel="wins of the first, %", ylim=(len(rows) - 0.4, -0.6))
    names = [textwrap.fill(f"{html.short(r['a'])} against {html.short(r['b'])}", 44) for r in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    note = "Bars of the majority: over images; of single votes: over images and annotators."
    few = [_names(r) for r in rows if r["vote_share"]["bootstrap_annotators"] is None]
    if few:
        note += f" With too few of either, over images alone or Wilson's: {html.escape(', '.join(few))}."
    return html.plot(figure, "win rates with intervals", "svg") + f"<p>{note}</p>"


def _reason_plots(found: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    rows = [r for r in found["comparisons"] if r["reasons"]]
    columns = min(3, len(rows))
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 0.4 + 2.6 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).reshape(-1)
    labels = ["Overall", *study.LABELS.values()]
    for axes, row in zip(panels, rows, strict=False):
        m = row["majority"]["rate"]
        bars = [(m, 0.0, 1 - m), *(tuple(r[k]["rate"] for k in ("win", "none", "lose")) for r in row["reasons"].values())]
        for y, bar in enumerate(bars):
            left = 0.0
            for width, colour, ink in zip(bar, (WON, NEITHER, LOST), ("white", "#333", "white"), strict=True):
                axes.barh(y, 100 * width, left=100 * left, color=colour, height=0.75)
                if width > 0.06:
                    axes.text(100 * (left + width / 2), y, f"{100 * width:.1f}", ha="center", va="center", color=ink, fontsize=8)
                left += width
        axes.set_yticks(range(len(bars)), labels if axes in panels[::columns] else [""] * len(bars), fontsize=8)
        axes.set(xlim=(0, 100), ylim=(len(bars) - 0.5, -0.5), xticks=[])
        axes.set_title(f"{html.short(row['a'])} (left, blue)\n{html.short(row['b'])} (right, orange)", fontsize=9, parse_math=False)
        axes.spines[:].set_visible(False)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    return html.plot(figure, "reasons: won, neither, lost", "svg")


def clearest(shares: dict[str, tuple[float, int]], count: int) -> list[str]:
    """Of {pair: (votes for a system, votes)} so many of the clearest wins, of the most even pairs, and of the clearest losses, none twice.

    Clearest by the lower end of Wilson's interval, since one vote of one is less clear than four of five.
    """
    won = sorted(shares, key=lambda name: -wilson(*shares[name])[0])
    lost = sorted(shares, key=lambda name: wilson(*shares[name])[1])
    even = sorted(shares, key=lambda name: (abs(shares[name][0] / shares[name][1] - 0.5), -shares[name][1]))
    return list(dict.fromkeys([*won[:count], *even[:count], *lost[:count]]))


def _examples(found: dict[str, Any], votes: Sequence[Vote], key: study.Key, media: pathlib.Path, arguments: argparse.Namespace) -> str:
    """Pairs with the clearest wins and losses and the most even ones, side by side; their videos are copied beside the page."""
    files = {(clip.model, clip.pair): name for name, clip in key.clips.items() if not clip.damage}
    prompts = {entry.id: entry.prompt for entry in key.pairs}
    parts = []
    (arguments.output / "media").mkdir(exist_ok=True)

    def figure(model: str, pair: str) -> str:
        file = files[model, pair]
        shutil.copyfile(media / file, arguments.output / "media" / file)
        video = f"<video src=media/{file} autoplay loop muted playsinline controls></video>"
        return f"<figure>{video}<figcaption>{html.escape(model)}</figcaption></figure>"

    for row in found["comparisons"]:
        a, b = row["a"], row["b"]
        scores = defaultdict(list)
        for v in votes:
            if v.kind == "pair" and {v.left, v.right} == {a, b} and {(a, v.pair), (b, v.pair)} <= files.keys():
                scores[v.pair].append(score(v, a))
        shares = {pair: (sum(scores[pair]), len(scores[pair])) for pair in prompts if pair in scores}
        parts += [f"<h3>{html.escape(a)} (left) against {html.escape(b)}</h3>"] if shares else []
        for pair in clearest(shares, arguments.examples):
            caption = f"{html.escape(prompts[pair])} <small>({shares[pair][0]:g} of {shares[pair][1]} votes for the left)</small>"
            parts.append(f"<div class=example><p>{caption}</p><div>{figure(a, pair)}{figure(b, pair)}</div></div>")
    return "<h2>Examples</h2>" + "".join(parts) if parts else ""
