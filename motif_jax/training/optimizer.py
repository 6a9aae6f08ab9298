"""AdamW with clipping, warm-up and decay from the configuration (optax)."""

import jax
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from motif_jax.config import Config
from motif_jax.dist.mesh import partition
from motif_jax.models.networks import Params
from motif_jax.models.placement import platform


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant or cosine to zero at `config.steps`."""
    warmup = config.optimizer.warmup_steps
    if config.optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - warmup))
    else:
        after = optax.constant_schedule(config.learning_rate)
    if warmup == 0:
        return after
    # Step 0 already learns: the ramp starts one notch above zero.
    return optax.join_schedules([optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup - 1), after], [warmup])


def make_optimizer(config: Config, learning_rate: optax.Schedule | None = None) -> optax.GradientTransformation:
    """AdamW at `learning_rate`, by default the configuration's schedule.

    The state has the same structure whatever the learning rate, its schedule and the clipping are.
    """
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip > 0 else optax.identity()
    adamw = optax.adamw(learning_rate or make_schedule(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(clip, adamw)


def as_stored(gradients: Params) -> Params:
    """On a GPU, gradients of convolutions laid out as their parameters: XLA would transpose the optimizer's state to cuDNN's layout."""
    mesh = jax.sharding.get_abstract_mesh()

    def pin(x: Array) -> Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    def one(name: str, x: Array) -> Array:
        if platform() != "gpu" or x.ndim < 3:
            return x
        if mesh.empty:
            return pin(x)
        spec = partition(name, x.shape, mesh)  # XLA would gather what it is told to lay out
        return jax.shard_map(pin, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    return {name: one(name, x) for name, x in gradients.items()}
