"""Companions of a quantised weight in another type or shape than their format says: a sentence, or the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe.kernels.bf12 import encode_bf12
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.config import read_quantisation
from moe.offload.formats.find import find_matrices

W = "m.proj.weight"
N, K = 16, 256


def packed_integers():
    return {
        "m.proj.weight_packed": torch.randint(0, 1 << 30, (N, K // 8), dtype=torch.int32),
        "m.proj.weight_scale": torch.rand(N, K // 32) + 0.5,
        "m.proj.weight_shape": torch.tensor([N, K]),
        "m.proj.weight_g_idx": torch.arange(K, dtype=torch.int32).flip(0) // 32,
    }


def gptq():
    return {
        "m.proj.qweight": torch.randint(0, 1 << 30, (K // 8, N), dtype=torch.int32),
        "m.proj.scales": torch.rand(K // 32, N).half() + 0.5,
        "m.proj.qzeros": torch.randint(0, 1 << 30, (K // 32, N // 8), dtype=torch.int32),
        "m.proj.g_idx": torch.arange(K, dtype=torch.int32).flip(0) // 32,
    }


def nf4():
    about = {"blocksize": 64, "shape": [N, K], "nested_blocksize": 256, "nested_offset": 0.5}
    return {
        W: torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8),
        W + ".absmax": torch.randint(0, 256, (N * K // 64,), dtype=torch.uint8),
        W + ".quant_map": torch.rand(16),
        W + ".nested_absmax": torch.rand(1),
        W + ".nested_quant_map": torch.rand(256),
        W + ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
    }


def bf12():
    codes, words = encode_bf12(torch.randn(N, K).bfloat16(), 3)
    return {"m.proj.weight_bf12": codes, "m.proj.weight_words": words, "m.proj.weight_shape": torch.tensor([N, K])}


def fp8():
    return {W: torch.randn(N, K).to(torch.float8_e4m3fn), "m.proj.weight_scale": torch.rand(N, 1) + 0.5}


def llm_int8():
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    return {W: codes, "m.proj.SCB": torch.rand(N), "m.proj.weight_format": torch.tensor(0, dtype=torch.uint8)}


def as_type(dtype):
    return lambda t: t.float().to(dtype)


CHANGES = {
    **{str(dtype): as_type(dtype) for dtype in (torch.int64, torch.float32, torch.int8, torch.bfloat16)},
    "flat": torch.Tensor.flatten,
    "deeper": lambda t: t[None],
    "a number": lambda t: t.flatten()[0].clone(),
    "nothing": lambda t: t.flatten()[:0],
    "no columns": lambda t: t.flatten()[:0].view(*t.shape[:-1], 0) if t.dim() else t,
    "fewer rows": lambda t: t[:-1] if t.dim() else t,
    "fewer columns": lambda t: t[..., :-1] if t.dim() else t,
    "more columns": lambda t: torch.cat((t, t), -1) if t.dim() else t,
    "largest": lambda t: t if t.is_floating_point() else torch.full_like(t, torch.iinfo(t.dtype).max),
    "least": lambda t: t if t.is_floating_point() else torch.full_like(t, torch.iinfo(t.dtype).min),
}


def decoded(tmp_path, tensors):
    (tmp_path / "config.json").write_text("{}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    found = find_matrices(Checkpoint.open(tmp_path).tensors, read_quantisation(tmp_path))
    if found.problems:
        raise ValueError(found.problems[W])
    return found.matrices[W].decoded()


@pytest.mark.parametrize("format", [packed_integers, gptq, nf4, bf12, fp8, llm_int8], ids=lambda f: f.__name__)
def test_other_types_and_shapes(format, tmp_path):
    """Never an error of torch; and kernels, which look at nothing, get no group that has no scales."""
    torch.manual_seed(0)
    tensors = format()
    decoded(tmp_path, tensors)
    refused = []
    for key in tensors:
        for change in CHANGES.values():
            try:  # of other shapes it may be another weight, which does not fit the model's
                decoded(tmp_path, tensors | {key: change(tensors[key])})
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 4 * len(tensors)
    assert all("m.proj" in said or "model.safetensors" in said for said in refused)


@pytest.mark.parametrize(
    "said", ["[]", "{", '{"shape": 3, "blocksize": 64}', '{"shape": [16, 256], "blocksize": "a"}', "{}"]
)
def test_what_bitsandbytes_says_of_a_weight(said, tmp_path):
    state = torch.tensor(list(said.encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="quant_state"):
        decoded(tmp_path, nf4() | {W + ".quant_state.bitsandbytes__nf4": state})


def test_a_shape_of_other_rows(tmp_path):
    for tensors in (bf12(), packed_integers()):
        with pytest.raises(ValueError, match=r"weight_shape says 17 rows, m.proj.weight has 16"):
            decoded(tmp_path, tensors | {"m.proj.weight_shape": torch.tensor([N + 1, K])})
