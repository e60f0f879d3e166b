"""A GGUF file beside the configuration of its model, as a source for `moe pack`: it is not served in place.

Experts stay in the file until they are packed, block by block (offload/formats/gguf.py). Dense tensors are decoded once
into a safetensors file of their own, by gguf's `dequantize` and under the names and in the orientation that
transformers' own GGUF loader gives them. Needs the package `gguf` (pip install "moeflow[gguf]").
"""

# mypy: allow-untyped-calls

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moe.models.blueprint import first_line, read_skeleton
from moe.models.families import FoundExperts, find_experts
from moe.offload.budget import format_bytes
from moe.offload.checkpoint import Checkpoint, TensorInfo
from moe.offload.conversions import Stack, View
from moe.offload.expert_parts import layer_parts
from moe.offload.formats.gguf import gguf_stack
from moe.offload.formats.stored import StoredMatrix
from moe.offload.segments import ExpertIndex

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight$")
_NAMED_AS = {"mixtral": "llama"}  # types that are no architecture of their own in GGUF files
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


class GgufModel(NamedTuple):
    """What `pack` takes: dense tensors as a checkpoint in `config_folder`, experts as an index."""

    checkpoint: Checkpoint
    experts: ExpertIndex


@contextmanager
def open_gguf(path: Path, config_folder: Path) -> Iterator[GgufModel]:
    """Reads the model in `path` (the first of several files, if it is split) that `config_folder` describes.

    The dense tensors lie in a temporary folder while the block runs: their float32 size on disk. Raises ValueError for
    a file that is not of that model, or of an architecture whose names nobody maps.
    """
    try:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError as error:
        raise ValueError(f'{path} needs the package gguf ({error}): pip install "moeflow[gguf]"') from None
    skeleton = read_skeleton(config_folder)
    found = find_experts(skeleton)
    config = skeleton.config.get_text_config().to_dict()
    try:
        readers = [(file, gguf.GGUFReader(file)) for file in _files(path)]
    except Exception as error:  # of any kind: gguf follows what the file says wherever that leads
        raise ValueError(
            f"{path} is no GGUF file that can be read: {first_line(error)}; if it was cut off, download it again"
        ) from None
    field = readers[0][1].fields.get("general.architecture")
    arch = "" if field is None else str(field.contents())
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config)
    is_named_so = _NAMED_AS.get(skeleton.config.model_type) == arch
    try:
        names = get_gguf_hf_weights_map(skeleton, processor, arch if is_named_so else None)
    except NotImplementedError:
        raise ValueError(
            f"{path} is of architecture {arch!r}, {config_folder}/config.json of {skeleton.config.model_type!r}, whose "
            "names in GGUF files transformers does not map: pack the original checkpoint (--experts makes it small), "
            "or give the folder of another model, if the file is of that"
        ) from None
    experts: dict[tuple[int, str], StoredMatrix] = {}
    dense: dict[str, torch.Tensor] = {}
    for file, reader in readers:
        for tensor in reader.tensors:
            place, kind = _EXPERTS.match(tensor.name), tensor.tensor_type.name
            dequantise = partial(gguf.quants.dequantize, qtype=tensor.tensor_type)
            if place is not None:
                experts[int(place[1]), place[2]] = _stack(file, tensor, kind, dequantise)
            elif "_exps" in tensor.name:
                raise ValueError(f"{path}: {tensor.name}: experts with {tensor.name.split('.')[-2:]} are not read")
            else:
                made = processor.process(weights=dequantise(tensor.data), name=tensor.name)
                if made.name in names:
                    dense[names[made.name]] = torch.from_numpy(made.weights.copy())
    index = _index(path, found, experts)
    with TemporaryDirectory(prefix="moe-gguf-") as folder:
        _save(dense, folder)
        tensors = Checkpoint.open(folder).tensors
        yield GgufModel(Checkpoint(folder=config_folder, tensors=tensors), index)


def _save(dense: dict[str, torch.Tensor], folder: str) -> None:
    try:
        save_file(dense, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        needed = format_bytes(sum(tensor.nbytes for tensor in dense.values()))
        raise OSError(
            errno.EIO,
            f"{first_line(error)}; dense tensors take {needed} here while the file is packed: make room, or set "
            "TMPDIR to a folder that has it; nothing was written",
            folder,
        ) from None


def _files(path: Path) -> list[Path]:
    split = _SPLIT.search(path.name)
    if split is None:
        return [path]
    stem, count = path.name[: split.start()], int(split[1])
    files = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{path} is one of {count} files; {missing[0].name} is missing: download it too")
    return files


def _stack(path: Path, tensor: Any, kind: str, dequantise: Callable[[Any], Any]) -> StoredMatrix:
    """One stack of experts where it lies in the file."""
    columns, rows, count = (int(n) for n in tensor.shape)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.uint8)
    width = int(tensor.n_bytes) // (count * rows * dtype.itemsize)
    info = TensorInfo(path, int(tensor.data_offset), int(tensor.n_bytes), dtype, (count, rows, width))
    return gguf_stack(tensor.name, kind, info, (count, rows, columns), dequantise)


def _index(path: Path, found: Sequence[FoundExperts], experts: dict[tuple[int, str], StoredMatrix]) -> ExpertIndex:
    """The experts of every layer of the model, in its own order."""
    made = []
    for layer, each in enumerate(found):
        site, number = each.site, re.search(r"\.layers\.(\d+)\.", each.site.module)
        if number is None or not site.gated or site.has_bias or site.interleaved:
            raise ValueError(
                f"{path}: experts of {site.module} are not read from GGUF (only gated ones without biases)"
            )
        stacks: dict[str, Stack] = {}
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            missing = [part for part in parts if (int(number[1]), part) not in experts]
            if missing:
                raise ValueError(
                    f"{path} has no blk.{number[1]}.ffn_{missing[0]}_exps.weight, which {site.module} needs"
                )
            matrices = [experts[int(number[1]), part] for part in parts]
            rows = (site.intermediate_size, site.hidden_size)
            wanted = (site.num_experts, *(rows if name == "gate_up_proj" else rows[::-1]))
            for matrix in matrices:
                if matrix.shape != wanted:
                    raise ValueError(
                        f"{path}: {matrix.name} is {list(matrix.shape)}, the config asks for {list(wanted)}"
                    )
            wholes = [View.whole(matrix, matrix.shape) for matrix in matrices]
            stacks[name] = [[whole.select(expert) for whole in wholes] for expert in range(site.num_experts)]
        made.append(layer_parts(layer, site, stacks))
    return ExpertIndex(
        sites=tuple(each.site for each in found),
        layouts=tuple(layout for layout, _ in made),
        expert_keys=frozenset(),
        parts=tuple(parts for _, parts in made),
    )
