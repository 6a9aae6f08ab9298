"""The reference's YAML (`model.params.unet_config.params`, ...) <-> our dataclasses.

VideoCrafter and DynamiCrafter write the same things under some different names; both are read, and a run is written in
the dialect that can express it.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from motif_jax.config import AutoencoderConfig, Config, DiffusionConfig, ImageConfig, ResamplerConfig, TextConfig, UNetConfig
from motif_jax.errors import UserError
from motif_jax.fields import build
from motif_jax.models.attention import IMAGE_TOKENS

# Defaults of the reference's U-Net where its YAML is silent, as far as they differ from ours.
_UNET_DEFAULTS = {"temporal_conv": False, "temporal_attention": True, "addition_attention": False, "fps_cond": False}
_UNET_NAMES = {
    "fs_condition": "fps_cond",
    "use_image_attention": "image_cross_attention",
    **{f.name: f.name for f in dataclasses.fields(UNetConfig) if f.name != "temporal_dropout"},  # norm_groups is ours: always 32 there
}
# What the reference can do and this U-Net cannot: the only value read.
_UNET_FIXED = {
    "use_linear": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "tempspatial_aware": False,
    "dims": 2,
    "num_heads": -1,
    "temporal_transformer_depth": 1,
}
_UNET_IRRELEVANT = {"use_checkpoint", "temporal_length", "image_size", "use_fp16", "default_fs", "legacy", "kernel_size_t", "padding_t"}
_ARCH = "ViT-H-14"  # of both OpenCLIP towers
# The reference's names of the resampler's sizes, and what is fixed here.
_RESAMPLER_NAMES = {"dim": "width", "depth": "depth", "heads": "heads", "dim_head": "head_width", "video_length": "frames"}
_RESAMPLER_FIXED = {"num_queries": IMAGE_TOKENS, "ff_mult": 4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a checkpoint's networks are and how they were trained."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    text: TextConfig
    diffusion: DiffusionConfig
    image: ImageConfig = ImageConfig()
    resampler: ResamplerConfig = ResamplerConfig()

    @classmethod
    def of(cls, config: Config) -> "Settings":
        return cls(config.unet, config.autoencoder, config.text, config.diffusion, config.image, config.resampler)


def read_yaml(path: str | pathlib.Path) -> Settings:
    """Raises UserError listing everything in the file that is missing, malformed or beyond these networks."""
    try:
        found = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    errors: list[str] = []

    def group(parent: Any, *keys: str, need: bool = True) -> dict[str, Any]:
        for i, key in enumerate(keys):
            parent = parent.get(key) if isinstance(parent, Mapping) else None
            if parent is None and need:
                errors.append(f"there is no {'.'.join(keys[: i + 1])}")
                return {}
        filled = isinstance(parent, Mapping) and parent
        if need and not filled:
            errors.append(f"{'.'.join(keys)} is {parent!r}: must be a group of settings")
        return dict(parent) if filled else {}

    model = group(found, "model", "params")
    if not model:
        raise UserError(f"{path}: is not a YAML of the reference: {errors[0]}")
    unet = _unet(group(model, "unet_config", "params"), errors)
    autoencoder = _autoencoder(model, errors)
    text = _text(group(model, "cond_stage_config", "params", need=False), errors)
    diffusion = _diffusion(model, errors)
    image = _image(group(model, "img_cond_stage_config", "params", need=False), errors)
    resampler = _resampler(group(model, "image_proj_stage_config", "params", need=False), errors)
    if errors:
        raise UserError(f"{path}: this YAML does not describe networks that are known here:\n  " + "\n  ".join(errors))
    return Settings(unet, autoencoder, text, diffusion, image, resampler)


def _build(cls: type, given: dict[str, Any], prefix: str, errors: list[str]) -> Any:
    given = {k: v for k, v in given.items() if v is not None}
    return build(cls, given, prefix, errors)


def _number(params: Mapping[str, Any], key: str, default: float, errors: list[str]) -> float:
    # YAML 1.1 takes "1e-4", without a dot, for text.
    try:
        return float(params.get(key, default))
    except (TypeError, ValueError):
        errors.append(f"{key}={params[key]!r}: must be a number")
        return default


def _unet(params: dict[str, Any], errors: list[str]) -> UNetConfig | None:
    if not params:
        return None
    for key, value in _UNET_FIXED.items():
        if params.get(key, value) not in (value, None):
            errors.append(f"unet_config.params.{key}={params[key]!r}: only {value!r} is supported")
    given = dict(_UNET_DEFAULTS)
    for key, value in params.items():
        if key in _UNET_NAMES:
            given[_UNET_NAMES[key]] = value
        elif key not in _UNET_FIXED and key not in _UNET_IRRELEVANT and value:  # what is off changes nothing
            errors.append(f"unet_config.params.{key}: unknown here, so that the network may be another one")
    need = ("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels")
    errors += [f"there is no model.params.unet_config.params.{key}" for key in need if key not in params]
    unet = _build(UNetConfig, given, "unet_config.params.", errors)
    head, widths = unet.num_head_channels, sorted({m * unet.model_channels for m in unet.channel_mult})
    errors += [f"unet_config.params.num_head_channels={head}: must divide the level width {width}" for width in widths if width % head]
    return unet


def _autoencoder(model: dict[str, Any], errors: list[str]) -> AutoencoderConfig | None:
    stage = model.get("first_stage_config")
    params = stage.get("params") if isinstance(stage, Mapping) else None
    if not isinstance(params, Mapping):
        errors.append("there is no model.params.first_stage_config.params")
        return None
    scale = _number(model, "scale_factor", 0.18215, errors)
    if str(stage.get("target", "")).endswith("PixelAutoencoder"):  # ours
        return _build(AutoencoderConfig, {"kind": "pixel", "scale_factor": scale, **params}, "first_stage_config.params.", errors)
    dd = params.get("ddconfig")
    if not isinstance(dd, Mapping):
        errors.append("there is no model.params.first_stage_config.params.ddconfig")
        return None
    fixed = {"double_z": True, "in_channels": 3, "out_ch": 3, "attn_resolutions": []}
    for key, value in fixed.items():
        if dd.get(key, value) != value:
            errors.append(f"ddconfig.{key}={dd[key]!r}: only {value!r} is supported")
    if params.get("embed_dim", dd.get("z_channels")) != dd.get("z_channels"):
        errors.append(
            f"first_stage_config.params.embed_dim={params['embed_dim']!r}: only ddconfig.z_channels={dd.get('z_channels')!r} is supported"
        )
    known = {*fixed, "z_channels", "ch", "ch_mult", "num_res_blocks", "dropout", "resolution"}
    errors += [f"ddconfig.{key}: unknown here" for key in dd if key not in known]
    errors += [f"there is no ddconfig.{key}" for key in ("z_channels", "ch", "ch_mult", "num_res_blocks") if key not in dd]
    given = {key: dd[key] for key in ("z_channels", "ch", "ch_mult", "num_res_blocks") if key in dd}
    if isinstance(dd.get("ch_mult"), list):
        given["factor"] = 2 ** max(len(dd["ch_mult"]) - 1, 0)
    return _build(AutoencoderConfig, {**given, "scale_factor": scale}, "ddconfig.", errors)


def _text(params: dict[str, Any], errors: list[str]) -> TextConfig | None:
    """The reference builds ViT-H/14 whatever its YAML says; towers of another size are named by TextConfig's fields, or `text_cfg`.

    `heads` is 0, unknown, where a width is named and they are not; so it is for `_image`.
    """
    if params.get("layer", "penultimate") != "penultimate":
        errors.append(f"cond_stage_config.params.layer={params['layer']!r}: only 'penultimate' is supported")
    if params.get("arch", _ARCH) != _ARCH:
        errors.append(f"cond_stage_config.params.arch={params['arch']!r}: only {_ARCH!r} is supported")
    sizes = params.get("text_cfg", params)
    if not isinstance(sizes, Mapping):
        errors.append(f"cond_stage_config.params.text_cfg={sizes!r}: must be a group of settings")
        sizes = {}
    given = {key: sizes[key] for key in ("vocab_size", "context_length", "width", "layers", "heads") if key in sizes}
    given |= {"kind": params["kind"]} if "kind" in params else {}
    if "max_length" in params:
        given.setdefault("context_length", params["max_length"])
    return _tower(TextConfig, given, "cond_stage_config.params.", errors)


def _image(params: dict[str, Any], errors: list[str]) -> ImageConfig | None:
    """As for the text tower: another size than ViT-H/14 is named by ImageConfig's fields."""
    if params.get("arch", _ARCH) != _ARCH:
        errors.append(f"img_cond_stage_config.params.arch={params['arch']!r}: only {_ARCH!r} is supported")
    given = {f.name: params[f.name] for f in dataclasses.fields(ImageConfig) if f.name in params}
    return _tower(ImageConfig, given, "img_cond_stage_config.params.", errors)


