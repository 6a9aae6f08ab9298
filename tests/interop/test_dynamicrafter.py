"""DynamiCrafter's checkpoints: image tower and resampler in and out under its names, its 256 model, and what a run makes of them."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from motif_jax.config import AutoencoderConfig, ImageConfig, ResamplerConfig, TextConfig, UNetConfig, from_config_dict
from motif_jax.errors import UserError
from motif_jax.interop import load_reference, names, reference
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.imported import Import, import_checkpoint
from motif_jax.interop.settings import Settings, read_yaml, to_yaml
from motif_jax.interop.tables import image, resampler, unet
from motif_jax.models.networks import Network, Networks
from motif_jax.training.export import export
from motif_jax.training.weights import IMAGE_PATH, initial_weights

pytestmark = pytest.mark.usefixtures("quick_compile")

PIXELS, WORDS = AutoencoderConfig(kind="pixel", factor=2, z_channels=12), TextConfig(kind="words", vocab_size=8, context_length=3, width=6)
LARGE = Settings(
    UNetConfig(in_channels=24, out_channels=12, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,),
               num_head_channels=8, context_dim=6, image_cross_attention=True),
    PIXELS, WORDS, reference.DYNAMICRAFTER,
    ImageConfig(size=4, patch=2, width=12, layers=1, heads=3, projection=5),
    ResamplerConfig(width=10, depth=1, heads=1, head_width=4, frames=3),
)  # fmt: skip
SMALL = dataclasses.replace(
    LARGE,
    unet=dataclasses.replace(LARGE.unet, image_cross_attention_scale_learnable=True),
    resampler=dataclasses.replace(LARGE.resampler, frames=1),
)
REST = {"embedder.model.logit_scale": np.zeros((), np.float32), "embedder.model.token_embedding.weight": np.zeros((3, 2), np.float32)}


def checkpoint(settings, seed=0, networks=("denoiser", "image", "resampler")):
    """Random tensors under the names of the checkpoint."""
    rng, make, state = np.random.default_rng(seed), reference.constructors(settings, np.float32), {}
    for name in networks:
        for path, leaf in Network.of(make[name]).shapes.items():
            tensor = rng.normal(size=names.torch_shape(path, leaf.shape)) * 0.3
            state[reference.TABLES[name].prefix + names.torch_name(path)] = np.asarray(tensor, np.float32)
    return state


def run_config(settings, **fields):
    parts = {"unet": settings.unet, "autoencoder": settings.autoencoder, "text": settings.text, "image": settings.image}
    given = {name: dataclasses.asdict(part) for name, part in (parts | {"resampler": settings.resampler}).items()}
    given |= {"dtype": "float32", "data": {"frames": 3, "height": 8, "width": 8}, "prepare": {"flow": "exact", "flow_stride": 2}}
    return from_config_dict(given | fields)


@pytest.fixture(params=["512", "256"])
def model(request, tmp_path):
    """(settings, tensors, file, YAML) of a small model built like one of the two."""
    settings = {"512": LARGE, "256": SMALL}[request.param]
    state = checkpoint(settings)
    written = state if settings is LARGE else {name.replace("fps_embedding.", "framestride_embed."): t for name, t in state.items()}
    safetensors.numpy.save_file(written | REST, tmp_path / "dc.safetensors")
    (tmp_path / "dc.yaml").write_text(to_yaml(settings))
    return settings, state, tmp_path / "dc.safetensors", tmp_path / "dc.yaml"


def test_there_and_back_through_a_run(model, tmp_path):
    """A run can start from the import, and every tensor comes back bit for bit under the reference's names."""
    settings, state, file, yaml = model
    assert read_yaml(yaml) == settings
    counts, _ = import_checkpoint("dynamicrafter", file, tmp_path / "in", yaml)
    assert counts.keys() == {"denoiser", "image", "resampler"}
    assert Import(tmp_path / "in").settings == settings
    config = run_config(settings, init_from=str(tmp_path / "in"))
    networks = Networks.of(config)
    start = initial_weights(config, networks)
    np.testing.assert_array_equal(start.denoiser["image_proj_model.proj_in.kernel"], state["image_proj_model.proj_in.weight"].T)
    np.testing.assert_array_equal(start.frozen["image"]["proj"], state["embedder.model.visual.proj"])
    _, count, _ = export(tmp_path / "in", tmp_path / "all.safetensors", frozen=False)
    found = safetensors.numpy.load_file(tmp_path / "all.safetensors")
    trained = {name: tensor for name, tensor in state.items() if not name.startswith(image.prefix)}
    assert count == len(found) and found.keys() == trained.keys()
    assert all(found[name].tobytes() == trained[name].tobytes() for name in trained)
    again = read_yaml(tmp_path / "all.yaml")
    assert (again.unet, again.image, again.resampler) == (settings.unet, settings.image, settings.resampler)


