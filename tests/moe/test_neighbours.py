"""Every architecture: the same tokens alone, beside others and in chunks, and those of transformers alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.config import BatchConfig
from moe.llm import LLM
from moe.models.neighbours import recomputed_beyond, why_not_packed
from tests.families import FAMILIES, tiny_config
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Case, config, engine_says, relative_error


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_neighbours_and_chunks_do_not_matter(case):
    for batch in (BatchConfig(max_tokens=512), BatchConfig(max_tokens=5, max_sequences=4, block_size=3)):
        with LLM(case.original, config("1.0", max_tokens=batch.max_tokens, block_size=batch.block_size)) as llm:
            together = engine_says(llm, PROMPTS)
            assert together.tokens == case.said().tokens
            assert relative_error(together, case.said()) <= FP32_BOUND
            assert engine_says(llm, PROMPTS[::-1]).tokens == case.said().tokens[::-1]
            alone = [engine_says(llm, [prompt]).tokens[0] for prompt in PROMPTS]
            assert alone == case.said().tokens


def test_longrope_is_packed_where_its_context_ends_before_the_switch(tmp_path):
    case = Case("phimoe_longrope", tmp_path)
    prompts, expected = [PROMPTS[n] for n in (0, 1)], [case.said().tokens[n] for n in (0, 1)]
    with LLM(case.original, config("1.0", max_context=24, max_tokens=5)) as llm:
        assert llm.engine.is_packed
        assert engine_says(llm, prompts).tokens == expected


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_every_layer_kind_with_its_own_rope_is_looked_at(kind):
    model_config = tiny_config("phimoe_longrope" if kind == "longrope" else "mixtral_dynamic")
    own = dict(model_config.rope_parameters)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    model.config.rope_parameters = {"full_attention": own, "sliding_attention": {"rope_type": "default"}}
    reason = why_not_packed(model, 1000)
    assert reason is not None
    assert "rotary frequencies" in reason
    model.config.rope_parameters = {"full_attention": {"rope_type": "yarn"}, "sliding_attention": None}
    assert why_not_packed(model, 1000) is None


def test_who_computes_a_sequence_anew_beyond_the_switch():
    for family, length in (("phimoe_longrope", 24), ("mixtral", None), ("mixtral_dynamic", None)):
        with torch.device("meta"):
            assert recomputed_beyond(AutoModelForCausalLM.from_config(tiny_config(family))) == length
    # Other families go on with both kinds of keys in one cache, whatever their config is called.
    mixed = tiny_config("mixtral")
    mixed.original_max_position_embeddings = 24
    with torch.device("meta"):
        assert recomputed_beyond(AutoModelForCausalLM.from_config(mixed)) is None
