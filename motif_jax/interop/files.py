"""Files of named tensors: .safetensors, and PyTorch's .ckpt, .pth, .pt and .bin. Read lazily; written whole or not at all.

Nothing stored in a file is executed, and PyTorch is imported only for its own files.
"""

import builtins
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors

from motif_jax.data.storage import replacing
from motif_jax.errors import UserError, enumerate_first

PYTORCH = (".ckpt", ".pth", ".pt", ".bin")
_HARMLESS = {"argparse", "collections", "pathlib", "typing"}  # of Python's modules; of the others harmful files take their functions
_POINTER = b"version https://git-lfs"  # what a clone has in place of a large file
_WRAPPERS = ("_forward_module.", "module.", "_orig_mod.")  # what DeepSpeed, DistributedDataParallel and compile put before every name

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is read when NumPy asks for it, so that files larger than memory pass through one tensor at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


class _LeftOut:
    """In place of an object that a checkpoint keeps beside its tensors (a callback, settings, a NumPy scalar), which is not made."""

    like: type | None = None  # what the file fills objects of this class as

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        type(self).like = OrderedDict

    def append(self, _: Any) -> None:
        type(self).like = list


class _Look(pickle.Unpickler):
    """Reads a pickle with a `_LeftOut` for everything that it asks for: nothing is imported or called."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.classes: dict[str, type[_LeftOut]] = {}

    def find_class(self, module: str, name: str) -> type[_LeftOut]:
        made = type(name, (_LeftOut,), {"__module__": module})
        return self.classes.setdefault(f"{module}.{name}", made)

    def persistent_load(self, _: Any) -> None:
        return None


def read_tensors(path: str | pathlib.Path) -> dict[str, Lazy]:
    """The tensors of a file by name, in the file's types; bfloat16 as the NumPy type of ml_dtypes, or widened to float32.

    PyTorch files may be DeepSpeed's ("module"), Lightning's ("state_dict") or a bare dict of tensors; objects beside these are left out,
    and what a wrapper has put before all names is taken off. An .index.json stands for the files that it lists. Raises UserError for a
    file that is absent, damaged, of another kind, or whose reading would run code; reading a tensor raises it for one that is not finite.
    """
    path = pathlib.Path(path)
    tensors = _read_index(path) if path.name.endswith(".index.json") and path.is_file() else _read_one(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    while wrapper := next((w for w in _WRAPPERS if all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return {name: dataclasses.replace(tensor, read=partial(_finite, path, name, tensor.read)) for name, tensor in tensors.items()}


def _read_one(path: pathlib.Path) -> dict[str, Lazy]:
    if not path.is_file():
        raise UserError(f"{path}: {'is a directory; name a file in it' if path.is_dir() else 'there is no such file'}")
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: is a pointer of Git LFS, not the file itself; fetch that with git lfs pull")
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    if path.suffix.lower() in PYTORCH:
        return _read_pytorch(path)
    raise UserError(f"{path}: must be a .safetensors, {', '.join(PYTORCH)} or .index.json file")


def _read_index(path: pathlib.Path) -> dict[str, Lazy]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        parts = {file: _read_one(path.parent / file) for file in sorted(set(places.values()))}
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no index of weight files: {error!r}") from error
    if absent := [f"{name} in {file}" for name, file in places.items() if name not in parts[file]]:
        raise UserError(f"{path}: lists what its files do not hold: {'; '.join(absent)}")
    return {name: parts[file][name] for name, file in places.items()}


def _finite(path: pathlib.Path, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    array = read()
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds NaN or infinity, so that no network can use it; fetch the file again")
    return array


def _read_safetensors(path: pathlib.Path) -> dict[str, Lazy]:
    try:
        with safetensors.safe_open(path, framework="np"):  # checks the header against the length of the file
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a .safetensors file, or incomplete ({error}); fetch it again") from error
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    _check_types(path, {entry["dtype"] for entry in header.values()} - _DTYPES.keys())

    def tensor(entry: dict[str, Any]) -> Lazy:
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        return Lazy(shape, dtype, partial(_read_part, path, 8 + length + entry["data_offsets"][0], shape, dtype))

    return {name: tensor(entry) for name, entry in header.items()}


def _check_types(path: pathlib.Path, strange: set[str]) -> None:
    if strange:
        raise UserError(
            f"{path}: holds tensors of type {', '.join(sorted(strange))}; must be integers or floating point of 16 bits or more"
        )


def _read_part(path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # A mapping of one tensor: its pages leave memory with the array, those of a mapping of the whole file would pile up.
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, shape))


def _read_pytorch(path: pathlib.Path) -> dict[str, Lazy]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file: install torch to read it, or convert it to .safetensors elsewhere") from error
    zipped = False
    with contextlib.suppress(zipfile.BadZipFile):
        zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04" and not zipped:
            raise UserError(f"{path}: is incomplete (the table of contents at its end is missing); fetch it again")
    if zipped and (damaged := _damaged_member(path)):
        raise UserError(f"{path}: is damaged (the checksum of {damaged} is another); fetch it again")
    left_out = _left_out(torch, path) if zipped else []
    try:
        with warnings.catch_warnings(record=True) as remarks, torch.serialization.safe_globals(left_out):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # PyTorch's reader raises what a damaged file makes it stumble over
        asked = re.findall(r"(?:GLOBAL|function) (\S+)", str(error))[:1] or [f"{cls.__module__}.{cls.__name__}" for cls in left_out]
        if asked:
            raise UserError(
                f"{path}: refused, because reading it would run code: it asks for {enumerate_first(asked, 3)}. Only tensors in plain dicts "
                "are read; save its state_dict alone, or as .safetensors, where you trust it"
            ) from error
        if protocol := re.search(r"pickle protocol ([45])", " ".join(str(remark.message) for remark in remarks)):
            raise UserError(
                f"{path}: refused, because reading it could run code: of a pickle of protocol {protocol[1]} PyTorch cannot read the "
                "tensors alone. Save its state_dict by torch.save, in its own protocol, or as .safetensors, where you trust it"
            ) from error
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        raise UserError(f"{path}: is not a PyTorch checkpoint of tensors, or damaged{f' ({reason[1]})' if reason else ''}") from error
    for key in ("module", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    values = found if isinstance(found, Mapping) else {"the file": found}
    if others := [f"{name} ({type(value).__name__})" for name, value in values.items() if not isinstance(value, torch.Tensor)]:
        raise UserError(
            f"{path}: holds no state dict: expected names and tensors, maybe below 'state_dict' or 'module', but there is "
            + enumerate_first(others)
        )
    kinds = {str(value.dtype).removeprefix("torch.") for value in found.values()}
    _check_types(path, kinds - {dtype.name for dtype in _NAMES})

    def tensor(value: Any) -> Lazy:
        wide = value.dtype == torch.bfloat16  # which NumPy does not know
        dtype = np.dtype(np.float32 if wide else str(value.dtype).removeprefix("torch."))
        return Lazy(tuple(value.shape), dtype, lambda: (value.float() if wide else value).detach().numpy())

    return {str(name): tensor(value) for name, value in found.items()}


def _left_out(torch: Any, path: pathlib.Path) -> list[type]:
    """A stand-in for each class and function that a file asks for and PyTorch does not make, except for what no checkpoint needs.

    Objects that are filled like a dict or a list become one: PyTorch fills nothing else.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            look = _Look(io.BytesIO(archive.read(member)))
        look.load()
    except Exception:  # PyTorch's and pickle's; reading the file raises it, too
        return []
    found = []
    for module, _, name in (name.rpartition(".") for name in names):
        type_of_python = module == "builtins" and isinstance(getattr(builtins, name, None), type)
        if type_of_python or module.split(".")[0] not in sys.stdlib_module_names - _HARMLESS:
            like = getattr(look.classes.get(f"{module}.{name}"), "like", None)
            parts = {"__new__": lambda cls, *_, like=like: like()} if like else {}
            found.append(type(name, (_LeftOut,), {"__module__": module, **parts}))
    return found


def _damaged_member(path: pathlib.Path) -> str | None:
    """The first part of a zipped PyTorch file that is not what its checksum says; PyTorch does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception as error:  # as PyTorch's
        return f"a part that cannot be read, {error}"


def write_safetensors(path: str | pathlib.Path, tensors: Mapping[str, Any]) -> str:
    """Writes arrays (NumPy, JAX or `Lazy`), one in memory at a time; returns the SHA-256 of the file."""
    header, offset = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with replacing(path) as temporary, open(temporary, "wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            sha256.update(data)

        write(struct.pack("<Q", len(text)) + text)
        for _, tensor in sorted(tensors.items()):
            write(np.ascontiguousarray(np.asarray(tensor)).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def write_pytorch(path: str | pathlib.Path, tensors: Mapping[str, Any]) -> None:
    """Writes {"state_dict": tensors}, as the reference's checkpoints are; holds all of it in memory."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path} is a PyTorch file: install torch to write it, or choose .safetensors") from error
    # Copies: PyTorch's tensors are writable, what they are made from need not be.
    state = {name: torch.from_numpy(np.array(tensor, order="C")) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        torch.save({"state_dict": state}, temporary)
