"""Every Mixture-of-Experts architecture of the installed transformers: its tokens, with one slot too."""

import pytest

from moe.llm import LLM
from tests.architectures import UNTESTED, architectures, reference, rounding_bound, tiny_model
from tests.moe.moe_cases import PROMPTS, config, engine_says, reference_says, relative_error

# Of each kind of attention and of experts one by default, the others by `make test-heavy`.
BY_DEFAULT = {"afmoe", "jetmoe", "laguna", "deepseek_v4", "minimax_m2"}
TESTED = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.heavy)
    for name in architectures()
    if name not in UNTESTED
]


@pytest.mark.parametrize("model_type", TESTED)
def test_served_exactly(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path)
    model = reference(model_type, tmp_path)
    expected = reference_says(model, PROMPTS)
    assert len({token for answer in expected.tokens for token in answer}) > 3  # one that repeats itself hides errors
    said = {}
    for budget, max_tokens in (("1.0", 16), ("1 expert", 5)):
        with LLM(tmp_path, config(budget, max_tokens=max_tokens)) as llm:
            said[budget] = engine_says(llm, PROMPTS)
    bound = rounding_bound(model, expected)
    for budget, ours in said.items():
        assert ours.tokens == expected.tokens, budget
        assert relative_error(ours, expected) <= bound, budget


def test_what_is_not_tested_is_an_architecture():
    assert set(UNTESTED) <= set(architectures())
