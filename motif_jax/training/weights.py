"""The weights a run starts from: random, another run's, or an imported checkpoint."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from motif_jax.config import Config, read_json
from motif_jax.data.storage import Path, run_location
from motif_jax.errors import UserError, enumerate_first
from motif_jax.interop.files import Lazy
from motif_jax.interop.imported import CONTENTS, Import, is_imported
from motif_jax.interop.settings import Settings
from motif_jax.models import lora
from motif_jax.models.networks import Networks, Params
from motif_jax.training.checkpoint import latest_step, read_arrays, read_meta
from motif_jax.training.finetune import PARTS

# What image cross attention adds to a text-to-video model.
IMAGE_PATH = re.compile(r"image_proj_model\..*|.*\.attn2\.(to_[kv]_ip\.kernel|alpha)")
FIRST_KERNEL = "input_blocks.0.0.kernel"  # whose input channels grow with the image latent
WEIGHTS_STREAM = 2**31 - 2  # fold_in number of the initial weights: no training step reaches it
FROZEN = ("autoencoder", "text", "image")
# Settings that change what a network computes and that the shapes of its weights do not show: {network: {group: fields}}. The latents'
# scale is among them because the denoiser was trained on latents of that scale.
UNTOLD = {
    "denoiser": {
        "denoiser": ("num_head_channels", "norm_groups", "patch"),
        "resampler": ("heads", "head_width"),
        "autoencoder": ("scale_factor",),
    },
    "text": {"text": ("heads",)},
    "image": {"image": ("heads",)},
}


@dataclasses.dataclass(frozen=True)
class Weights:
    denoiser: Params
    frozen: dict[str, Params]


def initial_weights(config: Config, networks: Networks) -> Weights:
    """Weights for step 0.

    Without `init_from` the denoiser is drawn from the seed. Frozen networks that have parameters (the KL autoencoder, the
    OpenCLIP towers) cannot be drawn: they need `init_from`. Raises UserError.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), WEIGHTS_STREAM)
    if not config.init_from:
        frozen = frozen_weights(networks)
        return Weights(networks.denoiser.init(key), frozen)
    try:
        source = find(config.init_from)
        given = source.denoiser()
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    frozen = frozen_weights(networks)
    new = {} if any(IMAGE_PATH.fullmatch(name) for name in given) else _new_image_path(networks, key)
    fitted = fit({**given, **new}, networks.denoiser.shapes, f"{config.init_from} (denoiser)", inflate=FIRST_KERNEL)
    check_untold(config, source, "denoiser")
    grown = {FIRST_KERNEL} if FIRST_KERNEL in given and given[FIRST_KERNEL].shape != fitted[FIRST_KERNEL].shape else set()
    if untrained := sorted(name for name in grown | new.keys() if not re.fullmatch(PARTS[config.finetune], name)):
        raise UserError(
            f"finetune={config.finetune!r}: does not train what the image enters by, which init_from={config.init_from} lacks "
            f"({enumerate_first(untrained, 2, ', ')}), and the model would never see the image; use finetune='all', or weights that have it"
        )
    return Weights(fitted, frozen)


def frozen_weights(networks: Networks, source: str | Path = "", names: Sequence[str] = FROZEN) -> dict[str, Params]:
    """{network: weights} of the frozen networks. Pretrained ones are taken from the import that `source` leads to or, where that lacks
    them, from the one that the configuration's `init_from` leads to; the others are made.

    Raises UserError when one of the pretrained networks in `names` is in neither.
    """
    init_from, missing = networks.config.init_from, [name for name in networks.pretrained if name in names]
    frozen = networks.init_frozen()
    for place in (source, init_from):
        if missing and (start := first_import(place)):
            for name, params in start.read(missing).items():
                frozen[name] = fit(params, networks.frozen[name].shapes, f"{start.directory} ({name})")
                check_untold(networks.config, start, name)
            missing = [name for name in missing if name not in frozen]
    if missing and init_from:
        raise lacking(init_from, missing)
    if missing:
        small = {"autoencoder": "autoencoder.kind='pixel'", "text": "text.kind='words'", "image": "image.kind='random'"}
        raise UserError(
            f"the {' and '.join(missing)} of this configuration are pretrained networks: set --config.init_from to an imported "
            f"checkpoint (docs/weights.md), or use {' and '.join(small[name] for name in missing)}"
        )
    return frozen


