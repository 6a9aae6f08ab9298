"""`load_reference` against sampling runs of the reference code, and what it says of unusual files.

The golden weights are at the tiny size of ../shared/golden/videocrafter2/README.md: a whole checkpoint, sampled for ten steps.
"""

import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx

from motif_jax.config import AutoencoderConfig, TextConfig, UNetConfig, UserError
from motif_jax.diffusion import samplers
from motif_jax.diffusion.guidance import classifier_free
from motif_jax.interop import autoencoder, load_reference, names, openclip, reference, unet
from motif_jax.interop.settings import Settings, to_yaml
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D

TINY = Settings(
    UNetConfig(in_channels=4, model_channels=32, num_res_blocks=1, num_head_channels=8, context_dim=64),
    AutoencoderConfig(ch=32),
    TextConfig(width=64, layers=3, heads=4),
    reference.VIDEOCRAFTER,
)


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden/videocrafter2"


@pytest.fixture(scope="module")
def checkpoints(golden, tmp_path_factory):
    """The tiny model with 4 and with 8 input channels as whole checkpoints with their YAML: channels -> (file, YAML)."""
    directory = tmp_path_factory.mktemp("checkpoints")

    def unpacked(name):
        return safetensors.numpy.load(lzma.open(golden / f"{name}_tiny.safetensors.xz").read())

    parts = {unet.PREFIX: unpacked("unet"), autoencoder.PREFIX: unpacked("autoencoder")}
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    state |= {"cond_stage_model." + name: tensor for name, tensor in unpacked("text").items()}
    found = {}
    for channels, diffusion in {4: reference.VIDEOCRAFTER, 8: reference.DYNAMICRAFTER}.items():
        first = unet.PREFIX + "input_blocks.0.0.weight"
        file = directory / f"{channels}.safetensors"
        safetensors.numpy.save_file(state | {first: np.ascontiguousarray(state[first][:, :channels])}, file)
        settings = Settings(UNetConfig(**{**vars(TINY.unet), "in_channels": channels}), TINY.autoencoder, TINY.text, diffusion)
        file.with_suffix(".yaml").write_text(to_yaml(settings))
        found[channels] = file, file.with_suffix(".yaml")
    return found


def last(x, axis=1):
    """The reference's channel axis moved to where ours is."""
    return np.moveaxis(x, axis, -1)


def difference(found, expected):
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def sample(loaded, golden, timesteps, concat, rescale, unscale):
    """Ten DDIM steps with the reference's guidance of 7.5, both passes as one batch."""
    graph, state = nnx.split(loaded.unet)
    text = jnp.concatenate([golden["text_cond"], golden["text_uncond"]])
    fps = jnp.tile(golden["fps"], 2)

    def denoise(x, t):
        x = x if concat is None else jnp.concatenate([x, concat], axis=-1)
        output = nnx.merge(graph, state)(jnp.concatenate([x, x]), jnp.concatenate([t, t]), text, fps)
        return classifier_free(output[: len(x)], output[len(x) :], 7.5, rescale)

    prediction = loaded.settings.diffusion.prediction
    return jax.jit(lambda x: samplers.ddim(denoise, loaded.schedule, x, timesteps, prediction, unscale=unscale, trajectory=True))


@pytest.mark.shared
@pytest.mark.slow
def test_videocrafter_trajectory(checkpoints, golden):
    """Text tower, U-Net, schedule with dynamic rescale, DDIM, and the decoder of the frames that come out."""
    run, prompts = np.load(golden / "ddim_tiny.npz"), np.load(golden / "text_tiny_io.npz")
    loaded = load_reference(*checkpoints[4])
    with jax.default_matmul_precision("highest"):
        text = loaded.text(jnp.asarray(prompts["tokens"]))
        assert difference(text, prompts["penultimate_ln"]) <= 1e-5
        timesteps = samplers.ddim_timesteps(1000, 10, "uniform")
        x, path, _ = sample(loaded, run, timesteps, None, 0.0, True)(last(run["xT"]))
        frames = nnx.jit(lambda a, z: a.decode(z))(loaded.autoencoder, x[0, :2] / loaded.settings.autoencoder.scale_factor)
    assert difference(path[0], last(run["eps_vc_scale/x_inter"][1])) <= 1e-5
    assert difference(x, last(run["eps_vc_scale/final"])) <= 1e-4
    assert difference(frames, last(run["eps_vc_scale/decoded_b0_f01"][0], 0)) <= 1e-4


