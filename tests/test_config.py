"""Configuration: every mistake in one error, and the shipped files are valid."""

import pathlib
import runpy

import pytest
from ml_collections import ConfigDict

from motif_jax import config as c
from motif_jax.consistency import surprises
from motif_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def test_every_mistake_is_named_at_once():
    given = {"stepz": 1, "loss": {"heatmap": "flo", "motion_weight": "x", "sharpness": -1}, "unet": {"channel_mult": [1, 2.5]}, "mesh": 3}
    with pytest.raises(c.ConfigError) as error:
        c.from_config_dict(given)
    text = str(error.value)
    assert "6 mistakes" in text
    for part in (
        "stepz: no such field; did you mean steps?",
        "loss.heatmap='flo': must be one of 'flow'",
        "loss.motion_weight='x': must be float",
        "loss.sharpness=-1.0: must be in [0.0, inf]",
        "unet.channel_mult=[1, 2.5]: must be a list of int",
        "mesh=3: must be a group of fields",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": {"height": 100}}, "data.height=100: must be a multiple of 64"),
        ({"condition": {"image": "first"}}, "unet.in_channels=8: must be 9"),
        ({"diffusion": {"prediction": "eps"}}, "zero_terminal_snr=True: impossible with prediction='eps'"),
        ({"diffusion": {"loss_space": "flow"}}, "diffusion.loss_space='flow'"),
        ({"diffusion": {"prediction": "flow"}, "sample": {"eta": 0.5}}, "sample.eta=0.5: flow matching's steps add no noise"),
        ({"steps": 100, "profile": {"start": 100}}, "profile.start=100: no step comes after it, steps=100"),
        ({"backbone": "dit", "unet": {"image_cross_attention": True}}, "unet.image_cross_attention=True: backbone='dit' has none"),
        ({"text": {"width": 512}}, "unet.context_dim=1024: must equal text.width=512"),
        ({"unet": {"norm_groups": 48}}, "unet.norm_groups=48: must divide unet.model_channels=320"),
        ({"unet": {"norm_groups": 640, "channel_mult": [2]}}, "unet.norm_groups=640: must divide unet.model_channels=320"),
        ({"unet": {"attention_resolutions": [3]}}, "unet.attention_resolutions=(3,): must be of 1, 2, 4, ..."),
        ({"unet": {"channel_mult": [1, 0]}}, "unet.channel_mult=(1, 0): must name at least one level, each of 1 or more"),
        ({"autoencoder": {"ch": 40}}, "autoencoder.ch, ch_mult: the level width 40 must be a multiple of 32"),
        ({"text": {"heads": 3}}, "text.heads=3: must divide text.width=1024"),
        ({"grad_accumulation": 7}, "grad_accumulation=7: must divide batch_size=64"),
        ({"init_from": "s3://bucket/weights"}, "init_from=s3://bucket/weights: weights are read from file systems and gs:// alone"),
        ({"ema": {"decay": 1.0, "warmup": False}}, "ema.decay=1.0: the average would never move"),
        ({"autoencoder": {"kind": "pixel"}}, "a pixel autoencoder of factor 8 has 192"),
        ({"prepare": {"flow_stride": 4}}, "RAFT's grid is 8 pixels"),
        ({"prepare": {"frame_stride_min": 7}}, "must not exceed prepare.frame_stride_max=6"),
        ({"prepare": {"flow_stride": 48}}, "data.height=320: must be a multiple of prepare.flow_stride=48"),
        ({"prepare": {"motion_min": 0.2, "motion_max": 0.1}}, "prepare.motion_max=0.1: must exceed prepare.motion_min=0.2"),
        ({"autoencoder": {"factor": 4}}, "autoencoder.factor=4: ch_mult (1, 2, 4, 4) gives 8"),
        ({"unet": {"out_channels": 3}}, "unet.out_channels=3: must equal autoencoder.z_channels=4"),
        ({"unet": {"num_head_channels": 48}}, "unet.num_head_channels=48: must divide the level width 320"),
        ({"backbone": "dit", "dit": {"patch": [1, 2]}}, "dit.patch=(1, 2): must be (frames, rows, columns)"),
        ({"backbone": "dit", "dit": {"width": 100}}, "dit.num_head_channels=64: must divide dit.width=100"),
        ({"backbone": "dit", "dit": {"patch": [3, 2, 2]}}, "data.frames=16: must be a multiple of dit.patch's 3"),
        ({"unet": {"image_cross_attention": True}, "image": {"size": 225}}, "image.patch=14: must divide image.size=225"),
        ({"unet": {"image_cross_attention": True}, "image": {"heads": 3}}, "image.heads=3: must divide image.width=1280"),
        ({"diffusion": {"beta_start": 0.1}}, "diffusion.beta_start=0.1: must not exceed diffusion.beta_end=0.012"),
        ({"diffusion": {"beta_end": 0.9}}, "diffusion.beta_end=0.9: after num_timesteps=1000, alpha_bar is less than 1e-37"),
        ({"eval": {"buckets": 1001}}, "eval.buckets=1001: at most diffusion.num_timesteps=1000"),
        ({"diffusion": {"prediction": "flow", "base_scale": 0.7}}, "base_scale=0.7: flow matching has no dynamic rescale"),
        ({"mesh": {"tensor": 0}}, "mesh.tensor=0: must be 1 or more, or -1 for the devices that are left"),
        ({"mesh": {"fsdp": -1}}, "mesh.data=-1, mesh.fsdp=-1: only one axis can take the devices that are left"),
        ({"sample": {"steps": 1001}}, "sample.steps=1001: at most diffusion.num_timesteps=1000"),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(c.ConfigError) as error:
        c.from_config_dict(given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be finite in float32"),
        ({"loss": {"motion_weight": float("nan")}}, "loss.motion_weight=nan: must be finite in float32"),
        ({"sample": {"guidance": 10**400}}, f"sample.guidance={10**400}: must be finite in float32"),
        ({"diffusion": {"beta_start": 0.0}}, "diffusion.beta_start=0.0: must be in [1e-06, 0.999]"),
        ({"optimizer": {"warmup_steps": 2**31}}, "optimizer.warmup_steps=2147483648: must be in [0, 2147483647]"),
        ({"optimizer": {"b1": 1.0}}, "optimizer.b1=1.0: must be in [0.0, 0.999999]"),
        ({"optimizer": {"eps": 0.0}}, "optimizer.eps=0.0: must be in [1e-20, inf]"),
        ({"seed": 2**32}, "seed=4294967296: must be in [0, 4294967295]"),  # whose key would be that of 0
        ([1], "a configuration must be a group of fields, not list"),
    ],
)
def test_one_mistake_is_one_line(given, message):
    with pytest.raises(c.ConfigError) as error:
        c.from_config_dict(given)
    assert str(error.value) == message


