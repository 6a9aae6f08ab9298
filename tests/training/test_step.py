"""The train step: every condition counts, types, random streams, one compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from motif_jax.data.tokens import make_tokenizer
from motif_jax.models.networks import Networks, image_condition
from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import Stream, diffusion_schedule, draw, make_eval_step, make_train_step, motion_heatmap, predict

pytestmark = pytest.mark.usefixtures("quick_compile")

DIT = {"width": 8, "depth": 1, "num_head_channels": 8}
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


def frozen_of(networks):
    """Pixel latents and word vectors have no parameters."""
    return networks.with_unconditional({"autoencoder": {}, "text": {}}, make_tokenizer(networks.config.text))


def random_params(networks, seed=0):
    """No weight is zero: freshly made networks put out exact zeros, through which no gradient passes."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(0, 0.1, s.shape) + k.endswith("scale"), jnp.float32) for k, s in networks.denoiser.shapes.items()}


def made(config):
    networks = Networks.of(config)
    return config, networks, random_params(networks), frozen_of(networks)


@pytest.fixture(scope="module")
def setup(tiny):
    """A transformer, which compiles faster."""
    return made(tiny(backbone="dit", dit=DIT))


def test_every_condition_changes_prediction_and_gradient(tiny):
    """A silently unused condition is a known fault of image-to-video trainers: each one must move output and gradient."""
    config, networks, params, _ = made(tiny())
    schedule = diffusion_schedule(config)
    batch = make_batch(config)
    key = jax.random.key(1)

    @jax.jit
    def run(params, z_image, tokens, fps):
        z = networks.encode({}, batch["frames"])
        x = jax.random.normal(key, z.shape)

        def loss(params):
            context = networks.embed({}, tokens)
            image = image_condition(z_image, config.data.frames, config.condition.image)
            out = networks.denoise(params, x, jnp.full(len(z), 500), context, fps, image)
            return jnp.mean((out - schedule.betas[0]) ** 2), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads["input_blocks.1.0.in_layers.2.kernel"]

    z_image = networks.encode({}, batch["frames"][:, :1])[:, 0]
    base = run(params, z_image, batch["tokens"], batch["fps"])
    others = {
        "image": run(params, z_image + 0.5, batch["tokens"], batch["fps"]),
        "text": run(params, z_image, batch["tokens"][::-1], batch["fps"]),
        "fps": run(params, z_image, batch["tokens"], batch["fps"] * 2),
    }
    for what, other in others.items():
        for a, b in zip(base, other, strict=True):
            assert np.linalg.norm(a - b) > 1e-3 * np.linalg.norm(a), what


def test_image_condition_first_marks_the_frame():
    z = jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    c = image_condition(z, 3, "first")
    assert c.shape == (1, 3, 2, 2, 3)
    np.testing.assert_array_equal(c[0, 0, ..., :2], z[0])
    np.testing.assert_array_equal(c[0, 1:, ..., :2], 0)
    np.testing.assert_array_equal(c[0, :, 0, 0, 2], [1, 0, 0])


def test_dropped_text_is_the_empty_sentence(setup):
    config, _, params, frozen = setup
    schedule = diffusion_schedule(config)
    always = dataclasses.replace(config, condition=dataclasses.replace(config.condition, text_drop=1.0))
    batch, key = make_batch(config), jax.random.key(3)
    chance = draw(config, key, len(CAPTIONS)), jax.random.key(4)
    none_left = predict(Networks.of(always), schedule, params, frozen, batch, *chance)
    without = {**batch, "tokens": make_tokenizer(config.text)([""] * len(CAPTIONS))}
    never = dataclasses.replace(config, condition=dataclasses.replace(config.condition, text_drop=0.0))
    expected = predict(Networks.of(never), schedule, params, frozen, without, *chance)
    np.testing.assert_array_equal(none_left[0], expected[0])