def _tower(cls: type, given: dict[str, Any], prefix: str, errors: list[str]) -> Any:
    found = _build(cls, given, prefix, errors)
    untold = found and found.kind == "openclip" and "width" in given and "heads" not in given
    return dataclasses.replace(found, heads=0) if untold else found


def _resampler(params: dict[str, Any], errors: list[str]) -> ResamplerConfig | None:
    for key, value in _RESAMPLER_FIXED.items():
        if params.get(key, value) != value:
            errors.append(f"image_proj_stage_config.params.{key}={params[key]!r}: only {value} is supported")
    given = {ours: params[key] for key, ours in _RESAMPLER_NAMES.items() if key in params}
    if params:
        given.setdefault("frames", 1)  # the reference's default: one set of tokens for all frames
    return _build(ResamplerConfig, given, "image_proj_stage_config.params.", errors)


def _diffusion(model: dict[str, Any], errors: list[str]) -> DiffusionConfig | None:
    if model.get("beta_schedule", "linear") != "linear":
        errors.append(f"beta_schedule={model['beta_schedule']!r}: only 'linear' is supported")
    for key, value in {"scale_a": 1, "mid_step": 400, "turning_step": 400}.items():
        if model.get(key, value) != value:
            errors.append(f"{key}={model[key]!r}: only {value} is supported")
    scale = 1.0
    if model.get("use_scale"):
        scale = _number(model, "scale_b", 0.3, errors)
    elif model.get("use_dynamic_rescale"):
        scale = _number(model, "base_scale", 0.7, errors)
    given = {
        "prediction": model.get("parameterization", "eps"),
        "num_timesteps": model.get("timesteps", 1000),
        "beta_start": _number(model, "linear_start", 1e-4, errors),
        "beta_end": _number(model, "linear_end", 2e-2, errors),
        "zero_terminal_snr": model.get("rescale_betas_zero_snr", False),
        "base_scale": scale,
    }
    return _build(DiffusionConfig, given, "model.params.", errors)


