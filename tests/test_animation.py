"""Lists for sampling: what is refused, and that a directory holds clips of one kind."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from motif_jax.animation import Animator, animate_list, animate_one, noise_seed
from motif_jax.data.images import cover
from motif_jax.errors import UserError
from motif_jax.models.networks import Networks


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path


def save(folder, *requests):
    lines = [r if isinstance(r, str) else json.dumps({"image": "a.png", "prompt": "x", "id": "1", **r}) for r in requests]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return str(folder / "list.jsonl")


def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path):
    """Beside them an unfinished save, whose name begins with a number, too."""
    for name in ("9", "40", "60.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds neither config\.json .*; checkpoints here: \[9, 40\]"):
        Animator.load(tmp_path / "checkpoints" / "50")


def never():
    raise AssertionError("weights are loaded before the flags are checked")


def test_flags_are_checked_before_weights_are_loaded(folder):
    with pytest.raises(UserError, match=r"--requests=.*list\.jsonl: line 1: Expecting"):
        animate_list(never, save(folder, "{"), str(folder / "out"), 0, 1, "gif")
    with pytest.raises(UserError, match=r"must end in \.mp4 or \.gif"):
        animate_one(never, "a.png", "x", "x.avi", 0)
    with pytest.raises(UserError, match=r"b\.png: missing file"):
        animate_one(never, str(folder / "b.png"), "x", str(folder / "x.gif"), 0)
    with pytest.raises(UserError, match=r"list\.jsonl: is no image"):
        animate_one(never, str(folder / "list.jsonl"), "x", str(folder / "x.gif"), 0)
    assert not (folder / "out").exists()
    with pytest.raises(UserError, match=r"--output=.*a\.png/out: cannot be written: .*Not a directory"):
        animate_list(never, save(folder, {}), str(folder / "a.png" / "out"), 0, 1, "gif")


class Still:
    """Stands for an animator: every frame is the image's mean colour."""

    def __init__(self, config, guidance=7.5):
        self.config, self.settings = config, {"model": "m", "guidance": guidance}
        self.sizes = []

    def __call__(self, images, prompts, seeds):
        self.sizes.append(len(images))
        return np.stack([np.full((4, 16, 16, 3), image.mean(), np.uint8) for image in images])


def test_a_directory_holds_clips_of_one_kind(folder, tiny, capsys):
    output, config = folder / "out", tiny()

    def make(*requests, seed=0, guidance=7.5):
        animate_list(lambda: Still(config, guidance), save(folder, *requests), str(output), seed, 2, "gif")

    make({})
    make({}, {"id": "2", "prompt": "w " * 8})
    said = capsys.readouterr().out
    assert "sentences with more words than the text tower takes (text.context_length=8" in said and "cut off: 1; the first: 2\n" in said
    assert "2 videos, 1 done before" in said
    assert sorted(p.name for p in output.iterdir()) == ["1.gif", "2.gif", "manifest.json"]
    before = {p: p.read_bytes() for p in output.iterdir()}
    for other, message in (({"seed": 1}, "seed: 0 there, 1 now"), ({"guidance": 1.0}, "guidance: 7.5 there, 1.0 now")):
        with pytest.raises(UserError, match=rf"made otherwise \({message}\); choose another --output"):
            make({}, **other)
    with pytest.raises(UserError, match=r"1\.gif there shows another image or prompt; delete it"):
        make({"prompt": "y"})
    assert {p: p.read_bytes() for p in output.iterdir()} == before
    (output / "1.gif").unlink()
    make({"prompt": "y"})


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (3, [3]), (5, [4, 4])])
def test_a_batch_is_no_larger_than_the_list(folder, tiny, count, sizes):
    animator = Still(tiny())
    requests = save(folder, *({"id": i} for i in range(count)))
    animate_list(lambda: animator, requests, str(folder / "out"), 0, 4, "gif")
    assert animator.sizes == sizes and len(list((folder / "out").glob("*.gif"))) == count


def test_files_of_unknown_making_are_refused(folder, tiny):
    output = folder / "out"
    output.mkdir()
    (output / "1.gif").write_bytes(b"another's")

    def make():
        animate_list(lambda: Still(tiny()), save(folder, {}, {"id": "2"}), str(output), 0, 2, "gif")

    with pytest.raises(UserError, match=r"1\.gif there is not in manifest\.json, .*; delete it"):
        make()
    assert [p.name for p in output.iterdir()] == ["1.gif"]
    (output / "1.gif").unlink()
    make()
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps(manifest | {"videos": manifest["videos"][1:]}))
    with pytest.raises(UserError, match=r"1\.gif there is not in"):
        make()


