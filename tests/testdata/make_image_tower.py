"""Makes image_tower.npz with transformers' CLIP and kornia: preprocessed images and the last hidden states of formula weights.

Run by hand in an environment with torch, transformers and kornia:
    python tests/testdata/make_image_tower.py
Last made with torch 2.13.0, transformers 5.23.0 and kornia 0.9.0 on a CPU, in float64. The tests import `SIZES`, `shapes`, `weights` and
`images`, which need numpy only.
"""

import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
SIZES = {"size": 24, "patch": 6, "width": 32, "layers": 2, "heads": 4, "projection": 20}
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def shapes(size: int, patch: int, width: int, layers: int, heads: int, projection: int) -> dict[str, tuple[int, ...]]:
    """OpenCLIP's name -> shape of every tensor of an image tower."""
    shapes = {"class_embedding": (width,), "positional_embedding": ((size // patch) ** 2 + 1, width), "proj": (width, projection)}
    shapes |= {"conv1.weight": (width, 3, patch, patch)}
    norms = ["ln_pre", "ln_post"]
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, out, inn in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width)):
            shapes |= {f"{block}.{name}.weight": (out, inn), f"{block}.{name}.bias": (out,)}
    return shapes | {f"{norm}.{leaf}": (width,) for norm in norms for leaf in ("weight", "bias")}


def weights() -> dict[str, np.ndarray]:
    """OpenCLIP's name -> tensor for `SIZES`, from a generator seeded by the name."""
    tensors = {}
    for name, shape in shapes(**SIZES).items():
        normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        one_dimensional = 0.2 * normal + (".weight" in name)
        tensors[name] = (one_dimensional if len(shape) == 1 else normal / np.prod(shape[1:]) ** 0.5).astype(np.float32)
    return tensors


def images(height: int, width: int) -> np.ndarray:
    """Two smooth images with noise, float32 in [-1, 1], [2, height, width, 3]."""
    random = np.random.default_rng(height * width)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin(0.7 * y[..., None] + random.uniform(0, 6, (2, 1, 1, 3))) * np.cos(
        0.4 * x[..., None] + random.uniform(0, 6, (2, 1, 1, 3))
    )
    return np.clip(0.7 * waves + 0.2 * random.normal(size=waves.shape), -1, 1).astype(np.float32)


def main() -> None:
    import kornia
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    ours = {name: torch.from_numpy(tensor) for name, tensor in weights().items()}
    width = SIZES["width"]
    state = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
    }
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for i in range(SIZES["layers"]):
        there, here = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        norms |= {f"{here}.ln_1": f"{there}.layer_norm1", f"{here}.ln_2": f"{there}.layer_norm2"}
        for j, part in enumerate(("q", "k", "v")):
            for leaf in ("weight", "bias"):
                state[f"{there}.self_attn.{part}_proj.{leaf}"] = ours[f"{here}.attn.in_proj_{leaf}"][j * width : (j + 1) * width]
        for a, b in (("self_attn.out_proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
            for leaf in ("weight", "bias"):
                state[f"{there}.{a}.{leaf}"] = ours[f"{here}.{b}.{leaf}"]
    state |= {f"{there}.{leaf}": ours[f"{here}.{leaf}"] for here, there in norms.items() for leaf in ("weight", "bias")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        image_size=SIZES["size"],
        patch_size=SIZES["patch"],
        hidden_act="gelu",
    )
    model = CLIPVisionModel(config).eval()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: tensor for name, tensor in state.items()}, strict=True)
    model = model.double()
    found = {}
    for height, wide in ((24, 24), (40, 64), (20, 90), (16, 12)):
        x = torch.from_numpy(images(height, wide)).double().permute(0, 3, 1, 2)
        x = kornia.geometry.resize(x, (SIZES["size"],) * 2, interpolation="bicubic", align_corners=True, antialias=True)
        x = kornia.enhance.normalize((x + 1) / 2, torch.tensor(MEAN).double(), torch.tensor(DEVIATION).double())
        found[f"preprocessed_{height}x{wide}"] = x.permute(0, 2, 3, 1)[:, ::3].numpy().astype(np.float32)
        if height == 40:
            with torch.no_grad():
                found["tokens"] = model(x, output_hidden_states=True).hidden_states[-1].numpy().astype(np.float32)
    np.savez_compressed(HERE / "image_tower.npz", **found)
    print({name: (array.shape, float(abs(array).mean())) for name, array in found.items()})


if __name__ == "__main__":
    main()
