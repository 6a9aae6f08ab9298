"""Checkpoints of VideoCrafter2 and its relatives: a file and its YAML in, weights in our layout or ready modules out."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from motif_jax.config import AutoencoderConfig, DiffusionConfig, TextConfig, UNetConfig, UserError
from motif_jax.diffusion.schedule import Schedule, make_schedule
from motif_jax.interop import architecture, autoencoder, files, openclip, unet
from motif_jax.interop.files import Lazy
from motif_jax.interop.names import select
from motif_jax.interop.settings import Settings, read_yaml
from motif_jax.models.autoencoder import KlAutoencoder, PixelAutoencoder, make_autoencoder
from motif_jax.models.networks import Network
from motif_jax.models.text import OpenClipTower, WordsTower, make_text_tower
from motif_jax.models.unet3d import UNet3D

TABLES = {"denoiser": unet, "autoencoder": autoencoder, "text": openclip}
# A tensor that says what a file without prefixes is, and what may precede its name there.
_MARKS = {
    "denoiser": ("input_blocks.0.0.weight", ("",)),
    "autoencoder": ("encoder.conv_in.weight", ("",)),
    "text": ("token_embedding.weight", ("", "model.")),
}
# The schedule is computed anew; the other networks and averages of a checkpoint have no counterpart here.
_IGNORED = re.compile(
    r"(betas|(sqrt_)?alphas_cumprod(_prev)?|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|"
    r"posterior_.*|scale_arr|logvar|lvlb_weights|scale_factor|model_ema\..*|embedder\..*|image_proj_model\..*|cond_stage_model\.(?!model\.).*)"
)
# What the published models were trained with (VideoCrafter2; DynamiCrafter-512), where no YAML says so.
VIDEOCRAFTER = DiffusionConfig(prediction="eps", zero_terminal_snr=False, base_scale=0.7)
DYNAMICRAFTER = DiffusionConfig(prediction="v", zero_terminal_snr=True, base_scale=0.7)

Weights = dict[str, dict[str, Lazy]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A checkpoint as modules (nnx; jit them yourself) and the schedule it was trained with.

    unet(x_BTHWC, t_B, context_BLD, fps_B) -> prediction [B,T,h,w,C], see `UNet3D`; of the kind settings.diffusion.prediction.
    autoencoder.encode(x_NHWC in [-1, 1]) -> moments [N,h,w,2C]; autoencoder.decode(z_NhwC) -> [N,H,W,3]. The U-Net's latents are
    settings.autoencoder.scale_factor times the autoencoder's.
    text(tokens_BL) -> [B,L,D], the penultimate layer; a ValueError for a tower whose number of heads nothing tells.
    A network that the file does not hold is None.
    """

    unet: UNet3D | None
    autoencoder: KlAutoencoder | PixelAutoencoder | None
    text: OpenClipTower | WordsTower | Callable | None
    schedule: Schedule
    settings: Settings


def load_reference(checkpoint: str | pathlib.Path, yaml: str | pathlib.Path | None = None, dtype: Any = jnp.float32) -> Reference:
    """The networks and schedule of a reference checkpoint (.ckpt, .pth, .safetensors) and its YAML.

    Without a YAML the networks are read off the shapes of the tensors and the schedule is the published model's.
    dtype: of the activations; parameters are float32. For float32 results to 1e-5 of PyTorch's, run under
    `jax.default_matmul_precision("highest")`. Raises UserError, a ValueError.
    """
    settings, weights = read_checkpoint(checkpoint, yaml)
    make = constructors(settings, dtype)
    modules = {name: bind(make[name], weights[name]) for name in weights}
    if settings.autoencoder.kind == "pixel":
        modules["autoencoder"] = make_autoencoder(settings.autoencoder, None)
    if settings.text.kind == "words":
        modules["text"] = make_text_tower(settings.text, None)
    if "text" in modules and settings.text.heads == 0:
        modules["text"] = _headless(f"{checkpoint}", settings.text.width)
    d = settings.diffusion
    schedule = make_schedule(d.num_timesteps, d.beta_start, d.beta_end, d.zero_terminal_snr, d.base_scale)
    return Reference(modules.get("denoiser"), modules.get("autoencoder"), modules.get("text"), schedule, settings)


