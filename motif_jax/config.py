"""The configuration inside the package: frozen, validated dataclasses, made from a ConfigDict at one boundary.

`from_config_dict` collects every mistake (unknown name, wrong type, value out of range, fields that contradict each
other) and raises one `ConfigError` that lists them all. Nothing outside the standard library is imported here, so
that every entry point can answer --help at once.
"""

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motif_jax.consistency import contradictions
from motif_jax.errors import UserError
from motif_jax.fields import build
from motif_jax.fields import described as _f


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every mistake, one a line."""


@dataclass(frozen=True)
class DataConfig:
    """The clips a run trains on; also the shape that `prepare` writes."""

    path: str = _f("", "dataset written by motif_jax.prepare, a directory or gs://BUCKET/DIR, or several with commas between")
    frames: int = _f(16, "frames per clip, T", low=2)
    height: int = _f(320, "clip height in pixels", low=8)
    width: int = _f(512, "clip width in pixels", low=8)
    workers: int = _f(0, "Grain worker processes; 0 reads in threads of the training process", low=0, high=1024)
    threads: int = _f(4, "read threads per process", low=1, high=1024)
    prefetch: int = _f(8, "batches read ahead", low=1, high=1024)


@dataclass(frozen=True)
class PrepareConfig:
    """The offline job: videos and captions -> clips -> flow -> shards (the paper's training data, DynamiCrafter's loader).

    Strides, clips per video and cuts are of videos; a synthetic world has none.
    """

    frame_stride_min: int = _f(1, "smallest distance between sampled frames, in source frames", low=1)
    frame_stride_max: int = _f(6, "largest distance between sampled frames, in source frames", low=1)
    clips_per_video: int = _f(1, "clips cut from each video", low=1, high=10_000)
    clips_per_shard: int = _f(64, "records per ArrayRecord shard", low=1)
    flow: str = _f("raft_small", "flow estimator; dis needs no weights", choices=("raft_small", "raft_large", "dis", "exact"))
    flow_weights: str = _f(
        "", "RAFT weights, .safetensors or .pth, a path or URL; original or torchvision names; '' only with flow=dis or exact"
    )
    flow_iterations: int = _f(12, "RAFT refinement iterations", low=1)
    flow_dtype: str = _f(
        "float32", "type of RAFT's convolutions; correlation and positions stay float32", choices=("float32", "tensorfloat32", "bfloat16")
    )
    flow_stride: int = _f(8, "pixels per cell of the stored flow; 8 is RAFT's and the latents' grid", low=1)
    image_format: str = _f("jpeg", "how frames are stored", choices=("jpeg", "png"))
    jpeg_quality: int = _f(90, "JPEG quality", low=1, high=100)
    validation_share: float = _f(0.02, "share of the videos held out in the split `validation`", low=0.0, high=0.5)
    cut_threshold: float = _f(20.0, "change from one source frame to the next that is a cut, in colour levels; 0 is off", low=0.0)
    motion_min: float = _f(0.0, "clips with less motion are left out: mean |flow| over the image diagonal", low=0.0)
    motion_max: float = _f(0.0, "clips with more motion are left out; 0 is off", low=0.0)
    latents: bool = _f(False, "store the autoencoder's posterior moments (weights from init_from) in place of frames")
    frames: bool = _f(False, "with latents: store the frames too")
    text_embeddings: bool = _f(False, "store the text tower's output (weights from init_from)")


@dataclass(frozen=True)
class UNetConfig:
    """The VideoCrafter2 U-Net; field names follow the reference's YAML (`unet_config.params`)."""

    in_channels: int = _f(8, "noisy latent plus image condition channels", low=1)
    out_channels: int = _f(4, "latent channels", low=1)
    model_channels: int = _f(320, "width of the outermost level", low=8)
    channel_mult: tuple[int, ...] = _f((1, 2, 4, 4), "width of each level over model_channels")
    num_res_blocks: int = _f(2, "residual blocks per level", low=1)
    attention_resolutions: tuple[int, ...] = _f((4, 2, 1), "downsampling rates with attention: 1, 2, 4, ...; those of no level do nothing")
    num_head_channels: int = _f(64, "width of one attention head", low=1)
    transformer_depth: int = _f(1, "blocks per transformer", low=1)
    context_dim: int = _f(1024, "width of the text tokens", low=1)
    temporal_conv: bool = _f(True, "temporal convolution after every residual block")
    temporal_attention: bool = _f(True, "temporal transformer after every spatial one")
    addition_attention: bool = _f(True, "temporal transformer `init_attn` after the first convolution")
    fps_cond: bool = _f(True, "add an embedding of the frame rate")
    dropout: float = _f(0.0, "dropout in residual blocks", low=0.0, high=0.9)
    temporal_dropout: float = _f(0.1, "dropout in the temporal convolutions (the reference hard-codes 0.1)", low=0.0, high=0.9)
    image_cross_attention: bool = _f(False, "the image also enters as tokens, through DynamiCrafter's separate projections (cx-attn)")
    image_cross_attention_scale_learnable: bool = _f(
        False, "with image_cross_attention: weigh the image's attention by tanh(alpha) + 1 (DynamiCrafter-256)"
    )
    norm_groups: int = _f(32, "groups of every GroupNorm", low=1)


