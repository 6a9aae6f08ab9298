"""AdamW with clipping, warm-up and decay from the configuration (optax)."""

import optax

from motif_jax.config import Config


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


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The state has the same structure whatever the learning rate, its schedule and the clipping are."""
    o = config.optimizer
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip > 0 else optax.identity()
    adamw = optax.adamw(make_schedule(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(clip, adamw)
