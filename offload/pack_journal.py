"""What is finished of a pack that was interrupted: the same request goes on from there.

journal.jsonl, in the unfinished folder: the request, then for each layer whose file is complete and on disk a line with
the checksums of its experts and what their rounding lost. Kept is what the file still holds by these checksums.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.offload.integrity import checksum
from moe.offload.requantise import Requantised
from moe.offload.segments import ExpertIndex
from moe.offload.stores import ExpertStore, aligned_bytes

LOST = ("errors", "losses", "uses", "output_errors")  # by layer, of `Requantised`
_NAME = "journal.jsonl"


class LayerFile(NamedTuple):
    """header: its beginning; a blob of `nbytes` of each expert follows."""

    name: str
    header: bytes
    nbytes: int


class Journal:
    """Of the unfinished folder `folder`, which is there afterwards, empty but for what is kept.

    request: what `request_of` says. files: of all layers, which are finished in order; kept: of each that is.
    progress(bytes) is called for each layer that is kept. Costs the reading of them.
    """

    def __init__(self, folder: Path, request: str, files: list[LayerFile], progress: Callable[[int], None]) -> None:
        self.folder, self.files, self.kept = folder, files, list[dict[str, Any]]()
        said = list(_read(folder / _NAME))
        if said[:1] == [{"request": request}]:
            for file, of_layer in zip(files, said[1:]):
                if not _holds(folder, file, of_layer["checksums"]):
                    break
                self.kept.append(of_layer)
                progress(file.nbytes * len(of_layer["checksums"]))
        names = {_NAME, *(file.name for file in files[: len(self.kept)])}
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
        new = folder / f"{_NAME}.new"
        new.write_text("".join(json.dumps(line) + "\n" for line in ({"request": request}, *self.kept)))
        new.replace(folder / _NAME)

    def add(self, of_layer: dict[str, Any]) -> None:
        """Once the layer's file is on disk."""
        with (self.folder / _NAME).open("a") as file:
            file.write(json.dumps(of_layer) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.kept.append(of_layer)

    def close(self) -> None:
        """All is there: the folder is no unfinished one any more."""
        (self.folder / _NAME).unlink()
        self.kept.clear()


def request_of(index: ExpertIndex, layers: list[dict[str, Any]], store: ExpertStore) -> str:
    """Equal where the experts' files, what they become and what they are calibrated with are the same."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in index.files()]
    seen = []
    if isinstance(store, Requantised) and store.calibration is not None:
        for layer, site in enumerate(index.sites):
            rows = (store.calibration.inputs(layer, expert) for expert in range(site.num_experts))
            seen.append([checksum(each.contiguous().view(-1).view(torch.uint8)) for each in rows])
    return hashlib.sha256(json.dumps([files, layers, seen, LOST]).encode()).hexdigest()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines: the last may have been cut. None where there is no journal."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _holds(folder: Path, made: LayerFile, checksums: list[int]) -> bool:
    """Whether the file is there as it should be, with these checksums."""
    path, blob = folder / made.name, aligned_bytes(made.nbytes)
    if not path.is_file() or path.stat().st_size != len(made.header) + made.nbytes * len(checksums):
        return False
    with path.open("rb") as file:
        if file.read(len(made.header)) != made.header:
            return False
        return all(file.readinto(blob.numpy().data) == made.nbytes and checksum(blob) == said for said in checksums)
