"""`moe info --check`: reads a whole folder and says what is wrong with it.

Packed folders: every expert and every dense tensor against its checksum. Others: every file against the SHA-256 that
the hub's client noted beside it, if it did; every expert as it would be read to run; no weight or scale that is not
finite. What a flipped bit makes of one weight in an original folder without such notes cannot be told.
"""

from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import Tensor

from moe.offload.checkpoint import Checkpoint, read_tensor
from moe.offload.integrity import check_dense, check_downloads
from moe.offload.layout import ExpertLayout
from moe.offload.segments import ExpertIndex
from moe.offload.stores import FileStore, aligned_bytes

_WITH_NO_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu)


def check_folder(
    checkpoint: Checkpoint, index: ExpertIndex, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """What is wrong, a sentence each. progress(experts done, of all). Costs reading everything once."""
    for path, is_whole in check_downloads(checkpoint.folder):
        if not is_whole:
            yield f"{path} is not the file that was downloaded (SHA-256 differs); download it again"
    yield from check_dense(checkpoint)
    for name in sorted(set(checkpoint.tensors) - index.expert_keys):
        info = checkpoint.tensors[name]
        if not _is_finite(read_tensor(info)):
            yield f"{info.path}: tensor {name} holds numbers that are not finite"
    yield from _check_experts(index, progress)


def _check_experts(index: ExpertIndex, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    experts = [(layer, expert) for layer, site in enumerate(index.sites) for expert in range(site.num_experts)]
    with closing(FileStore(index, check="always")) as store:
        for done, (layer, expert) in enumerate(experts, 1):
            yield from _check_expert(store, index.layouts[layer], layer, expert)
            if progress is not None:
                progress(done, len(experts))


def _check_expert(store: FileStore, layout: ExpertLayout, layer: int, expert: int) -> Iterator[str]:
    blob = aligned_bytes(layout.nbytes)
    try:
        store.read_into(layer, expert, blob)
    except OSError as error:
        yield str(error) if "layer" in str(error) else f"layer {layer}, expert {expert}: {error}"
        return
    for name, view in layout.views(blob[None]).items():
        if not _is_finite(view):
            yield f"layer {layer}, expert {expert}: {name} holds numbers that are not finite"


def _is_finite(tensor: Tensor) -> bool:
    return tensor.dtype not in _WITH_NO_NUMBERS or bool(tensor.float().isfinite().all())
