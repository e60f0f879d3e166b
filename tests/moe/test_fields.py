"""Every config class of a Mixture-of-Experts architecture says what we ask for by a name that we declared."""

from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING, MixtralConfig

from moe.models.fields import CONTEXT, FIXED_TOP_K, TOP_K, max_context, top_k
from tests.architectures import architectures

WITHOUT_LIMIT = ("switch_transformers",)  # its positions are distances, the far ones all alike


@pytest.mark.parametrize("model_type", architectures())
def test_every_config_names_its_top_k_and_its_context(model_type):
    text = CONFIG_MAPPING[model_type]().get_text_config()
    own = hasattr(getattr(text, "ffn_config", None), "moe_top_k")
    assert text.model_type in FIXED_TOP_K or own or any(hasattr(text, name) for name in TOP_K)
    assert text.model_type in WITHOUT_LIMIT or any(hasattr(text, name) for name in CONTEXT)
    assert (max_context(text) is None) == (text.model_type in WITHOUT_LIMIT)


def test_an_unknown_name_is_an_error_and_no_default():
    assert top_k(MixtralConfig(num_experts_per_tok=3)) == 3
    config = SimpleNamespace(model_type="new", experts_used=4)
    with pytest.raises(ValueError, match="how many experts a token takes"):
        top_k(config)
    config.moe_topk = [2, 4, 1]  # HunYuan: by layer
    assert top_k(config) == 4