@pytest.mark.shared
@pytest.mark.slow
def test_dynamicrafter_trajectory(checkpoints, golden):
    """Image channels, zero terminal SNR, v prediction, trailing steps and guidance rescale; the last scale stays in the result."""
    run, conditions = np.load(golden / "ddim_v_tiny.npz"), np.load(golden / "ddim_tiny.npz")
    loaded = load_reference(*checkpoints[8])
    with jax.default_matmul_precision("highest"):
        timesteps = samplers.ddim_timesteps(1000, 10, "trailing")
        x, path, _ = sample(loaded, conditions, timesteps, last(run["v/c_concat"]), 0.7, False)(last(run["v/xT"]))
    assert difference(path[0], last(run["v_dc_rescale0.7/x_inter"][1])) <= 1e-5
    assert difference(x, last(run["v_dc_rescale0.7/final"])) <= 1e-4


@pytest.mark.shared
def test_the_published_kind_of_file(golden, checkpoints, tmp_path):
    """A PyTorch checkpoint with schedule buffers, as the reference saves it, holds the same weights."""
    pytest.importorskip("torch")
    (tmp_path / "model.ckpt").write_bytes(lzma.open(golden / "model_tiny.ckpt.xz").read())
    settings, weights = reference.read_checkpoint(tmp_path / "model.ckpt", checkpoints[4][1])
    assert settings == TINY
    for name, part in reference.read_checkpoint(*checkpoints[4])[1].items():
        assert part.keys() == weights[name].keys()
        assert all(np.asarray(part[path]).tobytes() == np.asarray(weights[name][path]).tobytes() for path in part)


def unet_file(path, config):
    rng = np.random.default_rng(0)
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: UNet3D(config, rngs=nnx.Rngs(0))), nnx.Param))
    shapes = {names.dotted(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(state)}
    tensors = {names.torch_name(p): rng.normal(size=names.torch_shape(p, s)).astype(np.float32) * 0.1 for p, s in shapes.items()}
    safetensors.numpy.save_file(tensors, path)
    return tensors


SMALL = UNetConfig(in_channels=4, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=8,
                   context_dim=6)  # fmt: skip


def test_a_network_alone(tmp_path):
    tensors = unet_file(tmp_path / "x.safetensors", SMALL)
    loaded = load_reference(tmp_path / "x.safetensors")
    assert (loaded.settings.unet, loaded.settings.diffusion) == (SMALL, reference.VIDEOCRAFTER)
    assert loaded.autoencoder is None and loaded.text is None
    assert loaded.schedule.scale[-1] == np.float32(0.7) and loaded.schedule.alphas_cumprod[-1] > 0
    np.testing.assert_array_equal(loaded.unet.out[2].kernel[...], tensors["out.2.weight"].transpose(2, 3, 1, 0))
    x = np.random.default_rng(1).normal(size=(1, 2, 4, 4, 4)).astype(np.float32)
    output = nnx.jit(lambda m, *a: m(*a))(loaded.unet, x, jnp.array([500]), jnp.ones((1, 3, 6)), jnp.array([8.0]))
    assert output.shape == x.shape and np.isfinite(output).all() and np.std(output) > 0


def test_networks_without_weights_need_none(tmp_path):
    unet_file(tmp_path / "x.safetensors", SMALL)
    words = TextConfig(kind="words", vocab_size=16, context_length=3, width=6)
    settings = Settings(SMALL, AutoencoderConfig(kind="pixel", factor=2, z_channels=12), words, reference.DYNAMICRAFTER)
    (tmp_path / "x.yaml").write_text(to_yaml(settings))
    loaded = load_reference(tmp_path / "x.safetensors", tmp_path / "x.yaml")
    assert loaded.text(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 6)
    image = jnp.linspace(-1, 1, 48).reshape(1, 4, 4, 3)
    np.testing.assert_array_equal(loaded.autoencoder.decode(loaded.autoencoder.encode(image)[..., :12]), image)
    assert loaded.schedule.alphas_cumprod[-1] == 0


def test_an_unknown_number_of_heads(tmp_path):
    width, rng = 16, np.random.default_rng(0)
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make_text_tower(TextConfig(width=width, layers=2), nnx.Rngs(0))), nnx.Param))
    shapes = {names.dotted(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(state)}
    tensors = {openclip.PREFIX + names.torch_name(p): rng.normal(size=names.torch_shape(p, s)).astype("f4") for p, s in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    tokens = jnp.zeros((1, 77), jnp.int32)
    with pytest.raises(UserError, match="number of attention heads is not in the file: add `heads`"):
        load_reference(tmp_path / "x.safetensors").text(tokens)
    text = yaml.safe_load(to_yaml(TINY))
    text["model"]["params"]["cond_stage_config"]["params"] = {"text_cfg": {"width": width, "layers": 2, "heads": 4}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(text))
    assert load_reference(tmp_path / "x.safetensors", tmp_path / "x.yaml").text(tokens).shape == (1, 77, width)
