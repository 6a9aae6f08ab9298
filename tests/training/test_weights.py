"""Where a run's weights come from (an import, another run) and where they go (a PyTorch file)."""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import lzma
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image

from motif_jax.animation import Animator, animate_list
from motif_jax.config import CheckpointConfig, from_config_dict, to_dict, to_json
from motif_jax.errors import UserError
from motif_jax.interop.imported import Import, import_checkpoint
from motif_jax.interop.names import to_torch
from motif_jax.interop.settings import Settings, read_yaml, to_yaml
from motif_jax.interop.tables import autoencoder, unet
from motif_jax.models.networks import Networks
from motif_jax.training import weights, workdir
from motif_jax.training.checkpoint import Checkpoints
from motif_jax.training.export import export
from motif_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEEING = {  # by image cross attention
    "unet": {"image_cross_attention": True},
    "image": {"kind": "random", "size": 8, "patch": 4, "width": 16, "layers": 1, "heads": 2},
    "resampler": {"width": 16, "depth": 1, "heads": 2, "head_width": 64, "frames": 4},
}


@pytest.fixture(scope="module")
def tiny(tiny):
    """Without the layers over frames, whose weights are named and kept as the others' are: half the arrays."""
    fewer = {"temporal_conv": False, "temporal_attention": False}
    return lambda **overrides: tiny(**overrides | {"unet": fewer | overrides.get("unet", {})})


def changed(config, **fields):
    return from_config_dict({**to_dict(config), **fields})


def random_params(networks, seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32) for path, leaf in networks.denoiser.shapes.items()}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, tiny):
    """A function that writes the work directory of a run with the given configuration: (directory, raw weights, average)."""

    def make(**overrides):
        config = tiny(**overrides)
        directory = tmp_path_factory.mktemp("run")
        networks = Networks.of(config)
        raw, average = random_params(networks, 1), random_params(networks, 2) if config.ema.decay else {}
        (directory / "config.json").write_text(to_json(config))
        checkpoints = Checkpoints(directory, CheckpointConfig())
        state = TrainState(jnp.asarray(7), jax.tree.map(jnp.asarray, raw), jax.tree.map(jnp.asarray, average), {})
        checkpoints.save(7, state, {"step": 7}, {})
        checkpoints.close()
        return directory, raw, average

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), tensor, err_msg=name)


def torch_layout(params):
    return {unet.prefix + name: np.asarray(tensor) for name, tensor in to_torch(params).items()}


def test_a_checkpoint_of_its_own(make_run, monkeypatch):
    """WORKDIR/checkpoints/STEP, also by a relative path, is that step and not the newest."""
    directory, raw, _ = make_run()
    checkpoints = Checkpoints(directory, CheckpointConfig())
    later = jax.tree.map(lambda x: jnp.asarray(x) + 1, raw)
    checkpoints.save(9, TrainState(jnp.asarray(9), later, later, {}), {"step": 9}, {})
    checkpoints.close()
    assert_same(weights.load(directory / "checkpoints" / "7", "raw")["denoiser"], raw)
    assert_same(weights.load(directory, "raw")["denoiser"], later)
    monkeypatch.chdir(directory / "checkpoints")
    assert_same(weights.load("7", "raw")["denoiser"], raw)
    with pytest.raises(UserError, match=r"holds neither config\.json"):
        weights.load("8")


def test_a_run_may_have_the_name_of_a_checkpoint(run, tmp_path):
    directory = tmp_path / "checkpoints" / "3"
    shutil.copytree(run[0], directory)
    assert_same(weights.load(directory, "raw")["denoiser"], run[1])
    assert_same(weights.load(directory / "checkpoints" / "7", "raw")["denoiser"], run[1])


