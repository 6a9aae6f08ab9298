"""Checkpoints of VideoCrafter2 and its relatives: a file and its YAML in, weights in our layout or ready modules out."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from motif_jax.config import AutoencoderConfig, DiffusionConfig, ImageConfig, TextConfig, UNetConfig
from motif_jax.diffusion.schedule import Schedule, make_schedule
from motif_jax.errors import UserError, enumerate_first
from motif_jax.interop import architecture, files
from motif_jax.interop.files import Lazy
from motif_jax.interop.names import select
from motif_jax.interop.settings import Settings, read_yaml
from motif_jax.interop.tables import autoencoder, image, openclip, resampler, unet
from motif_jax.models.autoencoder import KlAutoencoder, PixelAutoencoder, make_autoencoder
from motif_jax.models.image import ImageTower
from motif_jax.models.networks import Network
from motif_jax.models.resampler import Resampler
from motif_jax.models.text import OpenClipTower, WordsTower, make_text_tower
from motif_jax.models.unet3d import UNet3D

TABLES = {"denoiser": unet, "autoencoder": autoencoder, "text": openclip, "image": image, "resampler": resampler}
# A tensor that says what a file without prefixes is, and what may precede its name there.
_MARKS = {
    "denoiser": ("input_blocks.0.0.weight", ("", "diffusion_model.")),
    "autoencoder": ("encoder.conv_in.weight", ("",)),
    "text": ("token_embedding.weight", ("", "model.")),
    "image": ("class_embedding", ("visual.",)),
}
# Names of other networks and of other libraries' conversions of these, and what to do.
_FOREIGN = {
    r"^(fnet|cnet|feature_encoder|context_encoder)\.": ("RAFT", "import it with --kind=raft"),
    r"(^|\.)(text|vision)_model\.": ("transformers", "take the OpenCLIP file of the same model (open_clip_pytorch_model.bin)"),
    r"(^|\.)((down|up)_blocks|mid_block|time_embedding)\.": (
        "diffusers",
        "take the original .ckpt or .safetensors, or convert it back with diffusers' convert_diffusers_to_original_stable_diffusion.py",
    ),
}
# How the shapes of its tensors tell what a network is, and where `Settings` says so.
_INFERRED = {
    "denoiser": ("unet", architecture.unet_config),
    "autoencoder": ("autoencoder", architecture.autoencoder_config),
    "text": ("text", architecture.text_config),
    "image": ("image", architecture.image_config),
    "resampler": ("resampler", architecture.resampler_config),
}
# The schedule is computed anew; averages, and what is left of the towers beside what runs, have no counterpart here.
_IGNORED = re.compile(
    r"(betas|(sqrt_)?alphas_cumprod(_prev)?|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|"
    r"posterior_.*|scale_arr|logvar|lvlb_weights|scale_factor|model_ema\..*|embedder\.(?!model\.visual\.).*|cond_stage_model\.(?!model\.).*)"
)
# What the published models were trained with (VideoCrafter2; DynamiCrafter-512), where no YAML says so.
VIDEOCRAFTER = DiffusionConfig(prediction="eps", zero_terminal_snr=False, base_scale=0.7)
DYNAMICRAFTER = DiffusionConfig(prediction="v", zero_terminal_snr=True, base_scale=0.7)
DYNAMICRAFTER_256 = DiffusionConfig(prediction="eps", zero_terminal_snr=False, base_scale=1.0)  # its YAML has none of the other's keys

LazyWeights = dict[str, dict[str, Lazy]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint as modules (nnx; jit them yourself) and the schedule it was trained with.

    unet(x_BTHWC, t_B, context_BLD, fps_B) -> prediction [B,T,h,w,C], see `UNet3D`; of the kind settings.diffusion.prediction.
    autoencoder.encode(x_NHWC in [-1, 1]) -> moments [N,h,w,2C]; autoencoder.decode(z_NhwC) -> [N,H,W,3]. The U-Net's latents are
    settings.autoencoder.scale_factor times the autoencoder's.
    text(tokens_BL) -> [B,L,D], the penultimate layer; a ValueError for a tower whose number of heads nothing tells.
    image(x_BHW3 in [-1, 1]) -> [B,S,E], resampler(image_BSE) -> [B,J,D]: with DynamiCrafter's image cross attention the context is
    [text, image tokens], 16 for each frame; J = 16 are one set for all frames.
    A network that the file does not hold is None.
    """

    unet: UNet3D | None
    autoencoder: KlAutoencoder | PixelAutoencoder | None
    text: OpenClipTower | WordsTower | Callable | None
    image: ImageTower | Callable | None
    resampler: Resampler | None
    schedule: Schedule
    settings: Settings


