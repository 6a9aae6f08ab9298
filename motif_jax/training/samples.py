"""Sample sheets during training: clips from held-out first frames and sentences, and how much they move.

Under `<workdir>/samples/<step>/`: one GIF per clip (truth left, sample right), `sheet.png`, and the mean optical flow of
samples and truth in the metrics, since a model that copies its image shows first there.
"""

import json
import math
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8

from motif_jax.config import Config
from motif_jax.data import pipeline
from motif_jax.data.videos import save_video
from motif_jax.dist.mesh import BATCH, ROWS, on_host, place
from motif_jax.generation import Sampler, make_generator, sample_latents, toward_finite
from motif_jax.models.networks import Networks, Params
from motif_jax.motion import pictures
from motif_jax.motion.dis import mean_flow
from motif_jax.training.metrics import MetricWriter


def save_comparison(
    directory: pathlib.Path, truth: UInt8[np.ndarray, "B T H W 3"], made: UInt8[np.ndarray, "B T H W 3"], captions: list[str], fps: float
) -> UInt8[np.ndarray, "h w 3"]:
    """Writes NN.gif (truth left, made right), captions.json and sheet.png to a directory that appears whole, and returns the sheet."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rows = []
    for index, (real, clip, caption) in enumerate(zip(truth, made, captions, strict=True)):
        save_video(temporary / f"{index:02d}.gif", np.concatenate([real, clip], axis=2), fps)
        rows += [pictures.strip(real, caption, end=" (truth)"), pictures.strip(clip, "sample")]
    sheet = pictures.stack(rows)
    pictures.save_png(temporary / "sheet.png", sheet)
    (temporary / "captions.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    temporary.replace(directory)
    return sheet


class SampleSheets:
    """The clips are split over the mesh like a batch, the first of them repeated until every device has as many."""

    def __init__(
        self,
        config: Config,
        networks: Networks,
        tokenizer: Callable,
        mesh: Mesh,
        sampler: Sampler = sample_latents,
    ) -> None:
        self._config, self._mesh = config, mesh
        self._examples = pipeline.examples(config.data, config.sample.count) if config.sample.every else []
        if self._examples:
            self._generate = make_generator(networks, mesh, sampler)
            self._tokens = tokenizer([e.caption for e in self._examples])
            self._decode = jax.jit(lambda frozen, moments: networks.decode(frozen["autoencoder"], networks.latents(moments)))
            self._truth: np.ndarray | None = None

    def write(self, step: int, params: Params, frozen: dict[str, Params], workdir: pathlib.Path, writer: MetricWriter | None) -> None:
        """Makes the clips; the process that has a `writer` writes them."""
        if not self._examples:
            return
        if self._truth is None:
            self._truth = self._true_clips(frozen)
        fps = np.asarray([e.fps for e in self._examples], np.float32)
        inputs = map(self._spread, (self._truth[:, 0], self._tokens, fps, np.arange(len(fps), dtype=np.int32)))
        clips, finite = (on_host(x)[: len(fps)] for x in self._generate(params, frozen, *inputs))
        if writer is None:
            return
        if not finite.all():
            print(
                f"step {step}  NaN or infinity in {len(fps) - finite.sum()} of {len(fps)} samples, which show nothing of the model; use "
                f"{toward_finite(self._config, 'a lower learning_rate, if it diverges,')}",
                flush=True,
            )
        captions = [e.caption for e in self._examples]
        sheet = save_comparison(workdir / "samples" / str(step), self._truth, clips, captions, self._config.sample.fps)
        writer.write_image(step, "samples", sheet)
        motion = {
            "sample/mean_flow": float(np.mean([mean_flow(c) for c in clips])),
            "sample/mean_flow_data": float(np.mean([mean_flow(c) for c in self._truth])),
        }
        writer.write(step, motion)
        print(
            f"step {step}  mean flow of samples {motion['sample/mean_flow']:.3f} px, of the data {motion['sample/mean_flow_data']:.3f} px",
            flush=True,
        )

    def _true_clips(self, frozen: dict[str, Params]) -> UInt8[np.ndarray, "B T H W 3"]:
        """The examples' frames, or what the autoencoder makes of their latents where only those are stored."""
        if self._examples[0].frames is not None:
            return np.stack([e.frames for e in self._examples])
        return on_host(self._decode(frozen, self._spread(np.stack([e.latent_moments for e in self._examples]))))[: len(self._examples)]

    def _spread(self, x: np.ndarray) -> jax.Array:
        unit = math.prod(self._mesh.shape[axis] for axis in ROWS)
        return place(x[np.arange(-(-len(x) // unit) * unit) % len(x)], NamedSharding(self._mesh, BATCH))
