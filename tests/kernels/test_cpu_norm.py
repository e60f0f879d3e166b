"""The compiled RMS norm against transformers' own, and what must not be replaced by it."""

import pytest
import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from moe.kernels.cpu import load_helper
from moe.kernels.cpu_norm import rms_norm
from moe.models.dense_cpu import CompiledRmsNorm, compile_dense

pytestmark = pytest.mark.skipif(load_helper() is None, reason="the compiled helper is absent")

DTYPES = (torch.float32, torch.bfloat16)


class OnePlusRMSNorm(MixtralRMSNorm):
    """Gemma's: looks the same and computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + super().forward(hidden_states) / self.weight


def random_norm(cls: type[nn.Module], width: int, dtype: torch.dtype) -> nn.Module:
    norm = cls(width, eps=1e-5)
    nn.init.normal_(norm.weight)
    return norm.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1, 192), (2, 63), (3, 5, 1), (1, 7, 4, 17), (64, 2048)])
@pytest.mark.parametrize(("cls", "once"), [(MixtralRMSNorm, False), (GptOssRMSNorm, True)])
def test_equals_transformers(cls: type[nn.Module], once: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = random_norm(cls, shape[-1], dtype)
    x = (torch.randn(shape) * 10 ** torch.randn(*shape[:-1], 1)).to(dtype)
    mine, right = rms_norm(x, norm.weight, 1e-5, round_once=once), norm(x)
    assert (mine.shape, mine.dtype) == (right.shape, right.dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)  # a sum of squares in another order
    else:
        torch.testing.assert_close(mine, right, rtol=2**-6, atol=0)  # one rounding moved by one, times the weight
        assert x.numel() == 0 or (mine != right).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_others(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 100).to(dtype), torch.randn(100).to(dtype)
    alone = torch.cat([rms_norm(row[None], weight, 1e-6) for row in x])
    assert torch.equal(rms_norm(x, weight, 1e-6), alone)
    assert torch.equal(rms_norm(x.T.contiguous().T, weight, 1e-6), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replaces_only_what_computes_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    classes = {"same": MixtralRMSNorm, "gemma": OnePlusRMSNorm, "gpt_oss": GptOssRMSNorm}
    model = nn.ModuleDict({name: random_norm(cls, 96, dtype) for name, cls in classes.items()})
    weight, before = model["same"].weight, model.state_dict()
    assert compile_dense(model) == 2
    assert isinstance(model["same"], CompiledRmsNorm)
    assert isinstance(model["gpt_oss"], CompiledRmsNorm)
    assert (model["same"].round_once, model["gpt_oss"].round_once) == (False, dtype == torch.bfloat16)
    assert type(model["gemma"]) is OnePlusRMSNorm
    assert model["same"].weight is weight
    assert model.state_dict().keys() == before.keys()


def test_says_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match="float16"):
        rms_norm(torch.randn(2, 8).half(), torch.randn(8).half(), 1e-6)
    with pytest.raises(ValueError, match="have 8 elements"):
        rms_norm(torch.randn(2, 8), torch.randn(9), 1e-6)