@dataclass(frozen=True)
class DiTConfig:
    """A small video diffusion transformer, the other backbone; its channels follow from autoencoder and condition."""

    width: int = _f(384, "width of a token", low=8)
    depth: int = _f(12, "blocks", low=1)
    num_head_channels: int = _f(64, "width of one attention head", low=1)
    patch: tuple[int, ...] = _f((1, 2, 2), "frames, rows and columns of latent cells per token")


@dataclass(frozen=True)
class AutoencoderConfig:
    """`kl` is the Stable Diffusion autoencoder; `pixel` moves pixel blocks to channels and loses nothing."""

    kind: str = _f("kl", "autoencoder", choices=("kl", "pixel"))
    factor: int = _f(8, "pixels per latent cell (kl: fixed by ch_mult)", low=1)
    z_channels: int = _f(4, "latent channels (pixel: 3 * factor**2)", low=1)
    scale_factor: float = _f(0.18215, "latents are multiplied by this after encoding", low=1e-6)
    ch: int = _f(128, "kl: width of the outermost level", low=8)
    ch_mult: tuple[int, ...] = _f((1, 2, 4, 4), "kl: width of each level over ch")
    num_res_blocks: int = _f(2, "kl: residual blocks per level", low=1)


@dataclass(frozen=True)
class TextConfig:
    """`openclip` is the ViT-H/14 tower; `words` gives every word a fixed random vector (no weights to download)."""

    kind: str = _f("openclip", "text tower", choices=("openclip", "words"))
    tokenizer: str = _f("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openclip: local folder or Hugging Face name of the vocabulary")
    vocab_size: int = _f(49408, "number of token ids", low=3)
    context_length: int = _f(77, "tokens per sentence, L", low=2)
    width: int = _f(1024, "width of one token, D", low=1)
    layers: int = _f(24, "openclip: residual blocks (the last one is not run)", low=2)
    heads: int = _f(16, "openclip: attention heads", low=1)


@dataclass(frozen=True)
class ImageConfig:
    """The frozen tower behind unet.image_cross_attention; `random` has weights from a fixed seed (nothing to download)."""

    kind: str = _f("openclip", "image tower", choices=("openclip", "random"))
    size: int = _f(224, "side of the square image that the tower reads, in pixels", low=1)
    patch: int = _f(14, "side of a patch in pixels", low=1)
    width: int = _f(1280, "width of one token", low=1)
    layers: int = _f(32, "residual blocks", low=1)
    heads: int = _f(16, "attention heads", low=1)
    projection: int = _f(1024, "width of the pooled embedding, which is stored but not used", low=1)


