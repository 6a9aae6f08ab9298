"""Masks by path against the module tree; what is frozen stays, bit for bit, and costs no optimizer state; LoRA against its formula."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import to_json
from motif_jax.data.tokens import make_tokenizer
from motif_jax.errors import UserError
from motif_jax.models import lora
from motif_jax.models.networks import Networks
from motif_jax.models.transformer import TemporalTransformer
from motif_jax.models.unet3d import TemporalConv, UNet3D
from motif_jax.training import finetune, weights
from motif_jax.training import state as train_state
from motif_jax.training.checkpoint import Checkpoints
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compile")

FROZEN = {"autoencoder": {}, "text": {}}


def names_below(module, kinds) -> set[str]:
    """Paths of all parameters that lie in a submodule of one of `kinds`."""
    found = set()
    for path, node in nnx.iter_graph(module):
        if isinstance(node, kinds):
            stem = ".".join(map(str, path))
            found |= {f"{stem}.{'.'.join(map(str, p))}" for p, _ in nnx.to_flat_state(nnx.state(node, nnx.Param))}
    return found


@pytest.mark.parametrize("levels", [1, 2])
def test_temporal_layers_are_those_of_the_module_tree(tiny, levels):
    config = tiny(
        finetune="temporal",
        unet={"channel_mult": [1] * levels, "attention_resolutions": [1, 2][:levels], "addition_attention": True, "num_res_blocks": 2},
    )
    network = nnx.eval_shape(lambda: UNet3D(config.unet, rngs=nnx.Rngs(0)))
    expected = names_below(network, (TemporalTransformer, TemporalConv))
    assert len(expected) > 100
    assert set(finetune.trained(config, Networks.of(config).denoiser.shapes)) == expected


def test_input_is_the_first_convolution(tiny):
    config = tiny(finetune="input")
    assert set(finetune.trained(config, Networks.of(config).denoiser.shapes)) == {"input_blocks.0.0.kernel", "input_blocks.0.0.bias"}


def test_a_backbone_without_such_layers_is_refused(tiny):
    config = tiny(finetune="temporal", backbone="dit", dit={"width": 16, "depth": 1, "num_head_channels": 8})
    with pytest.raises(UserError, match="finetune='temporal': this dit has no such parameters"):
        finetune.trained(config, Networks.of(config).denoiser.shapes)


def test_lora_is_on_every_attention_projection(tiny):
    """Those of the image's tokens, too."""
    image = {"kind": "random", "size": 8, "patch": 4, "width": 16, "layers": 2, "heads": 2}
    config = tiny(finetune="lora", lora_rank=3, unet={"image_cross_attention": True}, image=image, resampler={"frames": 4})
    shapes = {name: shape for name, shape in Networks.of(config).denoiser.shapes.items() if not name.startswith("image_proj_model.")}
    updates = lora.shapes(shapes, 3)
    projections = [n for n in shapes if re.search(r"\.to_(q|k|v|k_ip|v_ip|out\.0)\.kernel", n)]
    assert sum("_ip" in name for name in projections) > 5
    assert len(updates) == 2 * len(projections) > 20
    for name in projections:
        stem, (inputs, outputs) = name.removesuffix(".kernel"), shapes[name].shape
        assert updates[stem + ".lora_a"].shape == (inputs, 3) and updates[stem + ".lora_b"].shape == (3, outputs)


def test_new_updates_change_nothing():
    """lora_b is zero; lora_a has variance 1 / inputs, and every layer draws its own."""
    kernels = {f"{layer}.attn1.to_q.kernel": jax.ShapeDtypeStruct((400, 25), jnp.float32) for layer in "xy"}
    found = lora.init(kernels, 16, jax.random.key(0))
    for layer in "xy":
        assert not found[f"{layer}.attn1.to_q.lora_b"].any()
        assert found[f"{layer}.attn1.to_q.lora_a"].std() == pytest.approx(0.05, rel=0.05)  # 6400 values: standard error 1 %
    assert not np.array_equal(found["x.attn1.to_q.lora_a"], found["y.attn1.to_q.lora_a"])


