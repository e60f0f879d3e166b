"""Writes a checkpoint again with every expert as one contiguous, page-aligned blob, so that one read fetches it.

    packed.json                what `index_experts` checks: version, layout of each layer, files, checksums
    experts-00007.safetensors  one tensor packed.experts.7, uint8 [E, nbytes]; its data starts at a multiple of 4096
    dense.safetensors          all other tensors, under their old names
    config.json, tokenizer.json, …  copied

The folder does not look like an ordinary checkpoint on purpose: another loader would find no experts in it and
silently make random ones.
"""

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from moe.offload.budget import format_bytes
from moe.offload.checkpoint import DTYPE_NAMES, DTYPES, PACKED_FILE, PACKED_VERSION, Checkpoint, TensorInfo
from moe.offload.formats.slot import MatrixFormat
from moe.offload.integrity import checksum
from moe.offload.layout import ALIGNMENT, ExpertSite
from moe.offload.nested import checksums as level_checksums
from moe.offload.nested import is_nested
from moe.offload.pack_journal import LOST, Journal, LayerFile, request_of
from moe.offload.packed import PACKED_PREFIX, describe_layer
from moe.offload.requantise import Calibration, Requantised
from moe.offload.rounded_dense import Kind, RoundedDense
from moe.offload.segments import ExpertIndex
from moe.offload.short_floats import Shortened
from moe.offload.stores import ExpertStore, FileStore, aligned_bytes

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}


