"""Image + sentence -> clip: DDIM with classifier-free guidance, text and image condition computed once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from motif_jax.diffusion import objective, samplers
from motif_jax.diffusion.guidance import classifier_free
from motif_jax.models.networks import Networks, Params, image_condition
from motif_jax.models.placement import use_mesh
from motif_jax.training.step import diffusion_schedule


def make_generator(networks: Networks, mesh: Mesh | None = None) -> Callable[..., Array]:
    """A jitted function from images and tokens to clips, with `config.sample`'s steps and guidance.

    generate(params, frozen, images [B,H,W,3] uint8, tokens [B,L], fps [B], seeds [B]) -> [B,T,H,W,3] uint8.
    frozen: parameters by network, and "unconditional" (`Networks.with_unconditional`).
    A clip depends on its own seed only, not on its neighbours in the batch. `mesh` says over which devices activations are laid out.
    """
    config = networks.config
    s, d = config.sample, config.diffusion
    schedule = diffusion_schedule(config)
    timesteps = samplers.ddim_timesteps(d.num_timesteps, s.steps, "trailing")

    @jax.jit
    @use_mesh(mesh)
    def generate(
        params: Params,
        frozen: dict[str, Params],
        images_BHW3: UInt8[Array, "B H W 3"],
        tokens_BL: Int[Array, "B L"],
        fps_B: Float[Array, " B"],
        seeds_B: Int[Array, " B"],
    ) -> UInt8[Array, "B T H W 3"]:
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
        if d.prediction in objective.STRAIGHT:
            z_BThwC = samplers.flow_euler(denoise, schedule, x_T, timesteps, d.prediction)
        else:
            noise = None
            if s.eta > 0:
                noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (len(timesteps), *shape)), out_axes=1)(keys)
            # The references' last step leaves a trace of noise in the latents; in pixels one would see it.
            final = "exact" if config.autoencoder.kind == "pixel" else "reference"
            z_BThwC = samplers.ddim(denoise, schedule, x_T, timesteps, d.prediction, s.eta, final=final, noise=noise)
        return networks.decode(frozen["autoencoder"], z_BThwC)

    return generate
