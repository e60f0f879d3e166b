"""Whether the bytes that arrive are those that were written: a checksum per packed expert, what can be told of others.

CRC-32 of the whole blob (zlib's, which takes vector instructions and lets other threads run). One core checks 4 to 5
GB/s: a third of a read from this project's test disk (1.6 GB/s), so that checking every read is not free. Checking
each expert when it is first read costs once what a run reads many times, and finds what a disk, a copy or a mix-up of
files does between two runs; that is the default. docs/offload.md has the measurement.
"""

import errno
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe.offload.checkpoint import Checkpoint, read_tensor
from moe.offload.segments import ExpertIndex

CheckReads = Literal["first", "always", "never"]


def checksum(blob: Tensor, before: int = 0) -> int:
    """blob: uint8, contiguous, host memory. before: the checksum of bytes that it follows."""
    return zlib.crc32(blob.numpy().data, before)


class ReadCheck:
    """Compares blobs of a packed index with the checksums that `pack` wrote; nothing for other indexes.

    Safe to call from several threads: two may check the same expert at once.
    """

    def __init__(self, index: ExpertIndex, when: CheckReads) -> None:
        self.index, self.when = index, when
        self._is_on = bool(index.checksums) and when != "never"
        self._is_known = [bytearray(site.num_experts) for site in index.sites]

    def check(self, layer: int, expert: int, blob: Tensor) -> None:
        """Raises OSError, naming layer, expert and file, where `blob` is not what was packed."""
        if not self._is_on or (self._is_known[layer][expert] and self.when == "first"):
            return
        found, written = checksum(blob), self.index.checksums[layer][expert]
        if found != written:
            path = self.index.segments(layer, expert)[0].path
            raise OSError(
                errno.EIO,
                f"layer {layer}, expert {expert}: the bytes read have checksum {found:08x}, {written:08x} were packed; "
                "the file was damaged or belongs to another model: pack the original checkpoint again",
                str(path),
            )
        self._is_known[layer][expert] = 1


def check_dense(checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong with the dense tensors of a packed folder, a sentence each, after reading all of them."""
    written = (checkpoint.packed or {}).get("dense", {})
    for name, info in checkpoint.tensors.items():
        if name in written and checksum(read_tensor(info).reshape(-1).view(torch.uint8)) != written[name]:
            yield f"{info.path}: tensor {name} is not what was packed; pack the original checkpoint again"


def check_downloads(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Each file whose SHA-256 the hub's client noted when it downloaded it, and whether it still has it."""
    for note in sorted((folder / ".cache" / "huggingface" / "download").glob("*.metadata")):
        lines = note.read_text().split("\n")
        path = folder / note.name.removesuffix(".metadata")
        etag = lines[1].strip() if len(lines) > 1 else ""
        if len(etag) != 64 or not path.is_file():
            continue  # small files are known by another hash
        with path.open("rb") as file:
            yield path, hashlib.file_digest(file, "sha256").hexdigest() == etag