def test_images_are_opened_before_weights_are_loaded(folder):
    """All that a list still needs: one that cannot be read would stop it late, and every time."""
    for name in "bc":
        (folder / f"{name}.jpg").write_bytes(b"\xff\xd8\xff")
    requests = save(folder, {}, *({"image": f"{name}.jpg", "id": name} for name in "bc"))
    with pytest.raises(UserError, match=r"b\.jpg \(of b\): is no image: .*c\.jpg \(of c\): is no image.*; mend them, or take them off"):
        animate_list(lambda: 1 / 0, requests, str(folder / "out"), 0, 2, "gif")


def test_a_manifest_that_cannot_be_written(folder, tiny):
    (folder / "out" / "manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--output=.*out: cannot be written: .*Is a directory"):
        animate_list(lambda: Still(tiny()), save(folder, {}), str(folder / "out"), 0, 2, "gif")


def test_noise_depends_on_the_seed_and_the_id():
    """The numbers by which clips that were made can be made again: CRC-32 of "seed:id" (as gzip computes it), in 31 bits."""
    assert [noise_seed(0, "a"), noise_seed(0, "b"), noise_seed(1, "a")] == [1144435509, 1564467855, 1173674242]


@pytest.fixture
def broken_animator(tiny):
    """Of every batch the clip 1 has an infinite value in its latents."""
    networks = Networks.of(tiny(backbone="dit", dit={"width": 8, "depth": 1, "num_head_channels": 8}))
    params = networks.denoiser.init(jax.random.key(0))
    return Animator(
        networks.config,
        networks,
        params,
        networks.init_frozen(),
        8.0,
        directory=pathlib.Path("RUN"),
        step=7,
        sampler=lambda config, schedule, denoise, x_BThwC, keys_B: x_BThwC.at[1:2, 2, 0, 0, 5].set(jnp.inf),
    )


def test_a_clip_with_infinity_is_named_and_not_written(folder, broken_animator, capsys):
    """The others of the list are."""
    requests = save(folder, *({"id": str(i), "prompt": f"go {i}"} for i in range(4)))
    for made in (2, 0):
        message = rf"out: 2 of {made + 2} videos are not written \(NaN or infinity, see above\): 1\.gif; 3\.gif$"
        with pytest.raises(UserError, match=message):
            animate_list(lambda: broken_animator, requests, str(folder / "out"), 0, 2, "gif")
        assert sorted(p.name for p in (folder / "out").glob("*.gif")) == ["0.gif", "2.gif"]
        said = "RUN at step 7: NaN or infinity in the clip of 'go 3'; use another checkpoint or guidance nearer to 1 (now 7.5)\n"
        assert said in capsys.readouterr().out


def test_a_clip_of_its_own_with_infinity(folder, broken_animator):
    animator = dataclasses.replace(broken_animator, sampler=lambda config, schedule, denoise, x_BThwC, keys_B: x_BThwC * jnp.nan)
    with pytest.raises(UserError, match="RUN at step 7: NaN or infinity in the clip of 'x'"):
        animate_one(lambda: animator, str(folder / "a.png"), "x", str(folder / "x.gif"), 0)
    assert not (folder / "x.gif").exists()
    with pytest.raises(UserError, match="in the clip of 'x'; use"):  # once, however often a batch repeats it
        animator(2 * [Image.new("RGB", (16, 16))], ["x", "x"], [0, 0])


def test_the_network_is_told_the_image_and_the_frame_rate(tiny, monkeypatch):
    """In its place, three frames of the image's latent and one of the frame rate, which is not that of the written video."""
    settings = {"diffusion": {"prediction": "x0"}, "sample": {"guidance": 1.0, "steps": 1, "fps": 8.0}}
    networks = Networks.of(tiny(backbone="dit", dit={"width": 8, "depth": 1, "num_head_channels": 8}, **settings))

    def denoise(self, params, x, t, context, fps, image, dropout_rng=None):
        return image.at[:, 3].set(fps[:, None, None, None] / 32)

    monkeypatch.setattr(Networks, "denoise", denoise)
    animate = Animator(networks.config, networks, networks.denoiser.init(jax.random.key(0)), networks.init_frozen(), 24.0)
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    (clip,) = animate([picture], ["x"], [0])
    np.testing.assert_array_equal(clip[:3], np.broadcast_to(cover(picture, 16, 16), (3, 16, 16, 3)))
    np.testing.assert_array_equal(clip[3], round((24 / 32 + 1) * 127.5))


def test_every_clip_needs_an_image_a_prompt_and_a_seed(tiny):
    networks = Networks.of(tiny())
    animate = Animator(networks.config, networks, {}, networks.init_frozen(), 8.0)
    with pytest.raises(ValueError, match="1 images, 2 prompts and 1 seeds"):
        animate([Image.new("RGB", (16, 16))], ["a", "b"], [0])


def test_a_kernel_of_other_machines_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="attention='cudnn': runs on gpu and this is cpu; use 'auto'"):
        Animator.load(tmp_path, tiny(attention="cudnn"))
