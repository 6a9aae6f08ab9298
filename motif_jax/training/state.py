"""What a training run carries from step to step, as one pytree of arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from motif_jax.models.networks import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished updates; `ema` is an empty dict when no average is kept."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: Any

    @property
    def best(self) -> Params:
        """The weights to evaluate and sample with: the average if there is one."""
        return self.ema or self.params


def create(params: Params, optimizer: optax.GradientTransformation, with_ema: bool) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params) if with_ema else {}, optimizer.init(params))


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float, warmup: bool) -> Params:
    """ema + (1 - d)(params - ema) in float32, d = min(decay, (1 + step) / (10 + step)) with warm-up."""
    d = jnp.float32(decay)
    if warmup:
        d = jnp.minimum(d, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)