def test_an_animator_says_which_checkpoint_it_loaded(make_run, monkeypatch):
    """Also when the run has a newer one by then; the same one by its own directory gives the same settings."""
    directory, _, average = make_run()
    later = jax.tree.map(lambda x: jnp.asarray(x) + 1, average)
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(9, TrainState(jnp.asarray(9), later, later, {}), {"step": 9}, {})
    checkpoints.close()
    own = Animator.load(directory / "checkpoints" / "7").settings
    steps = iter([7, 9])
    monkeypatch.setattr(weights, "latest_step", lambda _: next(steps))
    animator = Animator.load(directory)
    assert_same(animator.params, average)
    assert animator.settings == own and own["step"] == 7 and own["model"] == str(directory.resolve())
    assert Animator.load(directory, animator.config).settings["step"] == 9


def test_the_options_of_an_animator(run):
    """Frames of a film of 24 a second that lie four apart are shown 6 a second; without options the run's own settings hold."""
    own, other = Animator.load(run[0]).settings, Animator.load(run[0], steps=3, guidance=2.0, frame_stride=4).settings
    options = ("steps", "guidance", "fps_condition", "fps")
    assert [own[name] for name in options] == [2, 7.5, 8.0, 8.0] and [other[name] for name in options] == [3, 2.0, 6.0, 8.0]
    with pytest.raises(UserError, match="--steps=1001: at most 1000, the timesteps of training"):
        Animator.load(run[0], steps=1001)


def test_a_frame_stride_that_the_model_is_not_told_of_changes_nothing(make_run, capsys):
    """Not even the settings of its clips, which would then be refused beside others that are equal."""
    directory = make_run(unet={"fps_cond": False})[0]
    animator = Animator.load(directory, frame_stride=4)
    assert "--frame_stride=4 changes nothing: this model is not told the frame rate (unet.fps_cond=False)" in capsys.readouterr().out
    assert animator.fps == animator.config.sample.fps and animator.settings == Animator.load(directory).settings


def test_a_run_with_a_kernel_of_other_devices_can_be_sampled(make_run):
    """Trained on a TPU, sampled here; what a caller asks for is left as it is."""
    directory = make_run(attention="splash")[0]
    animator = Animator.load(directory)
    assert animator.config.attention == "auto"
    (clip,) = animator([np.zeros((16, 16, 3), np.uint8)], ["a square"], [0])
    assert clip.shape == (animator.config.data.frames, animator.config.data.height, animator.config.data.width, 3)
    assert Animator.load(make_run(attention="xla")[0]).config.attention == "xla"


def test_raw_and_averaged_weights(run, tmp_path):
    directory, raw, average = run
    for kind, expected in (("raw", raw), ("ema", average), ("best", average)):
        assert_same(weights.load(directory, kind)["denoiser"], expected)
        _, count, remarks = export(directory, tmp_path / f"{kind}.safetensors", kind)
        assert_same(safetensors.numpy.load_file(tmp_path / f"{kind}.safetensors"), torch_layout(expected))
        assert count == len(expected)
        assert remarks == ["norms of 4 groups; the reference always has 32 and would compute something else"]


def test_the_yaml_describes_the_run(run, tmp_path, tiny):
    path, _, _ = export(run[0], tmp_path / "x.safetensors")
    found, config = read_yaml(path), tiny()
    assert (found.unet, found.autoencoder, found.text) == (config.unet, config.autoencoder, config.text)
    assert found.diffusion == config.diffusion


def test_pytorch_loads_it_strictly(run, tmp_path):
    torch = pytest.importorskip("torch")
    export(run[0], tmp_path / "x.ckpt", "raw")
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert_same({name: tensor.numpy() for name, tensor in found.items()}, torch_layout(run[1]))