def _headless(checkpoint: str, width: int) -> Callable:
    def text(tokens_BL: Any) -> Any:
        raise UserError(
            f"{checkpoint}: a text tower of width {width} is none of OpenCLIP's; its number of attention heads is not in the file: "
            "add `heads`, with width, layers, vocab_size and context_length, to cond_stage_config.params of the YAML"
        )

    return text


def bind(make: Callable, weights: Mapping[str, Any]) -> Any:
    """A module of `make(rngs)` with these parameters."""
    return Network.of(make).bind({path: jnp.array(np.asarray(array)) for path, array in weights.items()})


def constructors(settings: Settings, dtype: Any) -> dict[str, Callable]:
    """{network: function from nnx.Rngs to the module}."""
    return {
        "denoiser": lambda rngs: UNet3D(settings.unet, rngs=rngs, dtype=dtype),
        "autoencoder": lambda rngs: make_autoencoder(settings.autoencoder, rngs, dtype),
        "text": lambda rngs: make_text_tower(settings.text, rngs, dtype),
    }


def read_checkpoint(path: str | pathlib.Path, yaml: str | pathlib.Path | None = None) -> tuple[Settings, Weights]:
    """({network: {our path: array}}, not yet read, of the networks that a file holds) and what they are.

    The file may be a whole model or one network with or without its prefix. Every tensor's name and shape is checked against
    the YAML, or without one against the architecture that the shapes imply. Raises UserError.
    """
    settings = read_yaml(yaml) if yaml else None
    parts = _parts(files.read_tensors(path), path)
    try:
        if settings is None:
            settings = _inferred(parts)
        elif "text" in parts and settings.text == TextConfig():
            # The reference's YAML never gives the size of the tower.
            settings = dataclasses.replace(settings, text=architecture.text_config(parts["text"]))
        make = constructors(settings, jnp.float32)
        return settings, {name: TABLES[name].to_jax(parts[name], Network.of(make[name]).shapes, lazy=True) for name in parts}
    except ValueError as error:
        raise UserError(f"{path}: {error}" + (f"\n(the configuration is that of {yaml})" if yaml else "")) from error


def _inferred(parts: Mapping[str, Mapping[str, Lazy]]) -> Settings:
    network = architecture.unet_config(parts["denoiser"]) if "denoiser" in parts else UNetConfig()
    return Settings(
        network,
        architecture.autoencoder_config(parts["autoencoder"]) if "autoencoder" in parts else AutoencoderConfig(),
        architecture.text_config(parts["text"]) if "text" in parts else TextConfig(),
        DYNAMICRAFTER if network.image_cross_attention else VIDEOCRAFTER,
    )


def _parts(tensors: Mapping[str, Lazy], path: str | pathlib.Path) -> dict[str, dict[str, Lazy]]:
    """The tensors of each network, without its prefix."""
    parts = {name: found for name, table in TABLES.items() if (found := select(tensors, table.PREFIX))}
    if not parts:
        for name, (mark, prefixes) in _MARKS.items():
            for prefix in prefixes:
                if prefix + mark in tensors:
                    return {name: select(tensors, prefix)}
        first = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path}: holds no U-Net, autoencoder or text tower in the reference's names ({', '.join(t.PREFIX for t in TABLES.values())}); "
            f"it holds {len(tensors)} tensors: {first}, ..."
        )
    prefixes = tuple(table.PREFIX for table in TABLES.values())
    strange = sorted(name for name in tensors if not name.startswith(prefixes) and not _IGNORED.fullmatch(name))
    if strange:
        raise UserError(f"{path}: {len(strange)} tensors belong to no network known here: {'; '.join(strange)}")
    return parts
