"""The image through cross attention (cx-attn) and both ways at once: training, dropping, sampling, weights to start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.config import ConfigError
from motif_jax.data.tokens import make_tokenizer
from motif_jax.generation import make_generator
from motif_jax.models.networks import Networks
from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import diffusion_schedule, draw, make_train_step, predict
from motif_jax.training.weights import initial_weights

pytestmark = pytest.mark.usefixtures("quick_compile")

TOWER = {"kind": "random", "size": 8, "patch": 4, "width": 16, "layers": 2, "heads": 2}
RESAMPLER = {"width": 16, "depth": 1, "heads": 2, "head_width": 8, "frames": 4}
CAPTIONS = ["the red circle moves left", "the blue square moves up", "the green circle stays still", "the red square moves down"]


def make_batch(config, seed=0):
    rng, d = np.random.default_rng(seed), config.data
    n = len(CAPTIONS)
    return {
        "frames": rng.integers(0, 256, (n, d.frames, d.height, d.width, 3), dtype=np.uint8),
        "tokens": make_tokenizer(config.text)(CAPTIONS),
        "flow": np.ones((n, d.frames, d.height // 4, d.width // 4, 2), np.float16),
        "fps": np.full(n, 8.0, np.float32),
    }


def nonzero(params):
    """No weight is zero: freshly made networks put out exact zeros."""
    rng = np.random.default_rng(1)
    return {name: value + jnp.asarray(0.1 * rng.normal(size=value.shape), jnp.float32) for name, value in params.items()}


@pytest.fixture(scope="module")
def make(tiny):
    """A function from the kind of image condition and other settings to (config, networks, parameters, frozen ones).

    With cx-attn nothing mixes the frames: those layers see no image tokens, and cost half of the compilation. "both" has them.
    """

    def of(kind, **overrides):
        image, channels = {"cx-attn": ("none", 48), "both": ("repeat", 96)}[kind]
        mixing = dict.fromkeys(("temporal_conv", "temporal_attention"), kind == "both")
        unet = {"in_channels": channels, "image_cross_attention": True, **mixing, **overrides.pop("unet", {})}
        drop = overrides.pop("text_drop", 0.0)
        sizes = {"image": TOWER, "resampler": RESAMPLER | overrides.pop("resampler", {})}
        config = tiny(condition={"image": image, "text_drop": drop}, unet=unet, **sizes, **overrides)
        networks = Networks.of(config)
        start = initial_weights(config, networks)
        frozen = networks.with_unconditional(start.frozen, make_tokenizer(config.text))
        return config, networks, nonzero(start.denoiser), frozen

    return of


def test_the_first_frame_alone_does(make):
    """Beside latents (here beside the frames, from which the latents are made all the same) the image tower sees `image`."""
    config, networks, params, frozen = make("cx-attn")
    batch = make_batch(config)
    chance = draw(config, jax.random.key(0), 4), jax.random.key(0)
    run = jax.jit(lambda batch: predict(networks, diffusion_schedule(config), params, frozen, batch, *chance)[0])
    alone, other = ({**batch, "image": batch["frames"][:, t]} for t in (0, 1))
    np.testing.assert_array_equal(run(alone), run(batch))
    assert np.abs(run(other) - run(batch)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cx-attn", "both"])
def test_train_and_sample(kind, make):
    config, networks, params, frozen = make(kind, text_drop=0.1)
    optimizer, batch = make_optimizer(config), make_batch(config)
    state = train_state.create(params, optimizer, True)
    after, metrics = jax.jit(make_train_step(networks, optimizer))(state, frozen, batch)
    assert np.isfinite(metrics["loss"])
    moved = {name for name in params if not np.array_equal(after.params[name], params[name])}
    assert {name for name in params if "_ip." in name or name.startswith("image_proj_model.")} <= moved  # trained with the U-Net
    generate = make_generator(networks)
    seeds = np.zeros(4, np.int32)
    images, tokens = batch["frames"][:, 0], np.tile(batch["tokens"][:1], (4, 1))
    clips, _ = generate(params, frozen, images, tokens, batch["fps"], seeds)
    assert clips.shape == batch["frames"].shape
    assert not np.array_equal(clips[0], clips[1])  # the same sentence, noise and rate: the image differs
    alone, _ = generate(params, frozen, images[[1] * 4], tokens, batch["fps"], seeds)
    np.testing.assert_allclose(alone[0].astype(int), clips[1].astype(int), atol=1)


def test_the_pass_without_text_sees_a_grey_image(make, monkeypatch):
    """Guidance 0 leaves that pass alone; in place of the U-Net, how far one number of the last image token is from a grey image's."""
    config, networks, params, frozen = make("cx-attn", diffusion={"prediction": "x0"}, sample={"guidance": 0.0})
    grey = networks.image_tokens(params, frozen["unconditional"]["image"])

    def away(tokens):
        return jnp.tanh(50 * (tokens[:, -1, 0] - grey[:, -1, 0]))[:, None, None, None, None]

    monkeypatch.setattr(Networks, "denoise", lambda self, params, x, t, context, *given: 0 * x + away(context))
    batch = make_batch(config)
    images = batch["frames"][:, 0]
    clips, _ = make_generator(networks)(params, frozen, images, batch["tokens"], batch["fps"], np.arange(4))
    assert set(np.unique(clips)) <= {127, 128}
    assert np.abs(away(networks.image_tokens(params, networks.embed_image(frozen["image"], images)))).min() > 0.05  # six levels