def test_an_independent_pytorch_network_computes_the_same(make_run, tmp_path):
    """The averaged weights of a run with image channels, loaded strictly into a U-Net made from the YAML beside them."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("torch_unet", ROOT / "benchmarks/torch_unet.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    unet_config = {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "attention_resolutions": [1, 2],
        "addition_attention": True,
        "temporal_conv": True,
        "temporal_attention": True,
        "norm_groups": 32,
    }
    directory, _, average = make_run(unet=unet_config)
    rng = np.random.default_rng(3)
    x, context = rng.normal(size=(2, 4, 4, 4, 96)).astype(np.float32), rng.normal(size=(2, 8, 16)).astype(np.float32)
    t, fps = np.asarray([17, 981]), np.asarray([8.0, 24.0], np.float32)
    networks = Networks.of(weights.Run(directory).config)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(networks.denoise)(average, x[..., :48], t, context, fps, x[..., 48:])
    for suffix in (".safetensors", ".ckpt"):
        path, _, remarks = export(directory, file := tmp_path / (suffix[1:] + suffix))
        assert not remarks
        given = yaml.safe_load(path.read_text())["model"]["params"]["unet_config"]["params"]
        theirs = module.UNet(**{name: given[name] for name in inspect.signature(module.UNet).parameters if name in given}).eval()
        state = torch.load(file, weights_only=True)["state_dict"] if suffix == ".ckpt" else safetensors.numpy.load_file(file)
        theirs.load_state_dict({name.removeprefix(unet.prefix): torch.as_tensor(tensor) for name, tensor in state.items()}, strict=True)
        with torch.no_grad():
            inputs = (np.moveaxis(x, -1, 1), t, context, fps)
            expected = np.moveaxis(theirs(*(torch.from_numpy(np.ascontiguousarray(a)) for a in inputs)).numpy(), 1, -1)
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected), suffix


def test_a_run_without_an_average(make_run, tmp_path):
    directory, raw, _ = make_run(ema={"decay": 0.0})
    assert_same(weights.load(directory)["denoiser"], raw)
    with pytest.raises(UserError, match=r"keeps no average \(ema\.decay is 0\); use the raw weights"):
        export(directory, tmp_path / "x.safetensors", "ema")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(run, make_run, tmp_path, tiny):
    with pytest.raises(UserError, match=r"must end in \.safetensors or \.ckpt"):
        export(run[0], tmp_path / "x.onnx")
    with pytest.raises(UserError, match=r"holds neither config\.json"):
        export(tmp_path, tmp_path / "x.safetensors")
    dit = {"width": 16, "depth": 1, "num_head_channels": 8, "patch": [1, 1, 1]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(to_json(tiny(backbone="dit", dit=dit)))
    with pytest.raises(UserError, match="trained with backbone='dit', which the reference does not have; only 'unet3d'"):
        export(tmp_path / "run", tmp_path / "x.safetensors")
    (tmp_path / "run/config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"run/config\.json is not JSON"):
        export(tmp_path / "run", tmp_path / "x.safetensors")
    (tmp_path / "run/config.json").write_text(to_json(tiny()))
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        export(tmp_path / "run", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_export_leaves_nothing_behind(run, tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("motif_jax.interop.files.write_safetensors", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        export(run[0], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_exported_run_comes_back_as_an_import(run, tmp_path, tiny):
    export(run[0], tmp_path / "x.safetensors")
    import_checkpoint("videocrafter", tmp_path / "x.safetensors", tmp_path / "in", tmp_path / "x.yaml")
    config = changed(tiny(), init_from=str(tmp_path / "in"))
    assert_same(weights.initial_weights(config, Networks.of(config)).denoiser, run[2])


def test_an_import_finds_the_yaml_beside_the_file(run, tmp_path, tiny):
    """What no tensor says comes back: prediction and schedule, heads and groups, and the networks without weights."""
    export(run[0], tmp_path / "x.safetensors")
    command = ["import", "--kind=videocrafter", f"--input={tmp_path}/x.safetensors", f"--output={tmp_path}/in"]
    done = subprocess.run([sys.executable, "-m", "motif_jax.convert", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"--yaml={tmp_path}/x.yaml: found beside the input" in done.stdout, done.stderr
    assert Import(tmp_path / "in").settings == Settings.of(tiny())


def test_a_run_starts_from_another(run, tiny):
    config = changed(tiny(), init_from=str(run[0]))
    assert_same(weights.initial_weights(config, Networks.of(config)).denoiser, run[2])
    config = changed(config, init_from=str(run[0] / "samples"))
    with pytest.raises(UserError, match=rf"^init_from: {re.escape(config.init_from)}: holds neither config\.json"):
        weights.initial_weights(config, Networks.of(config))
    with pytest.raises(UserError, match=r"config\.json: holds neither .*; import this file first"):
        weights.find(run[0] / "config.json")


def test_clips_of_an_import_are_not_taken_for_those_of_another(run, tmp_path, tiny, monkeypatch):
    """Of other weights at the same place, under the same names."""
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    requests = tmp_path / "list.jsonl"
    monkeypatch.setattr(Animator, "__call__", lambda self, images, *_: np.zeros((len(images), 4, 16, 16, 3), np.uint8))

    def sample(name):
        requests.write_text(json.dumps({"image": "a.png", "prompt": "x", "id": name}))
        animate_list(lambda: Animator.load(tmp_path / "in", tiny()), str(requests), str(tmp_path / "out"), 0, 1, "gif")

    for kind in ("raw", "ema"):
        export(run[0], tmp_path / "x.safetensors", kind)
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        import_checkpoint("videocrafter", tmp_path / "x.safetensors", tmp_path / "in", tmp_path / "x.yaml")
        if kind == "raw":
            sample("1")
            sample("2")
    with pytest.raises(UserError, match=r"out holds videos made otherwise \(weights: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now\)"):
        sample("3")


def test_an_import_of_another_size_is_refused(run, tmp_path, tiny):
    export(run[0], tmp_path / "x.safetensors")
    import_checkpoint("videocrafter", tmp_path / "x.safetensors", tmp_path / "in", tmp_path / "x.yaml")
    config = changed(tiny(), init_from=str(tmp_path / "in"))
    wider = dataclasses.replace(config, unet=dataclasses.replace(config.unet, model_channels=24))
    count = r"weights do not fit the configuration, \d+ differences from its \d+ arrays"
    with pytest.raises(UserError, match=rf"(?s){count}; .*imported\.json.* is \(.*\), not \(.*and \d+ more$"):
        weights.initial_weights(wider, Networks.of(wider))


@pytest.mark.parametrize(
    ("group", "field"), [("unet", {"num_head_channels": 4}), ("unet", {"norm_groups": 8}), ("autoencoder", {"scale_factor": 0.5})]
)
def test_what_no_shape_tells_is_compared(run, tmp_path, tiny, group, field, capsys):
    """With an import's and a run's own word; with other heads, groups or another scale of latents the weights compute something else."""
    ((name, ours),) = field.items()
    theirs = getattr(getattr(tiny(), group), name)
    export(run[0], tmp_path / "x.safetensors")
    import_checkpoint("videocrafter", tmp_path / "x.safetensors", tmp_path / "in", tmp_path / "x.yaml")
    for source in (tmp_path / "in", run[0]):
        config = changed(tiny(**{group: field}), init_from=str(source))
        wrong, remedy = rf"made with {group}\.{name}={theirs}, .* says {ours}, ", rf"use --config\.{group}\.{name}={theirs}"
        fault = f"{source}: its denoiser was {wrong}.*{remedy}"
        with pytest.raises(UserError, match=fault):
            weights.initial_weights(config, Networks.of(config))
        with pytest.raises(UserError, match=fault):
            Animator.load(source, dataclasses.replace(config, init_from=""))
    # Without a YAML an import only assumes it.
    path = tmp_path / "in" / "imported.json"
    path.write_text(path.read_text().replace('"yaml"', '"no_yaml"'))
    config = changed(tiny(**{group: field}), init_from=str(tmp_path / "in"))
    weights.initial_weights(config, Networks.of(config))
    assert f"in: {group}.{name}={theirs} was assumed when it was imported, the configuration says {ours}" in capsys.readouterr().out


@pytest.mark.parametrize("described", [{"yaml": "x.yaml"}, {}])
def test_an_import_for_image_tokens_serves_a_model_without(tmp_path, tiny, described, capsys):
    """Which does not use the resampler; a model that does is told of its heads."""
    part = {"config": {"heads": 4}, "sha256": "", **described}
    (tmp_path / "imported.json").write_text(json.dumps({"networks": {"resampler": part}}))
    weights.check_untold(tiny(), Import(tmp_path), "denoiser")
    assert not capsys.readouterr().out
    with pytest.raises(UserError) if described else contextlib.nullcontext() as found:
        weights.check_untold(tiny(**SEEING), Import(tmp_path), "denoiser")
    assert "resampler.heads=4" in (str(found.value) if described else capsys.readouterr().out)


def test_image_tokens_are_added_to_a_run_without(run, tiny):
    """Whose configuration has a resampler, too, with other heads, which it did not use."""
    config = changed(tiny(**SEEING), init_from=str(run[0]))
    assert weights.Run(run[0]).config.resampler.heads != config.resampler.heads
    found = weights.initial_weights(config, Networks.of(config)).denoiser
    assert_same({name: found[name] for name in run[2]}, run[2])


def test_a_run_sampled_with_another_objective_is_told_of(run, tiny, capsys):
    Animator.load(run[0], tiny(diffusion={"base_scale": 0.7}))
    assert f"{run[0]}: these weights were trained with diffusion.base_scale=1.0, and are sampled with 0.7" in capsys.readouterr().out


def test_new_input_channels_start_at_zero(run, tmp_path, tiny):
    """4 -> 8 of the paper, here 48 -> 96: old columns copied, new ones zero, nothing else changed."""
    kernel = "input_blocks.0.0.kernel"
    old = dict(run[2]) | {kernel: run[2][kernel][:, :, :48]}
    path, _, _ = export(run[0], tmp_path / "x.safetensors")
    path.write_text(path.read_text().replace("in_channels: 96", "in_channels: 48"))
    safetensors.numpy.save_file(torch_layout(old), tmp_path / "x.safetensors")
    import_checkpoint("videocrafter", tmp_path / "x.safetensors", tmp_path / "in", path)
    config = changed(tiny(), init_from=str(tmp_path / "in"))
    found = weights.initial_weights(config, Networks.of(config)).denoiser
    np.testing.assert_array_equal(found[kernel][:, :, :48], old[kernel])
    assert not found.pop(kernel)[:, :, 48:].any()
    assert_same(found, {path: array for path, array in old.items() if path != kernel})
    with pytest.raises(UserError, match=rf"finetune='lora': .* lacks \({kernel}\).*; use finetune='all'"):
        weights.initial_weights(dataclasses.replace(config, finetune="lora"), Networks.of(config))
    weights.initial_weights(dataclasses.replace(config, finetune="input"), Networks.of(config))


@pytest.fixture(scope="module")
def golden_import(shared, tmp_path_factory):
    """The 4-channel tiny checkpoint of the reference, imported."""
    directory = tmp_path_factory.mktemp("golden")
    prefixes = {"unet": unet.prefix, "autoencoder": "first_stage_model.", "text": "cond_stage_model."}
    state = {}
    for name, prefix in prefixes.items():
        packed = (shared / f"golden/videocrafter2/{name}_tiny.safetensors.xz").read_bytes()
        state |= {prefix + key: tensor for key, tensor in safetensors.numpy.load(lzma.decompress(packed)).items()}
    first = unet.prefix + "input_blocks.0.0.weight"
    state[first] = np.ascontiguousarray(state[first][:, :4])
    safetensors.numpy.save_file(state, directory / "x.safetensors")
    import_checkpoint("videocrafter", directory / "x.safetensors", directory / "in")
    return directory / "in"


@pytest.mark.slow
@pytest.mark.parametrize("image", ["repeat", "first"])
def test_step_0_equals_the_text_to_video_model(shared, golden_import, image):
    """A run that starts from the import gives the reference's own T2V output, whatever the image channels hold."""
    config = from_config_dict(
        {
            "dtype": "float32",
            "init_from": str(golden_import),
            "data": {"frames": 4, "height": 64, "width": 128},
            "unet": {
                "in_channels": 9 if image == "first" else 8,
                "model_channels": 32,
                "num_res_blocks": 1,
                "num_head_channels": 8,
                "context_dim": 64,
            },
            "autoencoder": {"ch": 32},
            "text": {"width": 64, "layers": 3, "heads": 4},
            "condition": {"image": image},
        }
    )
    networks = Networks.of(config)
    params = weights.initial_weights(config, networks).denoiser
    golden = np.load(shared / "golden/videocrafter2/unet_tiny_io.npz")
    x, mask = np.moveaxis(golden["x8"], 1, -1), np.moveaxis(golden["mask"], 1, -1)
    condition = x[..., 4:] if image == "repeat" else np.concatenate([x[..., 4:], mask], axis=-1)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(networks.denoise)(params, x[..., :4], golden["t"], golden["context"], golden["fps"], condition)
    expected = np.moveaxis(golden["out4"], 1, -1)
    assert np.linalg.norm(output - expected) <= 1e-5 * np.linalg.norm(expected)


