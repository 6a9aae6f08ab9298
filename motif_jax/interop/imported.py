"""The directory of an import: one .safetensors file per network in our names and layout, and imported.json.

`denoiser`, `autoencoder`, `text`, `image` and `resampler` hold float32 weights by dotted path and serve as `init_from`;
`raft.safetensors` keeps the authors' names and serves as `prepare.flow_weights`. Several imports may share a directory as long
as each brings other networks. It is written to a disk, and may then be copied to gs://, where it is read too.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from motif_jax.config import AutoencoderConfig, DiffusionConfig, ImageConfig, ResamplerConfig, TextConfig, UNetConfig
from motif_jax.data import storage
from motif_jax.data.storage import Path, run_location
from motif_jax.errors import StoreError, UserError
from motif_jax.fields import build
from motif_jax.interop import files, raft
from motif_jax.interop.reference import TABLES, LazyWeights, read_checkpoint
from motif_jax.interop.settings import Settings, read_yaml

CONTENTS = "imported.json"
KINDS = ("videocrafter", "dynamicrafter", "openclip", "openclip_image", "autoencoder", "raft")
# Kinds that bring one network, maybe out of a whole checkpoint; and those that bring each network.
_ONE = {"openclip": "text", "openclip_image": "image", "autoencoder": "autoencoder"}
_KIND_OF = {network: kind for kind, network in _ONE.items()} | {"denoiser": "videocrafter or dynamicrafter", "resampler": "dynamicrafter"}
_CONFIGS = {
    "denoiser": UNetConfig,
    "autoencoder": AutoencoderConfig,
    "text": TextConfig,
    "image": ImageConfig,
    "resampler": ResamplerConfig,
}


def import_checkpoint(
    kind: str,
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    yaml: str | pathlib.Path | None = None,
    averaged: bool = False,
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Writes the networks of `source` to the directory `output`; returns ({network: (tensors, parameters)}, remarks).

    averaged: see `reference.read_checkpoint`. Everything is checked before the first byte is written, and a failure leaves nothing
    behind. Imports into one directory take turns. Raises UserError.
    """
    source, output = pathlib.Path(source), pathlib.Path(output)
    if kind not in KINDS:
        raise UserError(f"--kind={kind}: must be one of {', '.join(KINDS)}")
    if kind == "raft" and yaml:
        raise UserError(f"--yaml={yaml}: --kind=raft takes none, since its shapes say everything")
    if averaged and kind not in ("videocrafter", "dynamicrafter"):
        raise UserError(f"--weights=ema: only --kind=videocrafter and dynamicrafter have an average, not {kind}")
    networks, config, remarks = _raft(source) if kind == "raft" else _networks(kind, source, yaml, averaged)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file; name a directory")
    made = [directory for directory in (output, *output.parents) if not directory.exists()]  # inside out
    with contextlib.ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            held.enter_context(storage.locked(output))
            contents = _contents(output) if (output / CONTENTS).exists() else {"networks": {}}
            _check_output(output, contents["networks"], networks)
            about = {"kind": kind, "source": source.name, "source_sha256": storage.sha256(source)}
            about |= {"yaml": pathlib.Path(yaml).name} if yaml else {}
            for name, tensors in networks.items():
                path = output / f"{name}.safetensors"
                made.insert(0, path)
                told = about | ({"weights": "ema"} if averaged and name == "denoiser" else {})
                contents["networks"][name] = {**told, "sha256": files.write_safetensors(path, tensors), "config": config.get(name, {})}
            if "denoiser" in networks:
                contents |= {key: config[key] for key in ("diffusion", "weightless")}
            storage.write_whole(output / CONTENTS, json.dumps(contents, indent=2, sort_keys=True) + "\n")
        except BaseException as error:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            if isinstance(error, OSError):
                raise UserError(f"{output}: cannot be written: {error}") from error
            raise
    return {name: (len(t), sum(int(np.prod(x.shape)) for x in t.values())) for name, t in networks.items()}, remarks


def yaml_beside(kind: str, source: str | pathlib.Path) -> tuple[pathlib.Path | None, str]:
    """The YAML of the same name as a file, if it is one of the reference and describes what is imported; and a line on what was found."""
    source = pathlib.Path(source)
    yaml = (source.parent / source.name.removesuffix(".index.json")).with_suffix(".yaml")
    if kind == "raft" or not yaml.is_file():
        return None, ""
    try:
        settings = read_yaml(yaml)
        tower = {"openclip": settings.text, "openclip_image": settings.image}.get(kind)
        if tower and tower == type(tower)():
            raise UserError(f"{yaml}: says nothing of this tower")
    except UserError as error:
        return None, f"note: found beside the input, and ignored: {' '.join(str(error).split())}"
    return yaml, f"--yaml={yaml}: found beside the input; --yaml= leaves it out"


def _networks(
    kind: str, source: pathlib.Path, yaml: str | pathlib.Path | None, averaged: bool
) -> tuple[LazyWeights, dict[str, Any], list[str]]:
    settings, weights, remarks = read_checkpoint(source, yaml, _ONE.get(kind), averaged)
    wanted = _ONE.get(kind, "denoiser")
    if wanted not in weights:
        held = ", ".join(f"{name} (--kind={_KIND_OF[name]})" for name in weights)
        raise UserError(f"{source}: holds no {TABLES[wanted].what}, but {held}; check --kind={kind}")
    if kind in _ONE:
        weights, remarks = {wanted: weights[wanted]}, []
    elif settings.unet.image_cross_attention != (kind == "dynamicrafter"):
        other = "dynamicrafter" if kind == "videocrafter" else "videocrafter"
        has = "has" if settings.unet.image_cross_attention else "has no"
        raise UserError(f"{source}: its U-Net {has} image cross attention; import it with --kind={other}")
    config = {name: dataclasses.asdict(getattr(settings, "unet" if name == "denoiser" else name)) for name in _CONFIGS}
    for name in ("text", "image"):
        if config[name]["heads"] == 0:
            del config[name]["heads"]  # nothing says how many
    weightless = {name: config[name] for name in ("autoencoder", "text", "image") if config[name]["kind"] in ("pixel", "words", "random")}
    return weights, config | {"diffusion": dataclasses.asdict(settings.diffusion), "weightless": weightless}, remarks


