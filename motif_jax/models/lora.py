"""Low-rank updates of attention projections (LoRA, Hu et al., arXiv 2106.09685): parameters beside the kernels they change.

"X.kernel" [I, O] is used as kernel + lora_a @ lora_b with "X.lora_a" [I, r] and "X.lora_b" [r, O]; the paper's alpha is r.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

KERNELS = re.compile(r".*\.attn[12]\.(to_q|to_k|to_v|to_k_ip|to_v_ip|to_out\.0)\.kernel")
A, B = ".lora_a", ".lora_b"


def shapes(kernels: dict[str, jax.ShapeDtypeStruct], rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The updates for every attention projection among `kernels`, by name."""
    found = {}
    for name, kernel in kernels.items():
        if KERNELS.fullmatch(name):
            stem, (inputs, outputs) = name.removesuffix(".kernel"), kernel.shape
            found[stem + A] = jax.ShapeDtypeStruct((inputs, rank), jnp.float32)
            found[stem + B] = jax.ShapeDtypeStruct((rank, outputs), jnp.float32)
    return found


def init(kernels: dict[str, jax.ShapeDtypeStruct], rank: int, key: PRNGKeyArray) -> dict[str, jax.Array]:
    """lora_a from N(0, 1 / I), lora_b zero: step 0 equals the model without."""
    found = {}
    for number, (name, shape) in enumerate(sorted(shapes(kernels, rank).items())):
        normal = jax.random.normal(jax.random.fold_in(key, number), shape.shape) * shape.shape[0] ** -0.5
        found[name] = normal if name.endswith(A) else jnp.zeros(shape.shape, jnp.float32)
    return found


def merge(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters of the plain network: every update added to its kernel, in float32. Without updates, `params` itself."""
    stems = [name.removesuffix(A) for name in params if name.endswith(A)]
    if not stems:
        return params
    merged = {name: value for name, value in params.items() if not name.endswith((A, B))}
    with jax.default_matmul_precision("highest"):  # accelerators would round what they multiply
        for stem in stems:
            merged[stem + ".kernel"] = merged[stem + ".kernel"] + params[stem + A] @ params[stem + B]
    return merged