KL = {"kind": "kl", "factor": 4, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1}


def test_sampling_takes_the_frozen_networks_of_the_import(tmp_path, tiny):
    """An import that holds everything needs no init_from; what it lacks comes from there."""
    config = tiny(autoencoder=KL, unet={"in_channels": 8, "out_channels": 4})
    networks = Networks.of(config)
    denoiser = random_params(networks, 1)
    rng = np.random.default_rng(2)
    kl = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in networks.autoencoder.shapes.items()}
    files = {"unet": torch_layout(denoiser), "kl": {autoencoder.prefix + name: np.asarray(x) for name, x in to_torch(kl).items()}}
    (tmp_path / "x.yaml").write_text(to_yaml(Settings.of(config)))
    for name, tensors in {**files, "whole": files["unet"] | files["kl"]}.items():
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
        import_checkpoint(
            "autoencoder" if name == "kl" else "videocrafter", tmp_path / f"{name}.safetensors", tmp_path / name, tmp_path / "x.yaml"
        )
    for directory, init_from in (("whole", ""), ("unet", str(tmp_path / "kl")), ("whole", str(tmp_path / "unet"))):
        animator = Animator.load(tmp_path / directory, changed(config, init_from=init_from))
        assert_same(animator.params, denoiser)
        assert_same(animator.frozen["autoencoder"], kl)
    with pytest.raises(UserError, match=r"the autoencoder of this configuration are pretrained networks: set --config\.init_from"):
        Animator.load(tmp_path / "unet", config)
    with pytest.raises(UserError, match="kl: holds no weights of the denoiser, but autoencoder"):
        Animator.load(tmp_path / "kl", config)


