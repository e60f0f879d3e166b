"""Whether folders hold the same weights, told by a few bytes of each: the folders of several machines, or one folder at
two times.

What a header says is compared whole: names, shapes, types. Of the bytes a sample is: a page of some tensors of every
kind (`layers.#.mlp.gate`, …), first and last layers included; of a packed folder also the checksums of all experts. A
fine-tune moves nearly every tensor and is seen; one that changed a few tensors alone may not be.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from moe.offload.checkpoint import Checkpoint, TensorInfo
from moe.offload.json_object import read_object

_TENSORS, _BYTES = 8, 4096  # of a kind that are looked at; of a tensor
_NO_WEIGHTS = ("_name_or_path", "_commit_hash", "transformers_version")  # in config.json: who wrote it, and where
_PACKED = ("layers", "checksums", "dense")


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits: of the tensors, of config.json, and of what `pack` wrote about the experts.

    The same weights in other shards have the same. Costs some 100 reads of 4 KiB, however large the folder, and the
    hash of its header: docs/ray.md has the time. Raises OSError for a file that cannot be read, ValueError for a
    config.json that is none.
    """
    found = hashlib.blake2b(digest_size=8)
    kinds: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in sorted(checkpoint.tensors.items(), key=_by_number):
        found.update(f"{name} {info.dtype} {info.shape}\n".encode())
        kinds[re.sub(r"\d+", "#", name)].append(info)
    said = {name: (checkpoint.packed or {}).get(name) for name in _PACKED}
    found.update(json.dumps([_config(checkpoint.folder), said], sort_keys=True).encode())
    for infos in kinds.values():
        count = min(_TENSORS, len(infos))
        for number in range(count):
            found.update(_sample(infos[number * (len(infos) - 1) // max(1, count - 1)]))
    return found.hexdigest()


def _by_number(item: tuple[str, TensorInfo]) -> tuple[list[int], str]:
    """Layer 9 before layer 10: the last of a kind is then of the last layer."""
    return [int(number) for number in re.findall(r"\d+", item[0])], item[0]


def _config(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        return None
    return {name: value for name, value in read_object(path).items() if name not in _NO_WEIGHTS}


def _sample(info: TensorInfo) -> bytes:
    """From its middle: its ends are padded more often."""
    nbytes = min(_BYTES, info.nbytes)
    file = os.open(info.path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        return os.pread(file, nbytes, info.offset + (info.nbytes - nbytes) // 2)
    finally:
        os.close(file)
