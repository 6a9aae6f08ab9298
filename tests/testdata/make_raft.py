"""Makes raft_names.json and raft_flow.npz with torchvision: names and shapes of both key layouts, and the flow of formula weights.

Run by hand in an environment with torch, torchvision and the authors' key layout as .safetensors (small and large):
    python tests/testdata/make_raft.py SMALL.safetensors LARGE.safetensors
Last made with torch 2.13.0 and torchvision 0.28.0 on a CPU, in float32. The tests import `weights` and `frames`, which need numpy only.
"""

import json
import pathlib
import sys
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
HEIGHT, WIDTH, ITERATIONS, STRIDE = 125, 131, 4, 4  # 128 x 136 padded: a 16 x 17 grid, so that pooling meets odd sizes


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Numbers for every tensor from a generator seeded by its torchvision name; scaled so that flow stays within some pixels."""
    tensors = {}
    for name, shape in shapes.items():
        normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        if len(shape) == 4:
            value = normal * (2.0 / np.prod(shape[1:])) ** 0.5 * (0.3 if "flow_head.conv2" in name else 1.0)
        elif name.endswith("running_var"):
            value = 1 + 0.5 * np.tanh(normal)
        elif name.endswith("num_batches_tracked"):
            value = np.int64(7)
        else:
            value = 0.1 * normal + (name.endswith(".1.weight"))
        tensors[name] = np.asarray(value, np.int64 if name.endswith("tracked") else np.float32)
    return tensors


def frames() -> np.ndarray:
    """Two frames uint8 [2, 125, 131, 3] of blocks and noise; the second is the first moved by (u, v) = (3, -2) with new noise."""
    random = np.random.default_rng(5)
    blocks = random.integers(20, 236, (24, 24, 3)).repeat(8, 0).repeat(8, 1)
    views = np.stack([blocks[30 : 30 + HEIGHT, 30 : 30 + WIDTH], blocks[32 : 32 + HEIGHT, 27 : 27 + WIDTH]])
    return (views + random.integers(-20, 20, views.shape)).astype(np.uint8)


def main(files: list[str]) -> None:
    import safetensors.numpy
    import torch
    from torchvision.models.optical_flow import raft_large, raft_small

    names, flows = {}, {}
    for variant, make, file in zip(("small", "large"), (raft_small, raft_large), files, strict=True):
        model = make().eval()
        shapes = {name: list(tensor.shape) for name, tensor in sorted(model.state_dict().items())}
        original = {k.removeprefix("module."): list(v.shape) for k, v in sorted(safetensors.numpy.load_file(file).items())}
        names[variant] = {"torchvision": shapes, "original": original}
        model.load_state_dict({k: torch.from_numpy(v) for k, v in weights(shapes).items()}, strict=True)
        images = torch.from_numpy(frames()).permute(0, 3, 1, 2).float()
        top, left = -HEIGHT % 8 // 2, -WIDTH % 8 // 2
        pad = (left, -WIDTH % 8 - left, top, -HEIGHT % 8 - top)
        images = torch.nn.functional.pad(images / 255 * 2 - 1, pad, mode="replicate")
        with torch.no_grad():
            flow = model(images[:1], images[1:], num_flow_updates=ITERATIONS)[-1][0].permute(1, 2, 0).numpy()
        print(variant, "mean flow", flow.mean((0, 1)), "spread", flow.std((0, 1)), "largest", abs(flow).max())
        flows[variant] = flow[top : top + HEIGHT : STRIDE, left : left + WIDTH : STRIDE].astype(np.float32)
    text = json.dumps(names, separators=(",", ":")).replace("},", "},\n").replace("],", "],\n")
    (HERE / "raft_names.json").write_text(text + "\n")
    np.savez_compressed(HERE / "raft_flow.npz", **flows)


if __name__ == "__main__":
    main(sys.argv[1:])
