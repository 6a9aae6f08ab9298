"""The offline job from the outside: killed, shared among tasks, fed with bad input, damaged afterwards; TFDS reads what it wrote."""

import dataclasses
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from motif_jax import preparation, report
from motif_jax.config import Config, DataConfig, PrepareConfig
from motif_jax.data import pipeline, shards
from motif_jax.data.videos import save_video
from motif_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = Config(
    data=DataConfig(frames=4, height=32, width=32),
    prepare=PrepareConfig(flow="exact", flow_stride=8, image_format="png", clips_per_shard=8, validation_share=0.2),
)
CONFIG_FILE = """
from ml_collections import ConfigDict
from motif_jax.config import Config, to_dict

def get_config(clips_per_shard="20"):
    c = ConfigDict(to_dict(Config()))
    c.data.update(frames=4, height=32, width=32)
    c.prepare.update(flow="exact", flow_stride=8, image_format="png", clips_per_shard=int(clips_per_shard))
    c.unet.channel_mult = (1,)
    return c.lock()
"""


class Still:
    """A flow estimator that sees no motion."""

    def flow(self, frames):
        return np.zeros((len(frames), frames.shape[1] // 8, frames.shape[2] // 8, 2), np.float32)

    def describe(self):
        return {"flow": "still"}


def prepare(source, output, config=CONFIG, **options):
    lines: list[str] = []
    try:
        return preparation.prepare(config, str(source), output, log=lines.append, **options), lines
    except UserError as error:
        return str(error), lines


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def with_prepare(**changes) -> Config:
    return dataclasses.replace(CONFIG, prepare=dataclasses.replace(CONFIG.prepare, **changes))


def command(config: pathlib.Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "motif_jax.prepare", f"--config={config}", *arguments]


@pytest.fixture
def config_file(tmp_path) -> pathlib.Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return path


@pytest.fixture
def clips(tmp_path) -> pathlib.Path:
    """Eight videos and a list of them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    lines = ["video,caption"]
    for i in range(8):
        save_video(folder / f"{i}.mp4", np.random.default_rng(i).integers(0, 256, (12, 32, 32, 3), np.uint8), 10)
        lines.append(f"{i}.mp4,video number {i}")
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


# Interruption and sharing


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, config_file, how):
    source = "synthetic:shapes:400"
    assert subprocess.run(command(config_file, f"--source={source}", f"--output={tmp_path / 'a'}"), cwd=ROOT).returncode == 0
    undisturbed = files(tmp_path / "a")
    output = tmp_path / "b"
    kills = 0
    # Each time with another number of shards done, each time as soon as a shard is half written.
    while kills < 3:
        process = subprocess.Popen(command(config_file, f"--source={source}", f"--output={output}"), cwd=ROOT, stderr=subprocess.PIPE)
        before = len(list(output.glob("manifests/*.json")))
        while process.poll() is None:
            half_written = any("array_record" in p.name and p.suffix != ".json" for p in output.glob(".tmp-*"))
            if half_written and len(list(output.glob("manifests/*.json"))) >= before + 3:
                process.send_signal(how)
                break
            time.sleep(0.002)
        stderr = process.communicate()[1].decode()
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 1), stderr
        assert how == signal.SIGKILL or "the same command continues" in stderr
        assert not (output / "dataset.json").exists()
        kills += 1
    done = subprocess.run(command(config_file, f"--source={source}", f"--output={output}"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " kept in " in done.stdout and " 0 kept in " not in done.stdout
    assert files(output) == undisturbed  # and no temporary files are left


def test_three_tasks_equal_one(tmp_path, clips):
    for source, config, options in (
        ("synthetic:quickstart:70", CONFIG, {}),
        (clips / "list.csv", with_prepare(clips_per_video=5), {"estimator": Still()}),
    ):
        name = pathlib.Path(str(source).replace(":", "_")).stem
        one, three = tmp_path / f"{name}-1", tmp_path / f"{name}-3"
        prepare(source, one, config, **options)
        results = [prepare(source, three, config, task_index=i, task_count=3, **options) for i in (2, 0, 1)]
        assert [summary.missing > 0 for summary, _ in results] == [True, True, False]
        assert any("belong to other tasks" in line for line in results[0][1])
        assert files(one) == files(three) and "dataset.json" in files(one)


def test_a_task_that_begins_while_another_ends(tmp_path, monkeypatch):
    """It has seen no plan; by the time it looks for foreign files, the other task has written everything."""
    source, output, plans = "synthetic:shapes:10", tmp_path / "data", shards.plans

    def overtaken(directory):
        found = plans(directory)
        monkeypatch.setattr(shards, "plans", plans)
        assert prepare(source, output)[0].written
        return found

    monkeypatch.setattr(shards, "plans", overtaken)
    summary, lines = prepare(source, output)
    assert summary.written == 0 and summary.kept, (summary, lines)


def test_ten_workers_of_which_some_do_the_same_shards(tmp_path, config_file):
    """Seven tasks at once, and three of them a second time beside the first."""
    source, single, many = "synthetic:shapes:240", tmp_path / "single", tmp_path / "many"
    assert subprocess.run(command(config_file, f"--source={source}", f"--output={single}"), cwd=ROOT).returncode == 0
    shares = [*range(7), 0, 3, 6]
    arguments = [f"--source={source}", f"--output={many}", "--task_count=7"]
    workers = [subprocess.Popen(command(config_file, *arguments, f"--task_index={i}"), cwd=ROOT) for i in shares]
    assert [worker.wait() for worker in workers] == [0] * 10
    assert files(many) == files(single) and "dataset.json" in files(many)


def test_killed_ten_times_at_random(tmp_path, config_file):
    """A job that is ever slower to finish than its next kill, until it is left alone; the moments come from a fixed seed."""
    source, output = "synthetic:shapes:1500", tmp_path / "out"
    arguments = command(pathlib.Path(f"{config_file}:5"), f"--source={source}", f"--output={output}")
    random, kills = np.random.default_rng(0), 0
    while kills < 10:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
        while not output.exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            process.wait(random.uniform(0.1, 1.2))
            shutil.rmtree(output)  # it was faster: again from the start
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
            process.wait()
    assert subprocess.run(arguments, cwd=ROOT).returncode == 0
    assert (
        subprocess.run(command(pathlib.Path(f"{config_file}:5"), f"--source={source}", f"--output={tmp_path / 'a'}"), cwd=ROOT).returncode
        == 0
    )
    assert files(output) == files(tmp_path / "a")


def test_running_again_writes_nothing(tmp_path, clips):
    first, _ = prepare(clips / "list.csv", tmp_path / "a", estimator=Still())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    again, _ = prepare(clips / "list.csv", tmp_path / "a", estimator=Still())
    assert first.written == again.kept > 0 and again.written == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before


# Damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_damage_is_named_and_only_that_shard_written_again(tmp_path, damage):
    prepare("synthetic:shapes:60", tmp_path)
    whole = files(tmp_path)
    path = tmp_path / sorted(name for name in whole if name.startswith("motif-train"))[2]
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "delete":
        path.unlink()
    else:
        (tmp_path / "manifests" / f"{path.name}.json").unlink()
    untouched = {p: p.stat().st_mtime_ns for p in tmp_path.glob("motif-*") if p != path}
    summary, lines = prepare("synthetic:shapes:60", tmp_path)
    assert summary.written == 1 and summary.kept == len(untouched)
    assert damage in ("delete", "manifest") or any(path.name in line and "written again" in line for line in lines)
    assert {p: p.stat().st_mtime_ns for p in untouched} == untouched
    assert files(tmp_path) == whole


# Bad input


def test_bad_videos_are_skipped_counted_and_named(tmp_path, clips):
    whole = (clips / "3.mp4").read_bytes()
    (clips / "3.mp4").write_bytes(whole[: len(whole) // 2])
    (clips / "4.mp4").unlink()
    save_video(clips / "5.mp4", np.zeros((1, 32, 32, 3), np.uint8), 10)
    with (clips / "list.csv").open("a") as file:
        file.write("6.mp4,\n")
    summary, lines = prepare(clips / "list.csv", tmp_path / "out", with_prepare(validation_share=0.0), estimator=Still())
    assert summary.clips == {"train": 5}
    assert summary.skipped == {"truncated": 1, "missing file": 1, "too short": 1, "empty caption": 1}
    said = "\n".join(lines)
    for name, reason in (("3.mp4", "truncated"), ("4.mp4", "missing file"), ("5.mp4", "1 frame, a clip of 4"), ("6.mp4", "empty caption")):
        assert any(name in line and reason in line for line in lines), (name, said)
    assert "4 skipped (empty caption: 1, missing file: 1, too short: 1, truncated: 1)" in lines[-1]


def test_nothing_says_where_the_videos_lay(tmp_path, clips):
    """Not even why a broken one was skipped."""
    (clips / "3.mp4").write_text("not a video\n" * 100)
    (clips / "4.mp4").write_bytes((clips / "4.mp4").read_bytes()[:900])
    shutil.copytree(clips, tmp_path / "elsewhere" / "clips")
    for folder in ("", "elsewhere"):
        prepare(tmp_path / folder / "clips" / "list.csv", tmp_path / folder / "out", estimator=Still())
    assert files(tmp_path / "out") == files(tmp_path / "elsewhere" / "out")
    assert not any(str(clips).encode() in content for content in files(tmp_path / "out").values())


def test_a_file_that_arrives_later_is_taken_in(tmp_path, clips):
    late = (clips / "2.mp4").read_bytes()
    (clips / "2.mp4").unlink()
    config = with_prepare(validation_share=0.0, clips_per_shard=2)
    assert prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())[0].clips == {"train": 7}
    first = shards.read_manifest(tmp_path / "out").fingerprint
    (clips / "2.mp4").write_bytes(late)
    summary, _ = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert summary.clips == {"train": 8} and (summary.written, summary.kept) == (1, 3)
    assert shards.read_manifest(tmp_path / "out").fingerprint != first


def test_videos_that_are_gone_take_no_clip_with_them(tmp_path, clips):
    """A share that is not mounted: nothing is written, one line says so. What was missing all along stays a reason to look again."""
    config = with_prepare(validation_share=0.0, clips_per_shard=4)
    late = (clips / "2.mp4").rename(tmp_path / "late.mp4")
    prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    before = files(tmp_path / "out")
    for i in (0, 5):
        (clips / f"{i}.mp4").rename(tmp_path / f"{i}.mp4")
    late = late.rename(clips / "2.mp4")
    summary, lines = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert (summary.clips, summary.written, files(tmp_path / "out")) == ({"train": 7}, 0, before)
    assert [line for line in lines if "kept though" in line] == ["2 clips are kept though their files are gone, the first: 0.mp4"]
    (tmp_path / "0.mp4").rename(clips / "0.mp4")
    assert prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())[0].clips == {"train": 8}


def test_a_clip_that_was_skipped_has_nothing_to_lose(tmp_path, clips):
    """Its file may go; another of its shard that was repaired comes in all the same."""
    whole = (clips / "1.mp4").read_bytes()
    save_video(clips / "0.mp4", np.zeros((1, 32, 32, 3), np.uint8), 10)
    (clips / "1.mp4").write_bytes(whole[: len(whole) // 2])
    config = with_prepare(validation_share=0.0)
    first, _ = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert (first.clips, first.skipped) == ({"train": 6}, {"too short": 1, "truncated": 1})
    (clips / "0.mp4").unlink()
    (clips / "1.mp4").write_bytes(whole)
    again, lines = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert (again.clips, again.skipped) == ({"train": 7}, {"missing file": 1}) and not any("kept though" in line for line in lines)


def test_a_video_that_was_replaced_is_taken_anew(tmp_path, clips):
    """Also one of the same size."""
    config = with_prepare(validation_share=0.0, clips_per_shard=4)
    prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    with (clips / "5.mp4").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    summary, lines = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert summary.written == 1 and any("-00001-of-00002 is made from other videos: written again" in line for line in lines)


def test_a_job_that_fails_keeps_what_is_done(tmp_path, clips):
    """An estimator that cannot do these clips stops the job with one line; finished shards are kept."""

    class Tired(Still):
        calls = 0

        def flow(self, frames):
            self.calls += 1
            if self.calls > 5:
                raise ValueError("out of breath")
            return super().flow(frames)

    config = with_prepare(validation_share=0.0, clips_per_shard=2)
    message, _ = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Tired())
    assert "out of breath" in message
    summary, _ = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert (summary.written, summary.kept) == (2, 2)


def test_nothing_usable(tmp_path, clips):
    (clips / "none.csv").write_text("video,caption\nx.mp4,a\ny.mp4,b\n")
    message, _ = prepare(clips / "none.csv", tmp_path / "a", estimator=Still())
    assert "no usable training clip (missing file: 2); the first: x.mp4" in message
    (clips / "none.csv").write_text("video,caption\nx.mp4,\n")
    message, lines = prepare(clips / "none.csv", tmp_path / "b", estimator=Still())
    assert "no usable clip: empty caption: 1" in message and "x.mp4" in lines[0]
    assert not (tmp_path / "b").exists()


def test_exact_flow_of_videos_and_weights_that_are_not_there(tmp_path, clips):
    message, _ = prepare(clips / "list.csv", tmp_path / "out")
    assert "prepare.flow='exact': only a synthetic" in message
    message, _ = prepare(clips / "list.csv", tmp_path / "out", with_prepare(flow="raft_small"))
    assert "prepare.flow_weights" in message
    message, _ = prepare(clips / "list.csv", tmp_path / "out", with_prepare(flow="dis", flow_weights="raft.pth"))
    assert "prepare.flow_weights=raft.pth: prepare.flow='dis' has none" in message
    message, _ = prepare(clips / "list.csv", tmp_path / "out", with_prepare(flow="raft_small", flow_weights=str(tmp_path / "no.pth")))
    assert "no.pth" in message
    assert not (tmp_path / "out").exists()


def test_another_dataset_is_not_overwritten(tmp_path, clips):
    output = tmp_path / "out"
    prepare("synthetic:shapes:10", output)
    before = files(output)
    for source, config, options, message in (
        ("synthetic:shapes:10", dataclasses.replace(CONFIG, seed=1), {}, "seed was 0 and is now 1"),
        ("synthetic:shapes:10", with_prepare(flow_stride=16), {}, "prepare.flow_stride was 8 and is now 16"),
        ("synthetic:shapes:12", CONFIG, {}, "another list"),
        ("synthetic:quickstart:10", CONFIG, {}, "source was 'synthetic:shapes' and is now 'synthetic:quickstart'"),
        (clips / "list.csv", CONFIG, {"estimator": Still()}, "estimator.flow was None and is now 'still'"),
    ):
        said, _ = prepare(source, output, config, **options)
        assert message in said and "Use another --output" in said and str(output) in said
    assert files(output) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "features.json").write_text("{}")
    assert "not from motif_jax.prepare" in prepare("synthetic:shapes:10", tmp_path / "foreign")[0]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    message, _ = prepare("synthetic:shapes:10", tmp_path / "file" / "out")
    assert f"cannot write to --output={tmp_path / 'file' / 'out'}" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=synthetic:shapes:9", "--output=OUT", "--task_index=2", "--task_count=2"], "task_index=2: must be in [0, task_count=2)"),
        (["--source=synthetic:shapes:9", "--output=OUT", "--task_count=2"], "--task_count=2 needs --task_index"),
        (["--source=synthetic:nowhere", "--output=OUT"], "no synthetic world 'nowhere'"),
        (["--source=nowhere.csv", "--output=OUT"], "nowhere.csv"),
        (["--source=synthetic:shapes:9", "--output=OUT", "--config.data.height=33"], "data.height=33"),
        (["--source=synthetic:shapes:9", "--output=/proc/out"], "cannot write to --output=/proc/out"),
        (["--source=synthetic:shapes:9"], "--output"),
        (["--source=synthetic:shapes:9", "--output=OUT", "--runner=beam", "--beam_options='"], "No closing quotation"),
        (["--source=synthetic:shapes:9", "--output="], "--source and --output must not be empty"),
        (["--config=nowhere.py", "--source=synthetic:shapes:9", "--output=OUT"], "nowhere.py"),
    ],
)
def test_the_command_fails_with_one_line(tmp_path, config_file, arguments, message):
    arguments = [a.replace("OUT", str(tmp_path / "out")) for a in arguments]
    done = subprocess.run(command(config_file, *arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_full_disk_is_one_line_and_keeps_what_is_done(tmp_path, config_file):
    """The size that a process may write stands in for the disk."""
    arguments = command(config_file, "--source=synthetic:shapes:200", f"--output={tmp_path / 'out'}")[2:]
    limited = (
        f"import resource, runpy, sys; sys.argv = {arguments!r}; resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17));"
        "runpy.run_module('motif_jax.prepare', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "the same command continues" in done.stderr
    assert not list((tmp_path / "out").glob("*.array_record-*"))


def test_a_full_disk(tmp_path, config_file):
    """A real one, of one megabyte: one line, whole shards are kept, and with more room the same command completes the dataset."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        arguments = command(config_file, "--source=synthetic:shapes:200", f"--output={disk / 'out'}")
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "the same command continues" in done.stderr, done.stderr
        kept = sorted((disk / "out").glob("motif-*"))
        assert 0 < len(kept) < 10 and not list((disk / "out").rglob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and f"and {len(kept)} kept in" in done.stdout, done.stdout + done.stderr
        assert subprocess.run([*arguments[:3], "--verify", f"--output={disk / 'out'}"], cwd=ROOT).returncode == 0
    finally:
        subprocess.run(["umount", disk], check=True)


# What was written


def test_tfds_reads_it_without_our_code_and_without_tensorflow(tmp_path):
    prepare("synthetic:shapes:60", tmp_path)
    data = dataclasses.replace(CONFIG.data, path=str(tmp_path))
    for split in ("train", "validation"):
        ours = pipeline.open_dataset(data, split)
        np.savez(
            tmp_path / f"{split}.npz",
            **{
                k: np.stack([getattr(ours[i], k) for i in range(len(ours))])
                for k in ("frames", "flow", "motion_mask", "caption", "clip_id")
            },
        )
    code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
for split in ("train", "validation"):
    ours, theirs = np.load({str(tmp_path)!r} + f"/{{split}}.npz"), tfds.builder_from_directory({str(tmp_path)!r}).as_data_source(split)
    assert len(theirs) == len(ours["caption"]) > 0
    for i, clip in enumerate(theirs):
        assert clip["caption"].decode() == ours["caption"][i] and clip["clip_id"].decode() == ours["clip_id"][i]
        assert (np.stack(clip["frames"]) == ours["frames"][i]).all()
        assert (clip["flow"] == ours["flow"][i]).all() and clip["flow"].dtype == np.float16
        assert (clip["motion_mask"] == ours["motion_mask"][i]).all()
        assert clip["fps"] == 8.0 and clip["frame_stride"] == 1
assert "tensorflow" not in sys.modules and not any(m.startswith("motif") for m in sys.modules)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_a_folder_equals_its_list(tmp_path, clips):
    prepare(clips / "list.csv", tmp_path / "a", estimator=Still())
    (clips / "list.csv").unlink()
    for i in range(8):
        (clips / f"{i}.txt").write_text(f"video number {i}\n")
    prepare(clips, tmp_path / "b", estimator=Still())
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_jpeg_and_dataset_description(tmp_path, clips):
    prepare(clips / "list.csv", tmp_path / "out", with_prepare(image_format="jpeg"), estimator=Still())
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert dataset["settings"]["estimator.flow"] == "still" and dataset["settings"]["seed"] == 0
    clip = pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=str(tmp_path / "out")))[0]
    assert clip.frames.shape == (4, 32, 32, 3) and clip.caption.startswith("video number")


def test_previews(tmp_path):
    """The share that is printed is the share that the world moves: cells touched by the flow, for the widest reading."""
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, intensity="frame_max", threshold=1e-6, sharpness=1e9))
    summary, lines = prepare("synthetic:quickstart:9", tmp_path, config, preview=2)
    assert sum(summary.clips.values()) == 9
    pictures = sorted((tmp_path / "preview").glob("*.png"))
    assert len(pictures) == 2 and all(Image.open(p).width > 100 for p in pictures)
    dataset = pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=str(tmp_path)))
    share = np.mean([(np.abs(dataset[i].flow).max(-1) > 0).mean() for i in range(2)])
    (line,) = (line for line in lines if line.startswith("share of moving pixels in 2 clips"))
    assert f": {100 * share:.1f} %" in line and "diagonal" in line
    page = (tmp_path / "preview" / "index.html").read_text()
    assert all(p.name in page for p in pictures) and page.count("data:image/svg+xml") == 1


