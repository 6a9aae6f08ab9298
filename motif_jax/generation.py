"""Image + sentence -> clip: DDIM with classifier-free guidance, text and image condition computed once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from motif_jax.config import Config
from motif_jax.diffusion import objective, samplers
from motif_jax.diffusion.guidance import classifier_free
from motif_jax.diffusion.schedule import Schedule
from motif_jax.models.networks import Networks, Params, grey_levels, image_condition
from motif_jax.models.placement import use_mesh
from motif_jax.training.step import diffusion_schedule

# (config, noise schedule, denoising function, pure noise, a random key of each clip) -> latents. The function takes the noisy latents and
# their timesteps [B] and returns the network's output, guidance applied.
Sampler = Callable[
    [Config, Schedule, samplers.Denoise, Float[Array, "B T h w C"], PRNGKeyArray],
    Float[Array, "B T h w C"],
]


def sample_latents(
    config: Config,
    schedule: Schedule,
    denoise: samplers.Denoise,
    x_BThwC: Float[Array, "B T h w C"],
    keys_B: PRNGKeyArray,
) -> Float[Array, "B T h w C"]:
    """DDIM on trailing timesteps, or Euler steps on flow matching's path, as `config.sample` and `config.diffusion.prediction` say.

    Fold-in number 0 of a key made the clip's pure noise `x`; number 1 makes the noise of all steps with eta > 0.
    """
    s, d = config.sample, config.diffusion
    timesteps = samplers.ddim_timesteps(d.num_timesteps, s.steps, "trailing")
    if d.prediction in objective.STRAIGHT:
        return samplers.flow_euler(denoise, schedule, x_BThwC, timesteps, d.prediction)
    noise, shape = None, (len(timesteps), *x_BThwC.shape[1:])
    if s.eta > 0:
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape), out_axes=1)(keys_B)
    # The references' last step leaves a trace of noise in the latents; in pixels one would see it.
    final = "exact" if config.autoencoder.kind == "pixel" else "reference"
    return samplers.ddim(denoise, schedule, x_BThwC, timesteps, d.prediction, s.eta, final=final, noise=noise)


def toward_finite(config: Config, *more: str) -> str:
    """What may help, beside `more`, when samples have NaN or infinity; for a message."""
    guidance = config.sample.guidance
    nearer, wider = [f"guidance nearer to 1 (now {guidance:g})"] * (guidance != 1), ["dtype='float32'"] * (config.dtype != "float32")
    return " or ".join([*more, *nearer, *wider])


def make_generator(networks: Networks, mesh: Mesh | None = None, sampler: Sampler = sample_latents) -> Callable[..., tuple[Array, Array]]:
    """A jitted function from images and tokens to clips, with `config.sample`'s steps and guidance.

    generate(params, frozen, images [B,H,W,3] uint8, tokens [B,L], fps [B], seeds [B]) -> (clips [B,T,H,W,3] uint8, finite [B] bool).
    A clip that is not finite had NaN or infinity in its pixels, which uint8 does not show.
    frozen: parameters by network, and "unconditional" (`Networks.with_unconditional`).
    A clip depends on its own seed only, not on its neighbours in the batch. `mesh` says over which devices activations are laid out,
    `sampler` how latents are made of noise.
    """
    config = networks.config
    s = config.sample
    schedule = diffusion_schedule(config)

    @jax.jit
    @use_mesh(mesh)
    def generate(
        params: Params,
        frozen: dict[str, Params],
        images_BHW3: UInt8[Array, "B H W 3"],
        tokens_BL: Int[Array, "B L"],
        fps_B: Float[Array, " B"],
        seeds_B: Int[Array, " B"],
    ) -> tuple[UInt8[Array, "B T H W 3"], Bool[Array, " B"]]:
        z_BhwC = networks.encode(frozen["autoencoder"], images_BHW3[:, None])[:, 0]
        clips, frames = len(images_BHW3), config.data.frames
        image_BThwK = image_condition(z_BhwC, frames, config.condition.image)
        text_BLD = networks.embed(frozen["text"], tokens_BL)
        null_BLD = jnp.repeat(frozen["unconditional"]["text"], clips, axis=0)
        if config.image_tokens:  # the pass without text has the tokens of a grey image (DynamiCrafter); x-cat stays in both
            image = networks.image_tokens(params, networks.embed_image(frozen["image"], images_BHW3))
            grey = networks.image_tokens(params, frozen["unconditional"]["image"])
            text_BLD = jnp.concatenate([text_BLD, image], axis=1)
            null_BLD = jnp.concatenate([null_BLD, jnp.repeat(grey, clips, axis=0)], axis=1)

        params = networks.denoiser.cast(params)

        def paired(with_text: Array, without: Array) -> Array:
            # Clip by clip rather than one half after the other, so that a clip's two passes run on the device that has it.
            return jnp.stack([with_text, without], axis=1).reshape(2 * len(with_text), *with_text.shape[1:])

        def denoise(x_BThwC: Array, t_B: Array) -> Array:
            if s.guidance == 1.0:
                return networks.denoise(params, x_BThwC, t_B, text_BLD, fps_B, image_BThwK)
            twice = (paired(x, x) for x in (x_BThwC, t_B))
            both = networks.denoise(params, *twice, paired(text_BLD, null_BLD), paired(fps_B, fps_B), paired(image_BThwK, image_BThwK))
            both = both.reshape(clips, 2, *both.shape[1:])
            return classifier_free(both[:, 0], both[:, 1], s.guidance, s.guidance_rescale)

        keys = jax.vmap(jax.random.key)(seeds_B)
        shape = (frames, *z_BhwC.shape[1:])
        x_T = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), shape))(keys)
        x_BTHW3 = networks.pixels(frozen["autoencoder"], sampler(config, schedule, denoise, x_T, keys))
        return grey_levels(x_BTHW3), jnp.isfinite(x_BTHW3).all(axis=(1, 2, 3, 4))

    return generate