@pytest.mark.parametrize("content", [b"[1]", b'{"steps": "x"}', b"\xff\xfe"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(c.ConfigError) as error:
        c.read_json(tmp_path / "config.json")
    assert str(error.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({}, None),
        ({"steps": 0, "optimizer": {"warmup_steps": 5, "schedule": "cosine"}}, None),
        ({"steps": 5, "optimizer": {"warmup_steps": 5}}, None),
        ({"steps": 4, "optimizer": {"warmup_steps": 5}}, "optimizer.warmup_steps=5: the learning rate still rises at the end, steps=4"),
        ({"steps": 5, "optimizer": {"warmup_steps": 5, "schedule": "cosine"}}, "optimizer.schedule='cosine': never decays"),
        ({"ema": {"warmup": False}}, None),
        (
            {"steps": 400, "ema": {"warmup": False}},
            "ema.decay=0.9999 without ema.warmup: the average, which is",
        ),
        ({"condition": {"text_drop": 0.0}, "init_from": "W"}, None),
        ({"condition": {"text_drop": 0.0}, "sample": {"guidance": 1.0}}, None),
        ({"condition": {"text_drop": 0.0}}, "condition.text_drop=0.0: the empty sentence is never trained"),
        ({"condition": {"text_drop": 1.0}}, "condition.text_drop=1.0: no sentence is ever seen"),
        ({"checkpoint": {"every": 1000, "keep_every": 500}}, None),
        (
            {"checkpoint": {"every": 1000, "keep_every": 2500}},
            "checkpoint.keep_every=2500: of the checkpoints at multiples of checkpoint.every=1000 it keeps only those of 5000",
        ),
        ({"backbone": "dit", "unet": {"dropout": 0.1}}, "unet.dropout=0.1: backbone='dit' has none"),
        ({"sample": {"guidance": 0.0}}, "sample.guidance=0: samples do not see their sentence at all"),
    ],
)
def test_surprises(given, start):
    found = surprises(c.from_config_dict(given))
    assert len(found) == (start is not None) and all(text.startswith(start) for text in found)


def test_bool_is_no_number():
    with pytest.raises(c.ConfigError, match="steps=True: must be int"):
        c.from_config_dict({"steps": True})


@pytest.mark.parametrize("size", ["paper", "small", "tiny"])
def test_motif_is_valid_and_survives_json(size):
    config = c.load_config(f"configs/motif.py:{size}")
    assert c.from_json(c.to_json(config)) == config


def test_override():
    config = c.load_config("configs/motif.py:tiny")
    changed = c.override(config, {"data.path": "DATA", "steps": 3})
    assert (changed.data.path, changed.steps) == ("DATA", 3)
    assert c.override(changed, {"data.path": config.data.path, "steps": config.steps}) == config
    with pytest.raises(c.ConfigError, match=r"(?s)sampler: no such field.*steps=-1: must be in.*data\.pth: no such field"):
        c.override(config, {"data.pth": "DATA", "steps": -1, "sampler.steps": 3})
    with pytest.raises(c.ConfigError, match="steps"):
        c.override(config, {"steps.more": 3})


def test_unknown_size():
    with pytest.raises(UserError, match="use paper, small or tiny"):
        c.load_config("configs/motif.py:huge")


def test_paper_values():
    """Training settings of the paper, and sizes of VideoCrafter2's YAML."""
    config = c.load_config("configs/motif.py")
    assert (config.steps, config.batch_size, config.learning_rate) == (32_000, 64, 5e-5)
    assert (config.data.frames, config.data.height, config.data.width) == (16, 320, 512)
    assert (config.diffusion.prediction, config.loss.motion_weight, config.condition.text_drop) == ("v", 1.0, 0.1)
    assert (config.latent_height, config.latent_width) == (40, 64)
    assert (config.unet.model_channels, config.unet.channel_mult, config.unet.in_channels) == (320, (1, 2, 4, 4), 8)
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)  # copies of the state do not fit a v5e or v6e chip


