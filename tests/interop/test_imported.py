"""From a checkpoint to the directory of an import and back: bit for bit, or one error and nothing written."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import uuid

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx

from motif_jax.config import AutoencoderConfig, Config, TextConfig, UNetConfig
from motif_jax.data import storage
from motif_jax.errors import UserError
from motif_jax.interop import files, imported, names, raft, reference
from motif_jax.interop.buffers import schedule_buffers
from motif_jax.interop.imported import Import, import_checkpoint, is_imported, yaml_beside
from motif_jax.interop.settings import Settings, read_yaml, to_yaml
from motif_jax.interop.tables import autoencoder, openclip, unet
from motif_jax.models.autoencoder import make_autoencoder
from motif_jax.models.text import make_text_tower
from motif_jax.models.unet3d import UNet3D
from motif_jax.training.export import export
from motif_jax.training.weights import check_untold, other_objective

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = Settings(
    UNetConfig(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,), num_head_channels=4,
               context_dim=8),
    AutoencoderConfig(ch=32, ch_mult=(1, 2), factor=2, num_res_blocks=1),
    TextConfig(vocab_size=11, context_length=5, width=8, layers=2, heads=2),
    reference.VIDEOCRAFTER,
)  # fmt: skip


def tensors(make, prefix="", seed=0):
    """Random tensors in PyTorch's layout for a network."""
    rng = np.random.default_rng(seed)
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    paths = [(names.dotted(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    return {prefix + names.torch_name(p): rng.normal(size=names.torch_shape(p, s)).astype(np.float32) for p, s in paths}


@pytest.fixture(scope="module")
def networks():
    return {
        "denoiser": tensors(lambda: UNet3D(SETTINGS.unet, rngs=nnx.Rngs(0)), unet.prefix),
        "autoencoder": tensors(lambda: make_autoencoder(SETTINGS.autoencoder, nnx.Rngs(0)), autoencoder.prefix),
        "text": tensors(lambda: make_text_tower(SETTINGS.text, nnx.Rngs(0)), openclip.prefix),
    }


@pytest.fixture(scope="module")
def model(networks):
    """A whole checkpoint with what else the published ones hold."""
    buffers = {"betas": np.zeros(1000, np.float32), "scale_arr": np.ones(1400, np.float32), "logvar": np.zeros(1000, np.float32)}
    other = {"model_ema.decay": np.zeros((), np.float32), "cond_stage_model.model.attn_mask": np.zeros((5, 5), np.float32)}
    return networks["denoiser"] | networks["autoencoder"] | networks["text"] | buffers | other


def save(path, state):
    safetensors.numpy.save_file(state, path)
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.asarray(found[name]).tobytes() == tensor.tobytes() and tuple(found[name].shape) == tensor.shape, name


@pytest.mark.parametrize("with_yaml", [True, False])
def test_there_and_back(tmp_path, networks, model, with_yaml):
    source = save(tmp_path / "model.safetensors", model)
    (tmp_path / "model.yaml").write_text(to_yaml(SETTINGS))
    counts, _ = import_checkpoint("videocrafter", source, tmp_path / "in", tmp_path / "model.yaml" if with_yaml else None)
    assert counts == {n: (len(part), sum(t.size for t in part.values())) for n, part in networks.items()}
    assert sorted(os.listdir(tmp_path / "in")) == ["autoencoder.safetensors", "denoiser.safetensors", "imported.json", "text.safetensors"]
    contents = json.loads((tmp_path / "in/imported.json").read_text())["networks"]
    assert contents["text"]["sha256"] == storage.sha256(tmp_path / "in/text.safetensors")
    assert contents["denoiser"]["source_sha256"] == storage.sha256(source)

    found = Import(tmp_path / "in").settings
    assert (found.unet, found.diffusion) == (SETTINGS.unet, SETTINGS.diffusion)
    assert found.autoencoder == SETTINGS.autoencoder and found.text.width == 8 and found.text.heads == (2 if with_yaml else 0)

    other = dataclasses.replace(Config(), text=dataclasses.replace(SETTINGS.text, heads=4))
    with pytest.raises(UserError, match=r"its text was made with text\.heads=2, ") if with_yaml else contextlib.nullcontext():
        check_untold(other, Import(tmp_path / "in"), "text")

    _, count, remarks = export(tmp_path / "in", tmp_path / "out/all.safetensors", frozen=True)
    whole = networks["denoiser"] | networks["autoencoder"] | networks["text"] | schedule_buffers(SETTINGS.diffusion)
    same(safetensors.numpy.load_file(tmp_path / "out/all.safetensors"), whole)
    assert count == len(whole) and not remarks
    assert read_yaml(tmp_path / "out/all.yaml").unet == SETTINGS.unet
    export(tmp_path / "in", tmp_path / "out/unet.safetensors")
    same(safetensors.numpy.load_file(tmp_path / "out/unet.safetensors"), networks["denoiser"])
    import_checkpoint("videocrafter", tmp_path / "out/all.safetensors", tmp_path / "again", tmp_path / "out/all.yaml")
    for name in networks:
        assert (tmp_path / f"again/{name}.safetensors").read_bytes() == (tmp_path / f"in/{name}.safetensors").read_bytes()


def test_through_pytorch(tmp_path, networks, model):
    """torch -> jax -> torch, through .ckpt files, DeepSpeed's layout in."""
    torch = pytest.importorskip("torch")
    state = {"_forward_module." + name: torch.from_numpy(tensor) for name, tensor in model.items()}
    torch.save({"module": state, "global_step": 7}, tmp_path / "model.ckpt")
    import_checkpoint("videocrafter", tmp_path / "model.ckpt", tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out.ckpt", frozen=True)
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)["state_dict"]
    whole = networks["denoiser"] | networks["autoencoder"] | networks["text"] | schedule_buffers(SETTINGS.diffusion)
    same({n: t.numpy() for n, t in found.items()}, whole)


def test_the_average_beside_the_weights(tmp_path, networks):
    """LitEma's names are those of the U-Net without dots; by default the average is left out with a remark."""
    raw = networks["denoiser"]
    average = {"model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1 for name, tensor in raw.items()}
    source = save(tmp_path / "x.safetensors", raw | average | {"model_ema.num_updates": np.zeros((), np.int32)})
    for averaged, expected in ((False, raw), (True, {name: tensor + 1 for name, tensor in raw.items()})):
        _, remarks = import_checkpoint("videocrafter", source, tmp_path / f"{averaged}", averaged=averaged)
        assert [remark.endswith("--weights=ema takes it") for remark in remarks] == [True] * (not averaged)
        told = json.loads((tmp_path / f"{averaged}/imported.json").read_text())["networks"]["denoiser"]
        assert told.get("weights") == ("ema" if averaged else None)
        export(tmp_path / f"{averaged}", tmp_path / "out.safetensors")
        same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), expected)
    with pytest.raises(UserError, match=r"--weights=ema: holds no average of the U-Net's weights: there is no model_ema\.diffusion_model"):
        import_checkpoint("videocrafter", save(tmp_path / "y.safetensors", raw), tmp_path / "in", averaged=True)
    with pytest.raises(UserError, match="--weights=ema: only --kind=videocrafter and dynamicrafter"):
        import_checkpoint("autoencoder", source, tmp_path / "in", averaged=True)


def test_half_precision_is_widened(tmp_path, networks):
    half = {name: tensor.astype(np.float16) for name, tensor in networks["denoiser"].items()}
    import_checkpoint("videocrafter", save(tmp_path / "x.safetensors", half), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out.safetensors")
    same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), {n: t.astype(np.float32) for n, t in half.items()})


def test_networks_one_by_one_share_a_directory(tmp_path, networks):
    bare = {name: {n.removeprefix(reference.TABLES[name].prefix): t for n, t in part.items()} for name, part in networks.items()}
    kinds = {"denoiser": "videocrafter", "autoencoder": "autoencoder", "text": "openclip"}
    extra = {"visual.conv1.weight": np.zeros(3, np.float32)}  # a whole OpenCLIP file
    for name, kind in kinds.items():
        source = save(tmp_path / f"{name}.safetensors", bare[name] | (extra if name == "text" else {}))
        import_checkpoint(kind, source, tmp_path / "in")
    assert Import(tmp_path / "in").read().keys() == kinds.keys()
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    with pytest.raises(UserError, match="already holds text of an import"):
        import_checkpoint("openclip", tmp_path / "text.safetensors", tmp_path / "in")
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


@pytest.mark.parametrize(
    "beside",
    [
        ["cond_stage_model.transformer.text_model.x.weight", "model_ema.diffusion_modelx", "model.diffusion_model.input_blocks.0.0.weight"],
        ["conditioner.embedders.0.transformer.text_model.x.weight", "conditioner.embedders.1.model.ln_final.bias", "denoiser.sigmas"],
    ],
    ids=["as Stable Diffusion 1", "as SDXL"],
)
def test_an_autoencoder_within_a_model_of_another_kind(tmp_path, networks, beside):
    """What else the file holds is no matter, a text tower in another layout included; for the whole file it is."""
    state = networks["autoencoder"] | {name: np.zeros((2, 2), np.float32) for name in beside}
    source = save(tmp_path / "x.safetensors", state)
    import_checkpoint("autoencoder", source, tmp_path / "in")
    found = names.to_torch(Import(tmp_path / "in").read()["autoencoder"])
    same({autoencoder.prefix + name: tensor for name, tensor in found.items()}, networks["autoencoder"])
    for kind in ("videocrafter", "openclip"):
        with pytest.raises(UserError, match=r"in the layout of transformers \(cond.*take the OpenCLIP file"):
            import_checkpoint(kind, source, tmp_path / "other")


def test_two_imports_at_once_share_a_directory(tmp_path, networks, monkeypatch):
    sha256, both = storage.sha256, threading.Barrier(2)

    def meet(path):  # where the table of contents has been read and not yet written
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return sha256(path)

    monkeypatch.setattr(storage, "sha256", meet)
    sources = {kind: save(tmp_path / f"{kind}.safetensors", networks[name]) for kind, name in (("openclip", "text"), ("autoencoder",) * 2)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda kind: import_checkpoint(kind, sources[kind], tmp_path / "in"), sources))
    assert Import(tmp_path / "in").read().keys() == {"text", "autoencoder"}