def to_yaml(settings: Settings) -> str:
    """The YAML of exported weights, in VideoCrafter's dialect for eps, in DynamiCrafter's for what only that can express."""
    u, a, t, d = settings.unet, settings.autoencoder, settings.text, settings.diffusion
    videocrafter = d.prediction == "eps" and not u.image_cross_attention
    unet = {f.name: getattr(u, f.name) for f in dataclasses.fields(u) if f.name not in ("temporal_dropout", "norm_groups", "fps_cond")}
    unet = {k: list(v) if isinstance(v, tuple) else v for k, v in unet.items()}
    unet["fps_cond" if videocrafter else "fs_condition"] = u.fps_cond
    if not u.image_cross_attention:
        del unet["image_cross_attention"], unet["image_cross_attention_scale_learnable"]
    unet |= {key: _UNET_FIXED[key] for key in ("use_linear", "temporal_selfatt_only", "use_relative_position", "use_causal_attention")}
    unet["temporal_length"] = 16  # the reference asks for it, and runs on any number of frames
    unet |= {} if u.norm_groups == 32 else {"norm_groups": u.norm_groups}
    params = {
        "linear_start": d.beta_start,
        "linear_end": d.beta_end,
        "timesteps": d.num_timesteps,
        "first_stage_key": "video",
        "cond_stage_key": "caption",
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if u.in_channels > u.out_channels else "crossattn",
        "channels": u.out_channels,
        "scale_by_std": False,
        "scale_factor": a.scale_factor,
        "use_ema": False,
        "uncond_type": "empty_seq",
    }
    if videocrafter:
        params |= {"use_scale": d.base_scale != 1.0, "scale_b": d.base_scale}
    else:
        params |= {"parameterization": d.prediction, "rescale_betas_zero_snr": d.zero_terminal_snr}
        params |= {"use_dynamic_rescale": d.base_scale != 1.0, "base_scale": d.base_scale}
    params["unet_config"] = {"target": "lvdm.modules.networks.openaimodel3d.UNetModel", "params": unet}
    params["first_stage_config"] = _autoencoder_yaml(a)
    params["cond_stage_config"] = _text_yaml(t)
    if u.image_cross_attention:
        params |= {"img_cond_stage_config": _image_yaml(settings.image), "image_proj_stage_config": _resampler_yaml(settings)}
    code = "VideoCrafter's" if videocrafter else "DynamiCrafter's"
    head = f"# Written with the weights beside it, for {code} code (lvdm).\n"
    if d.prediction not in ("eps", "v", "x0"):
        head += f"# The reference has no parameterization {d.prediction!r}; its networks load the weights all the same.\n"
    target = "lvdm.models.ddpm3d." + ("LatentVisualDiffusion" if u.image_cross_attention else "LatentDiffusion")
    return head + yaml.safe_dump({"model": {"target": target, "params": params}}, sort_keys=False)


