"""Which parameters a run trains, by their paths (`config.finetune`); all others have no optimizer state and no average."""

import re

import jax
from jaxtyping import PRNGKeyArray

from motif_jax.config import Config
from motif_jax.errors import UserError
from motif_jax.models import lora
from motif_jax.models.networks import Networks, Params

LORA_STREAM = 2**31 - 3  # fold_in number of the low-rank updates: no training step reaches it

# In the U-Net a temporal transformer follows the residual block and the spatial transformer, hence number 2.
PARTS = {
    "all": r".*",
    "temporal": r"init_attn\..*|.*\.temopral_conv\..*|((in|out)put_blocks\.\d+|middle_block)\.2\.(norm|proj_|transformer_blocks).*",
    "input": r"input_blocks\.0\.0\..*|patch_embed\..*",
    "lora": r".*\.lora_[ab]",
}


def shapes(config: Config, networks: Networks) -> dict[str, jax.ShapeDtypeStruct]:
    """The denoiser's parameters, with the low-rank updates of finetune='lora'."""
    updates = lora.shapes(networks.denoiser.shapes, config.lora_rank) if config.finetune == "lora" else {}
    return networks.denoiser.shapes | updates


def add_updates(config: Config, params: Params, key: PRNGKeyArray) -> Params:
    """`params` of the denoiser, with low-rank updates that change nothing yet where the run trains them."""
    if config.finetune != "lora":
        return params
    return params | lora.init(params, config.lora_rank, jax.random.fold_in(key, LORA_STREAM))


def trained(config: Config, params: dict) -> dict:
    """The entries of `params` that the run trains. Raises UserError when the network has none of that kind."""
    found = {name: value for name, value in params.items() if re.fullmatch(PARTS[config.finetune], name)}
    if not found:
        raise UserError(f"finetune={config.finetune!r}: this {config.backbone} has no such parameters; use 'all' or another part")
    return found
