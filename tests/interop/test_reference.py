"""`load_reference` against sampling runs of the reference code, and what it says of unusual files.

The golden weights are at the tiny size of ../shared/golden/videocrafter2/README.md: a whole checkpoint, sampled for ten steps.
"""

import functools
import json
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx

from motif_jax.config import AutoencoderConfig, TextConfig, UNetConfig
from motif_jax.diffusion import samplers
from motif_jax.diffusion.guidance import classifier_free
from motif_jax.diffusion.schedule import make_schedule
from motif_jax.errors import UserError
from motif_jax.interop import load_reference, names, reference
from motif_jax.interop.files import read_tensors
from motif_jax.interop.settings import Settings, to_yaml
from motif_jax.interop.tables import autoencoder, openclip, unet
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D

pytestmark = pytest.mark.usefixtures("quick_compile")

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

    parts = {unet.prefix: unpacked("unet"), autoencoder.prefix: unpacked("autoencoder")}
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    state |= {"cond_stage_model." + name: tensor for name, tensor in unpacked("text").items()}
    found = {}
    for channels, diffusion in {4: reference.VIDEOCRAFTER, 8: reference.DYNAMICRAFTER}.items():
        first = unet.prefix + "input_blocks.0.0.weight"
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


@pytest.fixture(scope="module")
def networks(checkpoints, golden):
    """channels -> (the loaded checkpoint, its U-Net compiled once for both passes of guidance over two clips)."""
    text = np.load(golden / "ddim_tiny.npz")
    context = jnp.concatenate([text["text_cond"], text["text_uncond"]])
    fps = jnp.tile(text["fps"], 2)

    @functools.cache
    def load(channels):
        loaded = load_reference(*checkpoints[channels])
        graph, params = nnx.split(loaded.unet)
        run = jax.jit(lambda params, x, t: nnx.merge(graph, params)(x, t, context, fps))

        def network(x, t):
            with jax.disable_jit(False), jax.default_matmul_precision("highest"):
                return run(params, x, t)

        return loaded, network

    return load


# run: channels, prediction, zero terminal SNR, base_scale, spacing, guidance rescale, eta, dynamic rescale divided out of the result
RUNS = {
    "eps_vc_scale": (4, "eps", False, 0.7, "uniform", 0.0, 0.0, True),
    "eps_vc_scale_eta1": (4, "eps", False, 0.7, "uniform", 0.0, 1.0, True),
    "eps_vc_noscale": (4, "eps", False, 1.0, "uniform", 0.0, 0.0, True),
    "v_dc": (8, "v", True, 0.7, "trailing", 0.0, 0.0, False),
    "v_dc_rescale0.7": (8, "v", True, 0.7, "trailing", 0.7, 0.0, False),
    "v_dc_rescale0.7_eta1": (8, "v", True, 0.7, "trailing", 0.7, 1.0, False),
    "v_dc_uniform": (8, "v", True, 0.7, "uniform", 0.0, 0.0, False),
    "eps_x8": (8, "eps", False, 1.0, "uniform", 0.0, 0.0, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_sampling_runs_of_the_reference(run, networks, golden):
    """Ten DDIM steps with guidance 7.5 through the real network: VideoCrafter's and DynamiCrafter's samplers."""
    channels, prediction, zero, base_scale, spacing, rescale, eta, unscale = RUNS[run]
    loaded, unet = networks(channels)
    stored = np.load(golden / ("ddim_tiny.npz" if channels == 4 else "ddim_v_tiny.npz"))
    schedule = make_schedule(zero_terminal_snr=zero, base_scale=base_scale)
    concat = last(stored["v/c_concat"]) if channels == 8 else np.zeros((2, 4, 8, 16, 0), np.float32)
    noise = last(np.load(golden / "ddim_tiny.npz")["eps_vc_scale_eta1/noise"], 2) if eta else None

    def denoise(x, t):
        x = jnp.concatenate([x, concat], axis=-1)
        output = unet(jnp.concatenate([x, x]), jnp.concatenate([t, t]))
        return classifier_free(output[:2], output[2:], 7.5, rescale)

    with jax.disable_jit():  # the loop runs step by step around the compiled network
        x, path, _ = samplers.ddim(
            denoise,
            schedule,
            last(stored[f"{run}/x_inter"][0]),
            samplers.ddim_timesteps(1000, 10, spacing),
            prediction,
            eta,
            unscale=unscale,
            noise=noise,
            trajectory=True,
        )
    assert difference(path[0], last(stored[f"{run}/x_inter"][1])) <= 1e-5
    assert difference(x, last(stored[f"{run}/final"])) <= 1e-4
    if run == "eps_vc_scale":
        frames = nnx.jit(lambda a, z: a.decode(z))(loaded.autoencoder, x[0, :2] / loaded.settings.autoencoder.scale_factor)
        assert difference(frames, last(stored["eps_vc_scale/decoded_b0_f01"][0], 0)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["train_v", "train_eps"])
def test_training_outputs_of_the_reference(objective, networks, golden):
    stored = np.load(golden / "ddim_v_tiny.npz")
    x = np.concatenate([last(stored[f"{objective}/xt"]), last(stored["v/c_concat"])], -1)
    output = networks(8)[1](jnp.concatenate([x, x]), jnp.tile(jnp.asarray(stored["train_v/t"], jnp.int32), 2))[:2]
    assert difference(output, last(stored[f"{objective}/model_out"])) <= 1e-5


@pytest.mark.slow
def test_settings_of_both_checkpoints(networks, golden):
    """The schedule that `load_reference` gives is that of the runs above, the text that of its tower."""
    for channels, zero in ((4, False), (8, True)):
        loaded, _ = networks(channels)
        assert loaded.settings.diffusion.prediction == ("v" if zero else "eps")
        for found, expected in zip(loaded.schedule, make_schedule(zero_terminal_snr=zero, base_scale=0.7), strict=True):
            np.testing.assert_array_equal(found, expected)
    prompts = np.load(golden / "text_tiny_io.npz")
    with jax.default_matmul_precision("highest"):
        assert difference(loaded.text(jnp.asarray(prompts["tokens"])), prompts["penultimate_ln"]) <= 1e-5


def test_the_published_kind_of_file(golden, checkpoints, tmp_path):
    """A PyTorch checkpoint with schedule buffers, as the reference saves it, holds the same weights."""
    pytest.importorskip("torch")
    (tmp_path / "model.ckpt").write_bytes(lzma.open(golden / "model_tiny.ckpt.xz").read())
    listed = json.loads((golden / "model_tiny_keys.json").read_text())
    tensors = read_tensors(tmp_path / "model.ckpt")
    assert {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()} == {
        name: (shape, dtype.removeprefix("torch.")) for name, (shape, dtype) in listed.items()
    }
    settings, weights, _ = reference.read_checkpoint(tmp_path / "model.ckpt", checkpoints[4][1])
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
    tensors = {openclip.prefix + names.torch_name(p): rng.normal(size=names.torch_shape(p, s)).astype("f4") for p, s in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    tokens = jnp.zeros((1, 77), jnp.int32)
    with pytest.raises(UserError, match="number of attention heads is not in the file: add `heads`"):
        load_reference(tmp_path / "x.safetensors").text(tokens)
    text = yaml.safe_load(to_yaml(TINY))
    text["model"]["params"]["cond_stage_config"]["params"] = {"text_cfg": {"width": width, "layers": 2, "heads": 4}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(text))
    assert load_reference(tmp_path / "x.safetensors", tmp_path / "x.yaml").text(tokens).shape == (1, 77, width)
