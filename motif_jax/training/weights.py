"""The weights a run starts from: random, another run's, or an imported checkpoint."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from motif_jax.config import Config, read_json
from motif_jax.data.storage import Path, run_location
from motif_jax.errors import UserError, enumerate_first
from motif_jax.interop.files import Lazy
from motif_jax.interop.imported import CONTENTS, described, imported_settings, is_imported, read_imported, recorded
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
        loaded = load(config.init_from)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    frozen = frozen_weights(networks, loaded, config.init_from)
    given = loaded["denoiser"]
    new = {} if any(IMAGE_PATH.fullmatch(name) for name in given) else _new_image_path(networks, key)
    fitted = fit({**given, **new}, networks.denoiser.shapes, f"{config.init_from} (denoiser)", inflate=FIRST_KERNEL)
    check_untold(config, config.init_from, "denoiser")
    grown = {FIRST_KERNEL} if FIRST_KERNEL in given and given[FIRST_KERNEL].shape != fitted[FIRST_KERNEL].shape else set()
    if untrained := sorted(name for name in grown | new.keys() if not re.fullmatch(PARTS[config.finetune], name)):
        raise UserError(
            f"finetune={config.finetune!r}: does not train what the image enters by, which init_from={config.init_from} lacks "
            f"({enumerate_first(untrained, 2, ', ')}), and the model would never see the image; use finetune='all', or weights that have it"
        )
    return Weights(fitted, frozen)


def frozen_weights(
    networks: Networks, loaded: dict[str, Params] | None = None, source: str = "", names: Sequence[str] = FROZEN
) -> dict[str, Params]:
    """{network: weights} of the frozen networks. Pretrained ones are taken from `loaded`, which was read from `source`, or, where it
    lacks them, from the configuration's `init_from`; the others are made.

    Raises UserError when one of the pretrained networks in `names` is in neither.
    """
    init_from, need = networks.config.init_from, [name for name in networks.pretrained if name in names]
    found = {name: (source, loaded[name]) for name in need if name in (loaded or {})}
    if found.keys() < set(need):
        found = {name: (init_from, params) for name, params in load_frozen(init_from).items() if name in need} | found
    missing = [name for name in need if name not in found]
    if missing and init_from:
        raise lacking(init_from, missing)
    if missing:
        small = {"autoencoder": "autoencoder.kind='pixel'", "text": "text.kind='words'", "image": "image.kind='random'"}
        raise UserError(
            f"the {' and '.join(missing)} of this configuration are pretrained networks: set --config.init_from to an imported "
            f"checkpoint (docs/weights.md), or use {' and '.join(small[name] for name in missing)}"
        )
    fitted = {name: fit(params, networks.frozen[name].shapes, f"{source} ({name})") for name, (source, params) in found.items()}
    for name, (source, _) in found.items():
        check_untold(networks.config, origin(source), name)
    return networks.init_frozen() | fitted


def check_untold(config: Config, source: str | Path, network: str) -> None:
    """Raises UserError when the configuration gives `network` another value of an `UNTOLD` setting than the import or run `source` does.

    If the import had no YAML, its value was only assumed: then a line is printed, and the configuration's value is used.
    """
    source = run_location(source)
    if is_imported(source):
        groups, known = recorded(source), described(source)
    else:
        run = read_config(source)
        groups = dataclasses.asdict(run)
        groups["denoiser"] = groups["unet" if run.backbone == "unet3d" else "dit"]
        if not run.image_tokens:
            del groups["resampler"]
        known = groups.keys()
    backbone = "unet" if config.backbone == "unet3d" else "dit"
    for part, fields in UNTOLD.get(network, {}).items():
        group = backbone if part == "denoiser" else part
        for field in fields:
            theirs, ours = groups.get(part, {}).get(field), getattr(getattr(config, group), field, None)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            if not theirs or ours in (None, theirs) or (part == "resampler" and not config.image_tokens):
                continue
            name = f"{group}.{field}"
            if part in known:
                raise UserError(
                    f"{source}: its {network} was made with {name}={theirs!r}, and the configuration says {ours!r}, with which "
                    f"these weights compute something else: use --config.{name}={theirs}"
                )
            if jax.process_index() == 0:
                print(f"{source}: {name}={theirs!r} was assumed when it was imported, the configuration says {ours!r}", flush=True)


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


def load(directory: str | Path, kind: str = "best") -> dict[str, Params]:
    """{"denoiser": ..., maybe "autoencoder", "text", "image"} from a work directory, one of its checkpoints, or an import's directory.

    A work directory stands for its newest checkpoint; WORKDIR/checkpoints/STEP is another one. kind, of these: the average ("ema"), the
    raw weights ("raw"), or "best", the average if the run keeps one. Frozen networks are those of the run's own `init_from`. Raises
    UserError.
    """
    directory = run_location(directory)
    if is_imported(directory):
        if kind != "best":
            raise UserError(f"{directory}: an import holds one set of weights, not {kind}")
        loaded = _assembled(read_imported(directory))
        if "denoiser" not in loaded:
            raise UserError(f"{directory}: holds no weights of the denoiser, but {', '.join(loaded) or 'nothing that init_from reads'}")
        return loaded
    config = read_config(directory)
    averaged = config.ema.decay > 0
    if kind == "ema" and not averaged:
        raise UserError(f"{directory}: keeps no average (ema.decay is 0); use the raw weights")
    path = checkpoint_of(directory)
    average = read_arrays(path, ("ema",))["ema"] if averaged and kind != "raw" else {}
    # Without a mask the average covers every parameter.
    raw = read_arrays(path, ("params",))["params"] if not average or config.finetune != "all" else {}
    return {"denoiser": lora.merge({**raw, **average}), **load_frozen(config.init_from)}


def source_checksum(directory: Path) -> str:
    """sha256 of the checksums that a checkpoint keeps of its arrays, or an import's directory of its files."""
    kept = (directory / CONTENTS).read_text() if is_imported(directory) else json.dumps(read_meta(directory)["checksums"], sort_keys=True)
    return hashlib.sha256(kept.encode()).hexdigest()


