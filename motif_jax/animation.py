"""A trained run as a function from images and sentences to video files."""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, UInt8
from PIL.Image import Image

from motif_jax.config import Config
from motif_jax.consistency import UNGUIDED
from motif_jax.data.images import MediaError, cover, read_image, rgb
from motif_jax.data.storage import Path, here, run_location
from motif_jax.data.tokens import make_tokenizer, too_long
from motif_jax.data.videos import save_video
from motif_jax.dist.mesh import BATCH
from motif_jax.errors import UserError, enumerate_first
from motif_jax.fields import LARGEST_FLOAT
from motif_jax.generation import Sampler, make_generator, sample_latents, toward_finite
from motif_jax.method import DEFAULT, Method
from motif_jax.models.attention import check_kernel, missing_for
from motif_jax.models.networks import Networks, Params
from motif_jax.pairs import read_pairs
from motif_jax.requested import Request, check_images, check_made, make_output, write_manifest, writing
from motif_jax.training import weights

SOURCE_FPS = 24.0  # --frame_stride counts frames of a film


class NotFiniteError(UserError):
    """Some of the `clips` of a batch had NaN or infinity in their pixels: those where `finite` [B] is False."""

    def __init__(self, message: str, clips: UInt8[np.ndarray, "B T H W 3"], finite: Bool[np.ndarray, " B"]) -> None:
        super().__init__(message)
        self.clips, self.finite = clips, finite