def check_untold(config: Config, source: "Import | Run", network: str) -> None:
    """Raises UserError when the configuration gives `network` another value of an `UNTOLD` setting than the import or run `source` does.

    If the import had no YAML, its value was only assumed: then a line is printed, and the configuration's value is used.
    """
    recorded, backbone = source.recorded, config.backbone.removesuffix("3d")
    for part, fields in UNTOLD.get(network, {}).items():
        group = backbone if part == "denoiser" else part
        for field in fields:
            theirs, ours = recorded.get(part, {}).get(field), getattr(getattr(config, group), field, None)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            if not theirs or ours in (None, theirs) or (part == "resampler" and not config.image_tokens):
                continue
            name = f"{group}.{field}"
            if part not in source.assumed:
                raise UserError(
                    f"{source.directory}: its {network} was made with {name}={theirs!r}, and the configuration says {ours!r}, with which "
                    f"these weights compute something else: use --config.{name}={theirs}"
                )
            if jax.process_index() == 0:
                assumed = f"{name}={theirs!r} was assumed when it was imported"
                print(f"{source.directory}: {assumed}, the configuration says {ours!r}", flush=True)


def _new_image_path(networks: Networks, key: jax.Array) -> Params:
    """The parameters of image cross attention that a text-to-video model lacks, drawn from `key`; {} if the network has none.

    The kernels of the image's values are zero, so that at step 0 the network equals the text-to-video model.
    """
    names = [name for name in networks.denoiser.shapes if IMAGE_PATH.fullmatch(name)]
    if not names:
        return {}

    @jax.jit  # under which only what is asked for is drawn
    def draw(key: jax.Array) -> Params:
        whole = networks.denoiser.init(key)
        return {name: jnp.zeros_like(whole[name]) if ".to_v_ip." in name else whole[name] for name in names}

    return draw(key)


