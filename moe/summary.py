"""What `moe info` says of a model's folder, and where it is kept.

To tell it takes transformers' code of models, which takes seconds to import; to look it up takes none of that, so that
this file imports neither torch nor transformers. What is kept counts for these files of the model and these versions of
the programs alone: a change of either, and it is told anew.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from moe.placement.written import written_whole

MOST_KEPT = 100  # models, the latest
_CODE = Path(__file__).resolve().parent


class Layer(NamedTuple):
    """Experts of one layer. blob_bytes: of one in its slot."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    blob_bytes: int


class Rounded(NamedTuple):
    """Of all experts in another format. largest: of one expert in its slot."""

    nbytes: int
    largest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of a model as it lies in its folder. decoded: formats of coded dense weights; why_alone: sequences share no step.

    max_context: None = no limit; rounded: formats in which the experts would be smaller.
    """

    architecture: str
    max_context: int | None
    dense_bytes: int
    decoded: str
    why_alone: str | None
    layers: tuple[Layer, ...]
    top_k: int
    expert_formats: str
    is_packed: bool
    rounded: dict[str, Rounded]

    @property
    def num_experts(self) -> int:
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        return sum(layer.num_experts * layer.blob_bytes for layer in self.layers)

    @property
    def largest_blob(self) -> int:
        return max(layer.blob_bytes for layer in self.layers)


def kept(folder: Path, file: Path) -> Summary | None:
    """What `keep` wrote of the folder as it is now; None where that is nothing, or of other files or versions."""
    said = _read(file).get(str(folder.resolve()))
    if said is None or said["state"] != state_of(folder):
        return None
    one: dict[str, Any] = said["summary"]
    layers = tuple(Layer(*layer) for layer in one["layers"])
    return Summary(**{**one, "layers": layers, "rounded": {n: Rounded(*r) for n, r in one["rounded"].items()}})


def keep(folder: Path, state: str, summary: Summary, file: Path) -> None:
    """state: `state_of(folder)` from before it was read. Raises OSError where the file cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    name, every = str(folder.resolve()), _read(file)
    every.pop(name, None)
    every[name] = {"state": state, "summary": asdict(summary)}
    with written_whole(file) as part:
        part.write_text(json.dumps(dict(list(every.items())[-MOST_KEPT:])))


def state_of(folder: Path) -> str:
    """Equal for equal files of the model and of this program, by name, size and time, and equal versions of what both
    are read by. Costs some milliseconds."""
    versions = [version(name) for name in ("torch", "transformers")]
    files = [*_files_in(_CODE, ".py"), *_files_in(folder, "")]
    return hashlib.sha256(json.dumps([versions, files]).encode()).hexdigest()


def _files_in(folder: Path, ending: str) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of the last change of every file below `folder`, in order of their names."""
    for where, folders, names in os.walk(folder, followlinks=ending == ".py"):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(where, name)
            if name.endswith(ending) and os.path.isfile(path):
                found = os.stat(path)
                yield os.path.relpath(path, folder), found.st_size, found.st_mtime_ns


def _read(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is missing or no file of ours: then it is written anew."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
