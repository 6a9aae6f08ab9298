"""Weights of a run (or an import) -> a PyTorch checkpoint in the reference's names, with the reference's YAML beside it."""

import pathlib
from typing import Any

from motif_jax.data.storage import Path, replacing
from motif_jax.errors import UserError
from motif_jax.interop import files
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.names import to_torch
from motif_jax.interop.reference import TABLES
from motif_jax.interop.settings import to_yaml
from motif_jax.training import weights

SUFFIXES = (".safetensors", ".ckpt")


def export(
    directory: str | Path, output: str | pathlib.Path, kind: str = "best", frozen: bool = False
) -> tuple[pathlib.Path, int, list[str]]:
    """Writes `output` (.safetensors, or .ckpt, which needs PyTorch) and the same name with .yaml.

    kind: see `weights.load`. frozen: also the autoencoder, the towers and the schedule's tables: the reference's whole
    checkpoint. Returns the YAML's path, the number of tensors and remarks on what the reference reads differently.
    Raises UserError; then neither file is there.
    """
    output = pathlib.Path(output)
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output={output}: must end in {' or '.join(SUFFIXES)}")
    source = weights.find(directory)
    settings = source.settings
    if isinstance(source, weights.Run) and source.config.backbone != "unet3d":
        raise UserError(
            f"{directory}: was trained with backbone={source.config.backbone!r}, which the reference does not have; only 'unet3d' "
            "can be exported"
        )
    prefix = TABLES["resampler"].prefix  # a part of the denoiser here
    denoiser = to_torch(source.denoiser(kind))
    tensors: dict[str, Any] = {name if name.startswith(prefix) else TABLES["denoiser"].prefix + name: x for name, x in denoiser.items()}
    if frozen:  # those that have weights
        names = ["autoencoder"] * (settings.autoencoder.kind == "kl") + ["text"] * (settings.text.kind == "openclip")
        names += ["image"] * (settings.unet.image_cross_attention and settings.image.kind == "openclip")
        start = weights.first_import(directory)
        found = start.read(names) if start else {}
        if missing := [name for name in names if name not in found]:
            if isinstance(source, weights.Run):
                raise weights.lacking(source.config.init_from, missing)
            raise UserError(f"{directory}: holds no weights of the {' and '.join(missing)}")
        for name, params in found.items():
            tensors |= {TABLES[name].prefix + key: tensor for key, tensor in to_torch(params).items()}
        tensors |= schedule_buffers(settings.diffusion)
        if "image" in names:  # DynamiCrafter's image tower is a whole OpenCLIP without the text's blocks: the same one, and not used
            text = TABLES["text"].prefix
            ends = [name for name in tensors if name.startswith(text) and not name.startswith(f"{text}transformer.")]
            tensors |= {f"embedder.model.{name.removeprefix(text)}": tensors[name] for name in ends}
    yaml = output.with_suffix(".yaml")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(yaml) as temporary:  # appears after the weights, or not at all
            temporary.write_text(to_yaml(settings), encoding="utf-8")
            write = files.write_safetensors if output.suffix == ".safetensors" else files.write_pytorch
            write(output, tensors)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written: {error}") from error
    remarks = []
    if settings.unet.norm_groups != 32:
        remarks.append(f"norms of {settings.unet.norm_groups} groups; the reference always has 32 and would compute something else")
    return yaml, len(tensors), remarks
