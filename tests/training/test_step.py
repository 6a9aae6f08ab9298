"""The train step: every condition counts, types, random streams, one compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.data.tokens import make_tokenizer
from motif_jax.models.networks import Networks, image_condition
from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import Stream, diffusion_schedule, empty_sentence, make_eval_step, make_train_step, motion_heatmap, predict

pytestmark = pytest.mark.usefixtures("quick_compile")

FROZEN = {"autoencoder": {}, "text": {}}  # pixel latents and word vectors have no parameters
CAPTIONS = ["the red circle moves left", "the blue square moves up", "the green circle stays still", "the red square moves down"]


def make_batch(config, captions=CAPTIONS, seed=0):
    rng = np.random.default_rng(seed)
    d = config.data
    n = len(captions)
    flow = np.zeros((n, d.frames, d.height // 4, d.width // 4, 2), np.float16)
    flow[:, :, 1, 2] = 2.0
    return {
        "frames": rng.integers(0, 256, (n, d.frames, d.height, d.width, 3), dtype=np.uint8),
        "tokens": make_tokenizer(config.text)(captions),
        "flow": flow,
        "fps": np.full(n, 8.0, np.float32),
    }


def random_params(networks, seed=0):
    """No weight is zero: freshly made networks put out exact zeros, through which no gradient passes."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(0, 0.1, s.shape) + k.endswith("scale"), jnp.float32) for k, s in networks.denoiser.shapes.items()}


@pytest.fixture(scope="module")
def setup(tiny):
    config = tiny()
    networks = Networks.of(config)
    empty = empty_sentence(config, make_tokenizer(config.text))
    return config, networks, random_params(networks), empty


@pytest.mark.parametrize("what", ["image", "text", "fps"])
def test_condition_changes_prediction_and_gradient(setup, what):
    """A silently unused condition is a known fault of image-to-video trainers: each one must move output and gradient."""
    config, networks, params, _ = setup
    schedule = diffusion_schedule(config)
    batch = make_batch(config)
    key = jax.random.key(1)

    @jax.jit
    def run(params, z_image, tokens, fps):
        z = networks.encode({}, batch["frames"], None)
        x = jax.random.normal(key, z.shape)

        def loss(params):
            context = networks.embed({}, tokens)
            image = image_condition(z_image, config.data.frames, config.condition.image)
            out = networks.denoise(params, x, jnp.full(len(z), 500), context, fps, image)
            return jnp.mean((out - schedule.betas[0]) ** 2), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads["input_blocks.1.0.in_layers.2.kernel"]

    z_image = networks.encode({}, batch["frames"][:, :1], None)[:, 0]
    base = run(params, z_image, batch["tokens"], batch["fps"])
    other = {
        "image": lambda: run(params, z_image + 0.5, batch["tokens"], batch["fps"]),
        "text": lambda: run(params, z_image, batch["tokens"][::-1], batch["fps"]),
        "fps": lambda: run(params, z_image, batch["tokens"], batch["fps"] * 2),
    }[what]()
    for a, b in zip(base, other, strict=True):
        assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a)


def test_image_condition_first_marks_the_frame():
    z = jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    c = image_condition(z, 3, "first")
    assert c.shape == (1, 3, 2, 2, 3)
    np.testing.assert_array_equal(c[0, 0, ..., :2], z[0])
    np.testing.assert_array_equal(c[0, 1:, ..., :2], 0)
    np.testing.assert_array_equal(c[0, :, 0, 0, 2], [1, 0, 0])


def test_dropped_text_is_the_empty_sentence(setup):
    config, _, params, empty = setup
    schedule = diffusion_schedule(config)
    always = dataclasses.replace(config, condition=dataclasses.replace(config.condition, text_drop=1.0))
    batch, key = make_batch(config), jax.random.key(3)
    none_left = predict(Networks.of(always), schedule, params, FROZEN, batch, jnp.asarray(empty), key)
    without = {**batch, "tokens": np.tile(empty, (len(CAPTIONS), 1))}
    never = dataclasses.replace(config, condition=dataclasses.replace(config.condition, text_drop=0.0))
    expected = predict(Networks.of(never), schedule, params, FROZEN, without, jnp.asarray(empty), key)
    np.testing.assert_array_equal(none_left[0], expected[0])