def test_a_whole_checkpoint_comes_back(tmp_path):
    """Every name that DynamiCrafter's strict loader asks for, also what its image tower keeps of the same OpenCLIP and does not use."""
    kl = AutoencoderConfig(ch=32, ch_mult=(1, 1), factor=2, num_res_blocks=1)
    settings = dataclasses.replace(LARGE, autoencoder=kl, text=TextConfig(vocab_size=8, context_length=3, width=6, layers=2, heads=2))
    state, text = checkpoint(settings, networks=reference.TABLES), "cond_stage_model.model."
    unused = ("logit_scale", "text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias")
    state |= {f"embedder.model.{name}": state[text + name] for name in unused} | schedule_buffers(settings.diffusion)
    safetensors.numpy.save_file(state, tmp_path / "dc.safetensors")
    (tmp_path / "dc.yaml").write_text(to_yaml(settings))
    import_checkpoint("dynamicrafter", tmp_path / "dc.safetensors", tmp_path / "in", tmp_path / "dc.yaml")
    export(tmp_path / "in", tmp_path / "out.safetensors", frozen=True)
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys()
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)


def test_read_off_the_shapes(model):
    """Without a YAML: everything but the number of heads, which no shape tells."""
    settings, _, file, _ = model
    found, *_ = reference.read_checkpoint(file)
    trained = reference.DYNAMICRAFTER if settings is LARGE else reference.DYNAMICRAFTER_256
    assert found.unet == settings.unet and found.diffusion == trained
    assert found.image == dataclasses.replace(settings.image, heads=0)
    assert found.resampler == settings.resampler
    with pytest.raises(UserError, match=r"image tower of width 12: none of OpenCLIP's.*img_cond_stage_config"):
        load_reference(file).image(np.zeros((1, 4, 4, 3)))


