"""The U-Net against the reference's outputs and gradients, stored with the tests; and its contract as a function."""

import contextlib
import functools
import io

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import UNetConfig
from motif_jax.interop import names
from motif_jax.models.layers import Dropout
from motif_jax.models.unet3d import UNet3D

pytestmark = pytest.mark.usefixtures("quick_compile")

# Float32 noise against the reference is 2e-6; swapping the norms' epsilons would change the output by 1e-5 only, which is
# why the small-input cases below exist.
TOLERANCE = 1e-5
# Fewer blocks than a run may have: the middle and an output block hold every kind of layer.
SMALL = UNetConfig(in_channels=5, out_channels=3, model_channels=16, channel_mult=(1,), num_res_blocks=0, attention_resolutions=(1,),
                   num_head_channels=8, context_dim=6, norm_groups=4, dropout=0.2)  # fmt: skip


def channels_last(x_BCTHW):
    return jnp.asarray(np.moveaxis(x_BCTHW, 1, -1))


def channels_first(x_BTHWC):
    return np.moveaxis(np.asarray(x_BTHWC), -1, 1)


@pytest.fixture(scope="module")
def arguments(golden):
    x = channels_last(golden["unet/x8"])
    return x, golden["unet/t"], golden["unet/context"], golden["unet/fps"], channels_last(golden["unet/grad_target"])


@pytest.fixture(scope="module")
def evaluated(reference_unet, arguments):
    _, params, evaluate = reference_unet
    return jax.device_get(evaluate(params, *arguments))


def test_output_is_the_reference_s(evaluated, golden, difference):
    assert difference(channels_first(evaluated[1]), golden["unet/out8"]) < TOLERANCE


def test_gradients_are_the_reference_s(evaluated, golden):
    """The norm of every one of the 956 gradients."""
    value, _, gradient = evaluated
    np.testing.assert_allclose(value, golden["unet/grad_loss"], rtol=1e-5)
    norms = {name: np.linalg.norm(tensor) for name, tensor in names.to_torch(gradient).items()}
    # Biases in front of a norm of one channel per group have gradients of rounding noise alone: they are compared absolutely.
    np.testing.assert_allclose([norms[name] for name in sorted(norms)], golden["unet/grad_norms"], rtol=1e-3, atol=1e-5)


def test_whole_gradients_are_the_reference_s(evaluated, shared, difference):
    published = np.load(shared / "golden/videocrafter2/unet_tiny_io.npz")
    gradient = names.to_torch(evaluated[2])
    full = [key.removeprefix("grad/") for key in published.files if key.startswith("grad/")]
    assert len(full) == 8
    for name in full:
        assert difference(gradient[name], published[f"grad/{name}"]) < TOLERANCE, name


def test_zero_image_weights_give_the_text_to_video_model(reference_unet, arguments, golden, difference):
    """With the new input channels' weights at zero the 8-channel model is the 4-channel one (initialisation of x-cat)."""
    _, params, evaluate = reference_unet
    kernel = params["input_blocks"][0][0]["kernel"].copy()
    kernel[:, :, 4:] = 0
    inflated = {**params, "input_blocks": {**params["input_blocks"], 0: {0: {**params["input_blocks"][0][0], "kernel": kernel}}}}
    out = channels_first(evaluate(inflated, *arguments)[1])
    assert difference(out[:, :, 1::2, ::2, ::2], golden["unet/out4"]) < TOLERANCE


def test_frame_rate_reaches_the_output(reference_unet, arguments, golden, difference):
    _, params, evaluate = reference_unet
    x, t, context, fps, target = arguments
    out = channels_first(evaluate(params, x, t, context, np.full_like(fps, 16), target)[1])[:, :, 1::2, ::2, ::2]
    assert difference(out, golden["unet/out8_fps_int16"]) < TOLERANCE


def unit(module, x, *args):
    return np.asarray(jax.jit(lambda x, *args: module(x, *args))(x, *args))


def frames_last(x_NCHW):
    """[(B T), C, H, W] of one clip -> [1, T, H, W, C]."""
    return jnp.asarray(np.moveaxis(x_NCHW, 1, -1)[None])


def test_small_inputs_show_the_epsilons(reference_unet, golden, difference):
    """Inputs of 3e-3: a wrong epsilon changes these outputs by 10 % and more. The residual block has 32 -> 64 channels."""
    graph, params, _ = reference_unet
    model = nnx.merge(graph, params)
    case = lambda name: (golden[f"units/{name}_small/in"], golden[f"units/{name}_small/out"])  # noqa: E731
    x, out = case("resblock_skip")
    ours = unit(model.input_blocks[3][0], frames_last(x), golden["units/emb"])
    assert difference(np.moveaxis(ours[0], -1, 1), out) < TOLERANCE
    x, out = case("spatial_transformer")
    ours = unit(model.input_blocks[1][1], frames_last(x), golden["units/context"])
    assert difference(np.moveaxis(ours[0], -1, 1), out) < TOLERANCE
    x, out = case("temporal_transformer")
    ours = unit(model.input_blocks[1][2], channels_last(x))
    assert difference(channels_first(ours), out) < TOLERANCE


