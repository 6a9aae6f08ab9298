"""Latents and text embeddings in records: a run on them is the run on frames and sentences; other weights are refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from motif_jax import preparation
from motif_jax.animation import Animator
from motif_jax.data import pipeline, shards
from motif_jax.data.tokens import make_tokenizer
from motif_jax.dist.mesh import make_mesh
from motif_jax.errors import UserError
from motif_jax.interop.imported import import_checkpoint
from motif_jax.interop.names import to_torch
from motif_jax.interop.tables import autoencoder
from motif_jax.models.autoencoder import make_autoencoder
from motif_jax.models.networks import Networks
from motif_jax.towers import Towers, check_towers
from motif_jax.training import loop
from motif_jax.training.optimizer import make_optimizer
from motif_jax.training.samples import SampleSheets
from motif_jax.training.state import create
from motif_jax.training.step import make_train_step
from motif_jax.training.weights import frozen_weights, params_checksum

pytestmark = pytest.mark.usefixtures("quick_compile")

KL = {"kind": "kl", "factor": 4, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "scale_factor": 0.2}
DIT = {"width": 16, "depth": 1, "num_head_channels": 8}
SOURCE = "synthetic:shapes:12"


def save_import(config, folder, seed):
    """A random autoencoder in the authors' names, imported as a real one would be."""
    module = make_autoencoder(config.autoencoder, nnx.Rngs(seed))
    tensors = to_torch(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    path = folder.with_suffix(".safetensors")
    safetensors.numpy.save_file({autoencoder.prefix + k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()}, path)
    import_checkpoint("autoencoder", path, folder)
    return str(folder)


def prepare(config, directory):
    lines: list[str] = []
    preparation.prepare(config, SOURCE, directory, log=lines.append)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(directory))), lines


@pytest.fixture(scope="module")
def kl(tiny, tmp_path_factory):
    """The tiny configuration with an imported KL autoencoder, latents 4x4x4."""

    def make(seed=3, **stored):
        shape = tiny(autoencoder=KL, backbone="dit", dit=DIT)
        folder = save_import(shape, tmp_path_factory.mktemp("import") / "weights", seed)
        return tiny(autoencoder=KL, backbone="dit", dit=DIT, init_from=folder, prepare=stored)

    return make


@pytest.fixture(scope="module")
def stored(kl, tmp_path_factory):
    """A dataset of frames, latents and embeddings."""
    return prepare(kl(latents=True, text_embeddings=True, frames=True), tmp_path_factory.mktemp("data") / "all")[0]


def first_batch(config, dataset, image=False):
    batches = pipeline.make_iterator(dataset, config.batch_size, 0, 0, make_tokenizer(config.text), image=image)
    try:
        return next(batches)
    finally:
        batches.close()


@pytest.mark.slow
def test_a_run_on_latents_is_the_run_on_frames(kl, stored, tmp_path):
    """The same clips in the same order, the same noise: two updates differ by the rounding to float16 alone."""
    plain, _ = prepare(kl(), tmp_path / "plain")
    networks = Networks.of(plain)
    frozen = frozen_weights(networks)
    step = jax.jit(make_train_step(networks, make_optimizer(plain)))
    complete = networks.with_unconditional(frozen, make_tokenizer(plain.text))
    found = []
    for config in (plain, stored):
        dataset = pipeline.open_dataset(config.data)
        check_towers(config, dataset.manifests, {name: params_checksum(params) for name, params in frozen.items()})
        batch = first_batch(config, dataset)
        state = create(networks.denoiser.init(jax.random.key(0)), make_optimizer(plain), True)
        for _ in range(2):
            state, metrics = step(state, complete, batch)
        found.append((batch, metrics, state))
    (a, m, s), (b, n, t) = found
    assert a.keys() - b.keys() == {"frames", "tokens"} and b.keys() - a.keys() == {"latent_moments", "text_embedding"}
    np.testing.assert_array_equal(a["flow"], b["flow"])
    assert b["latent_moments"].shape == (4, 4, 4, 4, 8) and b["latent_moments"].dtype == np.float16
    # float16 keeps 11 bits: 5e-4 of each latent, of which the loss is a mean of squares.
    for name in ("loss", "grad_norm", "heatmap_mean"):
        np.testing.assert_allclose(m[name], n[name], rtol=2e-3, err_msg=name)
    assert float(m["loss"]) != float(n["loss"])
    moved = [float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(s.params), jax.tree.leaves(t.params), strict=True)]
    assert max(moved) < 0.1 * plain.learning_rate, max(moved)  # an update of Adam moves each weight by about the rate


