"""CLIP alignments from a tiny model that the test writes: against transformers where there is PyTorch, and its numbers everywhere."""

import json
import shutil

import numpy as np
import pytest

from motif_jax.bench.clip_alignment import MEAN, STD, ClipAlignment
from motif_jax.config import UserError
from motif_jax.interop.files import write_safetensors

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


def weights() -> dict[str, np.ndarray]:
    """Of two towers of two blocks, width 16."""
    rng = np.random.default_rng(0)
    shapes = {
        "logit_scale": (),
        "text_projection.weight": (12, 16),
        "visual_projection.weight": (12, 16),
        "text_model.embeddings.token_embedding.weight": (len(WORDS), 16),
        "text_model.embeddings.position_embedding.weight": (8, 16),
        "vision_model.embeddings.class_embedding": (16,),
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (17, 16),
    }
    linear = {f"self_attn.{name}_proj": (16, 16) for name in ("q", "k", "v", "out")} | {"mlp.fc1": (32, 16), "mlp.fc2": (16, 32)}
    norms = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for block in (f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(2)):
        norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
        for name, shape in linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (16,), f"{name}.bias": (16,)}
    scaled = {name: rng.normal(0, 0.7 if len(shape) > 1 else 0.1, shape) for name, shape in shapes.items()}
    return {name: (w + (name.removesuffix(".weight") in norms)).astype(np.float32) for name, w in scaled.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 5}
    vision = small | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
    folder = tmp_path_factory.mktemp("clip")
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=12).save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", weights())
    (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\nr u\nru n\nrun s</w>\nu p</w>\n")
    return folder


FRAMES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
COSINES = {"clip_image": 39.5036, "clip_text": 17.4216}  # by transformers 5.24, see the second test


def test_cosines(model):
    assert ClipAlignment(str(model))(FRAMES[1:], FRAMES[0], "a dog runs") == pytest.approx(COSINES, abs=1e-3)


def test_cosines_are_those_of_transformers(model):
    torch = pytest.importorskip("torch")
    from transformers import CLIPModel

    pixels = torch.from_numpy(((FRAMES / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = CLIPModel.from_pretrained(model)(input_ids=torch.tensor([[4, 0, 1, 2, 5]]), pixel_values=pixels)
    images, text = out.image_embeds.numpy(), out.text_embeds.numpy()[0]
    found = {"clip_image": 100 * (images[1:] @ images[0]).mean(), "clip_text": 100 * (images[1:] @ text).mean()}
    assert found == pytest.approx(COSINES, abs=1e-3)


def test_a_still_video_agrees_wholly_with_its_image(model):
    image = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    align = ClipAlignment(str(model))
    still = align(np.repeat(image[None], 2, 0), image, "a dog runs up " * 10)
    assert still["clip_image"] == pytest.approx(100, abs=1e-3) and -100 <= still["clip_text"] <= 100


def test_other_weights_have_another_digest(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    same = ClipAlignment(str(tmp_path / "copy")).digest
    assert same == ClipAlignment(str(model)).digest
    (tmp_path / "copy" / "merges.txt").write_text("#version: 0.2\n")
    assert ClipAlignment(str(tmp_path / "copy")).digest != same


def test_folders_that_are_none(model, tmp_path):
    def copy(name):
        return shutil.copytree(model, tmp_path / name)

    with pytest.raises(UserError, match=r"no config\.json there"):
        ClipAlignment(str(tmp_path))
    (copy("pickled") / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors there"):
        ClipAlignment(str(tmp_path / "pickled"))
    write_safetensors(copy("half") / "model.safetensors", {k: v for k, v in weights().items() if "text" in k})
    with pytest.raises(UserError, match=r"model\.safetensors does not fit config\.json: 'vision_model"):
        ClipAlignment(str(tmp_path / "half"))
    config = (copy("odd") / "config.json").read_text()
    (tmp_path / "odd" / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    with pytest.raises(UserError, match="activation relu is not one of quick_gelu, gelu"):
        ClipAlignment(str(tmp_path / "odd"))
