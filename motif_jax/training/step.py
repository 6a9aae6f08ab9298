"""The pure train step and evaluation step: arrays in, arrays out, jitted by the loop.

Random numbers come from fold_in(fold_in(key(seed), step), stream); nothing about them needs saving.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from motif_jax import losses
from motif_jax.config import Config
from motif_jax.diffusion import objective
from motif_jax.diffusion.schedule import Schedule, make_schedule
from motif_jax.models.networks import Networks, Params, image_condition
from motif_jax.models.placement import use_mesh
from motif_jax.motion.heatmap import heatmap
from motif_jax.training import finetune
from motif_jax.training.optimizer import as_stored
from motif_jax.training.optimizer import make_schedule as make_learning_rate
from motif_jax.training.state import TrainState, update_ema

Batch = dict[str, Array]


class Stream(enum.IntEnum):
    """One random stream per use; no key serves twice."""

    LATENT = 0
    NOISE = 1
    TIMESTEP = 2
    CONDITION_DROP = 3
    DROPOUT = 4
    IMAGE_NOISE = 5


def diffusion_schedule(config: Config) -> Schedule:
    """The tables of the noise schedule that `config.diffusion` describes."""
    d = config.diffusion
    return make_schedule(d.num_timesteps, d.beta_start, d.beta_end, d.zero_terminal_snr, d.base_scale)


class Draws(NamedTuple):
    """The random numbers of a batch, some of each clip: three kinds of Gaussian noise of unit variance, timesteps, and numbers in [0, 1)
    that say which conditions are dropped."""

    latent: Float[Array, "B T h w C"]
    noise: Float[Array, "B T h w C"]
    timestep: Int[Array, " B"]
    condition_drop: Float[Array, " B"]
    image_noise: Float[Array, "B h w C"]


def draw(config: Config, key: PRNGKeyArray, clips: int) -> Draws:
    """Of `clips` clips, each kind from its own stream of `key`; timesteps are uniform (DDPM, algorithm 1)."""

    def stream(which: Stream) -> PRNGKeyArray:
        return jax.random.fold_in(key, which)

    image = (clips, config.latent_height, config.latent_width, config.autoencoder.z_channels)
    clip = (clips, config.data.frames, *image[1:])
    return Draws(
        jax.random.normal(stream(Stream.LATENT), clip),
        jax.random.normal(stream(Stream.NOISE), clip),
        jax.random.randint(stream(Stream.TIMESTEP), (clips,), 0, config.diffusion.num_timesteps),
        jax.random.uniform(stream(Stream.CONDITION_DROP), (clips,)),
        jax.random.normal(stream(Stream.IMAGE_NOISE), image),
    )


class Predicted(NamedTuple):
    """Of a noised batch, float32: the network's prediction and its target, both in the space of the loss, and the clean latents, which are
    the means of the posterior."""

    prediction: Float[Array, "B T h w C"]
    target: Float[Array, "B T h w C"]
    latents: Float[Array, "B T h w C"]


def predict(
    networks: Networks,
    schedule: Schedule,
    params: Params,
    frozen: dict[str, Params],
    batch: Batch,
    draws: Draws,
    dropout: PRNGKeyArray | None,
) -> Predicted:
    """Noise a batch and denoise it.

    dropout: the key of dropout's masks; None is an evaluation, in which no condition is dropped or noised either. frozen: parameters by
    network, and "unconditional" (`Networks.with_unconditional`).
    """
    config, train = networks.config, dropout is not None
    d, t_B = config.diffusion, draws.timestep
    moments = batch["latent_moments"] if "latent_moments" in batch else networks.moments(frozen["autoencoder"], batch["frames"])
    z_BThwC = networks.latents(moments, draws.latent)

    context_BLD = batch["text_embedding"] if "text_embedding" in batch else networks.embed(frozen["text"], batch["tokens"])
    context_BLD = context_BLD.astype(jnp.float32)
    # One draw for text and image tokens, as in DynamiCrafter: a share p of each is dropped, p / 2 of both together.
    p = config.condition.text_drop if train else 0.0
    draw_B11 = draws.condition_drop[:, None, None]
    if p > 0:
        context_BLD = jnp.where(draw_B11 < p, frozen["unconditional"]["text"], context_BLD)
    if config.image_tokens:
        image_BHW3 = batch["image"] if "image" in batch else batch["frames"][:, 0]
        image_BSE = networks.embed_image(frozen["image"], image_BHW3)
        if p > 0:
            image_BSE = jnp.where((draw_B11 - p / 2) % 1.0 < p, frozen["unconditional"]["image"], image_BSE)
        context_BLD = jnp.concatenate([context_BLD, networks.image_tokens(params, image_BSE)], axis=1)

    x_t = objective.add_noise(schedule, z_BThwC, draws.noise, t_B, d.prediction)
    image_BhwC = z_BThwC[:, 0]
    if train and config.condition.image_noise > 0:
        image_BhwC += config.condition.image_noise * draws.image_noise
    output = networks.denoise(
        params,
        x_t,
        t_B,
        context_BLD,
        batch["fps"],
        image_condition(image_BhwC, config.data.frames, config.condition.image),
        dropout,
    )
    space = d.loss_space or d.prediction
    prediction = objective.convert(schedule, x_t, output, t_B, d.prediction, space)
    target = objective.target(schedule, z_BThwC, draws.noise, t_B, d.prediction, space)
    return Predicted(prediction, target, networks.latents(moments))


def motion_heatmap(config: Config, batch: Batch, kind: str, latents_BThwC: Array | None = None) -> Float[Array, "B T h w"]:
    """m' of a batch on the latent grid (the paper's sigma of the flow intensity, and the heatmaps of its ablations).

    Raises ValueError where the batch lacks what the kind is made of; "latent_difference" is made of `latents`, the posterior's
    means: samples differ from frame to frame where nothing moves.
    """
    return heatmap(
        kind,
        flow=batch.get("flow"),
        mask=batch.get("motion_mask"),
        latents=latents_BThwC,
        height=config.data.height,
        width=config.data.width,
        latent_hw=(config.latent_height, config.latent_width),
        reading=config.loss.intensity,
        sharpness=config.loss.sharpness,
        threshold=config.loss.threshold,
    )


# (config, batch, what was predicted, its timesteps [B]) -> (the scalar to minimise, more scalars to log: each must be finite).
Loss = Callable[[Config, Batch, Predicted, Int[Array, " B"]], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def motion_focal_loss(
    config: Config, batch: Batch, found: Predicted, t_B: Int[Array, " B"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The paper's loss (`losses.motif_loss`) with the heatmap of `config.loss`, at all timesteps alike.

    Gives L, and beside its parts the mean of the heatmap.
    Raises ValueError where the batch lacks what the heatmap is made of.
    """
    m = motion_heatmap(config, batch, config.loss.heatmap, found.latents)
    loss, parts = losses.motif_loss(found.prediction, found.target, m, config.loss.motion_weight)
    return loss, {**parts, "heatmap_mean": jnp.mean(m)}