def test_streams_are_distinct():
    keys = [
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), s))))
        for step in range(50)
        for s in Stream.__members__.values()  # a number given twice makes an alias, over which an enum does not iterate
    ]
    assert len(set(keys)) == len(keys) == 50 * 6


@pytest.fixture
def one_weight(monkeypatch):
    """A function that makes `Networks` whose denoiser is x_t times its one weight, and the list of what it is called with."""
    calls = []

    def denoise(self, params, x, *conditions):
        calls.append((x, *conditions))
        return params["w"] * x

    monkeypatch.setattr(Networks, "denoise", denoise)

    def of(config):
        networks = Networks.of(config)
        return networks, frozen_of(networks), calls

    return of


def oblong(tiny, **overrides):
    """Clips of 16 x 24 pixels whose stored moments have a deviation, a heatmap that depends on every setting, and a batch."""
    config = tiny(
        **{
            "data": {"width": 24},
            "backbone": "dit",
            "dit": DIT,
            "seed": 5,
            "optimizer": {"warmup_steps": 10},
            "ema": {"decay": 0.25},
            "loss": {"heatmap": "inverse", "intensity": "size", "sharpness": 20.0, "threshold": 0.1, "motion_weight": 3.0},
            "diffusion": {"base_scale": 0.7, "beta_end": 0.02, "zero_terminal_snr": False},
            **overrides,
        }
    )
    rng = np.random.default_rng(0)
    moments = np.concatenate([rng.normal(size=(4, 4, 4, 6, 48)), rng.uniform(-2, 0, (4, 4, 4, 6, 48))], -1).astype(np.float16)
    flow = rng.uniform(0, 5, (4, 4, 4, 6, 2)).astype(np.float16)
    fps = np.array([6, 8, 12, 24], np.float32)
    return config, {"latent_moments": moments, "tokens": make_tokenizer(config.text)(CAPTIONS), "flow": flow, "fps": fps}


def by_hand(config, batch, key, t=None):
    """z, t, noise, x_t and the target v, float64, from the random streams and the formulas.

    The step's own are float32; its cumulative products of a thousand factors alone may be off by some 1e-6.
    """
    mean, log_variance = np.split(batch["latent_moments"].astype(np.float64), 2, -1)
    z = mean + np.exp(log_variance / 2) * np.asarray(jax.random.normal(jax.random.fold_in(key, 0), mean.shape))
    noise = np.asarray(jax.random.normal(jax.random.fold_in(key, 1), mean.shape), np.float64)
    t = np.asarray(jax.random.randint(jax.random.fold_in(key, 2), (4,), 0, 1000)) if t is None else t
    betas = np.linspace(8.5e-4**0.5, config.diffusion.beta_end**0.5, 1000) ** 2
    ab = np.cumprod(1 - betas)[t][:, None, None, None, None]
    scaled = np.interp(t, [0, 399], [1, 0.7])[:, None, None, None, None] * z
    return z, t, noise, np.sqrt(ab) * scaled + np.sqrt(1 - ab) * noise, np.sqrt(ab) * noise - np.sqrt(1 - ab) * scaled


@pytest.mark.parametrize("train, image_noise", [(True, 0.0), (True, 0.3), (False, 0.3)])
def test_what_the_network_is_given(tiny, one_weight, train, image_noise):
    """Streams 0 to 2 draw latents, noise and timesteps, 5 noise on the first frame; evaluation drops and noises nothing."""
    config, batch = oblong(tiny, condition={"text_drop": 0.0 if train else 1.0, "image_noise": image_noise})
    networks, frozen, calls = one_weight(config)
    key, given = jax.random.key(9), None if train else np.array([0, 3, 500, 999])
    draws = draw(config, key, 4) if train else draw(config, key, 4)._replace(timestep=given)
    predict(networks, diffusion_schedule(config), {"w": 0.5}, frozen, batch, draws, jax.random.key(0) if train else None)
    z, t, _, x_t, _ = by_hand(config, batch, key, given)
    ((x, times, context, fps, image, dropout),) = calls
    np.testing.assert_allclose(x, x_t, atol=1e-5)
    np.testing.assert_array_equal(times, t)
    np.testing.assert_array_equal(context, networks.embed({}, batch["tokens"]))
    np.testing.assert_array_equal(fps, batch["fps"])
    first = z[:, 0] + (image_noise * np.asarray(jax.random.normal(jax.random.fold_in(key, 5), z[:, 0].shape)) if train else 0)
    np.testing.assert_allclose(image, np.repeat(first[:, None], 4, 1), atol=1e-5)
    assert (dropout is not None) == train


