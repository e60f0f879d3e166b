"""What a sequence says does not depend on what it is batched with, how it is cut, where its experts are, or who won.

All against transformers' own greedy tokens, in fp32.
"""

import dataclasses
import json

import pytest

from moe.config import OffloadConfig
from moe.engine.requests import Request
from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.moe_cases import (
    FP32_BOUND,
    NUM_NEW,
    ROOT,
    TINYMOE,
    Case,
    Said,
    check_whole,
    config,
    demo_reference,
    engine_says,
    greedy,
    random_prompts,
    reference_says,
    relative_error,
)

# Of prompts: one token; a token less than a block, a block, a token more. Two more prompts begin like the fifth.
LENGTHS = (1, 15, 16, 17, 63, 64, 90)


def prompts_for(vocab_size):
    prompts = random_prompts(LENGTHS, vocab_size)
    return [*prompts, prompts[4][:40] + prompts[0] * 5, prompts[4]]


VARIANTS = {
    "one token at a time, one sequence": config("1.0", max_tokens=1, max_sequences=1),
    "everything at once": config("0.5", max_tokens=512, max_sequences=16),
    "odd chunks, small blocks, one slot": config("1 expert", max_tokens=7, max_sequences=3, block_size=5),
    "reference kernel": config("3", kernel="reference", max_tokens=64, max_sequences=5),
    "nothing shared": config("0.5", max_tokens=33, max_sequences=9, prefix_sharing=False),
    "hardly any cache": config("0.25", max_tokens=24, max_sequences=8, kv_tokens=112, block_size=8),
    "not packed": config("0.25", max_tokens=24, packed=False),
}
NEEDED = ("odd chunks, small blocks, one slot", "hardly any cache")  # by default for the families


class Model:
    def __init__(self, folder, reference):
        self.folder, self.vocab_size = folder, reference.config.vocab_size
        self.prompts = prompts_for(self.vocab_size)
        self.said = reference_says(reference, self.prompts, NUM_NEW)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name) -> Model:
        if name not in made:
            if name == "tinymoe":
                made[name] = Model(TINYMOE, demo_reference())
            else:
                case = Case(name, tmp_path_factory.mktemp(name))
                made[name] = Model(case.original, case.reference())
        return made[name]

    return get


PRODUCT = [
    pytest.param(name, variant, marks=() if name == "tinymoe" or variant in NEEDED else pytest.mark.heavy)
    for name in ("tinymoe", "qwen3_moe", "gpt_oss")
    for variant in VARIANTS
]


@pytest.mark.parametrize(("name", "variant"), PRODUCT)
def test_no_token_changes(models, name, variant):
    model = models(name)
    slow = variant == "one token at a time, one sequence"
    chosen = [n for n, p in enumerate(model.prompts) if len(p) < 30 or not slow]
    expected = Said([model.said.tokens[n] for n in chosen], [model.said.logits[n] for n in chosen])
    with LLM(model.folder, VARIANTS[variant]) as llm:
        said = engine_says(llm, [model.prompts[n] for n in chosen], greedy(NUM_NEW))
        assert said.tokens == expected.tokens
        assert relative_error(said, expected) <= FP32_BOUND
        stats = llm.engine.stats
        sharing = not slow and variant not in ("nothing shared", "not packed")
        assert (stats.preemptions > 0) == (variant == "hardly any cache")
        if variant != "hardly any cache" and sharing:
            assert (
                engine_says(llm, model.prompts, greedy(NUM_NEW)).tokens == expected.tokens
            )  # all prefixes are known now
            assert stats.shared_tokens >= 16 * 10
        if variant == "nothing shared":
            assert stats.shared_tokens == 0


def test_order_and_company_do_not_matter(models):
    model = models("tinymoe")
    with LLM(TINYMOE, config("0.5", max_tokens=48, max_sequences=6)) as llm:
        for order in ([3, 7, 0], [6], [8, 5, 4, 3, 2, 1]):
            said = engine_says(llm, [model.prompts[n] for n in order], greedy(NUM_NEW))
            assert said.tokens == [model.said.tokens[n] for n in order]


