"""Which tensors of a checkpoint are one quantised weight, told by the tensors' names, dtypes and shapes.

A weight with its companions is quantised; a float alone is not; codes without what decodes them are an error that
names them, raised when somebody wants that weight. The configuration's own lists are not consulted: they come in many
dialects and are sometimes wrong.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from moe.offload.checkpoint import DTYPE_NAMES, TensorInfo
from moe.offload.formats.bf12 import bf12
from moe.offload.formats.fp4 import mxfp4, nvfp4
from moe.offload.formats.fp8 import fp8
from moe.offload.formats.gptq import gptq
from moe.offload.formats.integers import int_quantized, llm_int8, pack_quantized
from moe.offload.formats.nf4 import nf4
from moe.offload.formats.stored import Group, Quantisation, StoredMatrix

# Each returns None for tensors that are not its own. One function, one format of published checkpoints.
FORMATS: tuple[Callable[[Group, Quantisation], StoredMatrix | None], ...] = (
    fp8,
    pack_quantized,
    mxfp4,
    nvfp4,
    gptq,
    nf4,
    llm_int8,
    int_quantized,
    bf12,
)

# End of a key -> the end of the name of the weight that it belongs to, and its role there. The longest comes first.
_ROLES: tuple[tuple[str, str, str], ...] = (
    (".weight.quant_state.bitsandbytes__nf4", ".weight", "quant_state"),
    (".weight.quant_state.bitsandbytes__fp4", ".weight", "quant_state"),
    (".weight.nested_quant_map", ".weight", "nested_quant_map"),
    (".weight.nested_absmax", ".weight", "nested_absmax"),
    (".weight.quant_map", ".weight", "quant_map"),
    (".weight.absmax", ".weight", "absmax"),
    (".weight_global_scale", ".weight", "global_scale"),
    (".input_global_scale", ".weight", "unused"),
    (".weight_zero_point", ".weight", "zero_point"),
    ("_weight_scale_inv", "", "scale"),
    (".weight_scale_inv", ".weight", "scale"),
    (".activation_scale", ".weight", "unused"),
    (".weight_scale_2", ".weight", "scale_2"),
    ("_weight_scale_2", "", "scale_2"),
    (".weight_packed", ".weight", "packed"),
    (".weight_format", ".weight", "weight_format"),
    (".weight_scale", ".weight", "scale"),
    (".weight_words", ".weight", "words"),
    (".weight_shape", ".weight", "shape"),
    (".weight_bf12", ".weight", "bf12"),
    (".weight_g_idx", ".weight", "weight_g_idx"),
    ("_weight_scale", "", "scale"),
    (".input_scale", ".weight", "unused"),
    ("_input_scale", "", "unused"),
    ("_scale_inv", "", "scale"),
    (".qweight", ".weight", "qweight"),
    (".qzeros", ".weight", "qzeros"),
    (".scales", ".weight", "scales"),
    ("_blocks", "", "blocks"),
    ("_scales", "", "scale"),
    (".g_idx", ".weight", "g_idx"),
    (".scale", ".weight", "scale"),
    (".SCB", ".weight", "SCB"),
)
_CODES = {"weight", "packed", "qweight", "blocks", "bf12"}
_KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale")  # of a quantised KV cache, which this engine has not


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What is quantised in a checkpoint. problems: weights that cannot be read, and why."""

    matrices: Mapping[str, StoredMatrix]
    problems: Mapping[str, str]
    companions: frozenset[str]  # keys that are no weights of their own
    activations: str = ""  # what other engines round activations to with this folder

    def labels(self, names: Iterable[str]) -> str:
        """The published formats of these weights, the commonest first; "" where none is quantised."""
        count = Counter(self.matrices[name].label for name in names if name in self.matrices)
        return ", ".join(label for label, _ in count.most_common())


def find_matrices(tensors: Mapping[str, TensorInfo], said: Quantisation) -> Found:
    """Groups the keys by weight and reads what each group is. Reads a few small tensors where a format needs them."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for key in tensors:
        name, role = _role(key)
        if role != "weight":
            groups[name][role] = key
    matrices: dict[str, StoredMatrix] = {}
    memo: dict[tuple[object, ...], int] = {}
    problems: dict[str, str] = {}
    companions = {key for key in tensors if key.endswith(_KV_SCALES)}
    for name, roles in groups.items():
        if name in tensors:
            roles["weight"] = name
        if not _CODES & set(roles):
            if any(key.rsplit(".", 1)[-1].startswith(("weight_", "qzeros")) for key in roles.values()):
                problems[name] = f"{next(iter(roles.values()))} belongs to {name}, which is missing"
            continue  # a parameter whose name ends like a scale
        companions |= {key for role, key in roles.items() if role != "weight"}
        if set(roles) <= {"weight", "unused"} and tensors[name].dtype.itemsize > 1:
            continue
        try:
            matrix = _read(Group(name, {role: tensors[key] for role, key in roles.items()}, roles, memo), said)
        except ValueError as error:
            problems[name] = str(error)
            continue
        matrices[name] = matrix
    for key, info in tensors.items():
        if key not in groups and key not in companions and key.endswith((".weight", "_proj")) and _is_code(info.dtype):
            problems[key] = f"{key} is stored as {DTYPE_NAMES[info.dtype]} without the scales that would decode it"
    return Found(matrices=matrices, problems=problems, companions=frozenset(companions), activations=said.activations)


_LAST_WORDS = tuple({end.replace(".", "_").rsplit("_", 1)[1] for end, _, _ in _ROLES})


def _role(key: str) -> tuple[str, str]:
    if key.endswith(_LAST_WORDS):  # a model has a hundred thousand keys
        for end, weight_end, role in _ROLES:
            if key.endswith(end):
                return key[: len(key) - len(end)] + weight_end, role
    return key, "weight"


def _read(group: Group, said: Quantisation) -> StoredMatrix:
    for read in FORMATS:
        matrix = read(group, said)
        if matrix is not None:
            return matrix
    what = ", ".join(f"{group.keys[r]} {DTYPE_NAMES[i.dtype]} {list(i.shape)}" for r, i in group.tensors.items())
    raise ValueError(f"{group.name} is in a format that is not understood ({what[:300]})")


def _is_code(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 or dtype in (torch.int32, torch.int64)