def test_a_report_shows_the_configured_heatmap(tmp_path):
    """The caption's word and the pictures; where the latents of a network would make it, the flow's and a word about that."""
    prepare("synthetic:quickstart:9", tmp_path)
    data = dataclasses.replace(CONFIG.data, path=str(tmp_path))

    def shown(kind):
        loss = dataclasses.replace(CONFIG.loss, heatmap=kind)
        return report._heatmaps(dataclasses.replace(CONFIG, data=data, loss=loss)).split("<img", 1)

    found = {kind: shown(kind) for kind in ("flow", "mask", "inverse", "none", "latent_difference")}
    assert all(f"the heatmap ({kind}" in text for kind, (text, _) in found.items() if kind != "latent_difference")
    assert "the heatmap (flow; latent_difference is not drawn)" in found["latent_difference"][0]
    assert len({pictures for _, pictures in found.values()}) == 4 and found["flow"][1] == found["latent_difference"][1]


@pytest.mark.parametrize("kind", ["mask", "inverse"])
def test_a_preview_shows_the_configured_heatmap(tmp_path, kind):
    prepare("synthetic:quickstart:9", tmp_path, preview=1)
    (path,) = (tmp_path / "preview").glob("*.png")
    of_flow = np.asarray(Image.open(path)).astype(int)
    _, lines = prepare(
        "synthetic:quickstart:9", tmp_path, dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, heatmap=kind)), preview=1
    )
    assert f"loss.heatmap={kind!r} is what the sheets show; shares of moving pixels are those of the flow" in lines
    changed = np.asarray(Image.open(path)).astype(int)
    share = 0.2 if kind == "inverse" else 0.001  # of the sheet: all of the heatmap's row, or the cells that a sprite touches
    assert changed.shape == of_flow.shape and (np.abs(changed - of_flow).max(-1) > 20).mean() > share


