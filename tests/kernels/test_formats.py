"""Codes to numbers: the twin against loops in float64, element by element, and what does not fit together refused."""

import pytest
import torch
from kernels_codes import random_codes
from kernels_experts import random_weights

from moe.kernels.formats import CODE_DTYPES, E2M1, NIBBLE_CODES, Coding, decode
from moe.kernels.reference import check_expert_weights, dequantized
from moe.kernels.weights import Activation

CODES = sorted(set(CODE_DTYPES) - {"nested", "bf12"})  # which are in test_nested.py and test_bf12.py


def value_of(code: str, codes: torch.Tensor, row: int, column: int, table: torch.Tensor | None) -> float:
    if code not in NIBBLE_CODES:
        return float(codes[row, column])
    byte = int(codes[row, column // 2])
    nibble = byte >> 4 if column % 2 else byte & 15
    if code == "int4":
        return nibble - 8
    return E2M1[nibble] if table is None else float(table[nibble])


def random_coding(code: str, parts: int, rows: int, columns: int, block: tuple[int, int], *, groups: bool) -> Coding:
    grid = (1, parts, -(-rows // block[0]), -(-columns // block[1]))
    is_integer, is_nvfp4 = code in ("int8", "int4"), code == "e2m1"
    return Coding(
        code,
        block,
        torch.randint(100, 130, grid, dtype=torch.uint8).view(torch.float8_e8m0fnu) if is_nvfp4 else torch.rand(grid),
        torch.randint(-8, 9, grid, dtype=torch.int8) if is_integer else None,
        torch.rand(1, parts) if is_nvfp4 else None,
        torch.randn(1, parts, 16) if code == "lut4" else None,
        torch.randint(0, grid[3], (1, parts, columns), dtype=torch.int32) if groups else None,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_decode_against_loops(code, groups, interleaved):
    torch.manual_seed(0)
    rows, columns, block = 5, 23, (2, 8)
    coding = random_coding(code, 2, rows, columns, block, groups=groups)
    codes = random_codes(code, (2 * rows,), columns)
    got = decode(codes, coding, columns, 0, interleaved=interleaved)
    for part in range(2):
        for row in range(rows):
            for column in range(columns):
                at = 2 * row + part if interleaved else part * rows + row
                group = column // block[1] if coding.group_of is None else int(coding.group_of[0, part, column])
                place = (0, part, row // block[0], group)
                table = None if coding.table is None else coding.table[0, part]
                scale = float(coding.scale[place].float())
                scale *= 1 if coding.factor is None else float(coding.factor[0, part])
                zero = 0 if coding.zero is None else int(coding.zero[place])
                want = (value_of(code, codes, at, column, table) - zero) * scale
                assert abs(float(got[at, column]) - want) <= 2e-7 * abs(want), (part, row, column)


def test_odd_rows_ignore_the_last_half_byte():
    codes = torch.tensor([[0x21, 0xF3]], dtype=torch.uint8)
    got = decode(codes, Coding("int4", (1, 8), torch.ones(1, 1, 1, 1)), 3, 0)
    assert got.tolist() == [[-7.0, -6.0, -5.0]]


@pytest.mark.parametrize("act", [Activation(), Activation(interleaved=True), Activation(gated=False, kind="relu")])
def test_a_slot_is_decoded_by_its_own_coding(act):
    n = 6 if act.gated else 3
    first = random_coding("int4", 2 if act.gated else 1, 3, 8, (1, 4), groups=False)
    second = random_coding("e4m3", 1, 8, 3, (8, 3), groups=False)
    both = [random_codes("int4", (n,), 8), random_codes("e4m3", (8,), 3)]
    weights = random_weights(1, 8, 3, activation=act)._replace(
        gate_up=both[0][None], down=both[1][None], gate_up_coding=first, down_coding=second
    )
    check_expert_weights(weights)
    assert weights.formats == {"int4", "e4m3"}
    assert (weights.hidden_size, weights.intermediate_size) == (8, 3)
    gate_up, down = dequantized(weights, 0)
    assert torch.equal(gate_up, decode(both[0], first, 8, 0, interleaved=act.interleaved))
    assert torch.equal(down, decode(both[1], second, 3, 0))
    for change, message in (
        ({"gate_up_coding": first._replace(code="int8")}, "codes of int8 are torch.int8"),
        ({"gate_up_coding": first._replace(table=torch.zeros(1, 2, 16))}, "a table with lut4 only"),
        ({"down_coding": second._replace(zero=torch.zeros(1, 1, 1, 1, dtype=torch.int8))}, "zeros go with"),
        ({"gate_up_coding": first._replace(block=(0, 4))}, "both must be at least 1"),
        ({"gate_up_coding": first._replace(scale=first.scale.double())}, r"scales of gate_up are torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            check_expert_weights(weights._replace(**change))
