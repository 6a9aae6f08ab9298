"""Weights: PyTorch -> JAX -> PyTorch is the identity, and the names are those of the published networks."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from motif_jax.config import AutoencoderConfig, TextConfig, UNetConfig
from motif_jax.interop import names
from motif_jax.interop.tables import autoencoder, openclip, unet
from motif_jax.models.autoencoder import make_autoencoder
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D

SMALL = UNetConfig(in_channels=3, out_channels=2, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,),
                   num_head_channels=4, context_dim=6, norm_groups=4)  # fmt: skip


def shapes(make):
    """The parameters of a network without its values."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def small_template():
    return shapes(lambda: UNet3D(SMALL, rngs=nnx.Rngs(0)))


def random_tensors(template, seed=0):
    """Tensors in PyTorch's layout for every parameter of `template`."""
    rng = np.random.default_rng(seed)
    paths = [(names.dotted(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(template)]
    return {names.torch_name(path): rng.normal(size=names.torch_shape(path, shape)).astype(np.float32) for path, shape in paths}


def read(tree):
    return jax.tree.map(np.asarray, tree)


FULL = {
    "unet": (lambda: UNet3D(UNetConfig(in_channels=4), rngs=nnx.Rngs(0)), unet.prefix, 1_413_284_420, 1484),
    "autoencoder": (lambda: make_autoencoder(AutoencoderConfig(), nnx.Rngs(0)), autoencoder.prefix, 83_653_863, 248),
    "text": (lambda: make_text_tower(TextConfig(), nnx.Rngs(0)), openclip.prefix, 354_032_641, 294),
}


@pytest.mark.parametrize("network", FULL)
def test_full_size_counts(network):
    make, _, parameters, tensors = FULL[network]
    leaves = jax.tree.leaves(shapes(make))
    assert (sum(int(np.prod(leaf.shape)) for leaf in leaves), len(leaves)) == (parameters, tensors)


@pytest.mark.parametrize("network", FULL)
def test_full_size_names_and_shapes(network, shared):
    make, prefix, _, _ = FULL[network]
    published = json.loads((shared / "golden/videocrafter2/keys.json").read_text())
    published = {name: tuple(shape) for name, shape in names.select(published, prefix).items()}
    ours = {names.dotted(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(shapes(make))}
    assert {names.torch_name(path): names.torch_shape(path, shape) for path, shape in ours.items()} == published


def test_image_channels_change_one_tensor():
    """Four more input channels (x-cat) add 2880 weights each to the first convolution and touch nothing else."""
    four, eight = (shapes(lambda c=c: UNet3D(UNetConfig(in_channels=c), rngs=nnx.Rngs(0))) for c in (4, 8))
    changed = {
        names.dotted(path): int(np.prod(b.shape) - np.prod(a.shape))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(four), jax.tree.leaves(eight), strict=True)
        if a.shape != b.shape
    }
    assert changed == {"input_blocks.0.0.kernel": 11_520}


def test_there_and_back_is_the_identity():
    tensors = random_tensors(small_template())
    again = read(names.to_torch(unet.to_jax(tensors, small_template())))
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].tobytes() == tensor.tobytes() and again[name].shape == tensor.shape, name


def test_layouts():
    """Each kind of tensor by its own axes: a dense kernel is transposed, a convolution's axes move to the back."""
    tensors = random_tensors(small_template())
    params = read(unet.to_jax(tensors, small_template()))
    block = params["input_blocks"][1]
    np.testing.assert_array_equal(
        block[0]["in_layers"][2]["kernel"][2, 0, 5, 7], tensors["input_blocks.1.0.in_layers.2.weight"][7, 5, 2, 0]
    )
    temporal = tensors["input_blocks.1.0.temopral_conv.conv2.3.weight"]
    np.testing.assert_array_equal(block[0]["temopral_conv"]["conv2"][3]["kernel"][2, 0, 0, 1, 6], temporal[6, 1, 2, 0, 0])
    to_k = block[1]["transformer_blocks"][0]["attn2"]["to_k"]["kernel"]
    np.testing.assert_array_equal(to_k, tensors["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].T)
    np.testing.assert_array_equal(params["init_attn"][0]["proj_in"]["kernel"][0], tensors["init_attn.0.proj_in.weight"][:, :, 0].T)


def test_template_may_be_flat_nested_or_state():
    tensors = random_tensors(small_template())
    nested = read(unet.to_jax(tensors, small_template()))
    flat_template = {names.dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(small_template())}
    flat = read(unet.to_jax(tensors, flat_template))
    state = read(unet.to_jax(tensors, nnx.state(nnx.eval_shape(lambda: UNet3D(SMALL, rngs=nnx.Rngs(0))), nnx.Param)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(nested):
        np.testing.assert_array_equal(flat[names.dotted(path)], leaf)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(nested)
    assert names.to_torch(state).keys() == names.to_torch(flat).keys() == tensors.keys()


def test_every_mismatch_is_listed_at_once():
    tensors = random_tensors(small_template())
    del tensors["out.2.bias"], tensors["time_embed.0.weight"]
    tensors["out.0.weight"] = tensors["out.0.weight"][:3]
    tensors["middle_block.9.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        unet.to_jax(tensors, small_template())
    message = str(error.value)
    for text in (
        "2 missing",
        "out.2.bias [2]",
        "time_embed.0.weight [32, 8]",
        "1 left over",
        "middle_block.9.weight",
        "[3] in the file, [8]",
    ):
        assert text in message, message


def test_half_precision_is_widened_exactly():
    tensors = {name: tensor.astype(np.float16) for name, tensor in random_tensors(small_template()).items()}
    params = read(unet.to_jax(tensors, small_template()))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    for name, tensor in read(names.to_torch(params)).items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


def test_dynamicrafter_256_name_of_the_frame_rate_mlp():
    tensors = random_tensors(small_template())
    old = {name.replace("fps_embedding", "framestride_embed"): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    assert names.to_torch(unet.to_jax(old, small_template())).keys() == tensors.keys()


def test_text_tower_ignores_buffers_and_the_image_tower():
    config = TextConfig(vocab_size=11, context_length=5, width=8, layers=2, heads=2)
    template = shapes(lambda: make_text_tower(config, nnx.Rngs(0)))
    tensors = random_tensors(template)
    extra = {"attn_mask": np.zeros((5, 5), np.float32), "visual.conv1.weight": np.zeros(1, np.float32)}
    again = read(names.to_torch(openclip.to_jax(tensors | extra, template)))
    assert again.keys() == tensors.keys() and again["logit_scale"].shape == ()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_autoencoder_ignores_the_loss_and_the_average():
    """Of the average a pruned file keeps its two counters alone."""
    template = shapes(lambda: make_autoencoder(AutoencoderConfig(ch=32, ch_mult=(1,), factor=1, num_res_blocks=1), nnx.Rngs(0)))
    tensors = random_tensors(template)
    extra = {name: np.zeros((), np.float32) for name in ("loss.logvar", "model_ema.decay", "model_ema.num_updates")}
    assert names.to_torch(autoencoder.to_jax(tensors | extra, template)).keys() == tensors.keys()


def test_autoencoder_there_and_back():
    template = shapes(lambda: make_autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2), factor=2, num_res_blocks=1), nnx.Rngs(0)))
    tensors = random_tensors(template)
    again = read(names.to_torch(autoencoder.to_jax(tensors, template)))
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)
