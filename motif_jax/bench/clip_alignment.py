"""CLIP's opinion of a video: cosine of its frames with the image and with the prompt, from weights on disk. Needs PyTorch."""

import hashlib
import pathlib

import numpy as np
from jaxtyping import Float, UInt8

from motif_jax.data.images import cover
from motif_jax.data.storage import sha256
from motif_jax.errors import UserError
from motif_jax.models.image import DEVIATION, MEAN


class ClipAlignment:
    """100 times the mean cosine over frames, as Animate Bench prints it. A video that stands still has 100 with its image."""

    def __init__(self, directory: str):
        """A folder in Hugging Face's layout: config.json, weights, tokenizer files. Nothing is downloaded. Raises UserError."""
        try:
            import torch
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError as error:
            raise UserError(f"--clip needs PyTorch: pip install -e .[torch] ({error})") from error
        if not (pathlib.Path(directory) / "config.json").is_file():
            raise UserError(f"--clip={directory}: no config.json there; expected a CLIP model in Hugging Face's layout")
        try:
            self._model = CLIPModel.from_pretrained(directory, local_files_only=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--clip={directory}: {' '.join(str(error).split())}") from error
        files = sorted(p for p in pathlib.Path(directory).iterdir() if p.is_file())
        self.digest = hashlib.sha256(b"".join(bytes.fromhex(sha256(p)) for p in files)).hexdigest()
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, frames_THW3: UInt8[np.ndarray, "T H W 3"], image_HW3: UInt8[np.ndarray, "H W 3"], prompt: str) -> dict[str, float]:
        """{"clip_image", "clip_text"} of one video."""
        pictures = self._pictures([image_HW3, *frames_THW3])
        image, frames = pictures[0], pictures[1:]
        return {"clip_image": 100 * float((frames @ image).mean()), "clip_text": 100 * float((frames @ self._text(prompt)).mean())}

    def _pictures(self, pictures: list[np.ndarray]) -> Float[np.ndarray, "N D"]:
        import torch

        side = self._model.config.vision_config.image_size
        mean, deviation = np.float32(MEAN), np.float32(DEVIATION)
        batch = np.stack([(cover(p, side, side) / np.float32(255) - mean) / deviation for p in pictures]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            vision = self._model.vision_model(pixel_values=torch.from_numpy(batch).to(self._model.device))
            return _unit(self._model.visual_projection(vision.pooler_output))

    def _text(self, prompt: str) -> Float[np.ndarray, "D"]:
        import torch

        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return _unit(self._model.text_projection(self._model.text_model(**tokens).pooler_output))[0]


def _unit(features) -> np.ndarray:
    return (features / features.norm(dim=-1, keepdim=True)).float().cpu().numpy()
