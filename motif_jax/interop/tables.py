"""The networks of VideoCrafter2 and DynamiCrafter checkpoints: where each one's tensors are; `names` has the rule for their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from motif_jax.interop import names


@dataclass(frozen=True)
class Table:
    """Tensors that begin with `prefix` in a checkpoint -> weights of one network; `names.to_torch` is the way back."""

    prefix: str
    what: str  # for messages
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that may be left over
    renamed: tuple[tuple[str, str], ...] = ()  # beginnings of names that are read as others, which are those written

    def to_jax(self, tensors: Mapping[str, Any], template: Any) -> Any:
        """`template` filled from tensors named as in the checkpoint without `prefix`; see `names.to_jax`."""
        for old, new in self.renamed:
            tensors = {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()}
        what = f"the configured {self.what}; check its configuration"
        return names.to_jax(tensors, template, what, self.ignored)


# DynamiCrafter-256 calls the frame-rate MLP `framestride_embed`.
unet = Table("model.diffusion_model.", "U-Net", renamed=(("framestride_embed.", "fps_embedding."),))
# In some files: the training loss's own networks, and an average, or the two counters that pruning leaves of it.
autoencoder = Table("first_stage_model.", "autoencoder", ignored=(r"loss\..*", r"model_ema\..*"))
# A buffer, and the image tower of a whole OpenCLIP file.
openclip = Table("cond_stage_model.model.", "text tower", ignored=(r"attn_mask", r"visual\..*"))
image = Table("embedder.model.visual.", "image tower")
resampler = Table("image_proj_model.", "resampler")