@dataclasses.dataclass
class Animator:
    """Call it with images, sentences and seeds; see `__call__`. With a mesh each of its devices takes a share of the batch."""

    config: Config
    networks: Networks
    params: Params
    frozen: dict[str, Params]
    fps: float  # frame rate condition
    mesh: Mesh | None = None
    directory: Path = pathlib.Path()  # of the run or import that it was loaded from
    step: int | None = None  # of the run
    weights: str = ""  # checksum of what was loaded
    sampler: Sampler = sample_latents

    def __post_init__(self) -> None:
        place = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        self.params, self.frozen = jax.device_put((self.params, self.frozen), place)  # once, not for every batch
        self._tokenizer = make_tokenizer(self.config.text)
        self.frozen = self.networks.with_unconditional(self.frozen, self._tokenizer, place)
        self._generate = make_generator(self.networks, self.mesh, self.sampler)
        self._round_trip = jax.jit(lambda params, clip: self.networks.decode(params, self.networks.encode(params, clip)))

    @classmethod
    def load(
        cls,
        directory: str | Path,
        config: Config | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        frame_stride: int | None = None,
        mesh: Mesh | None = None,
        method: Method = DEFAULT,
    ) -> "Animator":
        """From a work directory (its newest checkpoint), a checkpoint, or an import's directory.

        config: by default the config.json of the run; an import needs one. steps, guidance: in place of `config.sample`'s. frame_stride:
        tells the model the frame rate 24 / frame_stride in place of `config.sample.fps`. method: the one that the run was trained with; of
        it the denoiser and the sampler count. Raises UserError.
        """
        directory = run_location(directory)
        if config is None:
            source = weights.find(directory)
            if not isinstance(source, weights.Run):
                raise UserError(f"{directory}: no config.json there, but an import, which needs a configuration (--checkpoint, --config)")
            config = source.config
            if missing_for(config.attention, jax.default_backend()):  # the run was on other devices
                config = dataclasses.replace(config, attention="auto")
        check_kernel(config.attention, jax.default_backend())
        if frame_stride and config.backbone == "unet3d" and not config.unet.fps_cond:
            print(f"--frame_stride={frame_stride} changes nothing: this model is not told the frame rate (unet.fps_cond=False)", flush=True)
            frame_stride = None
        if guidance is not None and not abs(guidance) < LARGEST_FLOAT:
            raise UserError(f"--guidance={guidance}: must be a finite number of float32")
        if guidance == 0:
            print(UNGUIDED.format("--guidance"), flush=True)
        changed = {k: v for k, v in {"steps": steps, "guidance": guidance}.items() if v is not None}
        if changed.get("steps", 1) > config.diffusion.num_timesteps:
            raise UserError(f"--steps={steps}: at most {config.diffusion.num_timesteps}, the timesteps of training")
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changed))
        networks = Networks.of(config, method.denoiser)
        source = weights.find(directory)
        run = source if isinstance(source, weights.Run) else None
        for line in weights.other_objective(source, config):
            print(line, flush=True)
        theirs, ours = run.meta.get("settings", {}) if run else {}, method.names["method.denoiser"]
        if theirs.get("method.denoiser", ours) != ours:
            raise UserError(
                f"{directory}: its network is {theirs['method.denoiser']}, not {ours}; sample from Python, with its Method (docs/extend.md)"
            )
        params = weights.fit(source.denoiser(), networks.denoiser.shapes, str(directory))
        frozen = weights.frozen_weights(networks, directory)
        weights.check_untold(config, source, "denoiser")
        fps = SOURCE_FPS / frame_stride if frame_stride else config.sample.fps
        step = run.step if run else None
        return cls(config, networks, params, frozen, fps, mesh, source.directory, step, source.checksum, method.sampler)

    def __str__(self) -> str:
        return f"{self.directory}{'' if self.step is None else f' at step {self.step}'}"

    @property
    def settings(self) -> dict[str, Any]:
        """What a clip depends on besides its image, sentence and seed."""
        c = self.config
        model = {"model": str(self.directory.resolve()), "step": self.step, "weights": self.weights, "name": c.name}
        sample = {name: value for name, value in dataclasses.asdict(c.sample).items() if name not in ("every", "count")}
        return {**model, "frames": c.data.frames, "height": c.data.height, "width": c.data.width, "fps_condition": self.fps, **sample}

    def __call__(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"] | Image], prompts: Sequence[str], seeds: Sequence[int]
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Clips that start at `images` (Pillow's, or arrays; any size: covered and centre-cropped) and move as `prompts` say.

        seeds: of each clip's noise. Raises ValueError for another number of prompts or seeds, and arrays that are not uint8 [H, W, 3];
        NotFiniteError, a UserError, when a clip has NaN or infinity.
        """
        height, width = self.config.data.height, self.config.data.width
        if not len(images) == len(prompts) == len(seeds):
            raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds: each clip needs one of each")
        batch = np.stack([cover(rgb(image), height, width) for image in images])
        fps = np.full(len(images), self.fps, np.float32)
        inputs = (batch, self._tokenizer(prompts), fps, np.asarray(seeds, np.int32))
        if self.mesh is not None:  # whose devices take as many each: the last clip makes the batch full
            full = np.arange(-(-len(images) // self.mesh.size) * self.mesh.size).clip(max=len(images) - 1)
            inputs = jax.device_put(tuple(x[full] for x in inputs), NamedSharding(self.mesh, BATCH))
        clips, finite = (np.asarray(x)[: len(images)] for x in self._generate(self.params, self.frozen, *inputs))
        if not finite.all():
            broken = dict.fromkeys(repr(prompt) for prompt, ok in zip(prompts, finite, strict=True) if not ok)  # a batch may repeat one
            named = enumerate_first([*broken], 3, ", ")
            raise NotFiniteError(
                f"{self}: NaN or infinity in the clip of {named}; use {toward_finite(self.config, 'another checkpoint')}",
                clips,
                finite,
            )
        return clips

    def round_trip(self, clips: UInt8[np.ndarray, "N T H W 3"]) -> UInt8[np.ndarray, "N T H W 3"]:
        """Clips through the autoencoder and back, one at a time: no sample can look better."""
        return np.concatenate([np.asarray(self._round_trip(self.frozen["autoencoder"], clip[None])) for clip in clips])


def noise_seed(seed: int, name: str) -> int:
    """The seed of the noise of one clip: a function of the user's seed and the clip's id alone."""
    return zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF


def open_image(path: str) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return read_image(here(path))
    except MediaError as error:
        raise UserError(f"{path}: {error}") from error


def save_clip(path: pathlib.Path, clip: UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_video(path, clip, fps)


def generate(
    animator: Callable,
    requests: Sequence[Request],
    output: pathlib.Path,
    fps: float,
    batch_size: int,
    progress: Callable[[str], None],
    task_index: int = 0,
    task_count: int = 1,
) -> int:
    """Writes the videos of every task_count-th batch of `requests` that are not there yet, and returns how many.

    A batch is computed whole, also where it is not full or holds videos that are there, and no larger than the list: what else is in
    its batch and where it stands there changes the rounding of a video, so that a stop or the number of tasks changes nothing.
    animator: (images, prompts, seeds) -> uint8 [B, T, H, W, 3], as `Animator`. Raises UserError for an image that cannot be read,
    a file that cannot be written and, after all others are, for videos with NaN or infinity, which are not.
    """
    batch_size = max(1, min(batch_size, len(requests)))
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)][task_index::task_count]
    missing = [[r for r in batch if not (output / r.file).exists()] for batch in batches]
    mine, todo, done = sum(map(len, batches)), sum(map(len, missing)), 0
    broken: list[str] = []
    progress(f"{mine} videos, {mine - todo} done before")
    for batch, wanted in zip(batches, missing, strict=True):
        if not wanted:
            continue
        full = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        seeds = [noise_seed(r.seed, r.pair.id) for r in full]
        finite = np.ones(len(full), bool)
        try:
            clips = animator([open_image(str(r.pair.image)) for r in full], [r.pair.prompt for r in full], seeds)
        except NotFiniteError as error:
            clips, finite = error.clips, error.finite
            progress(str(error))
        for request, clip, ok in zip(batch, clips, finite, strict=False):
            if request in wanted and ok:
                save_clip(output / request.file, clip, fps)
            elif request in wanted:
                broken.append(request.file)
        done += len(wanted)
        progress(f"{done} of {todo}")
    if broken:
        raise UserError(f"{output}: {len(broken)} of {todo} videos are not written (NaN or infinity, see above): {enumerate_first(broken)}")
    return todo


def open_output(load: Callable[[], Animator], requests: Sequence[Request], output: pathlib.Path, **settings: Any) -> Animator:
    """Writes a manifest of the requests, with the animator's and these `settings`, and returns the animator, for `generate`.

    Raises UserError, before weights are loaded where it can be, for an image that cannot be read, a directory that cannot be written,
    and one whose videos were made otherwise.
    """
    make_output(output)
    check_made(output, requests)
    check_images(output, requests)
    animator = load()
    if long := too_long(animator.config.text, "sentences", {r.pair.id: r.pair.prompt for r in requests}):
        print(long, flush=True)
    with writing(output):
        write_manifest(output, requests, {**animator.settings, **settings})
    return animator


def animate_one(load: Callable[[], Animator], image: str, prompt: str, output: str | pathlib.Path, seed: int) -> None:
    """Writes one clip to `output` (.mp4 or .gif)."""
    if pathlib.Path(output).suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"--output={output}: must end in .mp4 or .gif")
    path = pathlib.Path(output)
    if path.is_dir():
        raise UserError(f"--output={output}: is a directory")
    make_output(path.parent)
    picture = open_image(image)
    animator = load()
    if long := too_long(animator.config.text, "sentences", {"--prompt": prompt}):
        print(long, flush=True)
    print(f"{animator}: compiling and sampling", flush=True)
    clip = animator([picture], [prompt], [seed])[0]
    save_clip(path, clip, animator.config.sample.fps)
    print(f"{output}: {len(clip)} frames of {clip.shape[1]}x{clip.shape[2]}")


def animate_list(
    load: Callable[[], Animator], requests_file: str, output: str | pathlib.Path, seed: int, batch_size: int, suffix: str
) -> None:
    """Writes `<output>/<id>.<suffix>` for every request, and a manifest of them; a stopped run continues, unless it was another one.

    The noise of a clip depends on (seed, id) alone. Raises UserError where a clip that is there was made otherwise.
    """
    requests = [Request(pair, seed, f"{pair.id}.{suffix}") for pair in read_pairs(requests_file, "requests", blank=True)]
    animator = open_output(load, requests, pathlib.Path(output), seed=seed)
    generate(animator, requests, pathlib.Path(output), animator.config.sample.fps, batch_size, functools.partial(print, flush=True))