class Run:
    """The weights of a run: of its newest checkpoint, or of WORKDIR/checkpoints/STEP. Has what an `Import` has."""

    assumed = frozenset()

    def __init__(self, place: str | Path):
        """Raises UserError for what is neither a work directory nor a checkpoint."""
        place, self._step = run_location(place), None
        above = place.absolute().parent
        if place.name.isdigit() and above.name == "checkpoints" and place.is_dir() and not (place / "config.json").exists():
            place, self._step = above.parent, int(place.name)
        self.directory, path = place, place / "config.json"
        if not path.exists():
            others = sorted(int(p.name) for p in place.parent.glob("*") if p.name.isdigit()) if place.name.isdigit() else []
            hint = f"; checkpoints here: {others}" if others else "; import this file first (docs/weights.md)" if place.is_file() else ""
            raise UserError(f"{place}: holds neither config.json (a work directory of motif_jax.main) nor {CONTENTS} (an import){hint}")
        try:
            self.config = read_json(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    @functools.cached_property
    def step(self) -> int:
        """Looked up once: a run that goes on has another one soon."""
        newest = latest_step(self.directory) if self._step is None else self._step
        if newest is None:
            raise UserError(f"{self.directory}: holds no checkpoint yet; train first")
        return newest

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoints" / str(self.step)

    def denoiser(self, kind: str = "best") -> Params:
        """{dotted path: float32 array}: the average ("ema"), the raw weights ("raw"), or "best", the average if the run keeps one.

        The updates of finetune='lora' are merged. Raises UserError.
        """
        averaged = self.config.ema.decay > 0
        if kind == "ema" and not averaged:
            raise UserError(f"{self.directory}: keeps no average (ema.decay is 0); use the raw weights")
        average = read_arrays(self.checkpoint, ("ema",))["ema"] if averaged and kind != "raw" else {}
        # Without a mask the average covers every parameter.
        raw = read_arrays(self.checkpoint, ("params",))["params"] if not average or self.config.finetune != "all" else {}
        return lora.merge({**raw, **average})

    @property
    def meta(self) -> dict[str, Any]:
        """What the loop has saved beside the checkpoint's arrays. Raises CheckpointError."""
        return read_meta(self.checkpoint)

    @property
    def checksum(self) -> str:
        """SHA-256 of the checksums that the checkpoint keeps of its arrays."""
        return hashlib.sha256(json.dumps(self.meta["checksums"], sort_keys=True).encode()).hexdigest()

    @property
    def recorded(self) -> dict[str, dict[str, Any]]:
        """{network: its settings}; of the resampler only where the run has one."""
        groups = dataclasses.asdict(self.config)
        groups["denoiser"] = groups[self.config.backbone.removesuffix("3d")]
        if not self.config.image_tokens:
            del groups["resampler"]
        return groups

    @property
    def settings(self) -> Settings:
        return Settings.of(self.config)


def find(directory: str | Path) -> Import | Run:
    """What holds weights at a place: an import, a work directory or one of its checkpoints. Raises UserError."""
    return Import(directory) if is_imported(directory) else Run(directory)


def load(directory: str | Path, kind: str = "best") -> dict[str, Params]:
    """{"denoiser": ..., maybe "autoencoder", "text", "image"} from a work directory, one of its checkpoints, or an import's directory.

    A work directory stands for its newest checkpoint; WORKDIR/checkpoints/STEP is another one. kind, of these: the average ("ema"), the
    raw weights ("raw"), or "best", the average if the run keeps one. Frozen networks are those of the run's own `init_from`. Raises
    UserError.
    """
    start = first_import(directory)
    return {"denoiser": find(directory).denoiser(kind), **(start.read(FROZEN) if start else {})}


def params_checksum(params: Params) -> str:
    """sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name], np.float32)
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(value)
    return digest.hexdigest()


def other_objective(source: Import | Run, config: Config) -> list[str]:
    """A line for each diffusion setting of `config`, to sample with, other than that which the weights of `source` were trained with."""
    theirs, ours = dataclasses.asdict(source.settings.diffusion), dataclasses.asdict(config.diffusion)
    return [
        f"{source.directory}: these weights were trained with diffusion.{name}={theirs[name]!r}, and are sampled with {ours[name]!r}"
        for name in ("prediction", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr", "base_scale")
        if theirs[name] != ours[name]
    ]


def first_import(place: str | Path) -> Import | None:
    """The import that a place leads to (see `origin`)."""
    start = origin(place)
    return Import(start) if start and is_imported(start) else None


def lacking(init_from: str, names: list[str]) -> UserError:
    """The error for frozen networks that are not in an `init_from`."""
    start, networks = origin(init_from), " and ".join(names)
    if not start or run_location(start).exists():
        return UserError(f"init_from={start or init_from}: holds no weights of the {networks}")
    return UserError(
        f"init_from={start}: there is no such directory, from which the {networks} of this run came; put it back, or if the path is a "
        "relative one, call this from where the run was started"
    )


def origin(init_from: str | Path, *passed: Path) -> str:
    """Where the chain of runs that started from one another begins: an import, a path that does not exist, or "" (random weights).

    Raises UserError when the chain is a circle; `passed` are the work directories that come before `init_from` in it.
    """
    while str(init_from) and run_location(init_from).exists() and not is_imported(init_from):
        run = Run(init_from)
        passed = (*passed, run.directory.resolve())
        if passed[-1] in passed[:-1]:
            raise UserError(
                f"init_from: a run would start from itself ({' -> '.join(map(str, passed))}). The same command continues a run; give it "
                "the init_from that it began with"
            )
        init_from = run.config.init_from
    return str(init_from)


def fit(params: Params, shapes: dict[str, jax.ShapeDtypeStruct], source: str, inflate: str = "") -> Params:
    """`params` checked against `shapes`; the differences are counted, and the first listed, in one UserError.

    `inflate` names the one kernel whose input channels may grow: old ones are copied, new ones zero, so that step 0
    equals the model before (docs/weights.md).
    """
    params = dict(params)
    if inflate in params and inflate in shapes:
        old, new = params[inflate].shape, shapes[inflate].shape
        if old[:-2] == new[:-2] and old[-1] == new[-1] and old[-2] < new[-2]:
            params[inflate] = np.concatenate([params[inflate], np.zeros((*new[:-2], new[-2] - old[-2], new[-1]), np.float32)], axis=-2)
    bad = [f"missing {k}" for k in shapes.keys() - params.keys()] + [f"left over {k}" for k in params.keys() - shapes.keys()]
    bad += [f"{k} is {params[k].shape}, not {shapes[k].shape}" for k in shapes.keys() & params.keys() if params[k].shape != shapes[k].shape]
    if bad:
        raise UserError(
            f"{source}: weights do not fit the configuration, {len(bad)} differences from its {len(shapes)} arrays; "
            "use the configuration that they were trained with (imported.json or config.json there):\n  "
            + enumerate_first(sorted(bad), separator="\n  ")
        )
    # What an import holds is read from its file here.
    return {k: np.array(v) if isinstance(v := params[k], Lazy) else v for k in shapes}