def make_train_step(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    loss: Loss = motion_focal_loss,
    learning_rate: optax.Schedule | None = None,
) -> Callable[[TrainState, dict[str, Params], Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, frozen parameters, batch) -> (next state, metrics), to be jitted.

    frozen: as for `predict`. batch: arrays as `data.pipeline.make_iterator` yields them. mesh: over which devices activations are laid out.
    learning_rate: the optimizer's schedule, by default that of `config`; it is only logged.
    """
    config = networks.config
    schedule = diffusion_schedule(config)
    learning_rate = learning_rate or make_learning_rate(config)

    def loss_fn(trained: Params, params: Params, frozen: dict[str, Params], batch: Batch, draws: Draws, dropout: PRNGKeyArray):
        found = predict(networks, schedule, {**params, **trained}, frozen, batch, draws, dropout)
        total, metrics = loss(config, batch, found, draws.timestep)
        return total, {**metrics, "loss": total}

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def gradients(trained: Params, params: Params, frozen: dict[str, Params], batch: Batch, key: PRNGKeyArray):
        n, dropout = config.grad_accumulation, jax.random.fold_in(key, Stream.DROPOUT)
        draws = draw(config, key, len(batch["fps"]))
        if n == 1:
            return grad_fn(trained, params, frozen, batch, draws, dropout)
        # Micro-batch i takes clips i, i + n, ... so that every device works on every micro-batch.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0), (batch, draws))

        def add(total, micro):
            index, part = micro
            return jax.tree.map(jnp.add, total, grad_fn(trained, params, frozen, *part, jax.random.fold_in(dropout, index))), None

        shapes = jax.eval_shape(grad_fn, trained, params, frozen, *jax.tree.map(lambda x: x[0], parts), dropout)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), parts))
        return jax.tree.map(lambda x: x / n, total)

    def train_step(state: TrainState, frozen: dict[str, Params], batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        trained = finetune.trained(config, state.params)
        with use_mesh(mesh):
            grads, metrics = gradients(trained, state.params, frozen, batch, key)
            grads = as_stored(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        ema = update_ema(state.ema, trained, state.step, config.ema.decay, config.ema.warmup) if state.ema else state.ema
        norms = {"grad_norm": optax.global_norm(grads), "parameter_norm": optax.global_norm(trained)}
        metrics |= norms | {"learning_rate": learning_rate(state.step)}
        return TrainState(state.step + 1, {**state.params, **trained}, ema, opt_state), metrics

    return train_step


def make_eval_step(networks: Networks, mesh: Mesh | None = None) -> Callable[..., losses.RegionLosses]:
    """(params, frozen, batch, t_B, key) -> per-clip losses: total, in the moving region, and the region's size.

    Moving means m > 0.5 by optical flow, whatever the run's own heatmap (paper figure 6).
    """
    config = networks.config
    schedule = diffusion_schedule(config)

    def eval_step(params: Params, frozen: dict[str, Params], batch: Batch, t_B: Array, key: PRNGKeyArray) -> losses.RegionLosses:
        draws = draw(config, key, len(t_B))._replace(timestep=t_B)
        with use_mesh(mesh):
            found = predict(networks, schedule, params, frozen, batch, draws, None)
        return losses.region_losses(found.prediction, found.target, motion_heatmap(config, batch, "flow"), 0.5)

    return eval_step
