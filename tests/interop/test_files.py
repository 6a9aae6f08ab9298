"""Weight files: what one library writes the other reads, and what a damaged or dangerous file says."""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import pickle
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from motif_jax.data import storage
from motif_jax.errors import UserError
from motif_jax.interop import files

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 2, 5)).astype(np.float32),
    "a.half": RNG.normal(size=7).astype(np.float16),
    "a.double": RNG.normal(size=(2, 2)),
    "scalar": np.asarray(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "count": np.arange(3, dtype=np.int64),
    "brain": RNG.normal(size=(2, 3)).astype(jnp.bfloat16),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        array = np.asarray(found[name])
        assert (array.dtype, array.shape, array.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes()), name
        assert (found[name].dtype, tuple(found[name].shape)) == (tensor.dtype, tensor.shape), name


def test_the_library_reads_what_we_write(tmp_path):
    digest = files.write_safetensors(tmp_path / "x.safetensors", TENSORS)
    assert_same(safetensors.numpy.load_file(tmp_path / "x.safetensors"), TENSORS)
    assert digest == storage.sha256(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_we_read_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_same(files.read_tensors(tmp_path / "x.safetensors"), TENSORS)


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(8, np.float32)})
    tensor = files.read_tensors(tmp_path / "x.safetensors")["a"]
    files.write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(8, np.float32)})
    assert np.asarray(tensor).sum() == 8


def test_a_copy_is_a_copy(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(8, np.float32)})
    copy = np.array(files.read_tensors(tmp_path / "x.safetensors")["a"])
    copy += 1  # a mapping of the file is read-only
    assert np.asarray(files.read_tensors(tmp_path / "x.safetensors")["a"]).sum() == 0


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_truncated_safetensors(tmp_path, length):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"x\.safetensors: is not a .safetensors file, or incomplete"):
        files.read_tensors(path)


def test_a_header_that_lies_about_sizes(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match="incomplete"):
        files.read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_no_number(tmp_path, value):
    files.write_safetensors(tmp_path / "x.safetensors", TENSORS | {"bad.weight": np.asarray([1, value], jnp.bfloat16)})
    tensors = files.read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors: bad\.weight holds NaN or infinity"):
        np.asarray(tensors.pop("bad.weight"))
    assert_same(tensors, TENSORS)