def test_load_reference_runs_the_whole_path(model):
    settings, _, file, yaml = model
    loaded = load_reference(file, yaml)
    tokens = loaded.resampler(loaded.image(np.linspace(-1, 1, 8 * 6 * 3, dtype=np.float32).reshape(1, 8, 6, 3)))
    assert tokens.shape == (1, 16 * settings.resampler.frames, 6)
    context = np.concatenate([np.ones((1, 3, 6)), np.tile(tokens, (1, 3 // settings.resampler.frames, 1))], 1)
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 4, 24)).astype(np.float32)
    run = nnx.jit(lambda m, x, context: m(x, np.array([500]), context, np.array([8.0])))
    out = run(loaded.unet, x, context)
    assert out.shape == (1, 3, 4, 4, 12) and np.isfinite(out).all()
    assert np.abs(out - run(loaded.unet, x, np.concatenate([context[:, :3], context[:, 3:] + 1], 1))).max() > 1e-3


def test_an_openclip_file_brings_either_tower(tmp_path):
    state = {name.replace("embedder.model.", ""): t for name, t in checkpoint(LARGE).items() if name.startswith(image.prefix)}
    text = TextConfig(vocab_size=8, context_length=3, width=64, layers=2, heads=1)
    rng = np.random.default_rng(0)
    for path, leaf in Network.of(reference.constructors(dataclasses.replace(LARGE, text=text), np.float32)["text"]).shapes.items():
        state[names.torch_name(path)] = rng.normal(size=names.torch_shape(path, leaf.shape)).astype(np.float32)
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    assert import_checkpoint("openclip_image", tmp_path / "x.safetensors", tmp_path / "in")[0].keys() == {"image"}
    assert import_checkpoint("openclip", tmp_path / "x.safetensors", tmp_path / "in")[0].keys() == {"text"}
    del state["visual.proj"]
    safetensors.numpy.save_file(state, tmp_path / "y.safetensors")
    assert import_checkpoint("openclip", tmp_path / "y.safetensors", tmp_path / "other")[0].keys() == {"text"}
    with pytest.raises(UserError, match=r"no image tower.*there is no proj"):
        import_checkpoint("openclip_image", tmp_path / "y.safetensors", tmp_path / "third")


def test_a_text_to_video_model_grows_image_attention(tmp_path):
    """Nothing that is new changes what the model computes at step 0, and the new layers can learn."""
    plain = dataclasses.replace(LARGE, unet=dataclasses.replace(LARGE.unet, in_channels=12, image_cross_attention=False))
    state = {name: tensor for name, tensor in checkpoint(plain).items() if name.startswith(unet.prefix)}
    safetensors.numpy.save_file(state, tmp_path / "vc.safetensors")
    import_checkpoint("videocrafter", tmp_path / "vc.safetensors", tmp_path / "in")
    random = dataclasses.replace(LARGE, image=dataclasses.replace(LARGE.image, kind="random"))
    config = run_config(random, init_from=str(tmp_path / "in"))
    networks = Networks.of(config)
    params = initial_weights(config, networks).denoiser
    new = {name for name in params if IMAGE_PATH.fullmatch(name)}
    assert new and not any(params[name].any() for name in new if ".to_v_ip." in name)
    assert all(params[name].any() for name in new if ".to_k_ip." in name)

    x = np.random.default_rng(1).normal(size=(1, 3, 4, 4, 24)).astype(np.float32)
    text, tokens = np.ones((1, 3, 6), np.float32), np.random.default_rng(2).normal(size=(1, 48, 6)).astype(np.float32)
    t, fps = np.array([500]), np.array([8.0], np.float32)
    context = np.concatenate([text, tokens], 1)

    @jax.jit
    def run(params):
        def loss(params):
            out = networks.denoise(params, x[..., :12], t, context, fps, x[..., 12:])
            return (out**2).mean(), out

        gradient, out = jax.grad(loss, has_aux=True)(params)
        return out, {name: gradient[name] for name in new}

    out, gradient = run(params)
    before = nnx.jit(lambda m: m(x[..., :12], t, text, fps))(load_reference(tmp_path / "vc.safetensors").unet)
    np.testing.assert_allclose(out, before, rtol=1e-5, atol=1e-5)
    assert all(np.abs(gradient[name]).max() > 0 for name in new if ".to_v_ip." in name)


def test_faults_of_every_network_in_one_error(tmp_path):
    state = checkpoint(LARGE)
    del state[unet.prefix + "out.2.bias"], state[image.prefix + "ln_pre.bias"], state[resampler.prefix + "norm_out.weight"]
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"(?s)U-Net.*out\.2\.bias.*image tower.*ln_pre\.bias.*resampler.*norm_out\.weight"):
        import_checkpoint("dynamicrafter", tmp_path / "x.safetensors", tmp_path / "in")
    del state[resampler.prefix + "latents"]
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"(?s)resampler.*no latents.*out\.2\.bias.*ln_pre\.bias"):  # what it is cannot be told either
        import_checkpoint("dynamicrafter", tmp_path / "x.safetensors", tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