def load_reference(checkpoint: str | pathlib.Path, yaml: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> Reference:
    """The networks and schedule of a reference checkpoint (.ckpt, .pth, .safetensors) and its YAML.

    Without a YAML the networks are read off the shapes of the tensors and the schedule is the published model's.
    dtype: of the activations; parameters are float32. For float32 results to 1e-5 of PyTorch's, run under
    `jax.default_matmul_precision("highest")`. Raises UserError, a ValueError.
    """
    settings, weights, _ = read_checkpoint(checkpoint, yaml)
    make = constructors(settings, dtype)
    modules = {name: bind(make[name], weights[name]) for name in weights}
    if settings.autoencoder.kind == "pixel":
        modules["autoencoder"] = make_autoencoder(settings.autoencoder, None)
    if settings.text.kind == "words":
        modules["text"] = make_text_tower(settings.text, None)
    for name, config in (("text", settings.text), ("image", settings.image)):
        if name in modules and config.heads == 0:
            modules[name] = _headless(f"{checkpoint}", name, config.width)
    d = settings.diffusion
    schedule = make_schedule(d.num_timesteps, d.beta_start, d.beta_end, d.zero_terminal_snr, d.base_scale)
    return Reference(*(modules.get(name) for name in TABLES), schedule, settings)


def _headless(checkpoint: str, name: str, width: int) -> Callable:
    sizes, group = {
        "text": ("width, layers, vocab_size and context_length", "cond_stage_config"),
        "image": ("size, patch, width, layers and projection", "img_cond_stage_config"),
    }[name]

    def tower(_: Any) -> Any:
        raise UserError(
            f"{checkpoint}: {name} tower of width {width}: none of OpenCLIP's; its number of attention heads is not in the file: "
            f"add `heads`, with {sizes}, to {group}.params of the YAML"
        )

    return tower


def bind(make: Callable, weights: Mapping[str, Any]) -> Any:
    """A module of `make(rngs)` with these parameters."""
    return Network.of(make).bind({path: jnp.array(np.asarray(array)) for path, array in weights.items()})


def constructors(settings: Settings, dtype: Any) -> dict[str, Callable]:
    """{network: function from nnx.Rngs to the module}."""
    return {
        "denoiser": lambda rngs: UNet3D(settings.unet, rngs=rngs, dtype=dtype),
        "autoencoder": lambda rngs: make_autoencoder(settings.autoencoder, rngs, dtype),
        "text": lambda rngs: make_text_tower(settings.text, rngs, dtype),
        "image": lambda rngs: ImageTower(settings.image, rngs=rngs, dtype=dtype),
        "resampler": lambda rngs: Resampler(settings.resampler, settings.image.width, settings.unet.context_dim, rngs=rngs, dtype=dtype),
    }


def read_checkpoint(
    path: str | pathlib.Path, yaml: str | pathlib.Path | None = None, only: str | None = None, averaged: bool = False
) -> tuple[Settings, LazyWeights, list[str]]:
    """(what the networks of a file are, {network: {our path: array, not yet read}} of those that it holds, remarks).

    The file may be a whole model or one network with or without its prefix. Every tensor's name and shape is checked against
    the YAML, or without one against the architecture that the shapes imply. only: the one network to read, if it is there.
    averaged: take the average of the U-Net's weights that the file keeps beside them. Raises UserError, which lists the faults
    of every network.
    """
    settings = read_yaml(yaml) if yaml else None
    tensors = files.read_tensors(path)
    # The reference's LitEma stores the average of "model.a.b" as "model_ema.ab".
    averages = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in tensors if name.startswith(unet.prefix)}
    remarks = []
    if averaged:
        if absent := [average for average in averages.values() if average not in tensors]:
            raise UserError(f"{path}: --weights=ema: holds no average of the U-Net's weights: there is no {enumerate_first(absent, 2)}")
        tensors = {**tensors, **{name: tensors[average] for name, average in averages.items()}}
    elif not tensors.keys().isdisjoint(averages.values()):
        remarks.append(f"{path}: also holds an average of the U-Net's weights (model_ema.*), left out; --weights=ema takes it")
    parts = _parts(tensors, path, only)
    errors: list[str] = []

    def attempt(call: Callable, name: str, *args: Any) -> Any:
        try:
            return call(*args)
        except UserError as error:
            errors.append(str(error))
        except (ValueError, IndexError, ZeroDivisionError) as error:  # from a network that cannot be
            errors.append(f"the sizes of its {name} contradict each other ({error}): it is another network, or in another layout")
        return None

    unknown = list(parts)
    if settings is not None:  # the reference's YAML never gives the sizes of the towers
        unknown = [name for name, default in (("text", TextConfig()), ("image", ImageConfig())) if getattr(settings, name) == default]
    inferred = {name: attempt(_INFERRED[name][1], name, parts[name]) for name in unknown if name in parts}
    if settings is None:
        network = inferred.get("denoiser") or UNetConfig()
        trained = DYNAMICRAFTER if network.image_cross_attention else VIDEOCRAFTER
        if network.image_cross_attention_scale_learnable:
            trained = DYNAMICRAFTER_256
        settings = Settings(network, AutoencoderConfig(), TextConfig(), trained)
    settings = dataclasses.replace(settings, **{_INFERRED[name][0]: config for name, config in inferred.items() if config is not None})
    if "proj_in.weight" in parts.get("resampler", {}) and "image" not in parts:
        width = parts["resampler"]["proj_in.weight"].shape[-1]
        settings = dataclasses.replace(settings, image=dataclasses.replace(settings.image, width=width))
    if "scale_factor" in tensors and tensors["scale_factor"].shape == ():  # measured in training (`scale_by_std`); no YAML has it
        scaled = dataclasses.replace(settings.autoencoder, scale_factor=float(np.asarray(tensors["scale_factor"])))
        settings = dataclasses.replace(settings, autoencoder=scaled)
    make = constructors(settings, jnp.float32)

    def fill(name: str) -> dict[str, Lazy]:
        return TABLES[name].to_jax(parts[name], Network.of(make[name]).shapes)

    described = [name for name in parts if inferred.get(name, name) is not None]
    weights = {name: attempt(fill, name, name) for name in described}
    if errors:
        raise UserError(f"{path}: " + "\n".join(errors) + (f"\n(the configuration is that of {yaml})" if yaml else ""))
    return settings, weights, remarks