def outputs(setup, batch, key):
    _, networks, params, frozen = setup
    schedule, chance = diffusion_schedule(networks.config), (draw(networks.config, key, 4), key)
    return jax.jit(lambda batch: predict(networks, schedule, params, frozen, batch, *chance)[0])(batch)


def test_the_image_counts_through_attention_alone(make):
    """Another first frame, the same latents: x-cat is off, so that only the tower can see the difference."""
    setup = make("cx-attn")
    config, networks, params, frozen = setup
    batch = make_batch(config)
    other = batch | {"frames": np.concatenate([255 - batch["frames"][:, :1], batch["frames"][:, 1:]], 1)}

    @jax.jit
    def run(frames):
        z = networks.encode({}, batch["frames"])
        image = networks.image_tokens(params, networks.embed_image(frozen["image"], frames))
        context = jnp.concatenate([networks.embed({}, batch["tokens"]), image], 1)
        return networks.denoise(params, z, jnp.full(4, 500), context, batch["fps"], z[..., :0])

    assert np.linalg.norm(run(batch["frames"][:, 0]) - run(other["frames"][:, 0])) > 1e-2 * np.linalg.norm(run(batch["frames"][:, 0]))


def test_the_tower_sees_pixels_between_minus_one_and_one(make):
    _, networks, _, frozen = make("cx-attn")
    tower = networks.image.bind(frozen["image"])
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(networks.embed_image(frozen["image"], images), tower(images / 127.5 - 1), atol=1e-5)
    np.testing.assert_allclose(networks.embed_image(frozen["image"], None), tower(np.zeros((1, 8, 8, 3))), atol=1e-5)  # grey


def test_conditions_are_dropped_as_in_dynamicrafter(make):
    """Share p without text, p without image, p / 2 of them without both; a dropped image is a grey one, dropped text the empty sentence."""
    p, key = 0.4, jax.random.key(5)
    drawn = np.asarray(jax.random.uniform(jax.random.fold_in(key, 3), (4, 1, 1)))[:, 0, 0]
    without_text, without_image = drawn < p, (drawn >= p / 2) & (drawn < 1.5 * p)
    assert without_text.any() and without_image.any() and not without_text.all() and not without_image.all(), drawn
    setup = make("cx-attn", text_drop=p)
    never = make("cx-attn")
    config = setup[0]
    batch = make_batch(config)
    dropped = outputs(setup, batch, key)
    # The same by hand: dropped sentences replaced, and a tower that shows the first frame, or grey where the image is dropped.
    tokens = np.where(without_text[:, None], make_tokenizer(config.text)([""]), batch["tokens"])
    embed = Networks.embed_image

    def by_hand(self, params, images):
        return jnp.where(without_image[:, None, None], embed(self, params, None), embed(self, params, batch["frames"][:, 0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Networks, "embed_image", by_hand)
        expected = outputs(never, batch | {"tokens": tokens}, key)
    np.testing.assert_allclose(dropped, expected, rtol=1e-4, atol=1e-5)


def test_shared_tokens_and_learnable_scale(make):
    """16 tokens for all frames, as the reference's resampler has by default, weighed by tanh(alpha) + 1 per block (DynamiCrafter-256)."""
    config, networks, params, frozen = make("both", unet={"image_cross_attention_scale_learnable": True}, resampler={"frames": 1})
    alphas = [name for name in params if name.endswith("attn2.alpha")]
    assert len(alphas) == 4 and params["image_proj_model.latents"].shape == (1, 16, 16)
    batch = make_batch(config)
    tokens = networks.image_tokens(params, networks.embed_image(frozen["image"], batch["frames"][:, 0]))
    assert tokens.shape == (4, 4 * 16, 16)
    np.testing.assert_array_equal(tokens[:, :16], tokens[:, 48:])

    @jax.jit
    def run(params, image):
        z = networks.encode({}, batch["frames"])
        context = jnp.concatenate([networks.embed({}, batch["tokens"]), image], 1)
        return networks.denoise(params, z, jnp.full(4, 500), context, batch["fps"], z)

    off = params | dict.fromkeys(alphas, jnp.asarray(-20.0))  # tanh(-20) + 1 is 0
    np.testing.assert_allclose(run(off, tokens), run(off, tokens + 1), rtol=1e-5, atol=1e-5)
    half = params | dict.fromkeys(alphas, jnp.asarray(np.arctanh(-0.5), jnp.float32))
    values = params | {name: 0.5 * value for name, value in params.items() if ".to_v_ip." in name} | dict.fromkeys(alphas, jnp.asarray(0.0))
    np.testing.assert_allclose(run(half, tokens), run(values, tokens), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_combined(tiny):
    with pytest.raises(ConfigError, match=r"condition\.image='none': the image would not enter"):
        tiny(condition={"image": "none"}, unet={"in_channels": 48})
    with pytest.raises(ConfigError, match=r"condition\.image_noise=0\.1: condition\.image='none' has no image latent"):
        tiny(condition={"image": "none", "image_noise": 0.1}, unet={"image_cross_attention": True, "in_channels": 48}, image=TOWER)
    with pytest.raises(ConfigError, match=r"unet\.in_channels=96: must be 48 \(noisy latent 48\)"):
        tiny(condition={"image": "none"}, unet={"image_cross_attention": True}, image=TOWER, resampler=RESAMPLER)
    with pytest.raises(ConfigError, match=r"resampler\.frames=16: must be data\.frames=4, or 1"):
        tiny(unet={"image_cross_attention": True}, image=TOWER)