@dataclass(frozen=True)
class ResamplerConfig:
    """The trained network from the image tower's tokens to those of unet.image_cross_attention (DynamiCrafter)."""

    width: int = _f(1024, "width of one query", low=1)
    depth: int = _f(4, "layers", low=1)
    heads: int = _f(12, "attention heads", low=1)
    head_width: int = _f(64, "width of one attention head", low=1)
    frames: int = _f(16, "frames with tokens of their own; 1: all frames share one set", low=1)


@dataclass(frozen=True)
class ConditionConfig:
    """How image and text enter the network (the paper's x-cat, beside unet.image_cross_attention; its text dropping)."""

    image: str = _f(
        "repeat", "image latent: on all frames, on frame 0 with a mask channel, or not at all", choices=("repeat", "first", "none")
    )
    text_drop: float = _f(0.1, "share of samples trained with the empty sentence; as many lose their image tokens", low=0.0, high=1.0)
    image_noise: float = _f(0.0, "standard deviation of noise on the image latent in training, against copies of the image", low=0.0)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noising process and what the network predicts (the paper's training settings; VideoCrafter2's schedule)."""

    prediction: str = _f("v", "what the network predicts", choices=("v", "eps", "x0", "flow", "flow_x0"))
    loss_space: str = _f("", "space of the loss; '' is that of the prediction", choices=("", "v", "eps", "x0", "flow", "flow_x0"))
    num_timesteps: int = _f(1000, "training timesteps", low=2, high=100_000)
    beta_start: float = _f(8.5e-4, "v, eps and x0: first beta; betas are linear in the square root", low=1e-6, high=0.999)
    beta_end: float = _f(1.2e-2, "v, eps and x0: last beta", low=1e-6, high=0.999)
    zero_terminal_snr: bool = _f(True, "v, eps and x0: rescale the schedule so that the last step is pure noise")
    base_scale: float = _f(1.0, "dynamic rescale of x_0: 0.7 in VideoCrafter2 and DynamiCrafter-512, 1 is off", low=0.01, high=1.0)


@dataclass(frozen=True)
class LossConfig:
    """The motion focal loss: sigma, m' and lambda of the paper.

    sigma and its unit are of the heatmaps flow and inverse, and of the moving region in validation, whatever the heatmap is.
    """

    motion_weight: float = _f(1.0, "lambda; nothing to weigh with heatmap='none'", low=0.0)
    heatmap: str = _f("flow", "what the heatmap is made of", choices=("flow", "inverse", "latent_difference", "mask", "none"))
    intensity: str = _f("diagonal", "unit of the flow magnitude", choices=("diagonal", "size", "clip_max", "frame_max"))
    sharpness: float = _f(100.0, "slope of sigma", low=0.0)
    threshold: float = _f(0.05, "sigma's midpoint", low=0.0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    weight_decay: float = _f(0.01, "decoupled weight decay", low=0.0)
    b1: float = _f(0.9, "first moment decay", low=0.0, high=0.999999)
    b2: float = _f(0.999, "second moment decay", low=0.0, high=0.999999)
    eps: float = _f(1e-8, "epsilon", low=1e-20)
    grad_clip: float = _f(0.0, "largest global gradient norm; 0 is off", low=0.0)
    warmup_steps: int = _f(0, "linear warm-up", low=0)
    schedule: str = _f("constant", "after the warm-up", choices=("constant", "cosine"))


@dataclass(frozen=True)
class EmaConfig:
    decay: float = _f(0.9999, "decay of the averaged weights; 0 turns the average off", low=0.0, high=1.0)
    warmup: bool = _f(True, "use min(decay, (1 + step) / (10 + step))")


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 takes what is left."""

    data: int = _f(-1, "data parallel", low=-1)
    fsdp: int = _f(1, "parameters sharded", low=-1)
    context: int = _f(1, "frames or tokens sharded", low=-1)
    tensor: int = _f(1, "heads and channels sharded", low=-1)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = _f(1000, "steps between checkpoints", low=1)
    keep: int = _f(2, "newest checkpoints kept", low=1)
    keep_every: int = _f(0, "also keep every checkpoint at a multiple of this step, itself one of `every`; 0 is off", low=0)
    fallback: bool = _f(False, "when the newest checkpoint is damaged, set it aside and continue from an older one")