def test_image_cross_attention_has_the_first_frame_beside_latents(kl, stored, tmp_path):
    """The same picture as in a dataset of frames, to the bit."""
    plain, _ = prepare(kl(), tmp_path / "plain")
    frames = first_batch(plain, pipeline.open_dataset(plain.data))["frames"]
    batch = first_batch(stored, pipeline.open_dataset(stored.data), image=True)
    assert "frames" not in batch and "latent_moments" in batch
    np.testing.assert_array_equal(batch["image"], frames[:, 0])
    latents, _ = prepare(kl(latents=True), tmp_path / "latents")
    seeing = dataclasses.replace(latents, backbone="unet3d", unet=dataclasses.replace(latents.unet, image_cross_attention=True))
    with pytest.raises(UserError, match=r"looks at the first frame, and this dataset has none: prepare one with prepare\.frames=True"):
        check_towers(seeing, pipeline.open_dataset(latents.data).manifests, {})


def test_stored_moments_are_the_autoencoders(stored):
    clip = pipeline.open_dataset(stored.data)[0]
    networks = Networks.of(stored)
    frozen = frozen_weights(networks)
    expected = networks.encode(frozen["autoencoder"], clip.frames[None])[0]
    mean = clip.latent_moments[..., :4].astype(np.float32) * KL["scale_factor"]
    np.testing.assert_allclose(mean, expected, atol=1e-3 * float(jnp.abs(expected).max()))
    decoded = Towers(stored).decode(clip.latent_moments)
    np.testing.assert_allclose(decoded, networks.decode(frozen["autoencoder"], expected[None])[0], atol=1)  # grey levels


def test_frames_are_dropped_unless_asked_for(kl, stored, tmp_path):
    config, _ = prepare(kl(latents=True), tmp_path / "latents")
    lean, full = pipeline.open_dataset(config.data), pipeline.open_dataset(stored.data)
    assert lean[0].frames is None and full[0].frames.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(lean[0].latent_moments, full[0].latent_moments)
    assert lean.layout.names() == (
        "clip_id",
        "video",
        "caption",
        "frame_stride",
        "first_frame",
        "fps",
        "flow",
        "motion_mask",
        "latent_moments",
    )
    assert "frames" not in first_batch(config, lean) and "tokens" in first_batch(config, lean)


def test_tfds_reads_latents_without_tensorflow(stored, tmp_path):
    ours = pipeline.open_dataset(stored.data)
    np.savez(tmp_path / "ours.npz", moments=np.stack([ours[i].latent_moments for i in range(len(ours))]))
    code = f"""
import sys
import numpy as np
import tensorflow_datasets as tfds
ours, theirs = np.load({str(tmp_path / "ours.npz")!r})["moments"], tfds.builder_from_directory({stored.data.path!r}).as_data_source("train")
for moments, clip in zip(ours, theirs, strict=True):
    assert (clip["latent_moments"] == moments).all() and clip["latent_moments"].dtype == np.float16
    assert clip["text_embedding"].shape == (8, 16) and clip["text_embedding"].dtype == np.float16
assert "tensorflow" not in sys.modules
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_other_weights_are_another_dataset(kl, stored, tmp_path):
    """Refused as a continuation of the job, as another type is, and by a run that would decode with them."""
    other = kl(seed=4, latents=True, text_embeddings=True, frames=True)
    with pytest.raises(UserError, match=r"autoencoder\.sha256 was '[0-9a-f]{64}' and is now"):
        preparation.prepare(other, SOURCE, stored.data.path, log=lambda line: None)
    with pytest.raises(UserError, match=r" dtype was 'float32' and is now 'bfloat16'"):
        preparation.prepare(dataclasses.replace(stored, dtype="bfloat16"), SOURCE, stored.data.path, log=lambda line: None)
    sums = {name: params_checksum(params) for name, params in frozen_weights(Networks.of(other)).items()}
    with pytest.raises(UserError, match=rf"dataset {stored.data.path}: its latents were made by another network"):
        check_towers(other, [shards.read_manifest(stored.data.path)], sums)
    with pytest.raises(UserError, match=r"set --config\.init_from"):
        Towers(dataclasses.replace(other, init_from=""))


def test_every_dataset_is_compared_with_the_frozen_networks(stored, tmp_path):
    """Not the first alone: clips of all are mixed in a batch. The latents' scale comes after what is stored."""
    sums = {name: params_checksum(params) for name, params in frozen_weights(Networks.of(stored)).items()}
    first = shards.read_manifest(stored.data.path)
    second = dataclasses.replace(first, directory=tmp_path, settings={**first.settings, "autoencoder.sha256": "0" * 64})
    scaled = dataclasses.replace(stored, autoencoder=dataclasses.replace(stored.autoencoder, scale_factor=0.5))
    for config in (stored, scaled):
        check_towers(config, [first, first], sums)
    with pytest.raises(UserError, match=rf"dataset {tmp_path}: its latents .*autoencoder\.sha256 was '0{{64}}' and is now"):
        check_towers(stored, [first, second], sums)


