"""The frozen networks of the offline job: they encode frames and captions as the train step would, into float16.

The weights come from `init_from`, as in training. Their checksum is part of the dataset's settings, and a training run with
other frozen weights refuses the dataset (`check_towers`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float16, UInt8

from motif_jax.config import Config
from motif_jax.data.shards import Manifest
from motif_jax.data.tokens import make_tokenizer
from motif_jax.dist.replicas import Replicas
from motif_jax.errors import UserError
from motif_jax.models.networks import Networks, Params
from motif_jax.training.weights import frozen_weights, params_checksum

NAMES = {"autoencoder": "latents", "text": "text embeddings"}  # network -> what a dataset holds of it


def describe(config: Config, name: str, sha256: str) -> dict[str, Any]:
    """What the output of the network `name` depends on, and the `params_checksum` of its weights; not where the vocabulary is."""
    fields = {f"{name}.{k}": v for k, v in dataclasses.asdict(getattr(config, name)).items() if k not in ("tokenizer", "scale_factor")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()} | {f"{name}.sha256": sha256}


def check_towers(config: Config, datasets: Sequence[Manifest], sums: Mapping[str, str]) -> None:
    """Raises UserError when the datasets' latents or embeddings are not of the run's own frozen networks; `sums` are their checksums."""
    for dataset in datasets:
        if config.image_tokens and not dataset.layout.pixels:
            raise UserError(
                "unet.image_cross_attention looks at the first frame, and this dataset has none: prepare one with prepare.frames=True"
            )
        for name, shape in (("autoencoder", dataset.layout.latent), ("text", dataset.layout.text)):
            wanted, settings = describe(config, name, sums[name]) if shape else {}, dataset.settings
            differs = [f"{k} was {settings.get(k)!r} and is now {v!r}" for k, v in wanted.items() if settings.get(k) != v]
            if differs:
                raise UserError(
                    f"dataset {dataset.directory}: its {NAMES[name]} were made by another network: {'; '.join(differs)}. Use the "
                    f"init_from and the {name} settings that it was prepared with, or prepare again"
                )


class Towers:
    """The autoencoder's encoder and the text tower, as far as `config.prepare` asks for them."""

    def __init__(self, config: Config) -> None:
        """Raises UserError when `init_from` does not hold the weights, or the vocabulary cannot be read."""
        p, d = config.prepare, config.data
        networks = Networks.of(config)
        self._wanted = [name for name, asked in (("autoencoder", p.latents), ("text", p.text_embeddings)) if asked]
        frozen = frozen_weights(networks, names=self._wanted)
        self._settings = {"dtype": config.dtype}
        for name in self._wanted:
            self._settings |= describe(config, name, params_checksum(frozen[name]))

        def moments(params: Params, frames_THW3: jax.Array) -> jax.Array:
            return networks.moments(params, frames_THW3[None])[0].astype(jnp.float16)

        def pixels(params: Params, moments_ThwM: jax.Array) -> jax.Array:
            return networks.decode(params, networks.latents(moments_ThwM[None]))[0]

        def embedding(params: Params, tokens_L: jax.Array) -> jax.Array:
            return networks.embed(params, tokens_L[None])[0].astype(jnp.float16)

        self.latent = self.text = ()
        if p.latents:
            self._moments = Replicas(moments, frozen["autoencoder"])
            self._pixels = functools.cache(lambda: Replicas(pixels, frozen["autoencoder"]))
            frames = jax.ShapeDtypeStruct((d.frames, d.height, d.width, 3), np.uint8)
            self.latent = jax.eval_shape(moments, networks.autoencoder.shapes, frames).shape[1:]
        if p.text_embeddings:
            self._tokenizer = make_tokenizer(config.text)
            self._embedding = Replicas(embedding, frozen["text"])
            self.text = (config.text.context_length, config.text.width)

    def encode(self, frames_THW3: UInt8[np.ndarray, "T H W 3"], caption: str) -> dict[str, Float16[np.ndarray, "..."]]:
        """The record's fields: latent_moments [T,h,w,2C] and text_embedding [L,D], as far as asked for."""
        fields = {}
        if self.latent:
            fields["latent_moments"] = self._moments(frames_THW3)
        if self.text:
            fields["text_embedding"] = self._embedding(np.asarray(self._tokenizer([caption])[0], np.int32))
        return fields

    def decode(self, moments_ThwM: Float[np.ndarray, "T h w C2"]) -> UInt8[np.ndarray, "T H W 3"]:
        """The frames that stored moments stand for, as the autoencoder shows them."""
        return self._pixels()(moments_ThwM)

    def describe(self) -> dict[str, Any]:
        """What the fields depend on, for a dataset's settings."""
        return self._settings
