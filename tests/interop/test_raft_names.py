"""RAFT weights in both key layouts against torchvision's and the authors' own lists of names, and what a wrong file says."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import safetensors.numpy

from motif_jax.interop import files
from motif_jax.interop import raft as interop

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
SPEC = importlib.util.spec_from_file_location("make_raft", TESTDATA / "make_raft.py")
SPEC.loader.exec_module(make_raft := importlib.util.module_from_spec(SPEC))
NAMES = json.loads((TESTDATA / "raft_names.json").read_text())  # variant -> layout -> name -> PyTorch shape, read from the reference models


def tensors(variant, layout="torchvision"):
    weights = make_raft.weights(NAMES[variant]["torchvision"])
    return weights if layout == "torchvision" else interop.to_reference(interop.from_reference(weights), layout)


@pytest.mark.parametrize("layout", ["original", "torchvision"])
@pytest.mark.parametrize("variant", ["small", "large"])
def test_there_and_back_is_the_identity(variant, layout):
    given = tensors(variant, layout)
    assert {name: list(tensor.shape) for name, tensor in given.items()} == NAMES[variant][layout]
    back = interop.to_reference(interop.from_reference(given, variant), layout)
    assert set(back) == set(given)
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_number_of_parameters():
    """990,162 and 5,257,536, as counted in the authors' code (buffers and the second names of shared norms left out)."""
    for variant, expected in [("small", 990_162), ("large", 5_257_536)]:
        assert len(set(interop.names(variant).values())) == len(NAMES[variant]["torchvision"])
        sizes = {n: np.prod(s) for n, s in NAMES[variant]["torchvision"].items() if "running" not in n and "tracked" not in n}
        assert sum(sizes.values()) == expected
        paths = set(interop.names(variant, "torchvision").values())
        assert paths == set(interop.names(variant, "original").values())


@pytest.mark.parametrize(
    ("original", "torchvision"),
    [
        ("fnet.conv1.weight", "feature_encoder.convnormrelu.0.weight"),
        ("cnet.norm1.running_var", "context_encoder.convnormrelu.1.running_var"),
        ("cnet.layer2.0.downsample.1.bias", "context_encoder.layer2.0.downsample.1.bias"),
        ("update_block.encoder.convc2.bias", "update_block.motion_encoder.convcorr2.0.bias"),
        ("update_block.gru.convq2.weight", "update_block.recurrent_block.convgru2.convq.weight"),
        ("update_block.mask.2.weight", "mask_predictor.conv.weight"),
    ],
)
def test_names_of_the_same_tensor(original, torchvision):
    """That equal names meet equal tensors follows from the flow of torchvision in tests/motion/test_raft.py; these are read by eye."""
    assert interop.names("large", "original")[original] == interop.names("large", "torchvision")[torchvision]


@pytest.mark.parametrize(
    ("variant", "file", "prefix"), [("small", "raft_small_things", "module."), ("large", "raft_large_RANDOM_fp16", "")]
)
def test_published_files_leave_as_they_came(shared, variant, file, prefix):
    path = shared / "raft" / f"{file}.safetensors"
    given = {name.removeprefix(prefix): tensor for name, tensor in safetensors.numpy.load_file(path).items()}
    model = interop.load_raft(path, variant)
    back = interop.to_reference(model)
    assert set(back) == set(given)
    for name in given:
        np.testing.assert_array_equal(back[name], given[name], err_msg=name)
    again = interop.to_reference(interop.from_reference(interop.to_reference(model, "torchvision"), variant))
    for name in given:
        np.testing.assert_array_equal(again[name], given[name], err_msg=name)


def test_every_mistake_is_listed_in_one_error():
    broken = tensors("large", "original")
    del broken["update_block.mask.2.bias"]
    broken["fnet.conv1.weight"] = broken["fnet.conv1.weight"][:, :1]
    broken["cnet.layer3.0.norm3.bias"] = broken["cnet.layer3.0.norm3.bias"] + 1
    broken["fnet.layer4.0.conv1.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        interop.from_reference(broken)
    for line in (
        "these weights are not those of RAFT large (original layout); take the authors' file of it, or torchvision's\n",
        "\n  1 missing: update_block.mask.2.bias [576]\n",
        "\n  2 left over: cnet.layer3.0.norm3.bias (differs from its duplicate cnet.layer3.0.downsample.1.bias); ",
        "; fnet.layer4.0.conv1.weight\n",
        "\n  1 of another shape: fnet.conv1.weight: [64, 1, 7, 7] in the file, [64, 3, 7, 7] in the model",
    ):
        assert line in str(error.value)


def test_a_file_without_the_duplicates_loads():
    given = tensors("large", "original")
    fewer = {name: tensor for name, tensor in given.items() if ".norm3." not in name}
    assert len(given) - len(fewer) == 10
    assert set(interop.to_reference(interop.from_reference(fewer))) == set(given)


def test_a_file_without_counters_of_batches_loads():
    """As PyTorch wrote them before it counted; the counters, which nothing uses, are zero then."""
    given = tensors("large", "original")
    fewer = {name: tensor for name, tensor in given.items() if "tracked" not in name}
    assert len(fewer) < len(given)
    back = interop.to_reference(interop.from_reference(fewer))
    assert all(np.array_equal(back[name], given[name]) for name in fewer) and not any(back[name] for name in set(given) - set(fewer))


def test_the_variant_is_checked_and_strangers_are_refused():
    with pytest.raises(ValueError, match="weights of RAFT small, but RAFT large was asked for"):
        interop.from_reference(tensors("small"), "large")
    with pytest.raises(ValueError, match="not RAFT weights"):
        interop.from_reference({"model.diffusion_model.out.0.bias": np.zeros(3)})
    with pytest.raises(ValueError, match="not RAFT weights"):
        interop.from_reference({})
    with pytest.raises(ValueError, match="must be one of original, torchvision"):
        interop.names("small", "keras")


def test_files(tmp_path, monkeypatch):
    model = interop.from_reference(tensors("small"))
    path = tmp_path / "weights.safetensors"
    files.write_safetensors(path, interop.to_reference(model, "torchvision"))
    for name, tensor in interop.to_reference(interop.load_raft(path), "torchvision").items():
        np.testing.assert_array_equal(tensor, tensors("small")[name])
    with pytest.raises(FileNotFoundError, match=r"no RAFT weights at .*absent\.pth"):
        interop.load_raft(tmp_path / "absent.pth")
    (tmp_path / "weights.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a \.safetensors, \.ckpt, \.pth, \.pt, \.bin or \.index\.json file"):
        interop.load_raft(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"weights\.safetensors: these are weights of RAFT small"):
        interop.load_raft(path, "large")
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if PyTorch were not installed
    with pytest.raises(ValueError, match="install torch to read it, or convert it"):
        interop.load_raft(tmp_path / "weights.pth")


def test_pytorch_files(tmp_path):
    torch = pytest.importorskip("torch")
    given = tensors("large", "original")
    torch.save({f"module.{name}": torch.from_numpy(tensor) for name, tensor in given.items()}, tmp_path / "weights.pth")
    back = interop.to_reference(interop.load_raft(tmp_path / "weights.pth", "large"))
    assert set(back) == set(given)
    for name in given:
        np.testing.assert_array_equal(back[name], given[name])
    torch.save({"epoch": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        interop.load_raft(tmp_path / "checkpoint.pt")
