"""The human A/B protocol: `annotate build` makes a study, `annotate serve` runs it for several people, `annotate export` gives the votes.

build writes STUDY/page/, which opens from the file system or is served, and STUDY/key.json, which says what is what and is kept.
"""

import argparse
import importlib.resources
import os
import pathlib
import shutil

import numpy as np

from motif_jax.bench import study
from motif_jax.bench.arguments import at_least, folders, local, positive, size
from motif_jax.errors import UserError, enumerate_first
from motif_jax.requested import writing

SIDES = range(16, 4097, 2)  # pixels: even, for 4:2:0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="build|serve|export")
    build = commands.add_parser("build", help="make a study from two or more folders of videos")
    build.add_argument("--list", required=True, type=local, help="the image-text pairs: TI2V-Bench's folder, a .jsonl or a .csv")
    build.add_argument("--videos", required=True, action="append", metavar="NAME=DIR", help="a system and its videos; twice or more")
    build.add_argument("--output", required=True, type=local, metavar="STUDY", help="folder to make")
    build.add_argument("--pairs", action="append", metavar="all|NAME:NAME", help="which systems meet (repeatable; default: all)")
    build.add_argument("--annotators", default=5, type=at_least(1), help="votes per comparison; default 5")
    build.add_argument("--per_sheet", default=40, type=at_least(1), help="comparisons a sitting; default 40, about 17 minutes at 25 s each")
    build.add_argument("--repeats", default=2, type=at_least(0), help="comparisons shown again with sides swapped, per sheet; default 2")
    build.add_argument("--gold", default=2, type=at_least(0), help="comparisons with a visibly broken video, per sheet; default 2")
    build.add_argument("--no_training", action="store_true", help="leave out the four explained examples at the start")
    build.add_argument("--frames", type=at_least(2), help="first N frames of every video; default: as many as the shortest one has")
    build.add_argument("--fps", type=positive, help="frames a second; default: the lowest there is. Faster videos lose frames")
    build.add_argument("--size", default="320", type=size(SIDES), help="N or HEIGHTxWIDTH; default 320, that of the published samples")
    build.add_argument("--ties", action="store_true", help='also offer "About the same"; the paper forces a choice')
    build.add_argument("--title", default="Which video is better?", help="heading of the page; everybody sees it")
    build.add_argument("--seed", default=0, type=at_least(0), help="decides order and sides")

    serve = commands.add_parser("serve", help="serve a study to several annotators at once")
    serve.add_argument("--study", required=True, type=local, help="folder made by build")
    serve.add_argument("--votes", required=True, type=local, metavar="FILE.sqlite", help="where votes go; made when missing")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1, this machine only")
    serve.add_argument("--port", default=8000, type=int, help="default 8000; 0 takes a free one")
    serve.add_argument("--token", help="secret part of the link, of letters, digits, - and _; default: made once and kept with the votes")
    lease = "minutes without a vote after which someone else may take over a sheet; before the first vote at most 5"
    serve.add_argument("--lease", default=60.0, type=positive, help=lease)

    export = commands.add_parser("export", help="raw votes with the names of the systems")
    export.add_argument("--study", required=True, type=local, help="folder made by build")
    given = "the server's .sqlite, or .json files of the page"
    export.add_argument("--votes", required=True, nargs="+", action="extend", type=local, help=given)
    export.add_argument("--output", required=True, type=local, metavar="FILE.csv|.json")


def run(arguments: argparse.Namespace) -> None:
    {"build": run_build, "serve": run_serve, "export": run_export}[arguments.action](arguments)