def params_checksum(params: Params) -> str:
    """sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name], np.float32)
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(value)
    return digest.hexdigest()


def other_objective(directory: str | Path, config: Config) -> list[str]:
    """A line for each diffusion setting of `config`, to sample with, other than that which `directory`'s weights were trained with."""
    trained = imported_settings(directory) if is_imported(directory) else read_config(directory)
    theirs, ours = dataclasses.asdict(trained.diffusion), dataclasses.asdict(config.diffusion)
    return [
        f"{directory}: these weights were trained with diffusion.{name}={theirs[name]!r}, and are sampled with {ours[name]!r}"
        for name in ("prediction", "num_timesteps", "beta_start", "beta_end", "zero_terminal_snr", "base_scale")
        if theirs[name] != ours[name]
    ]


def _assembled(imported: dict[str, Params]) -> dict[str, Params]:
    """The resampler of an import is a part of the denoiser here, since it is trained with it."""
    resampler = {f"image_proj_model.{name}": value for name, value in imported.pop("resampler", {}).items()}
    return imported | ({"denoiser": imported["denoiser"] | resampler} if "denoiser" in imported else {})


def load_frozen(directory: str | Path) -> dict[str, Params]:
    """The "autoencoder", "text" and "image" of the import that an `init_from` leads to (see `origin`); {} without one."""
    start = origin(directory)
    return read_imported(start, FROZEN) if start and is_imported(start) else {}


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
    while str(init_from) and (start := run_location(init_from)).exists() and not is_imported(start):
        passed = (*passed, run_directory(start).resolve())
        if passed[-1] in passed[:-1]:
            raise UserError(
                f"init_from: a run would start from itself ({' -> '.join(map(str, passed))}). The same command continues a run; give it "
                "the init_from that it began with"
            )
        init_from = read_config(start).init_from
    return str(init_from)


def run_directory(directory: Path) -> Path:
    """The work directory of WORKDIR/checkpoints/STEP; any other directory itself, also a run's that has such a name."""
    named = directory.name.isdigit() and directory.absolute().parent.name == "checkpoints"
    is_step = named and directory.is_dir() and not (directory / "config.json").exists()
    return directory.absolute().parent.parent if is_step else directory


def checkpoint_of(directory: Path) -> Path:
    """The newest checkpoint of a work directory; a checkpoint or an import itself. Raises UserError."""
    if is_imported(directory) or run_directory(directory) != directory:
        return directory
    read_config(directory)  # says what a directory lacks that is none of these
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory}: holds no checkpoint yet; train first")
    return directory / "checkpoints" / str(step)


def read_config(directory: str | Path) -> Config:
    """The configuration of a work directory or of one of its checkpoints. Raises UserError."""
    path = run_directory(run_location(directory)) / "config.json"
    if not path.exists():
        raise UserError(f"{directory}: holds neither config.json (a work directory of motif_jax.main) nor {CONTENTS} (an import)")
    try:
        return read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


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
