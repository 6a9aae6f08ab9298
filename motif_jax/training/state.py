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
    """`step` counts finished updates; `ema` (empty when no average is kept) and `opt_state` cover the trained parameters only."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: Any

    @property
    def best(self) -> Params:
        """The weights to evaluate and sample with: the average of those that have one."""
        return {**self.params, **self.ema}


def create(params: Params, optimizer: optax.GradientTransformation, with_ema: bool, trained: Params | None = None) -> TrainState:
    """The state of step 0; `trained` is the part of `params` that will change, by default all of it."""
    trained = params if trained is None else trained
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, trained) if with_ema else {}, optimizer.init(trained))


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float, warmup: bool) -> Params:
    """ema + (1 - d)(params - ema) in float32, d = min(decay, (1 + step) / (10 + step)) with warm-up; both of the trained parameters."""
    d = jnp.float32(decay)
    if warmup:
        d = jnp.minimum(d, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)