def test_a_unet_under_its_name_within_the_model(tmp_path, networks):
    inner = {name.removeprefix("model."): tensor for name, tensor in networks["denoiser"].items()}
    import_checkpoint("videocrafter", save(tmp_path / "x.safetensors", inner), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out.safetensors")
    same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), networks["denoiser"])
    with pytest.raises(UserError, match="in: an import holds one set of weights, not ema"):
        export(tmp_path / "in", tmp_path / "out.safetensors", "ema")


@pytest.mark.parametrize("with_yaml", [True, False])
def test_a_scale_of_the_latents_that_was_measured_in_training(tmp_path, networks, with_yaml):
    source = save(tmp_path / "x.safetensors", networks["denoiser"] | {"scale_factor": np.asarray(0.25, np.float32)})
    (tmp_path / "x.yaml").write_text(to_yaml(SETTINGS))
    assert reference.read_checkpoint(source, tmp_path / "x.yaml" if with_yaml else None)[0].autoencoder.scale_factor == 0.25


def test_dynamicrafter_is_told_from_videocrafter(tmp_path, model):
    config = UNetConfig(**{**vars(SETTINGS.unet), "in_channels": 8, "image_cross_attention": True})
    image = tensors(lambda: UNet3D(config, rngs=nnx.Rngs(0)), unet.prefix)
    image |= {"embedder.model.logit_scale": np.zeros((), np.float32)}  # what is left of the text half beside the image tower
    with pytest.raises(UserError, match="has image cross attention; import it with --kind=dynamicrafter"):
        import_checkpoint("videocrafter", save(tmp_path / "dc.safetensors", image), tmp_path / "in")
    with pytest.raises(UserError, match="has no image cross attention; import it with --kind=videocrafter"):
        import_checkpoint("dynamicrafter", save(tmp_path / "vc.safetensors", model), tmp_path / "in")
    assert not (tmp_path / "in").exists()
    import_checkpoint("dynamicrafter", tmp_path / "dc.safetensors", tmp_path / "in")
    assert Import(tmp_path / "in").settings.unet == config
    diffusion = Import(tmp_path / "in").settings.diffusion
    assert diffusion.prediction == "v"
    config = dataclasses.replace(Config(), diffusion=diffusion)
    assert other_objective(Import(tmp_path / "in"), config) == []
    (line,) = other_objective(
        Import(tmp_path / "in"), dataclasses.replace(config, diffusion=dataclasses.replace(diffusion, prediction="x0"))
    )
    assert line == f"{tmp_path}/in: these weights were trained with diffusion.prediction='v', and are sampled with 'x0'"


