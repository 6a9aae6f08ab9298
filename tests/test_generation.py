"""Image and sentence to clip, with a formula in place of the network: what it is given, guidance, noise and steps, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.data.tokens import make_tokenizer
from motif_jax.generation import make_generator, sample_latents
from motif_jax.models.networks import Networks
from motif_jax.training.step import diffusion_schedule

FROZEN = {"autoencoder": {}, "text": {}}
SEEDS = np.array([3, 2**31 - 1], np.int32)
SHAPE = (4, 4, 6, 48)  # of a clip's latents


@pytest.fixture
def make(tiny, monkeypatch):
    """A function from a formula of (x, t, context, fps, image) and settings to (networks, clips of two images and two sentences)."""

    def of(formula, seeds=SEEDS, sampler=sample_latents, **overrides):
        monkeypatch.setattr(Networks, "denoise", lambda self, params, *given: formula(*given))
        config = tiny(data={"width": 24}, backbone="dit", dit={"width": 8, "depth": 1, "num_head_channels": 8}, **overrides)
        networks, tokenizer = Networks.of(config), make_tokenizer(config.text)
        images = np.random.default_rng(0).integers(100, 150, (2, 16, 24, 3), np.uint8)
        tokens, fps = tokenizer(["the red circle moves left", "a blue square"]), np.array([8, 24], np.float32)
        frozen = networks.with_unconditional(FROZEN, tokenizer)
        params = networks.denoiser.init(jax.random.key(0))
        clips, _ = make_generator(networks, sampler=sampler)(params, frozen, images, tokens, fps, seeds)
        sentences = [np.asarray(networks.embed({}, x), np.float64).sum((1, 2)) for x in (tokens, tokenizer(["", ""]))]
        return networks, np.asarray(clips).astype(int), images, sentences

    return of


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_conditions_and_guidance(make, guidance, rescale):
    """An estimate of the clean clip that depends on the conditions alone is what comes out."""
    time = np.linspace(-1, 1, 4)[:, None, None, None]

    def formula(x, t, context, fps, image):
        return image + (0.01 * context.sum((1, 2)) + 0.02 * fps)[:, None, None, None, None] * jnp.asarray(time)

    sample = {"guidance": guidance, "guidance_rescale": rescale}
    settings = {"diffusion": {"prediction": "x0"}, "sample": sample, "autoencoder": {"scale_factor": 2.0}}  # latents are twice the pixels
    _, clips, images, sentences = make(formula, **settings)
    for b, fps in enumerate((8, 24)):
        with_text, without = (images[b] / 127.5 - 1 + (0.005 * s[b] + 0.01 * fps) * time for s in sentences)
        guided = without + guidance * (with_text - without)
        if guidance != 1:
            guided *= rescale * with_text.std() / guided.std() + 1 - rescale
        wanted = np.clip(np.round((guided + 1) * 127.5), 0, 255)
        assert np.abs(with_text - without).max() > 0.03 and ((wanted > 0) & (wanted < 255)).mean() > 0.8
        assert np.abs(clips[b] - wanted).max() <= 1  # roundings that fall on the other side


def test_a_clip_starts_from_the_noise_of_its_seed(make):
    networks, clips, _, _ = make(lambda x, *given: 0 * x, diffusion={"prediction": "flow"})
    x_T = np.stack([jax.random.normal(jax.random.fold_in(jax.random.key(seed), 0), SHAPE) for seed in SEEDS])
    np.testing.assert_array_equal(clips, networks.decode({}, x_T))
    assert np.abs(clips[0] - clips[1]).mean() > 10


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_and_fresh_noise(make, eta):
    """DDIM (arXiv 2010.02502, equations 12 and 16) in float64 for an estimate of half of x; fresh noise is of the clip's seed alone."""
    sample = {"guidance": 1.0, "steps": 5, "eta": eta}
    networks, clips, _, _ = make(lambda x, *given: 0.5 * x, diffusion={"prediction": "x0", "zero_terminal_snr": False}, sample=sample)
    ab = np.cumprod(1 - np.linspace(8.5e-4**0.5, 1.2e-2**0.5, 1000) ** 2)
    latents = []
    for seed in SEEDS:
        key = jax.random.key(seed)
        x = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), SHAPE), np.float64)
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), (5, *SHAPE)), np.float64)
        for z, t in zip(noise, (999, 799, 599, 399, 199), strict=True):
            before = ab[t - 200] if t > 199 else 1.0
            eps = (x - np.sqrt(ab[t]) * x / 2) / np.sqrt(1 - ab[t])
            sigma = eta * np.sqrt((1 - before) / (1 - ab[t]) * (1 - ab[t] / before))
            x = np.sqrt(before) * x / 2 + np.sqrt(1 - before - sigma**2) * eps + sigma * z
        latents.append(x)
    wanted = np.asarray(networks.decode({}, jnp.asarray(np.stack(latents), jnp.float32))).astype(int)
    assert np.abs(clips - wanted).max() <= 1 and wanted.std() > 5


@pytest.mark.parametrize(("autoencoder", "end"), [({}, 1.0), ({"kind": "kl", "ch": 32, "ch_mult": [1, 1, 1]}, 1 - 8.5e-4)])
def test_where_sampling_ends(tiny, autoencoder, end):
    """With the reference's autoencoder at the reference's last alpha_bar, of pixels at 1; the dynamic rescale is divided out of both."""
    config = tiny(autoencoder=autoencoder, diffusion={"prediction": "x0", "base_scale": 0.7}, sample={"steps": 1})
    x_T, keys = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 48)), jax.vmap(jax.random.key)(SEEDS)
    latents = sample_latents(config, diffusion_schedule(config), lambda x, t: jnp.full_like(x, 0.7), jnp.asarray(x_T), keys)
    np.testing.assert_allclose(latents, np.sqrt(end) + np.sqrt(1 - end) * x_T, atol=1e-5)  # x_T is the noise where alpha_bar is 0


def test_another_sampler(make):
    """It calls the network as it likes, and has a key for each clip."""

    def sampler(config, schedule, denoise, x_BThwC, keys_B):
        shift = jax.vmap(lambda key: jax.random.uniform(key))(keys_B)[:, None, None, None, None]
        return denoise(x_BThwC, jnp.full(2, config.diffusion.num_timesteps // 2)) + 0.1 * shift

    networks, clips, _, _ = make(lambda x, t, *given: 100 * x / t[0], sampler=sampler, sample={"guidance": 1.0})
    keys = [jax.random.key(seed) for seed in SEEDS]
    latents = [jax.random.normal(jax.random.fold_in(key, 0), SHAPE) / 5 + 0.1 * jax.random.uniform(key) for key in keys]
    wanted = np.asarray(networks.decode({}, jnp.stack(latents))).astype(int)
    assert np.abs(clips - wanted).max() <= 1 and len(np.unique(wanted)) > 5