def test_absent_other_and_empty_files(tmp_path):
    for name in ("none.ckpt", "none.index.json"):
        with pytest.raises(UserError, match=rf"{name}: there is no such file"):
            files.read_tensors(tmp_path / name)
    (tmp_path / "x.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=r"x\.ckpt: is a pointer of Git LFS"):
        files.read_tensors(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="is a directory; name a file in it"):
        files.read_tensors(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"must be a \.safetensors, \.ckpt, \.pth, \.pt, \.bin or \.index\.json file"):
        files.read_tensors(tmp_path / "x.npz")
    files.write_safetensors(tmp_path / "x.safetensors", {})
    with pytest.raises(UserError, match="holds no tensors"):
        files.read_tensors(tmp_path / "x.safetensors")


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    files.write_safetensors(path, {"a": np.ones(2, np.float32)})
    before = path.read_bytes()

    def fail():
        raise OSError("no space left on device")

    broken = files.Lazy((2,), np.dtype(np.float32), fail)
    with pytest.raises(OSError, match="no space"):
        files.write_safetensors(path, {"a": np.zeros(2, np.float32), "b": broken})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("wrapper", ["_forward_module.", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_lose_what_a_wrapper_put_before_all_of_them(tmp_path, wrapper):
    files.write_safetensors(tmp_path / "x.safetensors", {wrapper + name: tensor for name, tensor in TENSORS.items()})
    assert_same(files.read_tensors(tmp_path / "x.safetensors"), TENSORS)
    mixed = {wrapper + "a": TENSORS["a.half"], "b": TENSORS["scalar"]}
    files.write_safetensors(tmp_path / "x.safetensors", mixed)
    assert_same(files.read_tensors(tmp_path / "x.safetensors"), mixed)


def test_a_model_in_several_files(tmp_path):
    names = sorted(TENSORS)
    parts = {"1.safetensors": names[:3], "2.safetensors": names[3:]}
    for file, part in parts.items():
        files.write_safetensors(tmp_path / file, {name: TENSORS[name] for name in part})
    index, places = tmp_path / "x.safetensors.index.json", {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(files.read_tensors(index), TENSORS)
    for given, message in (
        (json.dumps({"weight_map": places | {"c": "1.safetensors"}}), "lists what its files do not hold: c in 1.safetensors"),
        (json.dumps({"weight_map": places | {"c": "3.safetensors"}}), r"3\.safetensors: there is no such file"),
        (json.dumps({"weight_map": {"c": index.name}}), r"must be a \.safetensors"),
        ("[]", "is no index of weight files"),
        ('{"weight_map": {"a": 3}}', "is no index of weight files"),
        ("{", "is no index of weight files"),
    ):
        index.write_text(given)
        with pytest.raises(UserError, match=message):
            files.read_tensors(index)


def test_without_pytorch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"install torch to read it, or convert it to \.safetensors elsewhere"):
        files.read_tensors(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"install torch to write it, or choose \.safetensors"):
        files.write_pytorch(tmp_path / "y.ckpt", TENSORS)
    assert os.listdir(tmp_path) == ["x.ckpt"]


LAYOUTS = {
    "bare": lambda state: state,
    "lightning": lambda state: {"state_dict": state, "epoch": 3, "global_step": 10},
    "deepspeed": lambda state: {"module": {"_forward_module." + name: tensor for name, tensor in state.items()}, "lr_scheduler": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_layouts(tmp_path, layout, zipped):
    torch = pytest.importorskip("torch")
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "brain"}
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    state["brain"] = torch.from_numpy(TENSORS["brain"].astype(np.float32)).bfloat16()
    path = tmp_path / {"bare": "x.bin", "lightning": "X.CKPT", "deepspeed": "x.pth"}[layout]
    torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=zipped)
    assert_same(files.read_tensors(path), tensors | {"brain": TENSORS["brain"].astype(np.float32)})


def test_what_we_write_pytorch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "brain"}
    files.write_pytorch(tmp_path / "x.ckpt", tensors)
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert found.keys() == {"state_dict"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found["state_dict"][name].numpy(), tensor)


def test_a_failed_write_leaves_pytorch_s_old_file_alone(tmp_path, monkeypatch):
    torch, path = pytest.importorskip("torch"), tmp_path / "x.ckpt"
    files.write_pytorch(path, {"a": np.ones(2, np.float32)})
    before = path.read_bytes()

    def fail(state, file):
        pathlib.Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_pytorch(path, {"a": np.zeros(2, np.float32)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.ckpt"]


class Settings(dict):
    """As Lightning's AttributeDict; its __dict__ is stored, too."""


class Names(list):
    pass


class Harmful:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("executed",)


class Callback:
    def __init__(self):
        self.best = np.float64(0.5)


def test_what_a_trainer_keeps_beside_the_tensors_is_left_out(tmp_path, monkeypatch):
    """Classes of a library that is not installed, also kinds of dict and list, NumPy's scalars and arrays; nothing of them is made."""
    torch = pytest.importorskip("torch")
    beside = {"callbacks": {Callback: Callback()}, "seed": np.arange(3), "hyper_parameters": argparse.Namespace(root=pathlib.Path("x"))}
    settings = Settings(inner=Settings(names=Names("ab")), kind=dict, counts=collections.defaultdict(list, {1: [2]}))
    settings.extra = Settings()
    for name, state in (("x.ckpt", {"a": torch.ones(2)}), ("y.ckpt", Settings(a=torch.ones(2)))):
        torch.save({"state_dict": state, "settings": settings, **beside}, tmp_path / name)
    for kind in ("Callback", "Names", "Settings"):
        monkeypatch.delattr(sys.modules[__name__], kind)
    for name in ("x.ckpt", "y.ckpt"):
        assert_same(files.read_tensors(tmp_path / name), {"a": np.ones(2, np.float32)})


@pytest.mark.parametrize(
    ("call", "name"), [(os.mkdir, "(posix|nt).mkdir"), (pathlib.Path.mkdir, "pathlib.Path|getattr"), (eval, r"\S*eval")]
)
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch, call, name):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(2)}, "callback": Harmful(call)}, "x.ckpt")
    with pytest.raises(UserError, match=rf"x\.ckpt: refused, because reading it would run code: it asks for ({name})"):
        files.read_tensors("x.ckpt")
    assert os.listdir() == ["x.ckpt"]


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_plain_pickle_is_refused_without_a_warning(tmp_path, recwarn, protocol):
    pytest.importorskip("torch")
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"state_dict": {"a": np.zeros(2)}}, protocol))
    with pytest.raises(UserError, match=rf"x\.ckpt: refused, because reading it could run code: of a pickle of protocol {protocol}"):
        files.read_tensors(tmp_path / "x.ckpt")
    assert not recwarn


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_pytorch_files(tmp_path, zipped, share):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"x\.ckpt: is (incomplete|not a PyTorch checkpoint of tensors, or damaged)"):
        files.read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_damaged_anywhere(tmp_path, zipped):
    """Cut off at any length, or with one byte changed: a UserError or tensors, nothing else is raised."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    changed = [whole[:i] + bytes([whole[i] ^ 85]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
    for damaged in cut + changed:
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert len(files.read_tensors(path)) == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64"])
def test_a_pytorch_type_that_is_not_read(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2).to(getattr(torch, dtype))}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"x\.ckpt: holds tensors of type {dtype}; must be integers or floating point"):
        files.read_tensors(tmp_path / "x.ckpt")


def test_a_damaged_byte_in_a_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"x\.ckpt: is damaged \(the checksum of x/data/0 is another\); fetch it again"):
        files.read_tensors(path)


def test_something_else_in_a_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"epoch": 3, "a": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds no state dict.*epoch \(int\)$"):
        files.read_tensors(tmp_path / "x.pth")
    torch.save([torch.zeros(2)], tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds no state dict.*the file \(list\)$"):
        files.read_tensors(tmp_path / "x.pth")
    torch.save({"a": torch.zeros(2), "b": np.float64(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds no state dict.*b \(scalar\)$"):
        files.read_tensors(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"or damaged$"):  # PyTorch's advice would be to run its code
        files.read_tensors(tmp_path / "x.pth")
