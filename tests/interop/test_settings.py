"""The reference's YAML -> our configuration and back, and the architecture that shapes imply."""

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from motif_jax.config import AutoencoderConfig, DiffusionConfig, ImageConfig, TextConfig, UNetConfig
from motif_jax.errors import UserError
from motif_jax.interop import architecture, names
from motif_jax.interop.files import Lazy
from motif_jax.interop.settings import Settings, read_yaml, to_yaml
from motif_jax.models.autoencoder import make_autoencoder
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D

# The facts of the reference's inference_t2v_512_v2.0.yaml and of DynamiCrafter's 512 configuration.
VIDEOCRAFTER = """
model:
  target: lvdm.models.ddpm3d.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.012
    timesteps: 1000
    channels: 4
    image_size: [40, 64]
    scale_factor: 0.18215
    uncond_type: empty_seq
    use_scale: true
    scale_b: 0.7
    unet_config:
      target: lvdm.modules.networks.openaimodel3d.UNetModel
      params:
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_head_channels: 64
        transformer_depth: 1
        context_dim: 1024
        use_linear: true
        use_checkpoint: true
        temporal_conv: true
        temporal_attention: true
        temporal_selfatt_only: true
        use_relative_position: false
        use_causal_attention: false
        temporal_length: 16
        addition_attention: true
        fps_cond: true
    first_stage_config:
      target: lvdm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig: {double_z: true, z_channels: 4, resolution: 512, in_channels: 3, out_ch: 3, ch: 128, ch_mult: [1, 2, 4, 4],
                   num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: lvdm.modules.encoders.condition.FrozenOpenCLIPEmbedder
      params: {freeze: true, layer: penultimate}
"""
DYNAMICRAFTER = (
    VIDEOCRAFTER.replace("use_scale: true\n    scale_b: 0.7", "use_dynamic_rescale: true\n    base_scale: 0.7\n    parameterization: v\n"
                         "    rescale_betas_zero_snr: true")
    .replace("in_channels: 4\n", "in_channels: 8\n")
    .replace("fps_cond: true", "fs_condition: true\n        default_fs: 24\n        image_cross_attention: true\n        dropout: 0.1")
)  # fmt: skip


