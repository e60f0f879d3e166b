"""Nested precision: planes are read back, weights refine level by level, kernels say what the twin says."""

import pytest
import torch

from moe.kernels.cpu import CpuExperts, instruction_sets
from moe.kernels.encode_nested import encode_nested
from moe.kernels.formats import Coding, Residual, decode
from moe.kernels.nested import BLOCK, LEVELS, bit_of, nested_values, pack_plane, plane_bytes, unpack_plane
from moe.kernels.reference import check_expert_weights, experts_reference
from moe.kernels.weights import Activation, ExpertWeights

# Largest relative error of normal weights, groups of 64: their own scales for each width alone reach 0.34, 0.19, 0.10.
BOUNDS = {2: 0.39, 3: 0.20, 4: 0.11, 8: 0.02}


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 129, 256, 1100])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_plane_is_read_back(bits, columns):
    values = torch.randint(0, 1 << bits, (2, 5, columns), dtype=torch.uint8)
    plane = pack_plane(values, bits)
    assert plane.shape == (2, 5, plane_bytes(bits, columns))
    assert torch.equal(unpack_plane(plane, bits, columns), values)
    at, whole = bit_of(bits, columns).tolist(), int.from_bytes(bytes(plane[1, 2].tolist()), "little")
    assert [whole >> place & (1 << bits) - 1 for place in at] == values[1, 2].tolist()
    blocks = columns // BLOCK * BLOCK  # whole ones fill their bytes, then column follows column
    assert sorted(at[:blocks]) == list(range(0, blocks * bits, bits))
    assert at[blocks:] == list(range(blocks * bits, columns * bits, bits))


@pytest.mark.parametrize("columns", [48, 64, 200, 256])
def test_every_level_refines_the_one_before(columns):
    torch.manual_seed(0)
    w = torch.randn(32, columns) * 0.02
    planes = encode_nested(w, 64)
    errors = [float((nested_values(planes, b, columns, 64) - w).norm() / w.norm()) for b in LEVELS]
    assert all(error < BOUNDS[b] for b, error in zip(LEVELS, errors)), errors
    assert errors == sorted(errors, reverse=True)
    scale, signs = planes[1].float(), 2 * unpack_plane(planes[2], 1, columns).float() - 1
    step = nested_values(planes, 3, columns, 64) - nested_values(planes, 2, columns, 64)
    size = (scale * planes[3].float() / 256)[:, torch.arange(columns) // 64]
    assert torch.allclose(step, signs * size, atol=1e-8)  # fp32 rounding of a sum of weights of 0.02


def test_inputs_guide_the_rounding_and_zeros_stay_finite():
    torch.manual_seed(0)
    w, x = torch.randn(24, 96), torch.randn(200, 96) @ torch.randn(96, 96)
    nearest, guided = (
        float((x @ (nested_values(planes, 4, 96, 32) - w).T).norm())
        for planes in (encode_nested(w, 32), encode_nested(w, 32, x))
    )
    assert guided < 0.8 * nearest
    planes = encode_nested(torch.zeros(3, 32), 16)
    assert all(not nested_values(planes, b, 32, 16).any() for b in LEVELS)
    with pytest.raises(ValueError, match="not finite"):
        encode_nested(torch.full((2, 32), torch.inf), 16)


def matrices(slots, parts, n, k, group):
    """Of every slot, the planes of `parts` matrices as a slab has them."""
    made = [[encode_nested(torch.randn(n, k) * k**-0.5, group) for _ in range(parts)] for _ in range(slots)]
    fields = [torch.stack([torch.stack([planes[i] for planes in of]) for of in made]) for i in range(8)]
    codes = [f.flatten(1, 2) if i % 2 == 0 else f for i, f in enumerate(fields)]  # codes stand row by row
    bits = torch.tensor([[(2, 3, 4, 8, 4)[s % 5]] for s in range(slots)], dtype=torch.int32)
    return codes[0], Coding("nested", (1, group), codes[1], residual=Residual(bits, *codes[2:]))


@pytest.mark.parametrize("interleaved", [False, True], ids=["apart", "interleaved"])
@pytest.mark.parametrize(("hidden", "inter", "group"), [(200, 72, 64), (264, 272, 16), (33, 40, 64), (1336, 16, 48)])
def test_kernels_say_what_the_twin_says(hidden, inter, group, interleaved):
    """Slots of all levels in one call; a row's bits do not depend on the rows beside it, few or many."""
    torch.manual_seed(0)
    (first, up), (second, down) = matrices(5, 2, inter, hidden, group), matrices(5, 1, hidden, inter, group)
    activation = Activation(kind="gpt_oss", interleaved=True) if interleaved else Activation()
    weights = ExpertWeights(first, second, None, None, activation, up, down)
    check_expert_weights(weights)
    results = []
    for isa in range(len(instruction_sets())):
        kernel = CpuExperts(weights, isa=isa)
        for tokens in (0, 1, 63):
            x, ids = torch.randn(tokens, hidden), torch.randint(0, 5, (tokens, 2), dtype=torch.int32)
            found, right = kernel.experts(x, ids), experts_reference(x, ids, weights)
            assert float((found - right).norm()) <= 2e-6 * float(right.norm())  # fp32 sums of 200
        alone = torch.cat([kernel.experts(x[t : t + 1], ids[t : t + 1]) for t in range(0, 63, 9)])
        assert torch.equal(alone, found[::9])
        torch.manual_seed(1)
        x, ids = torch.randn(9, hidden), torch.arange(45, dtype=torch.int32).remainder(5).view(9, 5)
        if instruction_sets()[isa] != "plain":  # without fused multiply-add sums are others
            results.append(kernel.experts(x, ids))
        torch.manual_seed(0)
    assert all(torch.equal(results[0], other) for other in results)


def test_planes_that_a_slot_does_not_hold_are_not_read():
    torch.manual_seed(0)
    codes, coding = matrices(3, 1, 8, 64, 64)
    held = coding.residual._replace(codes8=None, scale8=None)
    assert held.most == 4
    assert coding._replace(residual=held).name == "nested4 1x64 float16"
    for slot in range(3):  # of 2, 3 and 4 bits
        fewer = decode(codes[slot], coding._replace(residual=held), 64, slot)
        assert torch.equal(fewer, decode(codes[slot], coding, 64, slot))
    (first, up), bad = matrices(3, 1, 64, 64, 64), coding._replace(block=(1, 24))
    with pytest.raises(ValueError, match="float16 scales"):
        check_expert_weights(ExpertWeights(first, first, None, None, Activation(gated=False), up, bad))