def broken(model, change):
    state = dict(model)
    change(state)
    return state


BIAS, SMALL = unet.prefix + "out.0.bias", np.zeros(3, np.float32)
CONV, TABLE = unet.prefix + "input_blocks.0.0.weight", openclip.prefix + "token_embedding.weight"
TO_K = unet.prefix + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
WRONG = {
    "an autoencoder alone": (
        lambda s: [s.pop(n) for n in list(s) if not n.startswith("first_stage")],
        r"holds no U-Net, but autoencoder \(--kind=autoencoder\)",
    ),
    "RAFT": (lambda s: (s.clear(), s.update({"fnet.conv1.weight": SMALL})), r"in the layout of RAFT .*; import it with --kind=raft"),
    "another network": (lambda s: (s.clear(), s.update({"layer1.0.conv1.weight": SMALL})), "holds no network in the reference's names"),
    "a tensor missing": (lambda s: s.pop(BIAS), r"1 missing: out\.0\.bias \[32\]"),
    "a tensor too many": (lambda s: s.update({unet.prefix + "x.y": SMALL}), r"1 left over: x\.y"),
    "a strange tensor": (lambda s: s.update({"upscaler.w": SMALL}), r"1 tensors belong to no network known here: upscaler\.w"),
    "another shape": (lambda s: s.update({BIAS: SMALL}), r"out\.0\.bias: \[3\] in the file, \[32\]"),
    "another layout": (
        lambda s: s.update({n: t.transpose(2, 3, 1, 0) for n, t in s.items() if t.ndim == 4}),
        "sizes of its autoencoder contr",
    ),
    "a first layer of another width": (
        lambda s: s.update({CONV: np.zeros((320, 4, 3, 3), np.float32)}),
        "sizes of its denoiser contradict",
    ),
    "a value that is no number": (lambda s: s.update({BIAS: np.full(32, np.nan, np.float32)}), r"out\.0\.bias holds NaN or infinity"),
    "a kernel without axes": (
        lambda s: s.update({"first_stage_model.quant_conv.weight": np.zeros((), np.float32)}),
        r"is \[\], which should have 4 axes",
    ),
    "a kernel of one axis": (lambda s: s.update({TO_K: SMALL}), r"attn2\.to_k\.weight is \[3\], which should have 2 axes"),
    "an empty table": (lambda s: s.update({TABLE: np.zeros((0, 8), np.float32)}), r"token_embedding\.weight is \[0, 8\]"),
    "no init_attn": (
        lambda s: [s.pop(n) for n in list(s) if ".init_attn." in n],
        "of width 32, no multiple of a head's 64; name num_head_ch",
    ),
    "a diffusers U-Net": (lambda s: (s.clear(), s.update({"down_blocks.0.x": SMALL})), r"is in the layout of diffusers \(down_blocks"),
    "a diffusers autoencoder": (lambda s: s.update({"encoder.down_blocks.0.x": SMALL}), r"in the layout of diffusers.*; take the original"),
    "a transformers tower": (lambda s: s.update({"text_model.x": SMALL}), r"in the layout of transformers.*; take the OpenCLIP file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_leaves_nothing_behind(tmp_path, model, case):
    change, message = WRONG[case]
    source = save(tmp_path / "x.safetensors", broken(model, change))
    with pytest.raises(UserError, match=message):
        import_checkpoint("videocrafter", source, tmp_path / "deep/in")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_wrong_yaml_leaves_nothing_behind(tmp_path, model):
    source = save(tmp_path / "x.safetensors", model)
    text = yaml.safe_load(to_yaml(SETTINGS))
    text["model"]["params"]["unet_config"]["params"]["channel_mult"] = [1, 2, 4]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=r"(?s)not those of the configured U-Net.* missing: .*the configuration is that of .*x\.yaml"):
        import_checkpoint("videocrafter", source, tmp_path / "in", tmp_path / "x.yaml")
    text["model"]["params"]["unet_config"]["params"] |= {"model_channels": 24, "channel_mult": [1, 2]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UserError, match=r"x\.yaml"):
        import_checkpoint("videocrafter", source, tmp_path / "in", tmp_path / "x.yaml")
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "x.yaml"]