def test_a_sample_can_look_no_better_than_its_latents(stored):
    """The ceiling of `bench synthetic`: frames through the autoencoder are what the latents of the records decode to, up to float16."""
    networks, records = Networks.of(stored), pipeline.open_dataset(stored.data)
    clips = [records[i] for i in range(3)]
    animator = Animator(stored, networks, {}, frozen_weights(networks), 8.0)
    back = animator.round_trip(np.stack([clip.frames for clip in clips]))
    z = networks.latents(jnp.stack([clip.latent_moments for clip in clips]))
    decoded = np.asarray(networks.decode(animator.frozen["autoencoder"], z))
    assert back.shape == (3, 4, 16, 16, 3) and back.std() > 1
    assert np.abs(back.astype(int) - decoded).max() <= 1


def test_the_checksum_knows_names_shapes_and_values():
    one = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    others = [one | {"a": one["a"].reshape(3, 2)}, one | {"b": np.array([1, 2], np.float32)}, {"a": one["a"], "c": one["b"]}]
    same = dict(reversed(one.items())), {k: jnp.asarray(v) for k, v in one.items()}
    assert {params_checksum(x) for x in same} == {params_checksum(one)}
    assert len({params_checksum(x) for x in (one, *others)}) == 4


def test_sheets_and_previews_show_decoded_latents(kl, tmp_path):
    config, _ = prepare(kl(latents=True), tmp_path / "data")
    preparation.prepare(config, SOURCE, tmp_path / "data", preview=1, log=lambda line: None)
    assert len(list((tmp_path / "data" / "preview").glob("*.png"))) == 1
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, every=1, count=2))
    networks, tokenizer = Networks.of(config), make_tokenizer(config.text)
    frozen = networks.with_unconditional(frozen_weights(networks), tokenizer)

    class Writer:
        def write(self, step, scalars):
            self.scalars = scalars

        def write_image(self, step, name, picture):
            self.picture = picture

    writer = Writer()
    sheets = SampleSheets(config, networks, tokenizer, make_mesh(config.mesh))
    sheets.write(1, networks.denoiser.init(jax.random.key(0)), frozen, tmp_path / "run", writer)
    assert (tmp_path / "run/samples/1/00.gif").exists() and np.isfinite(writer.scalars["sample/mean_flow_data"])


def test_embeddings_alone_need_no_autoencoder(tiny, tmp_path):
    """Whose weights nobody has given here."""
    config, _ = prepare(tiny(autoencoder=KL, backbone="dit", dit=DIT, prepare={"text_embeddings": True}), tmp_path / "data")
    layout = pipeline.open_dataset(config.data).layout
    assert tuple(layout.text) == (8, 16) and not layout.latent


@pytest.mark.slow
def test_a_whole_run_on_latents(tiny, tmp_path):
    """Trains, validates, samples and reports without a frame in the dataset; an autoencoder of other blocks is refused."""
    stored = {"latents": True, "text_embeddings": True, "validation_share": 0.4}
    config = tiny(backbone="dit", dit=DIT, prepare=stored, sample={"every": 2}, steps=2)
    config, _ = prepare(config, tmp_path / "data")
    loop.train(config, tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "eval/loss", "sample/mean_flow_data"} <= set().union(*metrics)
    assert (tmp_path / "run" / "samples" / "2" / "sheet.png").exists() and "--preview" in (tmp_path / "run" / "report.html").read_text()
    other = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=300))
    with pytest.raises(UserError, match=r"text\.vocab_size was 512 and is now 300"):
        loop.train(other, tmp_path / "other")
