"""The compiled linear layer against torch's, and which layers it may stand for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe.kernels.cpu import instruction_sets
from moe.kernels.cpu_linear import CpuLinear
from moe.models.dense_cpu import MOST_ROWS, CompiledLinear, compile_dense

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the compiled helper is absent")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(0, 16, 16), (1, 1, 1), (1, 64, 192), (3, 63, 17), (8, 65, 1040), (33, 130, 31), (241, 20, 48)]


@pytest.mark.parametrize("isa", range(len(instruction_sets())))
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_out", "width"), SHAPES)
def test_equals_torch(rows: int, num_out: int, width: int, dtype: torch.dtype, with_bias: bool, isa: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).to(dtype), (torch.randn(num_out, width) * width**-0.5).to(dtype)
    bias = torch.randn(num_out).to(dtype) if with_bias else None
    y = CpuLinear(weight, bias, isa=isa)(x)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    eps = torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 2)  # a rounding; in fp32 the sum's as well
    bound = (4 if dtype == torch.float32 else 1.01) * eps * exact.abs() + 4e-6
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others_nor_on_threads(dtype: torch.dtype) -> None:
    x, weight = torch.randn(19, 320).to(dtype), torch.randn(700, 320).to(dtype)
    linear = CpuLinear(weight)
    for isa, name in enumerate(instruction_sets()):
        forced = CpuLinear(weight, isa=isa)(x.repeat(20, 1))
        assert torch.equal(forced[:19], CpuLinear(weight, isa=isa)(x))
        assert name == "plain" or torch.equal(forced[:19], linear(x)), name  # without fused multiply-add on x86
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(linear(x), alone)
    assert torch.equal(linear(x.T.contiguous().T), alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(x.repeat(20, 1)), alone.repeat(20, 1))
    finally:
        torch.set_num_threads(threads)


def test_shapes_of_x_and_strided_weights() -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(9, 64)[:, :40]
    torch.testing.assert_close(CpuLinear(weight)(x), F.linear(x, weight))


def test_what_cannot_be_computed_is_refused() -> None:
    for weight, bias in (
        (torch.zeros(3, 4, dtype=torch.float64), None),
        (torch.zeros(3), None),
        (torch.zeros(4, 3).T, None),
        (torch.zeros(3, 4), torch.zeros(4)),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bfloat16)),
    ):
        with pytest.raises(ValueError, match=r"float32, bfloat16 or float16 \[N, K\]"):
            CpuLinear(weight, bias)
    with pytest.raises(ValueError, match=r"the weight takes torch.float32 4"):
        CpuLinear(torch.zeros(3, 4))(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="bfloat16"):
        CpuLinear(torch.zeros(3, 4))(torch.zeros(1, 4, dtype=torch.bfloat16))


class Doubled(nn.Linear):
    """Inherits, and computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_replaces_plain_layers_only_and_keeps_their_names_and_weights() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(8, 6), "other": Doubled(8, 6), "wide": nn.Linear(8, 6).double()})
    model = model.requires_grad_(False)
    before, x = dict(model.state_dict()), torch.randn(MOST_ROWS[torch.float32] + 1, 8)
    right = {name: model[name](x) for name in ("plain", "other")}
    weight = model["plain"].weight
    assert compile_dense(model) == 1
    assert isinstance(model["plain"], CompiledLinear)
    assert model["plain"].weight is weight
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    for rows in (1, len(x) - 1, len(x)):  # compiled, compiled, torch's
        for name, expected in right.items():
            torch.testing.assert_close(model[name](x[:rows]), expected[:rows])


def test_sixteen_bits_are_compiled_for_any_number_of_rows() -> None:
    model = nn.ModuleDict({"narrow": nn.Linear(96, 70).bfloat16()}).requires_grad_(False)
    compile_dense(model)
    x = torch.randn(300, 96).bfloat16()
    together = model["narrow"](x)
    for row in (0, 17, 299):
        assert torch.equal(model["narrow"](x[row]), together[row])
