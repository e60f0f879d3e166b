"""Every Mixture-of-Experts architecture of the installed transformers: its tokens, or a sentence that refuses it."""

import pytest

from moe.llm import LLM
from tests.architectures import REFUSED, architectures, reference, rounding_bound, tiny_model
from tests.moe.moe_cases import PROMPTS, ROOT, config, engine_says, reference_says, relative_error

# Of each kind of attention and of experts one by default, the others by `make test-heavy`.
BY_DEFAULT = {"afmoe", "jetmoe", "laguna", "deepseek_v4", "minimax_m2"}
REPETITIVE = {"nllb-moe"}
SERVED = [
    pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.heavy)
    for name in architectures()
    if name not in REFUSED
]


@pytest.mark.parametrize("model_type", SERVED)
def test_served_exactly(model_type, tmp_path):
    """Together and alone with all experts in memory, in chunks with one slot."""
    tiny_model(model_type).save_pretrained(tmp_path)
    model = reference(model_type, tmp_path)
    expected = reference_says(model, PROMPTS)
    if model_type not in REPETITIVE:  # one that repeats itself hides errors
        assert len({token for answer in expected.tokens for token in answer}) > 3
    said = {}
    for budget, max_tokens in (("1.0", 64), ("1 expert", 5)):
        with LLM(tmp_path, config(budget, max_tokens=max_tokens)) as llm:
            said[budget] = engine_says(llm, PROMPTS)
            assert not any("not used" in note for note in llm.notes), llm.notes
            if budget == "1.0":
                alone = [engine_says(llm, [prompt]).tokens[0] for prompt in PROMPTS]
    bound = rounding_bound(model, expected)
    assert alone == expected.tokens
    for budget, ours in said.items():
        assert ours.tokens == expected.tokens, budget
        assert relative_error(ours, expected) <= bound, budget


@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() & architectures().keys()))
def test_refused_in_a_sentence(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        LLM(tmp_path, config())


def test_the_table_in_the_docs_has_every_architecture():
    """One that a newer transformers brings is not there until `python -m tests.architectures` has run with it."""
    rows = (ROOT / "docs" / "architectures.md").read_text().splitlines()
    known = {row.split("|")[1].strip() for row in rows if row.startswith("| ")}
    assert set(architectures()) <= known
