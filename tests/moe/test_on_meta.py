"""Models without weights are what torch's own meta device makes of them, and what is loaded computes with the same."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from moe.models.on_meta import on_meta, quick_meta, without_values
from tests.moe.moe_cases import TINYMOE

ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
]


def config_of(rope):
    config = AutoConfig.from_pretrained(TINYMOE)
    config.rope_parameters = dict(rope)
    return config


def tensors_of(model):
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (t.device.type, t.dtype, t.shape, t.stride()) for name, t in named}


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_the_same_tensors_without_memory(rope):
    with torch.device("meta"):
        expected = tensors_of(AutoModelForCausalLM.from_config(config_of(rope)))
    with on_meta():
        model = AutoModelForCausalLM.from_config(config_of(rope))
    without_values(model)
    assert tensors_of(model) == expected
    assert {device for device, *_ in expected.values()} == {"meta"}


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_what_is_loaded_has_the_same_values(rope):
    torch.manual_seed(0)
    weights = AutoModelForCausalLM.from_config(config_of(rope)).state_dict()
    expected = MixtralForCausalLM.from_pretrained(None, config=config_of(rope), state_dict=dict(weights))
    with quick_meta():
        model = MixtralForCausalLM.from_pretrained(None, config=config_of(rope), state_dict=dict(weights))
    buffers = dict(expected.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, value in [*model.named_buffers(), *model.named_parameters()]:
        assert torch.equal(value, buffers.get(name, weights.get(name))), name


def test_weights_with_memory_are_drawn():
    with quick_meta():
        drawn = nn.init.normal_(torch.zeros(100))
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert nn.init.normal_(torch.zeros(3, device="meta")).is_meta
    assert drawn.std() > 0.5


def test_positions_that_meet_what_has_no_memory():
    with on_meta():
        weight = torch.ones(3)
        sums = [torch.arange(3) + weight, torch.where(torch.arange(3) > 1, weight, torch.arange(3))]
        sums.append(torch.cat([torch.arange(2) / 2, torch.zeros(1)]))
        assert not torch.arange(3).is_meta
        with pytest.raises(RuntimeError, match="broadcast"):
            torch.arange(3) + torch.ones(4)
    assert [(one.is_meta, tuple(one.shape)) for one in sums] == [(True, (3,))] * 3
