"""Every published layout against its formula, by element: other sizes, groups and conventions than the fixtures.

Each case writes random codes and scales as a checkpoint would hold them and says, in float64 and with plain indexing,
what they mean (the formulas of the formats' own libraries, which docs/formats.md names).
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe.kernels.formats import E2M1
from moe.offload.checkpoint import Checkpoint
from moe.offload.formats.config import read_quantisation
from moe.offload.formats.find import find_matrices

W = "m.proj.weight"
TABLE = np.array(E2M1)
GEN = np.random.default_rng(0)


def found(tmp_path, tensors, config=None, files=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    quantisation = {} if config is None else {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(quantisation))
    for name, said in (files or {}).items():
        (tmp_path / name).write_text(json.dumps(said))
    return find_matrices(Checkpoint.open(tmp_path).tensors, read_quantisation(tmp_path))


def decoded(tmp_path, tensors, config=None, files=None, name=W):
    said = found(tmp_path, tensors, config, files)
    assert said.problems == {}
    assert said.companions | {name} >= set(tensors)
    return said.matrices[name].decoded().double().numpy()


def assert_close(got, want):
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= 3e-7 * np.abs(want))  # two roundings to float32


def ints(high, *shape, low=0):
    return GEN.integers(low, high, shape)


def words(values, bits):
    """Fields of `bits` along the last axis, lowest first, as int32."""
    per = 32 // bits
    padded = np.concatenate([values, np.zeros((*values.shape[:-1], -values.shape[-1] % per), values.dtype)], -1)
    fields = padded.reshape(*values.shape[:-1], -1, per).astype(np.uint64)
    packed = sum(fields[..., i] << np.uint64(bits * i) for i in range(per)).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def nibbles(values):
    return torch.from_numpy((values[..., 0::2] | values[..., 1::2] << 4).astype(np.uint8))


def fp8(*shape):
    return torch.randn(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_fp8_ragged_blocks(dtype, tmp_path):
    """576 rows in blocks of 128 have 5 rows of scales; the block is the configured one, not 576 / 5."""
    n, k = 9 * 8, 52
    codes, scale = fp8(n, k), torch.rand(5, 4) + 0.5
    scale = scale.to(torch.float8_e8m0fnu).view(dtype) if dtype == torch.uint8 else scale.to(dtype)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    said = decoded(tmp_path, {W: codes, W + "_scale_inv": scale}, config)
    meant = (scale.view(torch.float8_e8m0fnu) if dtype == torch.uint8 else scale).double().numpy()
    rows, columns = np.arange(n) // 16, np.arange(k) // 16
    assert_close(said, codes.double().numpy() * meant[rows][:, columns])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (20,), (20, 1)])
def test_fp8_per_tensor_and_channel(shape, tmp_path):
    codes, scale = fp8(20, 12), torch.rand(shape) + 0.5
    tensors = {W: codes, "m.proj.weight_scale": scale, "m.proj.input_scale": torch.ones(1)}
    said = decoded(tmp_path, tensors, {"quant_method": "compressed-tensors", "format": "float-quantized"})
    assert_close(said, codes.double().numpy() * np.broadcast_to(scale.double().numpy().reshape(-1, 1), (20, 12)))


def test_fp8_without_blocks_and_static_activations(tmp_path):
    codes = fp8(8, 12)
    tensors = {W: codes, W + "_scale_inv": torch.tensor(0.25), "m.proj.activation_scale": torch.tensor(2.0)}
    said = decoded(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": None})
    assert_close(said, codes.double().numpy() * 0.25)


def test_mxfp8(tmp_path):
    codes, scale = fp8(6, 96), torch.from_numpy(ints(140, 6, 3, low=110).astype(np.uint8))
    said = decoded(tmp_path, {W: codes, W + "_scale_inv": scale}, {"quant_method": "mxfp8"})
    assert_close(said, codes.double().numpy() * 2.0 ** (scale.double().numpy().repeat(32, 1) - 127))


@pytest.mark.parametrize(("key", "dtype"), [("m.proj.weight_packed", torch.uint8), (W, torch.int8)])
def test_mxfp4(key, dtype, tmp_path):
    """Kimi-K3's names, and DeepSeek-V4's: I8 codes with `scale`."""
    values, scale = ints(16, 5, 96), ints(140, 5, 3, low=0).astype(np.uint8)
    scale_key = "m.proj.weight_scale" if "packed" in key else "m.proj.scale"
    tensors = {key: nibbles(values).view(dtype), scale_key: torch.from_numpy(scale)}
    said = decoded(tmp_path, tensors)
    assert_close(said, TABLE[values] * 2.0 ** (scale.astype(float).repeat(32, 1) - 127))


def test_gpt_oss_names(tmp_path):
    values, scale = ints(16, 3, 4, 64), ints(140, 3, 4, 2, low=110).astype(np.uint8)
    tensors = {"e.gate_up_proj_blocks": nibbles(values).view(3, 4, 2, 16), "e.gate_up_proj_scales": torch.tensor(scale)}
    said = decoded(tmp_path, tensors, {"quant_method": "mxfp4"}, name="e.gate_up_proj")
    assert_close(said, TABLE[values] * 2.0 ** (scale.astype(float).repeat(32, 2) - 127))


@pytest.mark.parametrize("convention", ["modelopt", "compressed-tensors", "stacked", "one file"])
def test_nvfp4(convention, tmp_path):
    values, scale, factor = ints(16, 6, 48), fp8(6, 3).abs(), torch.tensor(0.0123)
    means = TABLE[values] * (scale.double().numpy().repeat(16, 1) * float(factor))
    codes = nibbles(values)
    config, files, name = {"quant_method": "modelopt", "quant_algo": "NVFP4"}, None, W
    if convention == "compressed-tensors":
        tensors = {"m.proj.weight_packed": codes, "m.proj.weight_global_scale": (1 / factor)[None]}
        tensors |= {"m.proj.weight_scale": scale, "m.proj.input_global_scale": torch.ones(1)}
        config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    elif convention == "stacked":
        name, means = "e.gate_up_proj", np.stack([means, means * 2])
        tensors = {name: torch.stack([codes, codes]), name + "_weight_scale": torch.stack([scale, scale])}
        tensors |= {name + "_weight_scale_2": factor * torch.tensor([1.0, 2.0]), name + "_input_scale": torch.ones(2)}
    else:
        tensors = {W: codes, "m.proj.weight_scale": scale, "m.proj.weight_scale_2": factor}
        tensors |= {"m.proj.input_scale": torch.tensor(1.0), "m.k_proj.k_scale": torch.tensor(1.0)}
        if convention == "one file":
            said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
            config, files = None, {"hf_quant_config.json": said}
    assert_close(decoded(tmp_path, tensors, config, files, name), means)


@pytest.mark.parametrize(("bits", "k", "group"), [(4, 64, 32), (4, 20, 8), (4, 64, None), (8, 64, 16), (8, 22, None)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_integers(bits, k, group, zeros, grouped, tmp_path):
    """compressed-tensors: rows that do not fill their last word, zero points along N, groups by `weight_g_idx`."""
    n, half = 12, 1 << bits - 1
    groups = 1 if group is None else -(-k // group)
    values, zero = ints(half, n, k, low=-half), ints(half, n, groups, low=-half) * zeros
    scale = torch.rand(n, groups).bfloat16()
    group_of = np.arange(k) // (group or k)
    tensors = {
        "m.proj.weight_packed": words(values + half, bits),
        "m.proj.weight_scale": scale,
        "m.proj.weight_shape": torch.tensor([n, k]),
    }
    if zeros:
        tensors["m.proj.weight_zero_point"] = words((zero + half).T, bits).T
    if grouped:
        group_of = GEN.permutation(group_of)
        tensors["m.proj.weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    weights = {"num_bits": bits, "group_size": group, "strategy": "group" if group else "channel"}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": weights}}
    want = (values - zero[:, group_of]) * scale.double().numpy()[:, group_of]
    assert_close(decoded(tmp_path, tensors, config), want)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_int8(zeros, groups, tmp_path):
    values, scale = ints(128, 5, 24, low=-128), torch.rand(5, groups)
    zero = ints(128, 5, groups, low=-128) * zeros
    tensors = {W: torch.from_numpy(values.astype(np.int8)), "m.proj.weight_scale": scale}
    if zeros:
        tensors["m.proj.weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
    want = (values - zero.repeat(24 // groups, 1)) * scale.double().numpy().repeat(24 // groups, 1)
    assert_close(decoded(tmp_path, tensors), want)


def test_llm_int8(tmp_path):
    values, scb = ints(128, 5, 24, low=-127), torch.rand(5) * 3
    tensors = {W: torch.from_numpy(values.astype(np.int8)), "m.proj.SCB": scb}
    tensors["m.proj.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert_close(decoded(tmp_path, tensors, config), values * scb.double().numpy()[:, None] / 127)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", ["none", "trivial", "scattered", "whole"])
def test_gptq(bits, version, order, tmp_path):
    n, k, group = 16, 64, 64 if order == "whole" else 16
    groups = k // group
    values, zero = ints(1 << bits, k, n), ints(1 << bits, groups, n, low=1)
    scales = torch.rand(groups, n).half()
    group_of = np.arange(k) // group
    if order == "scattered":
        group_of = ints(groups, k)  # uneven groups, too
    tensors = {
        "m.proj.qweight": words(values.T, bits).T,
        "m.proj.scales": scales,
        "m.proj.qzeros": words(zero - (version != "gptq_v2"), bits),
    }
    if order != "none":
        tensors["m.proj.g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    config = {"quant_method": "gptq", "bits": bits, "group_size": -1 if order == "whole" else group, "desc_act": False}
    config |= {} if version is None else {"checkpoint_format": version}
    want = ((values - zero[group_of]) * scales.double().numpy()[group_of]).T
    files = {"quantize_config.json": config} if order == "trivial" else None
    assert_close(decoded(tmp_path, tensors, None if files else config, files), want)


@pytest.mark.parametrize("group", [16, 64])
def test_awq(group, tmp_path):
    n, k = 24, 64
    values, zero, scales = ints(16, k, n), ints(16, k // group, n), torch.rand(k // group, n).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # field i of a word holds this one of its eight columns

    def packed(v):
        return words(v.reshape(len(v), -1, 8)[:, :, order].reshape(len(v), -1), 4)

    tensors = {"m.proj.qweight": packed(values), "m.proj.qzeros": packed(zero), "m.proj.scales": scales}
    group_of = np.arange(k) // group
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    want = ((values - zero[group_of]) * scales.double().numpy()[group_of]).T
    assert_close(decoded(tmp_path, tensors, config), want)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("n", "k"), [(6, 128), (4, 96), (8, 32)])
@pytest.mark.parametrize("container", [torch.uint8, torch.bfloat16])
def test_nf4(nested, n, k, container, tmp_path):
    """Blocks of 64 run over the flattened matrix: over the ends of rows of 96 and 32."""
    values, table = ints(16, n * k), torch.rand(16)
    absmax = torch.rand(n * k // 64)
    codes = torch.from_numpy((values[0::2] << 4 | values[1::2]).astype(np.uint8)).view(container)
    about = {"quant_type": "nf4", "blocksize": 64, "shape": [n, k], "dtype": "bfloat16"}
    tensors = {W: codes[:, None], W + ".quant_map": table, W + ".absmax": absmax}
    maxima = absmax.double().numpy()
    if nested:
        index, outer, inner = ints(256, len(absmax)), torch.rand(1), torch.rand(256)
        about |= {"nested_blocksize": 256, "nested_offset": 0.03125, "nested_dtype": "float32"}
        tensors |= {W + ".absmax": torch.from_numpy(index.astype(np.uint8))}
        tensors |= {W + ".nested_absmax": outer, W + ".nested_quant_map": inner}
        maxima = inner.double().numpy()[index] * float(outer) + 0.03125
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    tensors[W + ".quant_state.bitsandbytes__nf4"] = state
    want = (table.double().numpy()[values] * maxima.repeat(64)).reshape(n, k)
    assert_close(decoded(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}), want)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quark"}, "quantised by 'quark'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin' of gptq"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout 'gemv' of awq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:ark"}, "layout 'auto_round:ark'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed as 'marlin-24'"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}},
            "transform_config changes the weights",
        ),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)
def test_what_is_not_understood_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        found(tmp_path, {W: torch.ones(2, 2)}, config)


def three_bits(t):
    t["m.proj.weight_packed"] = torch.zeros(4, 3, dtype=torch.int32)
    t["m.proj.weight_shape"] = torch.tensor([4, 32])
    t["m.proj.weight_scale"] = torch.ones(4, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({W: fp8(4, 4)}), "F8_E4M3 without the scales"),
        (lambda t: t.update({W: torch.ones(4, 4, dtype=torch.int8)}), "I8 without the scales"),
        (lambda t: t.update({W: torch.ones(4, 4), W + "_scale_inv": torch.ones(1)}), "not understood"),
        (lambda t: t.update({"m.proj.weight_scale": torch.ones(1)}), "weight_scale belongs to m.proj.weight, which is"),
        (lambda t: t.update({"m.proj.qweight": torch.zeros(4, 8, dtype=torch.int32)}), "missing its scales"),
        (three_bits, "3 words for 32 columns; only 4 and 8 bits"),
    ],
)
def test_a_problem_belongs_to_its_weight(change, message, tmp_path):
    tensors = {"other.weight": torch.ones(2, 2), "hc_attn_scale": torch.ones(3)}
    change(tensors)
    said = found(tmp_path, tensors)
    assert message in said.problems[W]
    assert "hc_attn_scale" not in said.companions