def test_requests_that_come_while_others_run(models):
    model = models("tinymoe")
    with LLM(TINYMOE, config("0.25", max_tokens=20, max_sequences=4)) as llm:
        running: list[Request] = []
        for n, prompt in enumerate(model.prompts):
            running.append(llm.engine.add_request(prompt, greedy(NUM_NEW)))
            for _ in range(n % 3):
                llm.engine.step()
        aborted = llm.engine.add_request(model.prompts[3], greedy(NUM_NEW))
        llm.engine.step()
        llm.engine.finish(aborted, "abort")
        while llm.engine.has_work:
            llm.engine.step()
        assert [s.tokens[s.num_prompt :] for s in running] == model.said.tokens
        assert aborted.finish_reason == "abort"
        check_whole(llm)


def test_seeds_make_samples_independent_of_their_batch(models):
    model = models("tinymoe")
    params = [
        SamplingParams(max_tokens=NUM_NEW, temperature=0.9, top_p=0.95, top_k=50, seed=n, ignore_eos=True)
        for n in range(len(model.prompts))
    ]
    prompts = model.prompts[:5]
    with LLM(TINYMOE, config("0.5", max_tokens=40, max_sequences=9)) as llm:
        together = [o.outputs[0].token_ids for o in llm.generate(prompts, params[:5])]
        alone = [llm.generate([p], one)[0].outputs[0].token_ids for p, one in zip(prompts, params)]
        assert together == alone
        again = dataclasses.replace(params[0], seed=77)
        assert llm.generate(model.prompts[:1], again)[0].outputs[0].token_ids != alone[0]
        three = llm.generate(model.prompts[2], dataclasses.replace(params[2], n=3))[0].outputs
        assert three[0].token_ids == alone[2]
        assert len({tuple(c.token_ids) for c in three}) == 3


@pytest.mark.parametrize(
    "offload",
    [
        OffloadConfig(budget="5", store="mmap", policy="lru"),
        OffloadConfig(budget="5", store="ram", readers=0),
        OffloadConfig(budget="5", direct=True, readers=3),
    ],
    ids=lambda o: o.store,
)
def test_stores_and_policies_do_not_matter(models, offload):
    model = models("tinymoe")
    with LLM(TINYMOE, dataclasses.replace(config(), offload=offload)) as llm:
        assert engine_says(llm, model.prompts[:4], greedy(NUM_NEW)).tokens == model.said.tokens[:4]


def domain_prompts(tokenizer, domains, per_domain=None):
    lines = [json.loads(line) for line in (ROOT / "examples" / "prompts.jsonl").read_text().splitlines()]
    chosen = []
    for domain in domains:
        own = [tokenizer(line["prompt"])["input_ids"] for line in lines if line["domain"] == domain]
        chosen += own[:per_domain]
    return chosen


@pytest.mark.parametrize(
    ("per_domain", "num_new"), [pytest.param(3, 12), pytest.param(None, 32, marks=pytest.mark.heavy)]
)
def test_demo_model_on_real_prompts(per_domain, num_new):
    """The heavy one: 224 prompts of four domains."""
    with LLM(TINYMOE, config("0.25", max_tokens=128, max_sequences=16)) as llm:
        domains = ("stories", "mathematics", "shakespeare", "code")
        prompts = domain_prompts(llm.tokenizer, domains[: None if per_domain is None else 3], per_domain)
        assert len(prompts) == (224 if per_domain is None else 3 * per_domain)
        said = engine_says(llm, prompts, greedy(num_new))
        stats = llm.engine.layer_stats()
        assert min(s.misses for s in stats) > 0
    reference = reference_says(demo_reference(), prompts, num_new)
    assert said.tokens == reference.tokens
    assert relative_error(said, reference) <= FP32_BOUND