def test_streams_are_distinct():
    keys = [
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), s))))
        for step in range(50)
        for s in Stream
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_stay_float32(tiny, dtype):
    """Parameters, average, moments, noise, target and loss are float32 whatever the activations are."""
    config = tiny(dtype=dtype)
    networks = Networks.of(config)
    empty = empty_sentence(config, make_tokenizer(config.text))
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda p: train_state.create(p, optimizer, True), networks.denoiser.shapes)
    after, metrics = jax.eval_shape(make_train_step(networks, optimizer, empty), state, FROZEN, make_batch(config))
    kinds = {str(x.dtype) for x in jax.tree.leaves((after, metrics))}
    assert kinds == {"float32", "int32"}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    out = jax.eval_shape(
        lambda p: predict(networks, diffusion_schedule(config), p, FROZEN, make_batch(config), empty, jax.random.key(0)),
        networks.denoiser.shapes,
    )
    assert {str(x.dtype) for x in out[:3]} == {"float32"}


def test_accumulated_gradient_is_the_mean_of_the_micro_batches(tiny):
    """AdamW's first moment after one step is (1 - b1) times the gradient: compare it with gradients taken one micro-batch at a time."""
    config = tiny(grad_accumulation=2, condition={"text_drop": 0.0}, unet={"temporal_dropout": 0.0})
    networks = Networks.of(config)
    empty = empty_sentence(config, make_tokenizer(config.text))
    optimizer = make_optimizer(config)
    params, batch = random_params(networks), make_batch(config)
    state = train_state.create(params, optimizer, False)
    after, _ = jax.jit(make_train_step(networks, optimizer, empty))(state, FROZEN, batch)
    moment = next(s.mu for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))

    from motif_jax import losses

    key = jax.random.fold_in(jax.random.key(config.seed), 0)

    def loss(params, part, index):
        prediction, target, z, _ = predict(
            networks, diffusion_schedule(config), params, FROZEN, part, jnp.asarray(empty), jax.random.fold_in(key, index)
        )
        return losses.motif_loss(prediction, target, motion_heatmap(config, part, z, "flow"), 1.0)[0]

    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(params, {k: v[i::2] for k, v in batch.items()}, i) for i in range(2)]
    for name in moment:
        expected = 0.1 * (grads[0][name] + grads[1][name]) / 2
        # Rounding of sums in another order, relative to the largest entry.
        np.testing.assert_allclose(moment[name], expected, atol=2e-5 * float(jnp.abs(expected).max()) + 1e-9)


def test_step_compiles_once(setup):
    config, networks, params, empty = setup
    optimizer = make_optimizer(config)
    step = jax.jit(make_train_step(networks, optimizer, empty), donate_argnums=0)
    state = jax.jit(lambda p: train_state.create(p, optimizer, True))(params)
    for seed in range(3):
        state, _ = step(state, FROZEN, make_batch(config, seed=seed))
    assert step._cache_size() == 1
    assert int(state.step) == 3


@pytest.mark.slow
def test_motion_weight_zero_and_heatmap_none_agree(tiny):
    """lambda = 0 and 'no heatmap' are both the plain diffusion loss, and both differ from the motion focal loss."""

    def first_loss(**loss):
        config = tiny(loss=loss)
        networks = Networks.of(config)
        empty = empty_sentence(config, make_tokenizer(config.text))
        optimizer = make_optimizer(config)
        state = train_state.create(random_params(networks), optimizer, False)
        step = make_train_step(networks, optimizer, empty)
        return float(jax.jit(lambda *arguments: step(*arguments)[1]["loss"])(state, FROZEN, make_batch(config)))  # no gradient is compiled

    plain = first_loss(heatmap="none")
    assert first_loss(motion_weight=0.0) == pytest.approx(plain, rel=1e-6)
    assert first_loss(motion_weight=1.0) > plain * 1.001


def test_evaluation_is_repeatable_and_sees_the_moving_region(setup):
    config, networks, params, empty = setup
    step = jax.jit(make_eval_step(networks, empty))
    args = (params, FROZEN, make_batch(config), jnp.array([100, 300, 500, 900]), jax.random.key(7))
    a, b = step(*args), step(*args)
    np.testing.assert_array_equal(a.overall, b.overall)
    np.testing.assert_array_equal(a.moving_cells, 4.0)  # one cell in each of the four frames


def test_mask_without_masks_is_refused(tiny):
    config = tiny(loss={"heatmap": "mask"})
    with pytest.raises(ValueError, match="motion_mask"):
        motion_heatmap(config, make_batch(config), jnp.zeros((4, 4, 4, 4, 48)), "mask")
