"""Weights of a run (or an import) -> a PyTorch checkpoint in the reference's names, with the reference's YAML beside it."""

import pathlib
from typing import Any

from motif_jax.data.storage import Path, replacing
from motif_jax.errors import UserError
from motif_jax.interop import files
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.imported import imported_settings, is_imported
from motif_jax.interop.names import select, to_torch
from motif_jax.interop.reference import TABLES
from motif_jax.interop.settings import Settings, to_yaml
from motif_jax.interop.tables import resampler as resampler_table
from motif_jax.training import weights

SUFFIXES = (".safetensors", ".ckpt")


def export(
    directory: str | Path, output: str | pathlib.Path, kind: str = "best", frozen: bool = False
) -> tuple[pathlib.Path, int, list[str]]:
    """Writes `output` (.safetensors, or .ckpt, which needs PyTorch) and the same name with .yaml.

    kind: see `weights.load`. frozen: also the autoencoder, the towers and, of a model that predicts eps, the
    schedule's tables: VideoCrafter's whole checkpoint. Returns the YAML's path, the number of tensors and
    remarks on what the reference reads differently. Raises UserError; then neither file is there.
    """
    output = pathlib.Path(output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output={output}: must end in {' or '.join(SUFFIXES)}")
    if is_imported(directory):
        settings = imported_settings(directory)
    else:
        config = weights.read_config(directory)
        if config.backbone != "unet3d":
            raise UserError(
                f"{directory}: was trained with backbone={config.backbone!r}, which the reference does not have; only 'unet3d' "
                "can be exported"
            )
        settings = Settings.of(config)
    found = weights.load(directory, kind)
    resampler = select(found["denoiser"], resampler_table.prefix) if "denoiser" in found else {}
    if resampler:
        unet = {name: value for name, value in found["denoiser"].items() if not name.startswith(resampler_table.prefix)}
        found |= {"denoiser": unet, "resampler": resampler}
    names = ["denoiser"] + ["resampler"] * bool(resampler)
    if frozen:  # those that have weights
        names += ["autoencoder"] * (settings.autoencoder.kind == "kl") + ["text"] * (settings.text.kind == "openclip")
        names += ["image"] * (settings.unet.image_cross_attention and settings.image.kind == "openclip")
    missing = [name for name in names if name not in found]
    if missing and not is_imported(directory):
        raise weights.lacking(config.init_from, missing)
    if missing:
        raise UserError(f"{directory}: holds no weights of the {' and '.join(missing)}")
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= {TABLES[name].prefix + key: tensor for key, tensor in to_torch(found[name]).items()}
    if frozen and settings.diffusion.prediction == "eps":  # what VideoCrafter's own loader asks for
        tensors |= schedule_buffers(settings.diffusion)
    yaml = output.with_suffix(".yaml")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(yaml) as temporary:  # appears after the weights, or not at all
            temporary.write_text(to_yaml(settings))
            write = files.write_safetensors if output.suffix == ".safetensors" else files.write_pytorch
            write(output, tensors)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error}") from error
    remarks = []
    if settings.unet.norm_groups != 32:
        remarks.append(f"norms of {settings.unet.norm_groups} groups; the reference always has 32 and would compute something else")
    return yaml, len(tensors), remarks
