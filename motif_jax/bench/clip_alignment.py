"""CLIP's opinion of a video: cosine of its frames with the image and with the prompt, from weights on disk."""

import hashlib
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from motif_jax.config import UserError
from motif_jax.data.videos import cover
from motif_jax.interop.files import read_tensors

# CLIP's normalisation, RGB in 0..1 (Radford et al. 2021)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "gelu": partial(jax.nn.gelu, approximate=False)}
Weights = dict[str, Float[Array, "..."]]


class ClipAlignment:
    """100 times the mean cosine over frames, as Animate Bench prints it. A video that stands still has 100 with its image."""

    def __init__(self, directory: str):
        """A folder in Hugging Face's layout: config.json, model.safetensors, tokenizer files. Nothing is downloaded. Raises UserError."""
        from transformers import CLIPConfig, CLIPTokenizer

        folder = pathlib.Path(directory)
        if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
            raise UserError(f"--clip={directory}: no {missing[0]} there; expected a CLIP model in Hugging Face's layout")
        try:
            config = CLIPConfig.from_pretrained(directory, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--clip={directory}: {' '.join(str(error).split())}") from error
        vision, text = config.vision_config, config.text_config
        if unknown := {vision.hidden_act, text.hidden_act} - ACTIVATIONS.keys():
            raise UserError(f"--clip={directory}: activation {min(unknown)} is not one of {', '.join(ACTIVATIONS)}")
        weights = {name: jnp.asarray(tensor, jnp.float32) for name, tensor in read_tensors(folder / "model.safetensors").items()}
        self._side, self._longest = vision.image_size, text.max_position_embeddings
        self._images, self._text = partial(jax.jit(partial(_images, vision)), weights), partial(_text, text, weights)
        blank = np.zeros((self._side, self._side, 3), np.uint8)
        try:
            self(blank[None], blank, "")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--clip={directory}: model.safetensors does not fit config.json: {error}") from error
        files = sorted(p for p in folder.iterdir() if p.is_file())
        self.digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()

    def __call__(self, frames_THW3: UInt8[np.ndarray, "T H W 3"], image_HW3: UInt8[np.ndarray, "H W 3"], prompt: str) -> dict[str, float]:
        """{"clip_image", "clip_text"} of one video."""
        covered = np.stack([cover(p, self._side, self._side) for p in (image_HW3, *frames_THW3)])
        tokens = self._tokenizer(prompt, truncation=True, max_length=self._longest)["input_ids"]
        with jax.default_matmul_precision("highest"):
            pictures, text = self._images((covered / np.float32(255) - MEAN) / STD), self._text(jnp.array(tokens))
        image, frames = pictures[0], pictures[1:]
        return {"clip_image": 100 * float(jnp.vecdot(frames, image).mean()), "clip_text": 100 * float(jnp.vecdot(frames, text).mean())}


def _images(config: Any, w: Weights, x_NHW3: Float[Array, "N H W 3"]) -> Float[Array, "N D"]:
    p, side = config.patch_size, config.image_size // config.patch_size
    x_NhpwqC = x_NHW3[:, : side * p, : side * p].reshape(-1, side, p, side, p, 3)
    x_NLD = jnp.einsum("nhpwqc,dcpq->nhwd", x_NhpwqC, w["vision_model.embeddings.patch_embedding.weight"])
    x_NLD = x_NLD.reshape(len(x_NHW3), side * side, -1)
    first = jnp.broadcast_to(w["vision_model.embeddings.class_embedding"], (len(x_NHW3), 1, x_NLD.shape[-1]))
    x_NLD = jnp.concatenate([first, x_NLD], 1) + w["vision_model.embeddings.position_embedding.weight"]
    x_NLD = _encoder(config, w, "vision_model", _norm(config, w, "vision_model.pre_layrnorm", x_NLD), causal=False)  # spelt so in the files
    return _unit(_norm(config, w, "vision_model.post_layernorm", x_NLD[:, 0]) @ w["visual_projection.weight"].T)


def _text(config: Any, w: Weights, tokens_L: Array) -> Float[Array, "D"]:
    """Of the last token, which ends the text."""
    x_LD = w["text_model.embeddings.token_embedding.weight"][tokens_L]
    x_LD = x_LD + w["text_model.embeddings.position_embedding.weight"][: len(tokens_L)]
    x_LD = _encoder(config, w, "text_model", x_LD[None], causal=True)[0]
    return _unit(_norm(config, w, "text_model.final_layer_norm", x_LD[-1]) @ w["text_projection.weight"].T)


def _encoder(config: Any, w: Weights, tower: str, x_NLD: Float[Array, "N L D"], causal: bool) -> Float[Array, "N L D"]:
    activation, heads = ACTIVATIONS[config.hidden_act], (*x_NLD.shape[:2], config.num_attention_heads, -1)
    for i in range(config.num_hidden_layers):
        block = f"{tower}.encoder.layers.{i}"
        y = _norm(config, w, f"{block}.layer_norm1", x_NLD)
        q, k, v = (_linear(w, f"{block}.self_attn.{name}_proj", y).reshape(heads) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal).reshape(x_NLD.shape)
        x_NLD = x_NLD + _linear(w, f"{block}.self_attn.out_proj", y)
        y = activation(_linear(w, f"{block}.mlp.fc1", _norm(config, w, f"{block}.layer_norm2", x_NLD)))
        x_NLD = x_NLD + _linear(w, f"{block}.mlp.fc2", y)
    return x_NLD


def _norm(config: Any, w: Weights, name: str, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    centred = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + config.layer_norm_eps)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Weights, name: str, x: Float[Array, "*n C"]) -> Float[Array, "*n D"]:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _unit(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
