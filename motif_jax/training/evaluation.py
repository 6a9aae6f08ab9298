"""Validation: loss overall, in the moving region and their ratio, over the whole range of timesteps (paper figure 6) and of motion."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from motif_jax.config import Config
from motif_jax.dist.mesh import global_batch
from motif_jax.models.networks import Params

VALIDATION_STREAM = 2**31 - 1  # fold_in number of the validation noise: no training step reaches it
DECILES = 10


def timesteps(config: Config, bucket: int, clips: int) -> np.ndarray:
    """int32 [clips], spread evenly over timestep bucket `bucket`, the same at every validation.

    From bucket to bucket they are handed on to other clips, so that no clip has the least noise in all of them.
    """
    n, count = config.diffusion.num_timesteps, config.eval.buckets
    low, high = bucket * n / count, (bucket + 1) * n / count
    place = (np.arange(clips) + bucket * clips // count) % clips
    return (low + (place + 0.5) / clips * (high - low)).astype(np.int32)


def validate(
    eval_step: Callable,
    params: Params,
    frozen: dict[str, Params],
    batches: Iterable[dict[str, np.ndarray]],
    config: Config,
    mesh: Mesh,
    distinct: int | None = None,
) -> dict[str, float]:
    """{"eval/loss", "eval/loss_moving", "eval/ratio", the same per bucket as "eval/ratio_t0" ..., "eval/loss_motion_d0" ... "_d9"}.

    Same clips, timesteps and noise at every call, so that two calls differ by the weights alone. A clip's moving region
    weighs by its size; `ratio` is (mean loss where m > 0.5) / (mean loss), missing when nothing moves. The deciles order the
    clips by their mean flow, from still to fast; missing with fewer than ten clips. Clips after the first `distinct` repeat them.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), VALIDATION_STREAM)
    overall = np.zeros((config.eval.buckets, 2))  # sum of losses, clips
    moving = np.zeros((config.eval.buckets, 2))  # sum of losses over moving cells, moving cells
    clip_losses, clip_motion = [], []
    mean_motion = jax.jit(_mean_motion, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for index, batch in enumerate(batches):
        on_devices = global_batch(batch, mesh, config.batch_size)
        clips = config.batch_size
        clip_motion.append(np.asarray(mean_motion(on_devices["flow"])))
        clip_losses.append(np.zeros(clips))
        for bucket in range(config.eval.buckets):
            noise_key = jax.random.fold_in(jax.random.fold_in(key, index), bucket)
            found = jax.device_get(eval_step(params, frozen, on_devices, timesteps(config, bucket, clips), noise_key))
            overall[bucket] += found.overall.sum(), clips
            clip_losses[-1] += found.overall / config.eval.buckets
            moving[bucket] += (found.moving * found.moving_cells).sum(), found.moving_cells.sum()
    result = {}
    for suffix, o, m in [("", overall.sum(0), moving.sum(0)), *((f"_t{b}", overall[b], moving[b]) for b in range(config.eval.buckets))]:
        result[f"eval/loss{suffix}"] = o[0] / o[1]
        if m[1] > 0:
            result[f"eval/loss_moving{suffix}"] = m[0] / m[1]
            result[f"eval/ratio{suffix}"] = (m[0] / m[1]) / (o[0] / o[1])
    order = np.argsort(np.concatenate(clip_motion)[:distinct], kind="stable")
    if len(order) >= DECILES:
        losses = np.concatenate(clip_losses)
        result |= {f"eval/loss_motion_d{i}": losses[part].mean() for i, part in enumerate(np.array_split(order, DECILES))}
    return {name: float(value) for name, value in result.items()}


def _mean_motion(flow_BThw2: Float[Array, "B T h w 2"]) -> Float[Array, " B"]:
    return jnp.mean(jnp.linalg.norm(flow_BThw2.astype(jnp.float32), axis=-1), axis=(1, 2, 3))
