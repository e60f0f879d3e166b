"""The engine says what transformers says: every family, any number of slots, original and packed."""

import pytest

from moe.llm import LLM
from tests.families import FAMILIES
from tests.moe.moe_cases import FP32_BOUND, PROMPTS, Case, RoutingLog, Said, config, engine_says, relative_error

SERVED_WHOLE = {"nllb_moe"}
IN_SLOTS = [f for f in FAMILIES if f not in SERVED_WHOLE]
BUDGETS = {"all": "1.0", "half": "0.5", "k": "3", "one": "1 expert"}
ONE_AT_A_TIME = {
    "minimax": "recurrent state",
    "jamba": "attention interface",
    "llama4": "positions from the cache",
    "phimoe_longrope": "sequence longer than 24",
    "switch_transformers": "encoder-decoder",
}


@pytest.fixture(scope="module", params=IN_SLOTS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def assert_exact(case, said):
    assert said.tokens == case.said().tokens
    assert relative_error(said, case.said()) <= FP32_BOUND
    if case.family not in SERVED_WHOLE:  # a model that repeats itself would hide errors
        assert len({t for answer in said.tokens for t in answer}) > 5


def test_all_resident_and_a_wrong_expert(case):
    with LLM(case.folder("original"), config("1.0")) as llm:
        assert_exact(case, engine_says(llm, PROMPTS))
        cache = llm.engine.experts.cache
        assert cache.num_slots == llm.engine.blueprint.num_experts == sum(cache.num_experts)
        assert sum(s.misses for s in cache.stats) == 0
        reason = ONE_AT_A_TIME.get(case.family)
        assert llm.engine.is_packed == (reason is None)
        assert [reason in note for note in llm.engine.notes] == [True] * (reason is not None)
        assert llm.engine.blueprint.top_k >= 3 or case.family in {"phimoe", "phimoe_longrope", "switch_transformers"}

        one, slots = PROMPTS[2:3], cache.resident_slots(0)
        right = Said(case.said().tokens[2:3], case.said().logits[2:3])
        a, b = (int(slots[e]) for e in most_used(llm))
        blobs = cache.slab.of_layer(0)
        blobs[[a, b]] = blobs[[b, a]]
        assert relative_error(engine_says(llm, one), right) > 100 * FP32_BOUND, "two experts exchanged"
        blobs[[a, b]] = blobs[[b, a]]
        cache.views(0)["down"][a] *= 1.01
        assert relative_error(engine_says(llm, one), right) > 2 * FP32_BOUND, "one expert's weights 1 % off"


def most_used(llm):
    """The two experts of the first layer that the last token chose, or that and any other one."""
    experts = llm.engine.experts
    log = RoutingLog(len(experts.kernels))
    experts.routing.observers.append(log)
    engine_says(llm, PROMPTS[2:3])
    experts.routing.observers.remove(log)
    chosen = log.take()[0].topk_ids.flatten().tolist()
    return (chosen + [(chosen[0] + 1) % experts.cache.num_experts[0]])[:2]


def test_one_slot_packed(case):
    with LLM(case.folder("packed"), config("1 expert", max_tokens=7)) as llm:
        assert llm.engine.blueprint.checkpoint.packed is not None
        assert llm.engine.experts.cache.num_slots == 1
        assert_exact(case, engine_says(llm, PROMPTS))
        stats = llm.engine.layer_stats()
        assert sum(s.misses for s in stats) > sum(s.hits for s in stats)  # one slot, and layers take turns


@pytest.mark.parametrize("form", ["original", "packed"])
@pytest.mark.parametrize("slots", BUDGETS)
@pytest.mark.heavy
def test_full_product(case, slots, form):
    for max_tokens in (512, 5):
        with LLM(case.folder(form), config(BUDGETS[slots], max_tokens=max_tokens)) as llm:
            assert_exact(case, engine_says(llm, PROMPTS))


@pytest.mark.parametrize("family", sorted(SERVED_WHOLE))
def test_family_whose_experts_cannot_be_reached_is_served_whole_and_says_so(family, tmp_path):
    case = Case(family, tmp_path)
    with LLM(case.original, config("1 expert")) as llm:
        assert llm.engine.experts is None
        assert any("cannot be served from slots" in note and "6 experts" in note for note in llm.engine.notes)
        assert any("one at a time" in note and "encoder-decoder" in note for note in llm.engine.notes)
        assert_exact(case, engine_says(llm, PROMPTS))
