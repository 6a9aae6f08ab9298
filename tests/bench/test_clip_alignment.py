"""CLIP alignments from a tiny model that the test writes, against transformers' own way from pictures to cosines."""

import json

import numpy as np
import pytest

from motif_jax.bench.clip_alignment import ClipAlignment
from motif_jax.errors import UserError
from motif_jax.models.image import DEVIATION, MEAN

WORDS = [
    "a</w>",
    "dog</w>",
    "runs</w>",
    "up</w>",
    "<|startoftext|>",
    "<|endoftext|>",
    "do",
    "ru",
    "run",
    *"dogruns",
    "g</w>",
    "s</w>",
    "p</w>",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 5}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\nr u\nru n\nrun s</w>\nu p</w>\n")
    return folder


def test_cosines_equal_transformers(model):
    import torch
    from transformers import CLIPModel

    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    row = ClipAlignment(str(model))(frames[1:], frames[0], "a dog runs")
    pixels = torch.from_numpy(((frames / 255 - MEAN) / DEVIATION).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = CLIPModel.from_pretrained(model)(input_ids=torch.tensor([[4, 0, 1, 2, 5]]), pixel_values=pixels)
    images, text = out.image_embeds.numpy(), out.text_embeds.numpy()[0]
    assert row["clip_image"] == pytest.approx(100 * (images[1:] @ images[0]).mean(), abs=1e-3)
    assert row["clip_text"] == pytest.approx(100 * (images[1:] @ text).mean(), abs=1e-3)


def test_a_still_video_agrees_wholly_with_its_image(model):
    image = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    align = ClipAlignment(str(model))
    still = align(np.repeat(image[None], 2, 0), image, "a dog runs up " * 10)
    assert still["clip_image"] == pytest.approx(100, abs=1e-3) and -100 <= still["clip_text"] <= 100


def test_other_weights_have_another_digest(model, tmp_path):
    import shutil

    shutil.copytree(model, tmp_path / "copy")
    same = ClipAlignment(str(tmp_path / "copy")).digest
    assert same == ClipAlignment(str(model)).digest
    (tmp_path / "copy" / "merges.txt").write_text("#version: 0.2\n")
    assert ClipAlignment(str(tmp_path / "copy")).digest != same


def test_a_folder_that_is_none(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"no config\.json there"):
        ClipAlignment(str(tmp_path))