def _autoencoder_yaml(a: AutoencoderConfig) -> dict[str, Any]:
    if a.kind == "pixel":
        return {"target": "motif_jax.models.autoencoder.PixelAutoencoder", "params": {"factor": a.factor, "z_channels": a.z_channels}}
    dd = {"double_z": True, "z_channels": a.z_channels, "resolution": 512, "in_channels": 3, "out_ch": 3, "ch": a.ch}
    dd |= {"ch_mult": list(a.ch_mult), "num_res_blocks": a.num_res_blocks, "attn_resolutions": [], "dropout": 0.0}
    loss = {"target": "torch.nn.Identity"}
    return {"target": "lvdm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": a.z_channels, "ddconfig": dd, "lossconfig": loss}}


def _text_yaml(t: TextConfig) -> dict[str, Any]:
    sizes = {"vocab_size": t.vocab_size, "context_length": t.context_length, "width": t.width}
    if t.kind == "words":
        return {"target": "motif_jax.models.text.WordsTower", "params": {"kind": "words", **sizes}}
    published = TextConfig(tokenizer=t.tokenizer) == t
    params = {"freeze": True, "layer": "penultimate"} | (
        {} if published else {**sizes, "layers": t.layers} | ({"heads": t.heads} if t.heads else {})
    )
    return {"target": "lvdm.modules.encoders.condition.FrozenOpenCLIPEmbedder", "params": params}


def _image_yaml(i: ImageConfig) -> dict[str, Any]:
    if i.kind == "random":
        return {"target": "motif_jax.models.image.ImageTower", "params": dataclasses.asdict(i)}
    sizes = {name: value for name, value in dataclasses.asdict(i).items() if value} if i != ImageConfig() else {}
    return {"target": "lvdm.modules.encoders.condition.FrozenOpenCLIPImageEmbedderV2", "params": {"freeze": True, **sizes}}


def _resampler_yaml(settings: Settings) -> dict[str, Any]:
    r = dataclasses.asdict(settings.resampler)
    params = {key: r[ours] for key, ours in _RESAMPLER_NAMES.items() if ours != "frames" or r["frames"] > 1} | _RESAMPLER_FIXED
    params |= {"embedding_dim": settings.image.width, "output_dim": settings.unet.context_dim}
    return {"target": "lvdm.modules.encoders.resampler.Resampler", "params": params}