def test_frozen_networks_that_are_gone(make_run, tmp_path, monkeypatch):
    """A relative init_from leads nowhere from another directory: the error names it, through the runs that started from one another."""
    sizes = {"autoencoder": KL, "unet": {"in_channels": 8, "out_channels": 4}}
    first, _, _ = make_run(**sizes, init_from="weights/kl")
    second, _, _ = make_run(**sizes, init_from=str(first))
    for call in (lambda: Animator.load(second), lambda: export(second, tmp_path / "x.safetensors", frozen=True)):
        with pytest.raises(UserError, match=r"^init_from=weights/kl: there is no such directory, from which the autoencoder of this run"):
            call()
    assert not list(tmp_path.iterdir())
    (tmp_path / "weights/kl").mkdir(parents=True)
    (tmp_path / "weights/kl/imported.json").write_text('{"networks": {}}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^init_from=weights/kl: holds no weights of the autoencoder$"):
        Animator.load(second)


@pytest.mark.parametrize("own", ["", "checkpoints/7"])
def test_a_run_does_not_start_from_itself(run, tiny, own, monkeypatch):
    """Its config.json would lose where its frozen networks came from, and lead to itself for ever."""
    monkeypatch.chdir(run[0].parent)
    config = changed(tiny(), init_from=str(run[0] / own))
    with pytest.raises(UserError, match=r"a run would start from itself .* give it the init_from that it began with"):
        workdir.check(config, pathlib.Path(run[0].name))
    workdir.check(config, run[0].parent / "another")
