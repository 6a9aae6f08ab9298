"""The networks of a run, assembled from its `Config`, as pure functions of flat parameter dicts.

A parameter dict maps the dotted path of a weight ("input_blocks.1.0.in_layers.2.kernel") to its array; the same path
addresses it in the sharding table, in fine-tuning masks and in the torch name tables.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from motif_jax.config import Config
from motif_jax.models import lora
from motif_jax.models.autoencoder import make_autoencoder, posterior_latents
from motif_jax.models.dit import VideoDiT
from motif_jax.models.image import RANDOM_SEED, ImageTower
from motif_jax.models.layers import Conv, Dense
from motif_jax.models.placement import use_kernels
from motif_jax.models.resampler import Resampler
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """One nnx module taken apart once: `init(key)` makes its parameters, `bind(params)`, low-rank updates included, a callable module."""

    make: Callable[[nnx.Rngs], nnx.Module]
    graph: nnx.GraphDef
    paths: dict[str, tuple]
    shapes: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs], nnx.Module]) -> "Network":
        """Of the module that `make` gives. Raises ValueError if it keeps other state than parameters, which would be lost between steps."""
        graph, state, other = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
        if kept := [".".join(map(str, path)) for path, _ in nnx.to_flat_state(other)]:
            raise ValueError(f"a network keeps nothing but nnx.Param; this one also keeps {', '.join(kept)}")
        flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
        return cls(make, graph, {k: p for k, (p, _) in flat.items()}, {k: v.get_value() for k, (_, v) in flat.items()})

    def init(self, key: PRNGKeyArray) -> Params:
        state = nnx.state(self.make(nnx.Rngs(key)), nnx.Param)
        return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}

    def bind(self, params: Params) -> nnx.Module:
        params = lora.merge(params)
        if params.keys() != self.paths.keys():
            raise ValueError(f"parameters do not fit the network: {sorted(params.keys() ^ self.paths.keys())[:5]} ...")
        return nnx.merge(self.graph, nnx.from_flat_state([(self.paths[k], nnx.Param(v)) for k, v in params.items()]))

    def cast(self, params: Params) -> Params:
        """The same network for many calls: low-rank updates added, kernels in the type in which their layers use them.

        `bind` takes either and computes the same; XLA leaves in a loop what does not change there, and would cast at every turn.
        """
        params = lora.merge(params)
        layers = ((".".join(map(str, path)), layer) for path, layer in self.bind(params).iter_modules() if isinstance(layer, (Conv, Dense)))
        return {**params, **{f"{name}.kernel": params[f"{name}.kernel"].astype(layer.dtype) for name, layer in layers}}


# (config, the generators of its weights, type of its activations) -> the denoising network, called as `Networks.denoise` does.
MakeDenoiser = Callable[[Config, nnx.Rngs, jnp.dtype], nnx.Module]


def make_denoiser(config: Config, rngs: nnx.Rngs, dtype: jnp.dtype) -> UNet3D | VideoDiT:
    """The backbone `config.backbone` names; with image cross attention the resampler, trained with it, is its `image_proj_model`."""
    kwargs = {"rngs": rngs, "dtype": dtype, "remat": config.remat, "attention": config.attention}
    if config.backbone == "dit":
        return VideoDiT(config.dit, config.in_channels, config.autoencoder.z_channels, config.text.width, **kwargs)
    unet = UNet3D(config.unet, **kwargs)
    if config.image_tokens:
        options = {"rngs": rngs, "dtype": dtype, "attention": config.attention}
        unet.image_proj_model = Resampler(config.resampler, config.image.width, config.unet.context_dim, **options)
    return unet


@dataclasses.dataclass(frozen=True)
class Networks:
    """The trained denoising network and the frozen ones: autoencoder, text tower and, with image cross attention, image tower."""

    config: Config
    denoiser: Network
    autoencoder: Network
    text: Network
    image: Network | None = None

    @classmethod
    def of(cls, config: Config, denoiser: MakeDenoiser = make_denoiser) -> "Networks":
        """The networks of `config`; `denoiser` makes the trained one."""
        dtype = jnp.dtype(config.dtype)
        return cls(
            config,
            Network.of(lambda rngs: denoiser(config, rngs, dtype)),
            Network.of(lambda rngs: make_autoencoder(config.autoencoder, rngs=rngs, dtype=dtype)),
            Network.of(lambda rngs: make_text_tower(config.text, rngs=rngs, dtype=dtype)),
            Network.of(lambda rngs: ImageTower(config.image, rngs=rngs, dtype=dtype)) if config.image_tokens else None,
        )

    @property
    def frozen(self) -> dict[str, Network]:
        """The networks that are not trained, by name."""
        found = {"autoencoder": self.autoencoder, "text": self.text, "image": self.image}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def pretrained(self) -> list[str]:
        """The frozen networks whose weights must come from a file."""
        drawn = {"image"} if self.config.image.kind == "random" else set()
        return [name for name, network in self.frozen.items() if network.shapes and name not in drawn]

    def init_frozen(self) -> dict[str, Params]:
        """Parameters of the frozen networks that need no file: pixels and words have none, a random image tower always the same."""
        key = jax.random.key(RANDOM_SEED)
        return {name: network.init(key) for name, network in self.frozen.items() if name not in self.pretrained}

    def moments(self, params: Params, frames_BTHW3: Array) -> Float[Array, "B T h w M"]:
        """uint8 frames -> the posterior's mean and log-variance, frame by frame (one frame of all clips at a time, to bound memory)."""
        autoencoder = self.autoencoder.bind(self.autoencoder.cast(params))
        moments_TBhwC = jax.lax.map(lambda x: autoencoder.encode(x.astype(jnp.float32) / 127.5 - 1.0), jnp.swapaxes(frames_BTHW3, 0, 1))
        return jnp.swapaxes(moments_TBhwC, 0, 1)

    def latents(self, moments_BThwM: Array, noise_BThwC: Array | None = None) -> Float[Array, "B T h w C"]:
        """The sample of the posterior that `noise` of unit variance makes (or without it the mean), times the scale factor."""
        return posterior_latents(moments_BThwM, self.config.autoencoder.scale_factor, noise_BThwC)

    def encode(self, params: Params, frames_BTHW3: Array) -> Float[Array, "B T h w C"]:
        """uint8 frames -> scaled latents, the means of the posterior."""
        return self.latents(self.moments(params, frames_BTHW3))

    def pixels(self, params: Params, z_BThwC: Float[Array, "B T h w C"]) -> Float[Array, "B T H W 3"]:
        """Scaled latents -> frames in float32, black is -1 and white 1."""
        autoencoder = self.autoencoder.bind(self.autoencoder.cast(params))
        z_TBhwC = jnp.swapaxes(z_BThwC, 0, 1) / self.config.autoencoder.scale_factor
        x_TBHW3 = jax.lax.map(autoencoder.decode, z_TBhwC)
        return jnp.swapaxes(x_TBHW3.astype(jnp.float32), 0, 1)

    def decode(self, params: Params, z_BThwC: Float[Array, "B T h w C"]) -> UInt8[Array, "B T H W 3"]:
        """Scaled latents -> frames."""
        return grey_levels(self.pixels(params, z_BThwC))

    def embed(self, params: Params, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.text.bind(params)(tokens_BL).astype(jnp.float32)

    def embed_image(self, params: Params, images_BHW3: Array | None) -> Float[Array, "B S E"]:
        """Tokens of the image tower for uint8 images; None is one grey image, which stands for no image (DynamiCrafter)."""
        size = self.config.image.size
        x_BHW3 = jnp.zeros((1, size, size, 3)) if images_BHW3 is None else images_BHW3.astype(jnp.float32) / 127.5 - 1.0
        return self.image.bind(params)(x_BHW3)

    def unconditional(self, frozen: dict[str, Params], empty_L: Int[Array, " L"]) -> Params:
        """What replaces a dropped condition: {"text": embedding of the empty sentence, "image": tokens of no image}, one clip each."""
        found = {"text": self.embed(frozen["text"], empty_L[None])}
        return found | ({"image": self.embed_image(frozen["image"], None)} if self.image else {})

    def with_unconditional(self, frozen: dict[str, Params], tokenizer: Callable, sharding: Sharding | None = None) -> dict[str, Params]:
        """`frozen` with its `unconditional`, which never changes: every step and video takes it from there."""
        empty_L = np.asarray(tokenizer([""])[0], np.int32)
        return {**frozen, "unconditional": jax.jit(self.unconditional, out_shardings=sharding)(frozen, empty_L)}

    def image_tokens(self, params: Params, image_BSE: Float[Array, "B S E"]) -> Float[Array, "B J D"]:
        """What follows the text in the U-Net's context: 16 tokens for each frame, made by the trained resampler."""
        tokens_BJD = self.denoiser.bind(params).image_proj_model(image_BSE)
        return jnp.tile(tokens_BJD, (1, self.config.data.frames // self.config.resampler.frames, 1))

    def denoise(self, params: Params, x_BThwC, t_B, context_BLD, fps_B, image_BThwK, dropout_rng=None) -> Float[Array, "B T h w C"]:
        """The network's raw output for noisy latents `x` given text (and image tokens), frame rate and image condition (x-cat)."""
        x = jnp.concatenate([x_BThwC, image_BThwK], axis=-1)
        params = self.denoiser.cast(params)  # a block would do it again in its backward pass
        with use_kernels(self.config.kernels == "auto"):
            return self.denoiser.bind(params)(x, t_B, context_BLD, fps_B, dropout_rng=dropout_rng).astype(jnp.float32)


def grey_levels(x: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
    """Values from -1 (black) to 1 (white) in 256 levels; of NaN nobody knows which."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def image_condition(z_BhwC: Float[Array, "B h w C"], frames: int, kind: str) -> Float[Array, "B T h w K"]:
    """The clean latent of the first frame as extra channels (the paper's x-cat); with `none` there are no channels.

    `repeat`: on every frame (DynamiCrafter), K = C. `first`: on frame 0, zeros elsewhere, and a channel that marks
    frame 0 (Emu Video), K = C + 1.
    """
    repeated = jnp.repeat(z_BhwC[:, None], frames, axis=1)
    if kind == "repeat":
        return repeated
    if kind == "none":
        return repeated[..., :0]
    mask = jnp.zeros((*repeated.shape[:-1], 1), repeated.dtype).at[:, 0].set(1.0)
    return jnp.concatenate([repeated * mask, mask], axis=-1)