class _Progress:
    def __init__(self, report: Callable[[int, int], None] | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.report is not None:
            self.report(self.done, self.total)


def pack(
    checkpoint: Checkpoint,
    index: ExpertIndex,
    out_folder: str | Path,
    *,
    experts: MatrixFormat | None = None,
    calibration: Calibration | None = None,
    dense: RoundedDense | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the packed form of `checkpoint` to `out_folder`, which must not exist, and returns it.

    experts: what their matrices are rounded to (`requantise.target_format`); None: as they are. Nothing is lost then,
    nor as bf12, which reads all experts once before it writes.
    calibration: inputs on which rounding should change the answers least; None: to nearest.
    dense: other weights that are rounded; None: all as they are.
    progress(bytes written, bytes in all) is called after each expert and dense tensor, of bf12 first (bytes read, bytes
    in all). Memory: one expert or dense
    tensor. The folder appears whole or not at all: it is written beside its place, synced and renamed. What is
    interrupted keeps the layers that are finished, and the same call goes on from there; with other experts or files,
    or another way of rounding, it begins again. Raises ValueError for a bad request, after which nothing is left,
    OSError for a full disk or any other failed write.
    """
    out = Path(out_folder)
    if checkpoint.packed is not None and experts is None:
        what = "copy the folder instead" if dense is None else "round its dense layers from the original checkpoint"
        raise ValueError(f"{checkpoint.folder} is packed already; {what}")
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another folder")
    others = _Others(checkpoint, sorted(set(checkpoint.tensors) - index.expert_keys), dense)
    files = FileStore(index)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            store = _made(files, index, experts, calibration, _Progress(progress, _nbytes(files)))
            _check_room(out, store, others.nbytes)
            total = others.nbytes + _nbytes(store)
            return _pack_whole(checkpoint, index, store, others, out, _Progress(progress, total))
    finally:
        files.close()


def _made(
    files: FileStore,
    index: ExpertIndex,
    experts: MatrixFormat | None,
    calibration: Calibration | None,
    reading: _Progress,
) -> ExpertStore:
    if experts is None:
        return files
    if experts.code == "bf12":
        return Shortened.read_all(files, index.sites, reading.add)
    return Requantised(files, index.sites, experts, calibration)


def _nbytes(store: ExpertStore) -> int:
    return sum(number * layout.nbytes for number, layout in zip(store.num_experts, store.layouts))


def _check_room(out: Path, store: ExpertStore, others: int) -> None:
    """others: bytes of what is no expert's. Raises OSError where the disk has no room for all."""
    total = others + _nbytes(store)
    free = shutil.disk_usage(out.parent).free
    there = _unfinished(out)
    if free + (sum(file.stat().st_size for file in there.iterdir()) if there.is_dir() else 0) < total:
        raise OSError(
            errno.ENOSPC,
            f"packing needs {format_bytes(total)}, {format_bytes(free)} are free; nothing was written: make room, or "
            "name a place on another disk",
            str(out),
        )


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Holds a lock beside `out`. Raises ValueError where another process packs to the same place."""
    path = out.parent / f".{out.name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out} is being packed by another process; wait for it or choose another folder"
            ) from None
        try:
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise ValueError(f"{out} was being packed by another process a moment ago; try again")
            if out.exists():  # the other process was quicker
                raise ValueError(f"{out} exists already; remove it or choose another folder")
            yield
        finally:
            path.unlink(missing_ok=True)


def _pack_whole(
    checkpoint: Checkpoint,
    index: ExpertIndex,
    store: ExpertStore,
    others: "_Others",
    out: Path,
    progress: _Progress,
) -> Path:
    work, journal = _unfinished(out), None
    try:
        journal = _journal(index, store, work, progress)
        _write_folder(checkpoint, index, store, others, journal, progress)
        journal.close()
        _sync(work)
        work.rename(out)
        _sync(out.parent)
    except (OSError, KeyboardInterrupt) as error:
        kept = len(journal.kept) if journal is not None else 0
        left = (
            f"{kept} of {len(index.sites)} layers are kept in {work}: the same command goes on from there; remove that "
            "folder if it shall not"
        )
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
            left = "the unfinished folder was removed"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(left) from None
        raise OSError(
            error.errno,
            f"packing stopped ({error.strerror or error}); {format_bytes(progress.total)} are needed: make room, or "
            f"name a place on another disk; {left}",
            str(out),
        ) from error
    except ValueError:  # it would be raised again
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def _unfinished(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _journal(index: ExpertIndex, store: ExpertStore, work: Path, progress: _Progress) -> Journal:
    layers = [describe_layer(site, layout) for site, layout in zip(index.sites, store.layouts)]
    files = [_layer_file(index, store, layer) for layer in range(len(layers))]
    return Journal(work, request_of(index, layers, store), files, progress.add)


def _layer_file(index: ExpertIndex, store: ExpertStore, layer: int) -> LayerFile:
    site, layout, header = index.sites[layer], store.layouts[layer], BytesIO()
    tensors = {f"{PACKED_PREFIX}{layer}": ("U8", (site.num_experts, layout.nbytes))}
    _write_header(header, tensors, {"layout": json.dumps(describe_layer(site, layout))})
    return LayerFile(f"experts-{layer:05d}.safetensors", header.getvalue(), layout.nbytes)


class _Others:
    """The tensors that are no experts'."""

    def __init__(self, checkpoint: Checkpoint, names: list[str], rounded: RoundedDense | None) -> None:
        self.checkpoint, self.names, self.rounded = checkpoint, names, rounded

    @property
    def nbytes(self) -> int:
        return sum(kind.dtype.itemsize * prod(kind.shape) for name in self.names for kind in self._kinds(name).values())

    def _kinds(self, name: str) -> dict[str, Kind]:
        if self.rounded is not None and name in self.rounded.names:
            return self.rounded.kinds(name)
        info = self.checkpoint.tensors[name]
        return {name: Kind(info.dtype, info.shape)}

    def write(self, file: BinaryIO, progress: _Progress) -> dict[str, int]:
        """Header and data; returns the checksum of each tensor."""
        kinds = {key: kind for name in self.names for key, kind in self._kinds(name).items()}
        _write_header(file, {key: (DTYPE_NAMES[kind.dtype], kind.shape) for key, kind in kinds.items()}, {})
        sums = {}
        for name in self.names:
            if self.rounded is None or name not in self.rounded.names:
                info = self.checkpoint.tensors[name]
                sums[name] = _copy(info, file)
                progress.add(info.nbytes)
                continue
            for key, tensor in self.rounded.tensors(name).items():
                raw = tensor.contiguous().view(-1).view(torch.uint8)
                sums[key] = checksum(raw)
                file.write(raw.numpy().data)
                progress.add(len(raw))
        return sums


def _write_folder(
    checkpoint: Checkpoint,
    index: ExpertIndex,
    store: ExpertStore,
    others: "_Others",
    journal: Journal,
    progress: _Progress,
) -> None:
    folder = journal.folder
    for layer in range(len(journal.kept), len(index.sites)):
        _write_layer(index.sites[layer], store, layer, journal, progress)
    files = [file.name for file in journal.files]
    files.append("dense.safetensors")
    with (folder / files[-1]).open("wb") as file:
        sums = others.write(file, progress)
        _flush(file)
    for source in sorted(checkpoint.folder.iterdir()):
        is_old = source.name == PACKED_FILE or source.name.endswith(".index.json")
        if source.is_file() and source.suffix not in _WEIGHTS and not is_old:
            shutil.copyfile(source, folder / source.name)
    description = {
        "version": PACKED_VERSION,
        "layers": [describe_layer(site, layout) for site, layout in zip(index.sites, store.layouts)],
        "files": files,
        "checksums": [kept["checksums"] for kept in journal.kept],
        "dense": sums,
    }
    if others.rounded is not None:
        description["dense_errors"] = others.rounded.errors
    if isinstance(store, Requantised):
        description["errors"] = [kept["errors"] for kept in journal.kept]
        if store.to.bits:
            names = {"losses": "losses", "uses": "uses", "checksums": "levels"}
            description["nested"] = {name: [kept[of] for kept in journal.kept] for name, of in names.items()}
        if store.calibration is not None:
            description["output_errors"] = [kept["output_errors"] for kept in journal.kept]
    with (folder / PACKED_FILE).open("wb") as file:
        file.write(json.dumps(description, indent=1).encode())
        _flush(file)


def _write_layer(site: ExpertSite, store: ExpertStore, layer: int, journal: Journal, progress: _Progress) -> None:
    """One layer's file, and what the journal says of it."""
    made, layout = journal.files[layer], store.layouts[layer]
    blob = aligned_bytes(layout.nbytes)  # zeroed once: the padding between pieces stays zero
    checksums: list[int] = []
    of_levels: list[list[int]] = []  # of nested precision
    with (journal.folder / made.name).open("wb") as file:
        file.write(made.header)
        for expert in range(site.num_experts):
            store.read_into(layer, expert, blob)
            if is_nested(layout):
                of_levels.append(level_checksums(site, layout, blob))
            checksums.append(checksum(blob))
            file.write(blob.numpy().data)
            progress.add(layout.nbytes)
        _flush(file)
    said: dict[str, Any] = {"checksums": checksums, "levels": of_levels}
    if isinstance(store, Requantised):
        said |= {name: getattr(store, name)[layer] for name in LOST}
    journal.add(said)


def _write_header(file: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    """A safetensors header, padded with spaces so that the data starts at a multiple of `ALIGNMENT`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "packed_version": str(PACKED_VERSION)} | metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    file.write(len(raw).to_bytes(8, "little") + raw)


def _copy(info: TensorInfo, file: BinaryIO) -> int:
    """Returns the checksum of what was copied."""
    found = 0
    with info.path.open("rb") as source:
        source.seek(info.offset)
        left = info.nbytes
        while left:
            data = source.read(min(left, 1 << 24))
            if not data:
                raise OSError(errno.EIO, f"{info.path} ended while it was copied")
            file.write(data)
            found = zlib.crc32(data, found)
            left -= len(data)
    return found


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