def test_what_a_list_lacks_is_said_before_the_work(tmp_path, clips):
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, heatmap="mask"))
    error, _ = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    assert "loss.heatmap='mask': no line names a mask" in error and not (tmp_path / "out").exists()
    for source, output in ((clips, clips), (f"file://{clips}", clips), (clips, f"file://{clips}")):
        error, _ = prepare(source, output, estimator=Still())
        assert error == f"--output={output}: is the folder of the videos; choose another, which can be deleted"


def test_captions_that_are_cut_off_are_counted(tmp_path, clips):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, context_length=3))
    _, lines = prepare(clips / "list.csv", tmp_path / "out", config, estimator=Still())
    said = "captions of clips with more words than the text tower takes (text.context_length=3 tokens, about 1.3 to a word)"
    assert any(said in x for x in lines)
    _, lines = prepare(clips / "list.csv", tmp_path / "whole", estimator=Still())
    assert not any("cut off" in x for x in lines)


def test_a_preview_measures_some_clips_of_many(tmp_path, monkeypatch):
    monkeypatch.setattr("motif_jax.preview._MEASURED", 4)
    prepare("synthetic:quickstart:30", tmp_path)
    read, record = [], pipeline._Records.__getitem__
    monkeypatch.setattr(pipeline._Records, "__getitem__", lambda self, i: read.append(i) or record(self, i))
    _, lines = prepare("synthetic:quickstart:30", tmp_path, preview=1)
    count = len(pipeline.open_dataset(dataclasses.replace(CONFIG.data, path=str(tmp_path))))
    assert read == [0, *(k * count // 4 for k in range(4))] and lines[-1].endswith("strides, motion and captions of 4 clips")


def test_a_preview_in_an_object_store(tmp_path, bucket):
    """In gs:// what a disk would hold; elsewhere it is refused before the work."""
    prepare("synthetic:quickstart:9", tmp_path, preview=1)
    _, lines = prepare("synthetic:quickstart:9", "gcs://bucket/previews", preview=1)  # the other name of gs://
    assert lines[-1].startswith("gs://bucket/previews/preview/index.html: ")
    there = {name.removeprefix("previews/preview/"): x for name, (x, _) in bucket.objects.items() if name.startswith("previews/preview/")}
    (sheet,) = (tmp_path / "preview").glob("*.png")
    assert there.keys() == {sheet.name, "index.html"} and there[sheet.name] == sheet.read_bytes()
    assert sheet.name in there["index.html"].decode()
    error, lines = prepare("synthetic:quickstart:9", "memory://previews", preview=1)
    assert "--preview reads shards on a disk or in gs://" in error and not lines


def test_beam_gives_the_same_bytes(tmp_path):
    pytest.importorskip("apache_beam")
    prepare("synthetic:shapes:60", tmp_path / "a")
    summary, _ = prepare("synthetic:shapes:60", tmp_path / "b", beam_options=[])
    assert summary.written == len(list((tmp_path / "b").glob("motif-*"))) > 1
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert prepare("synthetic:shapes:60", tmp_path / "b", beam_options=[])[0].written == 0


def test_beam_says_that_videos_are_gone(tmp_path, clips):
    pytest.importorskip("apache_beam")
    config = with_prepare(flow="dis", validation_share=0.0, clips_per_shard=4)
    prepare(clips / "list.csv", tmp_path / "out", config)
    for i in (0, 1, 5):
        (clips / f"{i}.mp4").unlink()
    summary, lines = prepare(clips / "list.csv", tmp_path / "out", config, beam_options=[])
    assert summary.written == 0 and "3 clips are kept though their files are gone" in lines


def test_a_validation_split_made_of_chance_alone(tmp_path, clips):
    """Few videos: training keeps at least one, and the pipeline copes with whatever is held out; that nothing is, is said."""
    for share in (0.0, 1e-6, 0.5):
        output = tmp_path / str(share)
        summary, lines = prepare(clips / "list.csv", output, with_prepare(validation_share=share), estimator=Still())
        assert summary.clips["train"] >= 1 and sum(summary.clips.values()) == 8
        data = dataclasses.replace(CONFIG.data, path=str(output))
        held_out = pipeline.validation_batches(data, 4, 4, lambda captions: np.zeros((len(captions), 2), np.int32))
        assert bool(held_out) == (summary.clips.get("validation", 0) > 0) == (share == 0.5)
        assert any("no clip is held out for validation" in line for line in lines) == (share == 1e-6)


@pytest.mark.slow
def test_real_clips_with_raft(tmp_path, shared):
    """The real estimator, made afresh by every task: the same bytes."""
    (tmp_path / "list.csv").write_text(
        "video,caption\n" + "".join(f"{shared / 'clips' / name},{name}\n" for name in ("intel_car.mp4", "intel_bottle.mp4", "tc_nasa.mp4"))
    )
    config = with_prepare(
        flow="raft_small",
        flow_weights=str(shared / "raft" / "raft_small_things.safetensors"),
        flow_iterations=2,
        clips_per_shard=1,
        validation_share=0.0,
        clips_per_video=2,
    )
    config = dataclasses.replace(config, data=DataConfig(frames=3, height=64, width=96))
    assert prepare(tmp_path / "list.csv", tmp_path / "a", config)[0].clips == {"train": 6}
    for i in range(2):
        prepare(tmp_path / "list.csv", tmp_path / "b", config, task_index=i, task_count=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    clips = pipeline.open_dataset(dataclasses.replace(config.data, path=str(tmp_path / "a")))
    assert {clips[i].flow.shape for i in range(6)} == {(3, 8, 12, 2)}
    assert all((clips[i].flow[-1] == clips[i].flow[-2]).all() for i in range(6))
    settings = json.loads((tmp_path / "a" / "dataset.json").read_text())["settings"]
    assert len(settings["estimator.flow_weights_sha256"]) == 64