def test_merge():
    rng = np.random.default_rng(0)
    params = {"x.attn1.to_q.kernel": rng.normal(size=(5, 4)), "y.bias": rng.normal(size=3)}
    assert lora.merge(params) is params
    a, b = rng.normal(size=(5, 2)), rng.normal(size=(2, 4))
    updates = {"x.attn1.to_q.lora_a": a, "x.attn1.to_q.lora_b": b}
    merged = lora.merge(params | updates)
    assert merged.keys() == params.keys()
    np.testing.assert_allclose(merged["x.attn1.to_q.kernel"], params["x.attn1.to_q.kernel"] + a @ b, rtol=1e-12)
    traced = jax.make_jaxpr(lora.merge)(params | updates)
    (product,) = (equation for equation in traced.eqns if equation.primitive.name == "dot_general")
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}  # on every platform


@pytest.mark.parametrize("part", ["input", "lora"])
def test_only_the_chosen_parameters_change(tiny, part):
    """Two steps: the others keep their bits and have neither moments nor average."""
    config = tiny(finetune=part, lora_rank=2, backbone="dit", dit={"width": 16, "depth": 1, "num_head_channels": 8})
    networks, optimizer = Networks.of(config), make_optimizer(config)
    rng = np.random.default_rng(0)
    base = {k: jnp.asarray(rng.normal(0, 0.1, s.shape) + k.endswith("scale"), jnp.float32) for k, s in networks.denoiser.shapes.items()}
    before = finetune.add_updates(config, base, jax.random.key(0))
    chosen = set(finetune.trained(config, before))
    state = train_state.create(before, optimizer, True, finetune.trained(config, before))
    moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    assert [set(m.mu) for m in moments] == [set(state.ema)] == [chosen]
    d = config.data
    batch = {
        "frames": rng.integers(0, 256, (4, d.frames, d.height, d.width, 3), dtype=np.uint8),
        "tokens": rng.integers(1, 500, (4, 8)).astype(np.int32),
        "flow": np.ones((4, d.frames, 4, 4, 2), np.float16),
        "fps": np.full(4, 8.0, np.float32),
    }
    step = jax.jit(make_train_step(networks, optimizer))
    frozen = networks.with_unconditional(FROZEN, make_tokenizer(config.text))
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    changed = {name for name, value in state.params.items() if not np.array_equal(value, before[name])}
    assert changed == chosen
    assert set(state.best) == set(before) and all(state.best[n] is state.ema[n] for n in chosen)


@pytest.mark.parametrize("kind", ["best", "raw"])
def test_loaded_weights_hold_the_average_and_the_updates(tiny, tmp_path, kind):
    """What sampling and export read of a LoRA run: the plain network's parameters."""
    config = tiny(finetune="lora", lora_rank=2, backbone="dit", dit={"width": 16, "depth": 1, "num_head_channels": 8})
    networks, optimizer = Networks.of(config), make_optimizer(config)
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for k, s in sorted(finetune.shapes(config, networks).items())}
    state = train_state.create(params, optimizer, True, finetune.trained(config, params))
    state = dataclasses.replace(state, ema={k: 2 * v for k, v in state.ema.items()})
    (tmp_path / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(1, state, {}, {})
    checkpoints.close()
    found = weights.load(tmp_path, kind)["denoiser"]
    assert found.keys() == networks.denoiser.shapes.keys()
    stem, factor = "blocks.0.attn1.to_q", 4 if kind == "best" else 1  # both factors of the product are doubled in the average
    update = np.asarray(params[stem + ".lora_a"], np.float64) @ np.asarray(params[stem + ".lora_b"], np.float64)
    np.testing.assert_allclose(found[stem + ".kernel"], params[stem + ".kernel"] + factor * update, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["patch_embed.kernel"], params["patch_embed.kernel"])