def run_build(arguments: argparse.Namespace) -> None:
    """Makes STUDY, under a temporary name until it is complete."""
    from motif_jax.pairs import find_videos, read_pairs

    if arguments.output.exists():
        raise UserError(f"--output={arguments.output}: exists already; votes belong to the study they were given in, so none is replaced")
    systems = folders(arguments.videos)
    if len(systems) < 2 or ":" in "".join(systems):
        raise UserError("--videos: a study compares two or more systems, whose names have no colon")
    asked = study.comparisons(list(systems), arguments.pairs or ["all"])
    listed = read_pairs(arguments.list)
    found = {}  # system -> {id of a pair: its video with the lowest seed}
    for name, folder in systems.items():
        videos = find_videos(folder, listed).videos
        found[name] = {id: videos[id, seed] for id, seed in sorted(videos, reverse=True)}
    pairs = [pair for pair in listed if any(pair.id in videos for videos in found.values())]
    if not pairs:
        raise UserError(f"--videos: no folder has a video of any of the {len(listed)} pairs of {arguments.list}")
    if missing := [f"{name} has none of {pair.id}" for pair in pairs for name in found if pair.id not in found[name]]:
        absent = f"{len(missing)} of {len(pairs) * len(systems)} videos are missing: {enumerate_first(missing, 5)}"
        raise UserError(f"--videos: {absent}; make them, or take their pairs out of --list")
    files = {(index, name): found[name][pair.id] for index, pair in enumerate(pairs) for name in found}
    if len(pairs) < len(listed):
        print(f"{len(listed) - len(pairs)} of {len(listed)} pairs are left out: there is no video of them")

    temporary = arguments.output.with_name(f".tmp-{arguments.output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(arguments.output):
        (temporary / "page" / "media").mkdir(parents=True)
    try:
        key = _make(arguments, temporary, pairs, files, asked)
        study.save(key, temporary)
        temporary.rename(arguments.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tasks = sum(map(len, key.sheets.values()))
    print(
        f"{arguments.output}: {len(pairs)} pairs x {len(asked)} comparisons x {arguments.annotators} annotators, "
        f"{tasks} tasks on {len(key.sheets)} sheets; videos of {key.frames} frames, {key.height}x{key.width}, {key.fps:g} frames a second"
    )


def _make(arguments, folder: pathlib.Path, pairs: list, files: dict, asked: list) -> study.Key:
    """Writes page and media and returns the key; files: (pair index, model) -> path."""
    from motif_jax.bench import study_clips

    media, rng = folder / "page" / "media", np.random.default_rng(arguments.seed)
    height, width = arguments.size
    models = list(dict.fromkeys(name for _, name in files))
    sources = list(dict.fromkeys(files.values()))
    lengths = dict(zip(sources, study_clips.parallel(study_clips.length, [(path,) for path in sources]), strict=True))
    form = study_clips.common_format(lengths, height, width, arguments.frames, arguments.fps)
    names = {where: f"{study.opaque()}.mp4" for where in files}
    jobs = [(path, lengths[path][1], form, media, names[where]) for where, path in files.items()]
    moves = study_clips.parallel(study_clips.convert, jobs, "videos")
    images = {path: f"{study.opaque()}.jpg" for path in dict.fromkeys(pair.image for pair in pairs)}
    study_clips.parallel(study_clips.convert_image, [(p, form, media, name) for p, name in images.items()])
    clips = {names[where]: study.Clip(where[1], pairs[where[0]].id) for where in files}

    def damaged(index: int, model: str, kind: str, damage) -> tuple[str, str]:
        """(good name, damaged name) of a video."""
        path, name = files[index, model], f"{study.opaque()}.mp4"
        frames = study_clips.read(path, lengths[path][1], form)
        study_clips.write(media, name, damage(frames, rng), form.fps)
        clips[name] = study.Clip(model, pairs[index].id, kind)
        return names[index, model], name

    # Training needs videos with motion: a frozen one must be wrong. A system whose video moves little beside another's is passed over.
    motion = dict(zip(files, moves, strict=True))
    lively = sorted(range(len(pairs)), key=lambda i: -sum(motion[i, m] for m in models))
    training = []
    for n, (reason, damage) in enumerate(study_clips.DAMAGE.items() if not arguments.no_training else ()):
        index, better = lively[n % len(lively)], study.SIDES[n % 2]
        moving = [m for m in models if motion[index, m] >= max(motion[index, other] for other in models) / 4]
        good, bad = damaged(index, moving[n % len(moving)], reason, damage)
        left, right = (good, bad) if better == "left" else (bad, good)
        training.append(study.Task(study.opaque(), "training", index, left, right, better=better, reason=reason))
    golds = []
    for n, index in enumerate(rng.permutation(len(pairs))[: 4 * arguments.gold].tolist()):
        golds.append((index, *damaged(index, models[n % len(models)], "gold", study_clips.GOLD_DAMAGE)))

    # Images of two folders may have one name, and two of one folder may differ in their endings alone.
    shared = os.path.commonpath([pair.image.parent.absolute() for pair in pairs])
    paths = [pair.image.absolute().relative_to(shared) for pair in pairs]
    alike = len({path.with_suffix("") for path in paths}) < len(set(paths))
    image_ids = [(path if alike else path.with_suffix("")).as_posix() for path in paths]
    for file in importlib.resources.files("motif_jax.bench").joinpath("page").iterdir():
        (folder / "page" / file.name).write_bytes(file.read_bytes())
    a = arguments
    sheets = study.deal(names, asked, golds, a.annotators, a.per_sheet, a.repeats, a.gold, a.seed)
    return study.Key(
        id=study.opaque(),
        title=arguments.title,
        ties=arguments.ties,
        models=models,
        comparisons=asked,
        frames=form.frames,
        fps=form.fps,
        height=height,
        width=width,
        pairs=[study.Entry(p.id, name, p.prompt, images[p.image], p.scenario) for p, name in zip(pairs, image_ids, strict=True)],
        clips=clips,
        training=training,
        sheets=sheets,
    )


def run_serve(arguments: argparse.Namespace) -> None:
    from motif_jax.bench import server

    if arguments.votes.suffix != ".sqlite":
        raise UserError(f"--votes={arguments.votes}: must end in .sqlite, by which `report` knows it")
    server.serve(arguments.study, arguments.votes, arguments.host, arguments.port, arguments.token, 60 * arguments.lease)


def run_export(arguments: argparse.Namespace) -> None:
    from motif_jax.bench import votes

    if arguments.output.resolve() in {path.resolve() for path in arguments.votes}:
        raise UserError(f"--output={arguments.output}: is one of --votes, and would lose what is refused; choose another name")
    found, refused = votes.read_all(arguments.votes, arguments.study)
    with writing(arguments.output):
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        votes.write_votes(arguments.output, found)
    for line in refused:
        print(f"refused: {line[:300]}")
    progress = study.load(arguments.study).progress(v.task for v in found)
    print(f"{arguments.output}: {len(found)} votes of {len({v.annotator for v in found})} annotators; {progress}")
