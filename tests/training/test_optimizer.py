"""Learning rates against their formulas; AdamW and the average against a direct transcription."""

import jax.numpy as jnp
import numpy as np
import pytest

from motif_jax.training import state as train_state
from motif_jax.training.optimizer import make_optimizer, make_schedule


def test_warmup_then_constant(tiny):
    schedule = make_schedule(tiny(learning_rate=1e-3, optimizer={"warmup_steps": 4}))
    np.testing.assert_allclose([schedule(i) for i in range(7)], [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3], rtol=1e-6)


def test_cosine_ends_at_zero(tiny):
    schedule = make_schedule(tiny(learning_rate=1e-3, steps=12, optimizer={"warmup_steps": 2, "schedule": "cosine"}))
    expected = [1e-3 * 0.5 * (1 + np.cos(np.pi * i / 10)) for i in range(11)]
    np.testing.assert_allclose([schedule(2 + i) for i in range(11)], expected, atol=1e-9)


def test_a_run_shorter_than_its_warmup(tiny):
    schedule = make_schedule(tiny(learning_rate=1e-3, steps=2, optimizer={"warmup_steps": 4, "schedule": "cosine"}))
    np.testing.assert_allclose([schedule(i) for i in range(2)], [2.5e-4, 5e-4], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw(tiny, clip):
    """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, three steps in float64; clipping scales the gradient to norm `clip`."""
    config = tiny(learning_rate=1e-2, optimizer={"grad_clip": clip, "weight_decay": 0.2, "b1": 0.8, "b2": 0.99, "eps": 1e-3})
    optimizer = make_optimizer(config)
    params = {"a.kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    state = optimizer.init(params)
    p = np.array(params["a.kernel"], np.float64)
    m = v = np.zeros_like(p)
    rng = np.random.default_rng(0)
    for t in range(1, 4):
        g = rng.normal(size=p.shape)
        updates, state = optimizer.update({"a.kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = {"a.kernel": params["a.kernel"] + updates["a.kernel"]}
        norm = np.linalg.norm(g)
        g = g * min(1.0, clip / norm) if clip else g
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
        p = p - 1e-2 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3) + 0.2 * p)
    np.testing.assert_allclose(params["a.kernel"], p, rtol=2e-5)  # float32 against float64


def test_average():
    ema, params = {"a": jnp.array([0.0])}, {"a": jnp.array([1.0])}
    assert float(train_state.update_ema(ema, params, jnp.array(0), 0.99, True)["a"][0]) == pytest.approx(0.9)
    assert float(train_state.update_ema(ema, params, jnp.array(10_000), 0.99, True)["a"][0]) == pytest.approx(0.01)
    assert float(train_state.update_ema(ema, params, jnp.array(0), 0.99, False)["a"][0]) == pytest.approx(0.01)