@pytest.fixture(scope="module")
def small():
    """A network of one level whose zero-initialised layers are filled, its arguments, and its loss as a function of parameters."""
    rng = np.random.default_rng(0)
    graph, params = nnx.split(UNet3D(SMALL, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), nnx.to_pure_dict(params))
    x = jnp.asarray(rng.normal(size=(2, 3, 8, 4, 5)), jnp.float32)
    context = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    return graph, params, (x, jnp.asarray([3, 700]), context, jnp.asarray([8.0, 24.0]))


def build(**options):
    return nnx.split(nnx.eval_shape(lambda: UNet3D(SMALL, rngs=nnx.Rngs(0), **options)), nnx.Param)[0]


@pytest.fixture(scope="module")
def evaluate():
    """(graph, params, args, key) -> output of the network, its loss against ones, and the gradients; compiled once per graph."""

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(graph, params, args, key=None):
        def loss(params):
            out = nnx.merge(graph, params)(*args, dropout_rng=key)
            return jnp.mean(jnp.square(out - 1)), out

        (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return out, value, gradient

    return evaluate


def test_fresh_network_puts_out_zero(small, evaluate):
    graph, _, args = small
    fresh = nnx.to_pure_dict(nnx.state(UNet3D(SMALL, rngs=nnx.Rngs(0)), nnx.Param))
    out = evaluate(graph, fresh, args)[0]
    assert out.shape == (2, 3, 8, 4, 3) and not np.any(out)


def test_initial_values_are_pytorch_s():
    """Weights and biases U(+-1/sqrt(fan_in)), norms 1 and 0, and exactly the reference's layers at zero."""
    params = nnx.to_pure_dict(nnx.state(UNet3D(SMALL, rngs=nnx.Rngs(0)), nnx.Param))
    flat = {names.torch_name(names.dotted(path)): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    zero = {name.rpartition(".")[0] for name, leaf in flat.items() if name.endswith("weight") and not leaf.any()}
    expected = {
        n.rpartition(".")[0]
        for n in flat
        if n.endswith(("proj_out.weight", "out_layers.3.weight", "conv4.3.weight")) or n == "out.2.weight"
    }
    assert zero == expected and not any(flat[f"{name}.bias"].any() for name in zero)
    conv, bias = flat["middle_block.0.in_layers.2.weight"], flat["middle_block.0.emb_layers.1.bias"]
    for leaf, fan_in in ((conv, 9 * 16), (bias, 64)):
        assert np.abs(leaf).max() <= fan_in**-0.5
        np.testing.assert_allclose(leaf.std(), (3 * fan_in) ** -0.5, rtol=0.2)  # 32 biases: a standard error of 8 %
    np.testing.assert_array_equal(flat["out.0.weight"], 1)
    tensors = [leaf.tobytes() for leaf in flat.values() if leaf.any() and np.unique(leaf).size > 1]
    assert len(set(tensors)) == len(tensors)


def test_condition_reaches_output_and_gradient(small, evaluate):
    graph, params, (x, t, context, fps) = small
    out, _, gradient = evaluate(graph, params, (x, t, context, fps))
    image = x.at[..., -2:].add(0.5)
    for changed in ((image, t, context, fps), (x, t, context.at[:, 0].add(0.5), fps), (x, t, context, fps + 8), (x, t + 100, context, fps)):
        out2, _, gradient2 = evaluate(graph, params, changed)
        assert np.linalg.norm(out2 - out) > 1e-3 * np.linalg.norm(out)
        assert not np.allclose(gradient2["out"][2]["kernel"], gradient["out"][2]["kernel"], rtol=1e-4)
    assert np.abs(gradient["input_blocks"][0][0]["kernel"][:, :, -2:]).min() > 0
    text = gradient["middle_block"][1]["transformer_blocks"][0]["attn2"]
    assert np.abs(text["to_k"]["kernel"]).max() > 0 and np.abs(text["to_v"]["kernel"]).max() > 0


def test_clips_do_not_mix(small, evaluate):
    """Another latent, text, frame rate and timestep in clip 1 leave clip 0 as it was."""
    graph, params, args = small
    changed = [a.at[1].add(1) for a in args]
    before, after = evaluate(graph, params, args)[0], evaluate(graph, params, tuple(changed))[0]
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(after[1], before[1], rtol=1e-2)


@pytest.mark.slow
def test_remat_changes_memory_not_gradients(small, evaluate):
    """With dropout on, so that the recomputation must draw the same masks."""
    plain, params, args = small
    remat, key = build(remat="block"), jax.random.key(3)
    out, _, gradient = evaluate(plain, params, args, key)
    out2, _, gradient2 = evaluate(remat, params, args, key)
    np.testing.assert_allclose(out2, out, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6)  # the same sums, compiled into other fusions

    def activations_saved(graph):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            jax.ad_checkpoint.print_saved_residuals(lambda params: nnx.merge(graph, params)(*args).sum(), params)
        return sum("from the argument" not in line for line in text.getvalue().splitlines())

    kept = [activations_saved(graph) for graph in (remat, build(remat="convs"), build(remat="dots"), plain)]
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert kept[0] < kept[3] / 4


def test_dropout_draws_from_its_key_alone(small, evaluate):
    graph, params, args = small
    first, again, other = (evaluate(graph, params, args, jax.random.key(seed))[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, evaluate(graph, params, args)[0])


def test_bfloat16_contract(small, evaluate, difference):
    """Convolutions in bfloat16 but for the first and the last, parameters, output and gradients float32; the output stays within 2 %."""
    graph, params, args = small
    half = build(dtype=jnp.bfloat16)
    out = jax.jit(lambda params: nnx.merge(half, params)(*args))(params)
    assert out.dtype == jnp.float32
    assert difference(out, np.asarray(evaluate(graph, params, args)[0])) < 2e-2
    gradient = jax.eval_shape(jax.grad(lambda params: nnx.merge(half, params)(*args).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    text = str(jax.make_jaxpr(lambda params: nnx.merge(half, params)(*args))(params))
    convolutions = [line.split("=")[0] for line in text.splitlines() if " conv_general_dilated[" in line]
    assert len(convolutions) > 10 and ["bf16" in line for line in convolutions] == [False, *[True] * (len(convolutions) - 2), False]


def test_every_dropout_layer_has_its_own_stream(tiny_unet):
    model = nnx.eval_shape(lambda: UNet3D(tiny_unet, rngs=nnx.Rngs(0)))
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, Dropout) and "ff" not in _]
    assert len({m.stream for m in layers}) == len(layers) == 14 * 4
    assert sorted({m.rate for m in layers}) == [0.0, 0.1]


def test_image_tokens_of_a_frame_reach_that_frame(small):
    """DynamiCrafter's image cross attention: frame t reads its own 16 tokens; weights of 512 px add 25,559,040 parameters."""
    config = UNetConfig(**{**vars(SMALL), "image_cross_attention": True, "temporal_conv": False, "temporal_attention": False,
                           "addition_attention": False})  # fmt: skip
    rng = np.random.default_rng(1)
    graph, params = nnx.split(UNet3D(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    _, _, (x, t, _, fps) = small
    context = jnp.asarray(rng.normal(size=(2, 4 + 3 * 16, 6)), jnp.float32)
    run = jax.jit(lambda context: nnx.merge(graph, params)(x, t, context, fps))
    moved = np.abs(run(context.at[:, 4 + 16 + 5].add(1.0)) - run(context)).max((0, 2, 3, 4))
    assert moved[1] > 1e-4 and moved[0] == moved[2] == 0
    moved = np.abs(run(context.at[:, 3].add(1.0)) - run(context)).max((0, 2, 3, 4))
    assert moved.min() > 1e-4
    with pytest.raises(ValueError, match="48 context tokens: image cross attention needs text and 16 for each of 3 frames"):
        run(context[:, 4:])

    def count(**changes):
        state = nnx.state(nnx.eval_shape(lambda: UNet3D(UNetConfig(in_channels=8, **changes), rngs=nnx.Rngs(0))), nnx.Param)
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))

    assert count(image_cross_attention=True) == 1_438_854_980


def test_wrong_arguments_are_named(small):
    graph, params, (x, t, context, fps) = small
    model = nnx.merge(graph, params)
    with pytest.raises(ValueError, match="5 channels, not 4"):
        model(x[..., :4], t, context, fps)
    with pytest.raises(ValueError, match=r"7 wide, not unet\.context_dim=6"):
        model(x, t, jnp.ones((2, 4, 7)), fps)
    with pytest.raises(ValueError, match="remat='all'"):
        UNet3D(SMALL, rngs=nnx.Rngs(0), remat="all")
    two_levels = nnx.eval_shape(lambda: UNet3D(UNetConfig(**{**vars(SMALL), "channel_mult": (1, 2)}), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="8x3 cannot be halved 1 times; use multiples of 2"):
        two_levels(x[:, :, :, :3], t, context, fps)
