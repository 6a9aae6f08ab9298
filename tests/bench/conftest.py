"""A small study of two invented systems, built once, and the server as a process, for the tests of `annotate`."""

import json
import pathlib
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from motif_jax.bench import __main__ as bench
from motif_jax.data.videos import save_video


@dataclass(frozen=True)
class Material:
    """A list of pairs and the folders of the systems; nobody who judges may ever read these names."""

    folder: pathlib.Path
    systems: tuple[str, str] = ("zebrafish", "quokka")

    def build(self, output: pathlib.Path, *options: str) -> pathlib.Path:
        videos = [f"--videos={name}={self.folder / name}" for name in self.systems]
        bench.main(["annotate", "build", f"--list={self.folder / 'list.jsonl'}", *videos, f"--output={output}", *options])
        return output


def scene(n: int, shift: int, frames: int, size: int) -> np.ndarray:
    """A square on a ground of its own colour, moving `shift` pixels a frame."""
    out = np.empty((frames, size, size, 3), np.uint8)
    out[:] = (40 + 60 * n, 90, 200 - 60 * n)
    for t in range(frames):
        x = 4 + shift * t
        out[t, size // 4 : size // 2, x : x + size // 4] = (230, 220, 60)
    return out


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Material:
    """Three pairs. One system: 8 frames of 64x64 at 8 frames a second; the other: 20 of 96x96 at 16, as GIFs moving the other way."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("material")
    zebrafish, quokka = Material.systems
    lines = []
    for name in Material.systems:
        (folder / name).mkdir()
    for n in range(3):
        Image.fromarray(scene(n, 0, 1, 96)[0]).save(folder / f"image{n}.png")
        lines.append(json.dumps({"id": f"pair{n}", "image": f"image{n}.png", "prompt": f"The square {n} moves.", "scenario": "squares"}))
        save_video(folder / zebrafish / f"pair{n}_0.mp4", scene(n, 3, 8, 64), 8)
        save_video(folder / quokka / f"pair{n}.gif", scene(n, 1, 20, 96), 16)
    (folder / "list.jsonl").write_text("\n".join(lines))
    return Material(folder)


@pytest.fixture(scope="session")
def small_study(material, tmp_path_factory) -> pathlib.Path:
    """The folder of a study: three pairs, two annotators, one sheet in two copies of five tasks, and four examples in front."""
    return material.build(tmp_path_factory.mktemp("small") / "study", "--annotators=2", "--size=64", "--repeats=1", "--gold=1")


class Server:
    """`annotate serve` as a process of its own, on a free port."""

    def __init__(self, study: pathlib.Path, votes: pathlib.Path, *options: str) -> None:
        command = [sys.executable, "-m", "motif_jax.bench", "annotate", "serve", f"--study={study}", f"--votes={votes}", "--port=0"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise AssertionError(self.process.stderr.read())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def stop(self, sign: signal.Signals) -> str:
        """What it said on standard error; `said` is what came after the link on standard output."""
        self.process.send_signal(sign)
        self.said = self.process.stdout.read()
        return self.process.stderr.read()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def serve() -> type[Server]:
    """serve(study folder, file of votes, *options): a context manager; `url` is the link that was printed."""
    return Server
