"""A Hugging Face checkpoint folder, known by the headers of its safetensors files only.

Opening reads a few kilobytes per shard; tensors are read one by one with `load`, as copies that keep no file mapped.
"""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.offload.json_object import read_object
from moe.offload.recognise import check_files, why_no_weights, why_not_a_folder

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
PACKED_FILE = "packed.json"  # written last by `pack`; marks the folder as packed
PACKED_VERSION = 2


class TensorInfo(NamedTuple):
    path: Path
    offset: int  # bytes from the start of the file
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Where every tensor of a checkpoint folder lies. `packed` is the description that `pack` wrote, else None."""

    folder: Path
    tensors: dict[str, TensorInfo]
    packed: dict[str, Any] | None = field(default=None, repr=False)

    @staticmethod
    def open(folder: str | Path) -> "Checkpoint":
        """Reads the shards' headers. Raises ValueError for a missing, truncated or foreign file, naming it."""
        folder = Path(folder)
        packed = None
        if (folder / PACKED_FILE).is_file():
            packed = read_object(folder / PACKED_FILE)
            if packed.get("version") != PACKED_VERSION or not isinstance(packed.get("files"), list):
                raise ValueError(
                    f"{folder / PACKED_FILE} has version {packed.get('version')!r}, this program reads "
                    f"{PACKED_VERSION}; pack the original checkpoint again"
                )
            names, listed = packed["files"], "the packed folder's description"
        else:
            names, listed = _shard_names(folder)
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{folder}: {listed} names {name!r}, which is not a file name in this folder")
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: shard {name} is missing although {listed} lists it; download it again")
            for key, info in read_header(folder / name).items():
                if key in tensors:
                    raise ValueError(f"{folder}: tensor {key} is in both {tensors[key].path.name} and {name}")
                tensors[key] = info
        return Checkpoint(folder=folder, tensors=tensors, packed=packed)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def load(self, name: str) -> Tensor:
        """The tensor `name` in its stored dtype, a copy of its own. Raises KeyError for an unknown name."""
        return read_tensor(self.tensors[name])


def read_tensor(info: TensorInfo) -> Tensor:
    """A copy of the tensor in its stored dtype. Raises ValueError where the file is shorter than it was."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    with info.path.open("rb", buffering=0) as file:
        file.seek(info.offset)
        target = data.numpy().data
        while target:
            count = file.readinto(target)
            if not count:
                raise ValueError(f"{info.path} ended while a tensor was read; it was changed or cut meanwhile")
            target = target[count:]
    return data.view(info.dtype).view(info.shape)


def _shard_names(folder: Path) -> tuple[list[Any], str]:
    """File names of the shards, and what lists them (for messages)."""
    if not folder.is_dir():
        raise ValueError(why_not_a_folder(folder))
    check_files(folder)
    if (folder / "model.safetensors.index.json").is_file():
        index = folder / "model.safetensors.index.json"
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; download it again")
        return sorted(set(map(str, weight_map.values()))), index.name
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"], "the folder"
    raise ValueError(why_no_weights(folder))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises ValueError if the header or the file's size is not right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is not a whole safetensors file: its first 8 bytes ask for a header of {length} bytes, "
                f"the file has {size}; download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a bad safetensors header: {error}") from None
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    tensors = {name: _tensor_info(path, 8 + length, name, entry) for name, entry in entries}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ValueError(
                f"{path}: tensor {name} begins at byte {info.offset}, those before it end at {end}: in a safetensors "
                "file they follow each other without overlaps and gaps; download it again"
            )
        end += info.nbytes
    if size != end:
        word = "truncated" if size < end else "longer than it should be"
        raise ValueError(f"{path} is {word}: its header says {end} bytes, the file has {size}; download it again")
    return tensors


def _tensor_info(path: Path, start: int, name: str, entry: Any) -> TensorInfo:
    try:
        dtype_name, shape = str(entry["dtype"]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: tensor {name} has a bad header entry {str(entry)[:80]}")
    if dtype_name not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has dtype {dtype_name}, which is not supported ({', '.join(DTYPES)})")
    dtype = DTYPES[dtype_name]
    if last - first != prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path}: tensor {name} takes {last - first} bytes, but {dtype_name} of shape {list(shape)} needs "
            f"{prod(shape) * dtype.itemsize}"
        )
    return TensorInfo(path, start + first, last - first, dtype, shape)