def test_a_failing_disk_leaves_nothing_behind(tmp_path, model, monkeypatch):
    source = save(tmp_path / "x.safetensors", model)
    write, done = files.write_safetensors, []

    def full(path, part):
        if done:
            raise OSError(28, "No space left on device")
        done.append(path)
        return write(path, part)

    monkeypatch.setattr(imported.files, "write_safetensors", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        import_checkpoint("videocrafter", source, tmp_path / "in")
    assert done and os.listdir(tmp_path) == ["x.safetensors"]


def test_an_output_that_is_something_else(tmp_path, model):
    source = save(tmp_path / "x.safetensors", model)
    with pytest.raises(UserError, match="is a file; name a directory"):
        import_checkpoint("videocrafter", source, source)
    with pytest.raises(UserError, match=r"safetensors/in: cannot be written: .*Not a directory"):
        import_checkpoint("videocrafter", source, source / "in")
    with pytest.raises(UserError, match="is not empty and no import"):
        import_checkpoint("videocrafter", source, tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/imported.json").write_text("{")
    with pytest.raises(UserError, match=r"imported\.json: cannot be read"):
        Import(tmp_path / "bad").read()
    for text in ("[]", '{"networks": 3}', '{"networks": {"denoiser": 3}}', '{"networks": {"denoiser": {"config": 3, "sha256": ""}}}'):
        (tmp_path / "bad/imported.json").write_text(text)
        with pytest.raises(UserError, match=r"imported\.json: is no table of contents"):
            Import(tmp_path / "bad")


def test_a_half_written_import_is_refused_when_read(tmp_path, model):
    import_checkpoint("videocrafter", save(tmp_path / "x.safetensors", model), tmp_path / "in")
    whole = (tmp_path / "in/text.safetensors").read_bytes()
    (tmp_path / "in/text.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"text\.safetensors: .*incomplete"):
        Import(tmp_path / "in").read()
    (tmp_path / "in/text.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"text\.safetensors: is not what was imported"):
        Import(tmp_path / "in").read()
    assert Import(tmp_path / "in").read(["denoiser"]).keys() == {"denoiser"}  # the others are not looked at
    (tmp_path / "in/text.safetensors").unlink()
    with pytest.raises(UserError, match=r"text\.safetensors: there is no such file"):
        Import(tmp_path / "in").read()


def test_an_import_in_a_bucket(tmp_path, model, bucket, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import_checkpoint("videocrafter", save(tmp_path / "x.safetensors", model), tmp_path / "in")
    name = uuid.uuid4().hex
    url = f"gs://bucket/{name}"
    assert not is_imported(url)
    for path in (tmp_path / "in").iterdir():
        bucket.put(f"{name}/{path.name}", path.read_bytes())
    assert is_imported(url) and Import(url).settings == Import(tmp_path / "in").settings
    found, expected = Import(url).read(), Import(tmp_path / "in").read()
    assert found.keys() == expected.keys()
    for network, tensors in expected.items():
        same(found[network], {name: np.asarray(tensor) for name, tensor in tensors.items()})
    content, _ = bucket.objects[f"{name}/text.safetensors"]
    bucket.put(f"{name}/text.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{url}/text\.safetensors: is not what was imported"):
        Import(url).read()
    del bucket.objects[f"{name}/text.safetensors"]
    with pytest.raises(UserError, match=rf"{url}/text\.safetensors: there is no such file"):
        Import(url).read()


def test_raft_serves_as_flow_weights(tmp_path):
    shapes = json.loads((ROOT / "tests/testdata/raft_names.json").read_text())["small"]["torchvision"]
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    import_checkpoint("raft", save(tmp_path / "x.safetensors", given), tmp_path / "in")
    model = raft.load_raft(tmp_path / "in/raft.safetensors", "small")
    same(raft.to_reference(model, "torchvision"), given)
    with pytest.raises(UserError, match=r"--yaml=x\.yaml: --kind=raft takes none"):
        import_checkpoint("raft", tmp_path / "x.safetensors", tmp_path / "other", "x.yaml")
    with pytest.raises(UserError, match=r"x\.safetensors: these are not RAFT weights"):
        import_checkpoint("raft", save(tmp_path / "x.safetensors", {"a": np.zeros(2)}), tmp_path / "other")


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", "motif_jax.convert", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path, networks, model):
    source = save(tmp_path / "model.safetensors", model)
    (tmp_path / "model.yaml").write_text(to_yaml(SETTINGS))
    code, out, err = command("import", "--kind=videocrafter", f"--input={source}", f"--output={tmp_path}/in", "--yaml=")
    assert (code, err) == (0, "") and f"{len(networks['text'])} tensors" in out and "beside" not in out
    (tmp_path / "model.yaml").write_text("a: [")
    assert "assumed, for want of a --yaml: diffusion.prediction=eps" in out and "text.heads=unknown" in out
    code, out, err = command("export", f"--workdir={tmp_path}/in", f"--output={tmp_path}/out.safetensors")
    assert (code, err) == (0, "") and "out.yaml" in out
    same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), networks["denoiser"])
    source.write_bytes(source.read_bytes()[:1000])
    code, out, err = command("import", "--kind=videocrafter", f"--input={source}", f"--output={tmp_path}/other")
    assert out.startswith("note: found beside the input, and ignored") and out.count("\n") == 1
    assert code == 1 and err.startswith("motif_jax.convert: ") and err.count("\n") == 1 and "incomplete" in err
    assert not (tmp_path / "other").exists()


def test_a_yaml_beside_the_file_that_is_no_use_is_ignored(tmp_path):
    source, path = tmp_path / "x.ckpt", tmp_path / "x.yaml"
    assert yaml_beside("autoencoder", source) == (None, "")
    for text, reason in (
        ("model: {params: {ddconfig: {}}}", "there is no unet_config"),
        ("a: [", "cannot be read as YAML"),
        ("", "is not a YAML of the reference"),
    ):
        path.write_text(text)
        found, remark = yaml_beside("autoencoder", source)
        assert found is None and reason in remark and "\n" not in remark
        assert remark.startswith(f"note: found beside the input, and ignored: {path}: ")
    path.write_text(to_yaml(SETTINGS))
    assert yaml_beside("autoencoder", source)[0] == yaml_beside("openclip", source)[0] == path
    assert yaml_beside("autoencoder", tmp_path / "x.safetensors.index.json")[0] == path
    assert "x.yaml: says nothing of this tower" in yaml_beside("openclip_image", source)[1]
    assert yaml_beside("raft", source) == (None, "")


STOPPED = """
import runpy, sys, time
from motif_jax.data.storage import replacing
from motif_jax.interop import files
write, done = files.write_safetensors, []

def slow(path, tensors):
    if done:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of it")
            print("writing", flush=True)
            time.sleep(60)
    done.append(path)
    return write(path, tensors)

files.write_safetensors = slow
runpy.run_module("motif_jax.convert", run_name="__main__")
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_import_leaves_nothing_behind(tmp_path, model, stop):
    """The signal comes while the second network is half written."""
    source = save(tmp_path / "x.safetensors", model)
    arguments = ["import", "--kind=videocrafter", f"--input={source}", f"--output={tmp_path}/deep/in"]
    with subprocess.Popen([sys.executable, "-c", STOPPED, *arguments], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "writing\n", process.stderr.read()
        process.send_signal(stop)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped" in error and "Traceback" not in error, error
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one command, import or export"),
        (["translate"], "give one command, import or export, not 'translate'"),
        (["import", "--kind=raft"], "import needs --input, --output"),
        (["export", "--workdir=a", "--output=b", "--yaml=c"], "export does not take --yaml"),
    ],
)
def test_wrong_commands(arguments, message):
    code, _, err = command(*arguments)
    assert code == 1 and message in err