def _raft(source: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    try:
        model = raft.load_raft(source)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    return {"raft": raft.to_reference(model)}, {"raft": {"variant": model.variant}}, []


def _check_output(output: pathlib.Path, present: dict[str, Any], new: dict[str, Any]) -> None:
    if both := sorted(present.keys() & new.keys()):
        raise UserError(f"--output={output}: already holds {', '.join(both)} of an import; name another directory, or delete this one")
    if not present and any(output.iterdir()):
        raise UserError(f"--output={output}: is not empty and no import; name another directory")


def _contents(directory: Path) -> dict[str, Any]:
    path = directory / CONTENTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = found["networks"].values()
        groups = [found.get("diffusion", {}), found.get("weightless", {}), *(part["config"] for part in parts)]
        if all(isinstance(group, dict) for group in groups) and all(isinstance(part["sha256"], str) for part in parts):
            return found
    except StoreError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); import again") from error
    except (KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: is no table of contents of an import; import again")


def is_imported(directory: str | Path) -> bool:
    return (run_location(directory) / CONTENTS).exists()


class Import:
    """The directory of an import. Everything here raises UserError, also for a file that is no longer what was imported."""

    def __init__(self, directory: str | Path):
        self.directory = run_location(directory)
        self._contents = _contents(self.directory)

    def read(self, names: Iterable[str] = tuple(_CONFIGS)) -> LazyWeights:
        """{network: {dotted path: array, not yet read}} of those of `names` that it holds; from gs://, of copies on the disk."""
        held, found = self._contents["networks"], {}
        for name in names:
            if name in held:
                path = self.directory / f"{name}.safetensors"
                try:
                    file = storage.on_disk(path)
                except FileNotFoundError as error:
                    raise UserError(f"{path}: there is no such file") from error
                found[name] = files.read_tensors(file)
                if storage.sha256(file) != held[name]["sha256"]:
                    raise UserError(f"{path}: is not what was imported (its SHA-256 is not that in {CONTENTS}); import again")
        return found

    def denoiser(self, kind: str = "best") -> dict[str, files.Lazy]:
        """{dotted path: array, not yet read} of the U-Net with the resampler, which is a part of it here, since it is trained with it.

        kind: only "best"; an import holds one set of weights.
        """
        if kind != "best":
            raise UserError(f"{self.directory}: an import holds one set of weights, not {kind}")
        if "denoiser" not in self._contents["networks"]:
            held = ", ".join(name for name in _CONFIGS if name in self._contents["networks"])
            raise UserError(f"{self.directory}: holds no weights of the denoiser, but {held or 'nothing that init_from reads'}")
        found = self.read(("denoiser", "resampler"))
        return found["denoiser"] | {TABLES["resampler"].prefix + name: value for name, value in found.get("resampler", {}).items()}

    @property
    def checksum(self) -> str:
        """SHA-256 of the table of contents, which has that of every file."""
        return hashlib.sha256((self.directory / CONTENTS).read_text(encoding="utf-8").encode()).hexdigest()

    @property
    def recorded(self) -> dict[str, dict[str, Any]]:
        """{network: its settings} of those that it holds, or that need no weights."""
        return self._contents.get("weightless", {}) | {name: part["config"] for name, part in self._contents["networks"].items()}

    @property
    def assumed(self) -> set[str]:
        """The networks whose settings came from no YAML, so that some of what `recorded` has of them are `assumptions`."""
        silent = {name for name, part in self._contents["networks"].items() if not part.get("yaml")}
        return silent | (self._contents.get("weightless", {}).keys() if "denoiser" in silent else set())

    @property
    def settings(self) -> Settings:
        """What the networks are; defaults for those that it does not hold."""
        given, errors = self.recorded, []
        found = {name: build(cls, given.get(name, {}), f"{name}.", errors) for name, cls in _CONFIGS.items()}
        diffusion = build(DiffusionConfig, self._contents.get("diffusion", {}), "diffusion.", errors)
        if errors:
            raise UserError(f"{self.directory}/{CONTENTS}: " + "; ".join(errors))
        for name in ("text", "image"):
            if given.get(name) and "heads" not in given[name]:
                found[name] = dataclasses.replace(found[name], heads=0)
        return Settings(unet=found.pop("denoiser"), diffusion=diffusion, **found)

    def assumptions(self, names: Iterable[str]) -> str:
        """What no tensor of these networks says, so that an import without the reference's YAML took it from the published models."""
        settings = self.settings
        d, u = settings.diffusion, settings.unet
        facts = {
            "denoiser": f"diffusion.prediction={d.prediction}, diffusion.zero_terminal_snr={d.zero_terminal_snr}, "
            f"diffusion.base_scale={d.base_scale}, unet.norm_groups={u.norm_groups}"
            + ("" if u.addition_attention else f", unet.num_head_channels={u.num_head_channels}"),
            "autoencoder": f"autoencoder.scale_factor={settings.autoencoder.scale_factor}",
            "text": f"text.heads={settings.text.heads or 'unknown'}",
            "image": f"image.heads={settings.image.heads or 'unknown'}",
            "resampler": f"resampler.heads={settings.resampler.heads}",
        }
        return ", ".join(facts[name] for name in facts if name in names)