def _parts(tensors: Mapping[str, Lazy], path: str | pathlib.Path, only: str | None) -> dict[str, dict[str, Lazy]]:
    """The tensors of each network, without its prefix; of the network `only` alone if it is there, whatever is beside it."""
    parts = {name: found for name, table in TABLES.items() if (found := select(tensors, table.prefix))}
    if only in parts:
        return {only: parts[only]}
    for pattern, (layout, remedy) in _FOREIGN.items():
        if found := [name for name in tensors if re.search(pattern, name)]:
            raise UserError(f"{path}: is in the layout of {layout} ({found[0]}), which is not read; {remedy}")
    if not parts:
        for name, (mark, prefixes) in _MARKS.items():
            for prefix in prefixes:
                if prefix + mark in tensors:
                    parts[name] = select(tensors, prefix)
        if parts:
            return {only: parts[only]} if only in parts else parts
        first = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path}: holds no network in the reference's names ({', '.join(t.prefix for t in TABLES.values())}); "
            f"it holds {len(tensors)} tensors: {first}, ..."
        )
    prefixes = tuple(table.prefix for table in TABLES.values())
    strange = sorted(name for name in tensors if not name.startswith(prefixes) and not _IGNORED.fullmatch(name))
    if strange:
        raise UserError(f"{path}: {len(strange)} tensors belong to no network known here: {enumerate_first(strange)}")
    return parts
