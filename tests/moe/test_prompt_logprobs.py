"""Log-probabilities of prompts equal those of transformers' own full forward, however the prompt is computed."""

import json

import pytest
import torch

from moe.batch import run_batch
from moe.cluster.ledger import Ledger
from moe.cluster.messages import Said
from moe.comm.membership import process_groups
from moe.engine.requests import Request
from moe.engine.sampling import Logprobs
from moe.llm import LLM
from moe.openai import BadRequest, parse_request
from moe.params import SamplingParams
from tests.distributed import spawn
from tests.families import reference_model, tiny_checkpoint
from tests.moe.moe_cases import PROMPTS, TINYMOE, check_whole, config
from tests.moe.test_parallel import config_of

NUM_TOP = 3
ASK = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=NUM_TOP)
BOUND = 2e-5  # sums of another order in fp32, three layers deep, and a log-softmax


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@torch.no_grad()
def expected_of(family, folder, prompt):
    """Of every prompt token but the first: its log-probability and rank, and the likeliest [N, top]."""
    scores = reference_model(family, folder)(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(prompt[1:])[:, None])
    return chosen[:, 0], 1 + (scores > chosen).sum(1), scores.topk(NUM_TOP)


def check(folder, prompt, told, family="qwen3_moe"):
    assert told[0] is None
    assert len(told) == len(prompt)
    chosen, ranks, top = expected_of(family, folder, prompt) if len(prompt) > 1 else ((), (), None)
    for place, (token, entry) in enumerate(zip(prompt[1:], told[1:])):
        assert next(iter(entry)) == token
        assert abs(entry[token].logprob - float(chosen[place])) < BOUND
        assert entry[token].rank == int(ranks[place])
        assert set(entry) == {token, *top.indices[place].tolist()}
        for rank, (one, value) in enumerate(zip(top.indices[place].tolist(), top.values[place].tolist()), 1):
            assert abs(entry[one].logprob - value) < BOUND
            assert entry[one].rank == rank


SETTINGS = {
    "whole": config("1.0", max_tokens=128),
    "in chunks, one slot": config("1 expert", max_tokens=7, max_sequences=3, block_size=4),
    "a token at a time": config("1.0", max_tokens=1, max_sequences=1),
    "out of blocks": config("1.0", max_tokens=16, block_size=4, kv_tokens=44),
    "one after another": config("1.0", packed=False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_as_a_full_forward(folders, name):
    folder = folders("qwen3_moe")
    with LLM(folder, SETTINGS[name]) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=1))  # whose prefixes could be shared
        plain = llm.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True))
        outputs = llm.generate(PROMPTS, ASK)
        for prompt, output, before in zip(PROMPTS, outputs, plain):
            check(folder, prompt, output.prompt_logprobs)
            assert output.outputs[0].token_ids == before.outputs[0].token_ids
            assert before.prompt_logprobs is None
        assert name != "out of blocks" or llm.engine.stats.preemptions
        check_whole(llm)


@pytest.mark.parametrize("family", ["deepseek_v3", "jamba", "gpt_oss"])  # by modules, sequential, with sinks
def test_of_other_families(folders, family):
    with LLM(folders(family), config("0.5", max_tokens=16)) as llm:
        for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, ASK)):
            check(folders(family), prompt, output.prompt_logprobs, family)


def test_each_asks_for_itself_and_samples_share(folders):
    folder = folders("qwen3_moe")
    with LLM(folder, config("1.0", max_tokens=9)) as llm:
        none, only_own, three = llm.generate(
            [PROMPTS[2]] * 3,
            [
                SamplingParams(max_tokens=2),
                SamplingParams(max_tokens=2, prompt_logprobs=0),
                SamplingParams(max_tokens=2, prompt_logprobs=NUM_TOP, n=3, temperature=1.0, seed=1),
            ],
        )
        assert none.prompt_logprobs is None
        assert [len(entry) for entry in only_own.prompt_logprobs[1:]] == [1] * (len(PROMPTS[2]) - 1)
        check(folder, PROMPTS[2], three.prompt_logprobs)
        assert len(three.outputs) == 3
        (everything,) = llm.generate([[3, 4]], SamplingParams(max_tokens=1, prompt_logprobs=10**6))
        assert len(everything.prompt_logprobs[1]) == llm.engine.limits.vocabulary


def test_an_encoder_tells_nothing_of_its_prompt(folders):
    with LLM(folders("switch_transformers"), config("1.0")) as llm:
        with pytest.raises(ValueError, match="prompt_logprobs: this model's encoder reads the prompt"):
            llm.generate([[1, 2, 3]], ASK)


def test_not_finite_is_an_error_of_the_request(folders):
    with LLM(folders("qwen3_moe"), config("1.0")) as llm:
        runner = llm.engine.place.mode.runner
        whole = runner._by_plan if runner.plan is not None else runner._by_modules

        def spoiled(chunks):
            logits = whole(chunks)
            logits[0] = torch.nan
            return logits

        runner._by_plan = runner._by_modules = spoiled
        (output,) = llm.generate([PROMPTS[0]], ASK)
        assert output.outputs[0].finish_reason == "error"
        assert "of the prompt are not finite" in output.outputs[0].error


def of_ranks(folder, dispatcher) -> list:
    with process_groups() as groups:
        with LLM(folder, config_of("0.5", None, dispatcher), groups=groups) as llm:
            return [output.prompt_logprobs for output in llm.generate(PROMPTS[groups.rank :: 2], ASK)]


@pytest.mark.parametrize("dispatcher", ["all_to_all", "coherent"])
def test_over_ranks(folders, dispatcher):
    folder = folders("qwen3_moe")
    for rank, told in enumerate(spawn(2, of_ranks, folder, dispatcher)):
        for prompt, one in zip(PROMPTS[rank::2], told):
            check(folder, prompt, one)


def test_a_clusters_host_says_them_with_the_first_token():
    ledger = Ledger()
    request = Request(0, [1, 2], ASK, 2)
    ledger.add(request)
    ledger.deal([5], 1)
    told = Logprobs(-1.0, {2: -1.0}, 1)
    ledger.hear(5, [Said(0, (7,), None, (), None, (told,)), Said(0, (8,), "length")])
    while ledger.has_news:
        ledger.hand_out()
    assert (request.tokens, request.prompt_logprobs) == ([1, 2, 7, 8], [told])


def test_in_bodies(tmp_path):
    lines = [
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 2, "n": 2, "prompt_logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0}),
    ]
    with (tmp_path / "in.jsonl").open("w") as file:
        for number, (url, body) in enumerate(lines):
            file.write(json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": body}) + "\n")
    with LLM(TINYMOE, config("1.0", max_tokens=64)) as llm:
        llm.tokenizer.chat_template = "{{ messages[0].content }}"
        run_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        (direct,) = llm.generate("Once upon a time", SamplingParams(max_tokens=2, prompt_logprobs=1))
    bodies = {
        line["custom_id"]: line["response"]["body"]
        for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    }
    for choice in bodies["0"]["choices"]:
        assert choice["prompt_logprobs"][0] is None
        for said, entry in zip(choice["prompt_logprobs"][1:], direct.prompt_logprobs[1:]):
            names = ("logprob", "rank", "decoded_token")  # as vLLM has them
            assert said == {str(t): {name: getattr(one, name) for name in names} for t, one in entry.items()}
    assert bodies["1"]["prompt_logprobs"][0] is None
    with pytest.raises(BadRequest, match="prompt_logprobs cannot be streamed"):
        parse_request("/v1/completions", {"prompt": "a", "stream": True, "prompt_logprobs": 1})