@dataclass(frozen=True)
class ProfileConfig:
    """An XProf trace of some steps, under <workdir>/plugins/profile."""

    start: int = _f(0, "step after which the trace begins; 0 is off", low=0)
    steps: int = _f(3, "length of the trace", low=1)


@dataclass(frozen=True)
class EvalConfig:
    every: int = _f(1000, "steps between validations; 0 is off", low=0)
    batches: int = _f(4, "validation batches, or as many as there are", low=1)
    buckets: int = _f(5, "timestep buckets of figure 6", low=1)


@dataclass(frozen=True)
class SampleConfig:
    every: int = _f(2000, "steps between sample sheets; 0 is off", low=0)
    count: int = _f(4, "clips on a sheet, or as many as are held out", low=1)
    steps: int = _f(50, "DDIM steps", low=1)
    guidance: float = _f(7.5, "classifier-free guidance scale; 1 is off, 0 leaves the sentence out", low=0.0)
    guidance_rescale: float = _f(0.0, "phi of the guidance rescale; none with guidance=1", low=0.0, high=1.0)
    eta: float = _f(0.0, "DDIM eta", low=0.0, high=1.0)
    fps: float = _f(8.0, "frame rate of the written video", low=0.1, high=1000.0)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides its work directory."""

    name: str = _f("motif", "name of the experiment")
    seed: int = _f(0, "seed of weights, data order and noise", low=0, high=2**32 - 1)
    steps: int = _f(32_000, "training steps", low=0)
    batch_size: int = _f(64, "clips per step over all devices", low=1, high=2**20)
    grad_accumulation: int = _f(1, "micro-batches per step; the clips and their noise are those of the whole batch", low=1)
    learning_rate: float = _f(5e-5, "peak learning rate", low=0.0)
    init_from: str = _f("", "start from these weights: an imported checkpoint directory or another run's work directory, also in gs://")
    dtype: str = _f("bfloat16", "activation type; parameters, noise and loss are float32", choices=("float32", "bfloat16"))
    remat: str = _f(
        "none",
        "what the backward pass recomputes: nothing, blocks, blocks but for convolutions, blocks but for all products",
        choices=("none", "block", "convs", "dots"),
    )
    attention: str = _f("auto", "attention kernel", choices=("auto", "reference", "xla", "cudnn", "splash"))
    kernels: str = _f(
        "auto",
        "auto has its own for half precision: a GPU's norms, gates and few tokens' attention, a TPU's attention",
        choices=("auto", "xla"),
    )
    finetune: str = _f("all", "which of the denoiser's parameters are trained", choices=("all", "temporal", "input", "lora"))
    lora_rank: int = _f(16, "finetune='lora': rank of the updates of the attention projections", low=1, high=1024)
    log_every: int = _f(10, "steps between log lines", low=1)
    data: DataConfig = _f(DataConfig(), "clips")
    prepare: PrepareConfig = _f(PrepareConfig(), "the offline job")
    backbone: str = _f("unet3d", "denoising network", choices=("unet3d", "dit"))
    unet: UNetConfig = _f(UNetConfig(), "backbone unet3d")
    dit: DiTConfig = _f(DiTConfig(), "backbone dit")
    autoencoder: AutoencoderConfig = _f(AutoencoderConfig(), "pixels <-> latents")
    text: TextConfig = _f(TextConfig(), "sentence -> tokens")
    image: ImageConfig = _f(ImageConfig(), "image -> tokens, with unet.image_cross_attention")
    resampler: ResamplerConfig = _f(ResamplerConfig(), "the image's tokens -> those of each frame")
    condition: ConditionConfig = _f(ConditionConfig(), "image and text condition")
    diffusion: DiffusionConfig = _f(DiffusionConfig(), "noise and objective")
    loss: LossConfig = _f(LossConfig(), "motion focal loss")
    optimizer: OptimizerConfig = _f(OptimizerConfig(), "AdamW")
    ema: EmaConfig = _f(EmaConfig(), "averaged weights")
    mesh: MeshConfig = _f(MeshConfig(), "devices")
    checkpoint: CheckpointConfig = _f(CheckpointConfig(), "checkpoints")
    eval: EvalConfig = _f(EvalConfig(), "validation")
    sample: SampleConfig = _f(SampleConfig(), "samples")
    profile: ProfileConfig = _f(ProfileConfig(), "traces")

    @property
    def in_channels(self) -> int:
        """Channels that the denoising network reads: noisy latent, image latent unless it is off, and the mask of image='first'."""
        image = self.condition.image
        return self.autoencoder.z_channels * (1 + (image != "none")) + (image == "first")

    @property
    def image_tokens(self) -> bool:
        """Whether the image enters through cross attention (the paper's cx-attn)."""
        return self.backbone == "unet3d" and self.unet.image_cross_attention

    @property
    def latent_height(self) -> int:
        return self.data.height // self.autoencoder.factor

    @property
    def latent_width(self) -> int:
        return self.data.width // self.autoencoder.factor


def from_config_dict(given: Mapping[str, Any]) -> Config:
    """The validated `Config` of a nested mapping (an `ml_collections.ConfigDict` or parsed JSON).

    Fields not given keep their defaults. Raises `ConfigError` naming every wrong field, its value and what is allowed.
    """
    errors: list[str] = []
    if hasattr(given, "to_dict"):
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise ConfigError(f"a configuration must be a group of fields, not {type(given).__name__}")
    config = build(Config, given, "", errors)
    # Fields that were rejected hold their defaults here, which could contradict each other for no fault of the user.
    if not errors:
        errors = contradictions(config)
    if errors:
        several = f"the configuration has {len(errors)} mistakes:\n  " if len(errors) > 1 else ""
        raise ConfigError(several + "\n  ".join(errors))
    return config


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values of fields named as on the command line, such as {"data.path": "DATA"}. Raises `ConfigError`."""
    given = to_dict(config)
    for name, value in values.items():
        group, _, field = name.rpartition(".")
        inner = given.get(group) if group else given
        changed = {**(inner if isinstance(inner, dict) else {}), field: value}
        given = {**given, group: changed} if group else changed
    return from_config_dict(given)


def to_dict(config: Any) -> dict[str, Any]:
    """A nested dict of plain values; tuples stay tuples (ConfigDict keeps them)."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """The text of a work directory's config.json."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str, source: str = "config.json") -> Config:
    """The inverse of `to_json`; raises `ConfigError`, which names `source`, on text that is not a configuration."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is not JSON: {error}; in a work directory, delete it: motif_jax.main with the run's --config writes it anew"
        ) from error
    try:
        return from_config_dict(given)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_json(path: pathlib.Path) -> Config:
    """The configuration in a config.json. Raises `ConfigError` that names the file; OSError."""
    return from_json(path.read_text(errors="replace", encoding="utf-8"), str(path))


def load_config(name: str) -> Config:
    """The configuration of a Python file with get_config, as FILE.py or FILE.py:ARGUMENT, or in a config.json. Raises UserError."""
    file, _, argument = name.partition(":")
    try:
        if file.endswith(".json"):
            return read_json(pathlib.Path(file))
        return from_config_dict(runpy.run_path(file)["get_config"](*([argument] if argument else [])))
    except Exception as error:  # a configuration file is code: it may raise anything
        reason = error if isinstance(error, ConfigError) else " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--config={name}: cannot be loaded: {reason}") from error