def test_configuration_files(tmp_path):
    assert c.load_config("configs/quickstart.py").name == "quickstart"
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "raising.py").write_text("1 / 0")
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {'steps': -1}")
    (tmp_path / "bad.json").write_text('{"steps": -1}')
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"')
    for name, message in (
        ("none.py", "none.py: cannot be loaded"),
        ("empty.py", "get_config"),
        ("broken.py", "invalid"),
        ("raising.py", "raising.py: cannot be loaded: .*division by zero"),
        ("wrong.py", "wrong.py: .*steps"),
        ("none.json", "No such"),
        ("bad.json", "/bad.json: .*steps"),
        ("latin.json", "/latin.json is not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            c.load_config(str(tmp_path / name))


ARMS = runpy.run_path(str(ROOT / "configs/ablation.py"))["ARMS"]


@pytest.mark.parametrize("name", [*(path.stem for path in (ROOT / "configs").glob("*.py")), *(f"ablation:{arm}" for arm in ARMS)])
def test_shipped_configs_are_valid_and_locked(name):
    file, *argument = name.split(":")
    config = runpy.run_path(str(ROOT / f"configs/{file}.py"))["get_config"](*argument)
    assert isinstance(config, ConfigDict) and config.is_locked
    assert not surprises(c.from_config_dict(config))