def test_a_step_by_hand(tiny, one_weight):
    """The paper's loss, its gradient, the averages and what is logged, at step 3 of seed 5, for a network of one weight."""
    config, batch = oblong(tiny, condition={"text_drop": 0.0})
    networks, frozen, calls = one_weight(config)
    optimizer, w = make_optimizer(config), {"w": jnp.float32(0.5)}
    state = dataclasses.replace(train_state.create(w, optimizer, True), step=jnp.int32(3), ema={"w": jnp.float32(2.0)})
    after, metrics = make_train_step(networks, optimizer)(state, frozen, batch)
    key = jax.random.fold_in(jax.random.key(5), 3)
    assert calls[0][-1] == jax.random.fold_in(key, 4)  # stream 4 is dropout
    _, _, _, x_t, v = by_hand(config, batch, key)
    speed = np.linalg.norm(batch["flow"].astype(np.float64) / [24, 16], axis=-1)
    speed[:, 3] = speed[:, 2]
    m = 1 - 1 / (1 + np.exp(20 * (0.1 - speed)))
    residual, weight = v - 0.5 * x_t, 1 + 3 * m[..., None] ** 2
    gradient = abs(np.mean(-2 * weight * residual * x_t))
    new = float(after.params["w"])
    expected = {
        "loss": np.mean(weight * residual**2),
        "loss_diffusion": np.mean(residual**2),
        "loss_motif": np.mean((m[..., None] * residual) ** 2),
        "heatmap_mean": m.mean(),
        "grad_norm": gradient,
        "parameter_norm": new,
        "learning_rate": 4e-4,  # the fourth of ten warm-up steps to 1e-3
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert int(after.step) == 4 and new != 0.5
    assert float(after.ema["w"]) == pytest.approx(2 + 0.75 * (new - 2), rel=1e-6)  # decay 0.25, below (1 + 3) / (10 + 3)


def test_another_loss(tiny, one_weight):
    """It sees the batch, its timesteps and the means of the posterior; its gradient moves the weight, and what it returns is logged."""
    config, batch = oblong(tiny, condition={"text_drop": 0.0})
    networks, frozen, _ = one_weight(config)

    def loss(given, batch, found, t_B):
        assert given is config
        metrics = {"t": jnp.sum(t_B), "fps": jnp.sum(batch["fps"]), "target": jnp.mean(found.target), "mean": jnp.mean(found.latents)}
        return jnp.mean(found.prediction**2), metrics

    sgd = optax.sgd(0.1)
    step = make_train_step(networks, sgd, loss=loss, learning_rate=lambda step: 7.0 + step)
    after, metrics = step(train_state.create({"w": jnp.float32(0.5)}, sgd, False), frozen, batch)
    _, t, _, x_t, v = by_hand(config, batch, jax.random.fold_in(jax.random.key(5), 0))
    power, mean = np.mean(x_t**2), np.split(batch["latent_moments"].astype(np.float64), 2, -1)[0].mean()
    assert float(after.params["w"]) == pytest.approx(0.5 - 0.1 * power, rel=1e-5)
    expected = {"loss": 0.25 * power, "t": t.sum(), "fps": 50, "target": v.mean(), "mean": mean, "learning_rate": 7}
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_latent_difference_is_that_of_the_means(tiny, one_weight):
    """Drawn latents differ from frame to frame where nothing moves: over their own maximum that noise would be motion everywhere."""
    config, batch = oblong(tiny, loss={"heatmap": "latent_difference"})
    networks, frozen, _ = one_weight(config)
    mean, log_variance = np.split(batch["latent_moments"].astype(np.float64), 2, -1)
    mean[:2] = mean[:2, :1]  # two clips that stand still
    batch["latent_moments"] = np.concatenate([mean, log_variance], -1).astype(np.float16)
    optimizer = make_optimizer(config)
    _, metrics = make_train_step(networks, optimizer)(train_state.create({"w": jnp.float32(0.5)}, optimizer, False), frozen, batch)
    speed = np.linalg.norm(mean[2:, 1:] - mean[2:, :-1], axis=-1)
    m = (speed / speed.max((1, 2, 3), keepdims=True))[:, [0, 1, 2, 2]]
    assert float(metrics["heatmap_mean"]) == pytest.approx(m.sum() / (2 * m.size), rel=1e-5)


def test_the_average_warms_up(tiny, one_weight):
    config, batch = oblong(tiny, ema={"decay": 0.9})
    networks, frozen, _ = one_weight(config)
    optimizer = make_optimizer(config)
    state = dataclasses.replace(
        train_state.create({"w": jnp.float32(0.5)}, optimizer, True), step=jnp.int32(3), ema={"w": jnp.float32(2.0)}
    )
    after, _ = make_train_step(networks, optimizer)(state, frozen, batch)
    assert float(after.ema["w"]) == pytest.approx(2 + 9 / 13 * (float(after.params["w"]) - 2), rel=1e-6)


@pytest.mark.parametrize("space", ["eps", "x0"])
def test_the_loss_space_holds_in_evaluation_and_motion_is_that_of_flow(tiny, one_weight, space):
    """Per clip, with timesteps at which no divisor is clamped; the run's own heatmap, the inverse, has no say in what moves."""
    config, batch = oblong(tiny, diffusion={"base_scale": 0.7, "beta_end": 0.02, "zero_terminal_snr": False, "loss_space": space})
    networks, frozen, _ = one_weight(config)
    key, t = jax.random.key(9), np.array([100, 200, 300, 400])
    found = make_eval_step(networks)({"w": jnp.float32(0.5)}, frozen, batch, t, key)
    _, _, _, x_t, v = by_hand(config, batch, key, t)
    ab = np.cumprod(1 - np.linspace(8.5e-4**0.5, 0.02**0.5, 1000) ** 2)[t][:, None, None, None]
    error = np.mean((v - 0.5 * x_t) ** 2, -1) * (ab if space == "eps" else 1 - ab)
    speed = np.linalg.norm(batch["flow"].astype(np.float64) / [24, 16], axis=-1)
    speed[:, 3] = speed[:, 2]
    moving = speed > 0.1
    assert 50 < moving.sum() < 350
    np.testing.assert_allclose(found.overall, error.mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found.moving_cells, moving.sum((1, 2, 3)))
    np.testing.assert_allclose(found.moving, (error * moving).sum((1, 2, 3)) / moving.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_stay_float32(tiny, dtype):
    """Parameters, average, moments, noise, target and loss are float32 whatever the activations are."""
    config = tiny(dtype=dtype)
    networks = Networks.of(config)
    optimizer, frozen = make_optimizer(config), frozen_of(networks)
    state = jax.eval_shape(lambda p: train_state.create(p, optimizer, True), networks.denoiser.shapes)
    after, metrics = jax.eval_shape(make_train_step(networks, optimizer), state, frozen, make_batch(config))
    kinds = {str(x.dtype) for x in jax.tree.leaves((after, metrics))}
    assert kinds == {"float32", "int32"}
    assert jax.tree.structure(after) == jax.tree.structure(state)
    chance = draw(config, jax.random.key(0), 4), jax.random.key(0)
    out = jax.eval_shape(
        lambda p: predict(networks, diffusion_schedule(config), p, frozen, make_batch(config), *chance), networks.denoiser.shapes
    )
    assert {str(x.dtype) for x in out} == {"float32"}


def test_micro_batches_make_the_step_of_the_whole_batch(tiny):
    """Every clip has the same noise, timestep and dropped conditions however many micro-batches there are. AdamW's first moment after
    one step is (1 - b1) times the gradient."""

    def step(n):
        config = tiny(grad_accumulation=n, condition={"text_drop": 0.5, "image_noise": 0.3}, backbone="dit", dit=DIT)
        networks = Networks.of(config)
        optimizer, frozen = make_optimizer(config), frozen_of(networks)
        state = train_state.create(random_params(networks), optimizer, False)
        after, metrics = jax.jit(make_train_step(networks, optimizer))(state, frozen, make_batch(config))
        return next(s.mu for s in jax.tree.leaves(after.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")), metrics

    (moment, metrics), (whole, expected) = step(2), step(1)
    # Rounding of sums in another order, of the gradient relative to its largest entry.
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=2e-5)
    for name in whole:
        np.testing.assert_allclose(moment[name], whole[name], atol=2e-5 * float(jnp.abs(whole[name]).max()) + 1e-9)


def test_step_compiles_once(setup):
    config, networks, params, frozen = setup
    optimizer = make_optimizer(config)
    step = jax.jit(make_train_step(networks, optimizer), donate_argnums=0)
    state = jax.jit(lambda p: train_state.create(p, optimizer, True))(params)
    for seed in range(3):
        state, _ = step(state, frozen, make_batch(config, seed=seed))
    assert step._cache_size() == 1
    assert int(state.step) == 3


def test_motion_weight_zero_and_heatmap_none_agree(tiny, one_weight):
    """lambda = 0 and 'no heatmap' are both the plain diffusion loss, and both differ from the motion focal loss."""

    def first_loss(**loss):
        config, batch = oblong(tiny, loss=loss)
        networks, frozen, _ = one_weight(config)
        optimizer = make_optimizer(config)
        state = train_state.create({"w": jnp.float32(0.5)}, optimizer, False)
        return float(make_train_step(networks, optimizer)(state, frozen, batch)[1]["loss"])

    plain = first_loss(heatmap="none")
    assert first_loss(motion_weight=0.0) == pytest.approx(plain, rel=1e-6)
    assert first_loss(motion_weight=1.0) > plain * 1.001


def test_a_micro_batch_takes_every_nth_clip_and_a_dropout_key_of_its_own(tiny, one_weight, monkeypatch):
    config, batch = oblong(tiny, condition={"text_drop": 0.0}, grad_accumulation=2, loss={"heatmap": "none"})
    networks, frozen, _ = one_weight(config)
    monkeypatch.setattr(Networks, "denoise", lambda self, params, x, *rest: params["w"] * x * jax.random.normal(rest[-1]))
    optimizer = make_optimizer(config)
    _, metrics = make_train_step(networks, optimizer)(train_state.create({"w": jnp.float32(0.5)}, optimizer, False), frozen, batch)
    key = jax.random.fold_in(jax.random.key(5), 0)
    _, _, _, x_t, v = by_hand(config, batch, key)
    factors = [float(jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 4), i))) for i in range(2)]
    expected = np.mean([np.mean((v[i::2] - 0.5 * factors[i] * x_t[i::2]) ** 2) for i in range(2)])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_repeatable_and_sees_the_moving_region(setup):
    config, networks, params, frozen = setup
    step = jax.jit(make_eval_step(networks))
    args = (params, frozen, make_batch(config), jnp.array([100, 300, 500, 900]), jax.random.key(7))
    a, b = step(*args), step(*args)
    np.testing.assert_array_equal(a.overall, b.overall)
    np.testing.assert_array_equal(a.moving_cells, 4.0)  # one cell in each of the four frames


def test_mask_without_masks_is_refused(tiny):
    config = tiny(loss={"heatmap": "mask"})
    with pytest.raises(ValueError, match="motion_mask"):
        motion_heatmap(config, make_batch(config), "mask")