def read(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    return read_yaml(tmp_path / "x.yaml")


def test_videocrafter2(tmp_path):
    expected = Settings(
        UNetConfig(in_channels=4),
        AutoencoderConfig(),
        TextConfig(),
        DiffusionConfig(prediction="eps", zero_terminal_snr=False, base_scale=0.7),
    )
    assert read(tmp_path, VIDEOCRAFTER) == expected


def test_dynamicrafter(tmp_path):
    found = read(tmp_path, DYNAMICRAFTER)
    assert found.unet == UNetConfig(in_channels=8, dropout=0.1, image_cross_attention=True)
    assert found.diffusion == DiffusionConfig(prediction="v", zero_terminal_snr=True, base_scale=0.7)


def test_a_setting_that_is_unknown_but_off(tmp_path):
    text = VIDEOCRAFTER.replace("temporal_length: 16", "temporal_length: 16\n        mixture_of_experts: false")
    assert read(tmp_path, text).unet == UNetConfig(in_channels=4)


def test_no_rescale(tmp_path):
    assert read(tmp_path, VIDEOCRAFTER.replace("use_scale: true", "use_scale: false")).diffusion.base_scale == 1.0


def test_numbers_without_a_dot(tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    assert read(tmp_path, VIDEOCRAFTER.replace("0.00085", "1e-3")).diffusion.beta_start == 1e-3


SMALL_UNET = UNetConfig(in_channels=9, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
                        num_head_channels=8, context_dim=16, temporal_attention=False, fps_cond=False)  # fmt: skip
RUNS = {
    "published": Settings(UNetConfig(), AutoencoderConfig(), TextConfig(), DiffusionConfig(prediction="eps", zero_terminal_snr=False)),
    "v": Settings(UNetConfig(dropout=0.1), AutoencoderConfig(), TextConfig(), DiffusionConfig(base_scale=0.7)),
    "small": Settings(
        SMALL_UNET, AutoencoderConfig(ch=32), TextConfig(width=16, layers=3, heads=4), DiffusionConfig(prediction="x0", num_timesteps=100)
    ),
    "unknown heads": Settings(
        UNetConfig(image_cross_attention=True),
        AutoencoderConfig(),
        TextConfig(width=16, layers=3, heads=0),
        DiffusionConfig(),
        ImageConfig(width=24, layers=2, heads=0),
    ),
    "ours": Settings(
        UNetConfig(in_channels=24, out_channels=12, norm_groups=8, context_dim=8, image_cross_attention=True),
        AutoencoderConfig(kind="pixel", factor=2, z_channels=12, scale_factor=1.0),
        TextConfig(kind="words", vocab_size=64, context_length=8, width=8),
        DiffusionConfig(prediction="flow"),
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_there_and_back(tmp_path, run):
    assert read(tmp_path, to_yaml(RUNS[run])) == RUNS[run]


def test_what_the_published_yaml_says_is_what_we_write():
    """Every setting of the published file appears in ours, under the same name and with the same value."""
    ours = yaml.safe_load(to_yaml(Settings(UNetConfig(in_channels=4), AutoencoderConfig(), TextConfig(), RUNS["published"].diffusion)))

    def leaves(tree, path=()):
        if isinstance(tree, dict):
            return {k: v for key, value in tree.items() for k, v in leaves(value, (*path, key)).items()}
        return {path: tree}

    published, written = leaves(yaml.safe_load(VIDEOCRAFTER)), leaves(ours)
    other = {("model", "params", *path) for path in [("image_size",), ("use_scale",), ("scale_b",)]}
    other.add(("model", "params", "unet_config", "params", "use_checkpoint"))
    assert {k: written.get(k) for k in published if k not in other} == {k: v for k, v in published.items() if k not in other}


def test_every_mistake_is_listed(tmp_path):
    wrong = VIDEOCRAFTER
    for old, new in {
        "use_linear: true": "use_linear: false",
        "num_res_blocks: 2\n        channel": "num_res_blocks: two\n        channel",
        "temporal_length: 16": "temporal_length: 16\n        mixture_of_experts: 8",
        "layer: penultimate": "layer: last",
        "double_z: true": "double_z: false",
        "        model_channels: 320\n": "",
        "linear_end: 0.012": "linear_end: much",
    }.items():
        assert old in wrong
        wrong = wrong.replace(old, new)
    with pytest.raises(UserError) as error:
        read(tmp_path, wrong)
    lines = str(error.value).splitlines()
    assert len(lines) == 8 and "x.yaml: this YAML does not describe" in lines[0]
    for text in (
        "use_linear=False: only True is supported",
        "num_res_blocks='two': must be int",
        "mixture_of_experts: unknown here",
        "layer='last'",
        "ddconfig.double_z=False",
        "there is no model.params.unet_config.params.model_channels",
        "linear_end='much': must be a number",
    ):
        assert any(text in line for line in lines), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "cannot be read as YAML"),
        ("- 1\n- 2", "is not a YAML of the reference: there is no model"),
        ("model: {params: {}}", r"is not a YAML of the reference: model\.params is {}: must be a group of settings"),
        ("model: {params: {unet_config: {params: [1]}}}", r"unet_config\.params is \[1\]: must be a group of settings"),
        ("model: {params: {unet_config: {params: {}}}}", r"unet_config\.params is {}: must be a group of settings"),
        ("model: {params: {timesteps: 1000}}", "there is no unet_config"),
        (VIDEOCRAFTER.replace("channels: 64", "channels: 640"), "num_head_channels=640: must divide the level width 320$"),
        (VIDEOCRAFTER.replace("penultimate", "penultimate, text_cfg: 3"), "text_cfg=3: must be a group of settings$"),
        ("!!python/object/apply:os.mkdir [x]", "cannot be read as YAML"),
    ],
)
def test_a_file_of_another_kind(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def tensors(make):
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    paths = [(names.dotted(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    return {names.torch_name(p): Lazy(names.torch_shape(p, s), np.dtype(np.float32), lambda: None) for p, s in paths}


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(in_channels=4),
        UNetConfig(in_channels=8, image_cross_attention=True),
        UNetConfig(in_channels=8, model_channels=32, num_res_blocks=1, num_head_channels=8, context_dim=64),
        UNetConfig(in_channels=9, out_channels=3, model_channels=64, channel_mult=(1, 3), attention_resolutions=(2,), transformer_depth=2,
                   fps_cond=False),
        UNetConfig(model_channels=64, temporal_conv=False, temporal_attention=False, addition_attention=False),
        UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), num_head_channels=8, context_dim=6),
    ],
)  # fmt: skip
def test_unet_from_shapes(config):
    assert architecture.unet_config(tensors(lambda: UNet3D(config, rngs=nnx.Rngs(0)))) == config


@pytest.mark.parametrize(
    "config", [AutoencoderConfig(), AutoencoderConfig(ch=32, ch_mult=(1, 2), factor=2, num_res_blocks=1, z_channels=3)]
)
def test_autoencoder_from_shapes(config):
    assert architecture.autoencoder_config(tensors(lambda: make_autoencoder(config, nnx.Rngs(0)))) == config


def test_text_tower_from_shapes():
    assert architecture.text_config(tensors(lambda: make_text_tower(TextConfig(), nnx.Rngs(0)))) == TextConfig()
    small = TextConfig(vocab_size=11, context_length=5, width=8, layers=2, heads=2)
    found = architecture.text_config(tensors(lambda: make_text_tower(small, nnx.Rngs(0))))
    assert (found.width, found.layers, found.vocab_size, found.context_length, found.heads) == (8, 2, 11, 5, 0)


def test_no_network_in_the_shapes():
    with pytest.raises(UserError, match=r"no U-Net in the reference's names: there is no input_blocks\.0\.0\.weight"):
        architecture.unet_config({"a": np.zeros(2)})
