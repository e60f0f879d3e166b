"""The public face: forms of prompts, ends of answers, streaming, and what is refused."""

import dataclasses
import logging
import time

import numpy as np
import pytest
import torch

import moe
from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.moe_cases import TINYMOE, Case, check_whole, config, demo_reference, random_prompts, reference_says

PROMPT = "Once upon a time, there was"


@pytest.fixture(scope="module")
def llm():
    with moe.LLM(TINYMOE, config("1.0", max_tokens=64, max_sequences=4), experts_in_memory=0.5) as llm:
        assert llm.engine.experts.cache.num_slots == 48
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    yield
    assert not llm.engine.has_work
    check_whole(llm)


def one(llm, prompt=PROMPT, **params):
    return llm.generate(prompt, SamplingParams(**params))[0].outputs[0]


def test_forms_of_prompts(llm):
    ids = llm.encode(PROMPT)
    by_text, by_ids, both = llm.generate(PROMPT), llm.generate(ids), llm.generate([PROMPT, ids, (1, 2)])
    assert len(by_text) == len(by_ids) == 1
    assert by_text[0].prompt == PROMPT
    assert by_ids[0].prompt is None
    assert by_text[0].prompt_token_ids == by_ids[0].prompt_token_ids == ids
    assert by_text[0].outputs == by_ids[0].outputs == both[0].outputs == both[1].outputs
    assert both[2].prompt_token_ids == [1, 2]
    assert llm.generate([]) == []
    assert llm.generate("", SamplingParams(max_tokens=2))[0].prompt_token_ids == [0]  # the tokenizer's first token
    answer = by_text[0].outputs[0]
    assert len(answer.token_ids) == 64
    assert answer.text == llm.tokenizer.decode(answer.token_ids)


def test_no_answer_ends_before_it_began_when_the_clock_is_set_back(llm, monkeypatch):
    real, calls = time.time, []
    monkeypatch.setattr(time, "time", lambda: calls.append(1) or real() - 3600 * len(calls))  # further at each look
    times = llm.generate(PROMPT, SamplingParams(max_tokens=3))[0].metrics
    assert times.arrival <= times.first_token <= times.finished < times.arrival + 60


def test_params_for_all_or_for_each(llm):
    short, long = SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)
    assert [len(o.outputs[0].token_ids) for o in llm.generate([PROMPT] * 2, [short, long])] == [1, 3]
    with pytest.raises(ValueError, match="1 sampling parameters for 2 prompts"):
        llm.generate([PROMPT] * 2, [short])


def test_ends_of_an_answer(llm):
    free = one(llm, max_tokens=40)
    assert free.finish_reason == "length"
    fourth = free.token_ids[3]
    first = free.token_ids.index(fourth)
    by_token = one(llm, max_tokens=40, stop_token_ids=[fourth])
    assert by_token.finish_reason == "stop"
    assert by_token.token_ids == free.token_ids[: first + 1]
    assert by_token.text == llm.tokenizer.decode(free.token_ids[:first])
    stop = free.text[30:35]
    by_text = one(llm, max_tokens=40, stop=stop)
    assert by_text.finish_reason == "stop"
    assert by_text.text == free.text[: free.text.index(stop)]
    assert by_text.token_ids == free.token_ids[: len(by_text.token_ids)]
    assert len(by_text.token_ids) < 40
    last = free.text[-3:]
    assert one(llm, max_tokens=40, stop="nowhere", seed=4).text == free.text
    if free.text.index(last) == len(free.text) - 3:  # the last token completes the stop string
        assert one(llm, max_tokens=40, stop=last).finish_reason == "stop"


def test_the_models_own_end(llm, monkeypatch):
    free = one(llm, max_tokens=10)
    monkeypatch.setattr(llm.engine, "eos_ids", {free.token_ids[5]})
    at = free.token_ids.index(free.token_ids[5])
    ended = one(llm, max_tokens=10)
    assert (ended.finish_reason, ended.token_ids) == ("stop", free.token_ids[: at + 1])
    assert one(llm, max_tokens=10, ignore_eos=True).token_ids == free.token_ids


def test_logprobs_are_those_of_transformers(llm):
    ids = llm.encode(PROMPT)
    said = reference_says(demo_reference(), [ids], 6)
    answer = one(llm, max_tokens=6, logprobs=3)
    assert answer.token_ids == said.tokens[0]
    exact = said.logits[0].double().log_softmax(-1)
    for step, (token, logprobs) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert next(iter(logprobs)) == token
        assert logprobs[token].logprob == pytest.approx(float(exact[step, token]), abs=1e-4)
        best = exact[step].topk(3)
        assert list(logprobs) == best.indices.tolist()  # greedy: the chosen one is the first of them
        assert [one.logprob for one in logprobs.values()] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [one.rank for one in logprobs.values()] == [1, 2, 3]
        assert [one.decoded_token for one in logprobs.values()] == [llm.tokenizer.decode([t]) for t in logprobs]
    assert answer.cumulative_logprob == pytest.approx(
        sum(step[t].logprob for t, step in zip(answer.token_ids, answer.logprobs))
    )
    assert one(llm, max_tokens=2).logprobs is None


def test_stream(llm):
    whole = one(llm, max_tokens=30, temperature=0.8, seed=2)
    pieces = list(llm.stream(PROMPT, SamplingParams(max_tokens=30, temperature=0.8, seed=2)))
    assert len(pieces) > 10
    assert "".join(pieces) == whole.text
    stop = whole.text[20:24]
    pieces = list(llm.stream(PROMPT, SamplingParams(max_tokens=30, temperature=0.8, seed=2, stop=stop)))
    assert "".join(pieces) == whole.text[: whole.text.index(stop)]


def test_a_stream_that_is_left_and_others_meanwhile(llm):
    expected = one(llm, max_tokens=8).text
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=8))
    first = next(stream)
    assert one(llm, "ROMEO:", max_tokens=3).token_ids  # moves the stream's answer on, too
    assert first + "".join(stream) == expected
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=200))
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work


def test_context_ends_an_answer(tmp_path):
    case = Case("qwen3_moe", tmp_path)
    (prompt,) = random_prompts((28,))
    with LLM(case.original, config("1 expert", max_context=32)) as llm:
        said = llm.generate(prompt, SamplingParams(max_tokens=50, ignore_eos=True))[0].outputs[0]
        assert (len(said.token_ids), said.finish_reason) == (4, "length")
        assert said.token_ids == reference_says(case.reference(), [prompt], 4).tokens[0]
        assert len(llm.generate(prompt + [1, 2, 3], SamplingParams(max_tokens=50))[0].outputs[0].token_ids) == 1
        with pytest.raises(ValueError, match="32 tokens, the context holds 32 with at least one"):
            llm.generate(prompt + [1, 2, 3, 4])
        check_whole(llm)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "has no tokens"),
        ([5000], "token 5000 is outside the vocabulary of 2048"),
        ([-1], "token -1 is outside"),
        ([3] * 1024, "1024 tokens, the context holds 1024"),
        (["text", 5], "either texts or lists of token ids"),
        ("half \ud83d a pair", "not valid text"),
        ([[1.5]], "token ids .* must be a whole number"),
        ([[True]], "token ids .* must be a whole number"),
        ([["a"]], "token ids .* must be a whole number"),
    ],
)
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt)
    with pytest.raises(ValueError, match=message):  # and what came before it in the same call is dropped
        llm.generate([PROMPT, *(prompt if isinstance(prompt[0], list | str) and prompt[0] != "h" else [prompt])])


@pytest.mark.parametrize("prompts", [None, 5, b"text", [None], [b"text"], ["text", 1.5]])
def test_what_is_no_prompt(llm, prompts):
    with pytest.raises(ValueError, match=r"prompts? must be .* is a (NoneType|int|bytes|float)"):
        llm.generate(prompts)


def test_prompts_that_can_be_gone_through_only_once(llm):
    params = SamplingParams(max_tokens=2)
    once, twice = llm.generate((p for p in (PROMPT, PROMPT)), params), llm.generate([PROMPT, PROMPT], params)
    assert [one.outputs[0].token_ids for one in once] == [one.outputs[0].token_ids for one in twice]
    (of_numpy,), (of_ids,) = llm.generate(np.array([3, 4, 5]), params), llm.generate([3, 4, 5], params)
    assert of_numpy.outputs[0].token_ids == of_ids.outputs[0].token_ids


def test_a_prompt_beyond_the_context_is_refused_in_our_words_alone(llm):
    class Said(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said, handler, theirs = [], Said(), logging.getLogger("transformers")
    theirs.addHandler(handler)
    try:
        with pytest.raises(ValueError, match="tokens, the context holds 1024"):
            llm.generate(["word " * 3000])
        with pytest.raises(ValueError, match="tokens, the context holds 1024"):
            llm.chat([{"role": "user", "content": "word " * 3000}], chat_template="{{ messages[0].content }}")
    finally:
        theirs.removeHandler(handler)
    assert said == []


def test_chat(llm, tmp_path):
    with pytest.raises(ValueError, match="has no chat template; give a written prompt"):
        llm.chat([{"role": "user", "content": "Hello"}])
    with LLM(Case("mixtral", tmp_path).original, config("1 expert")) as bare:
        for call in (lambda: bare.generate("text"), lambda: bare.chat([{"role": "user", "content": "Hello"}])):
            with pytest.raises(ValueError, match=r"has no tokenizer; give token ids|has no chat template"):
                call()
        with pytest.raises(ValueError, match="stop strings need a tokenizer; use stop_token_ids"):
            bare.generate([1, 2], SamplingParams(stop="x"))
        assert bare.generate([1, 2], SamplingParams(max_tokens=2))[0].outputs[0].text == ""


def test_nothing_grows_with_aborted_requests(llm):
    before = len(llm.engine._started)
    for _ in range(3):
        stream = llm.stream(PROMPT)
        llm.abort(list(llm._open.values()))
        stream.close()
        request = llm.add(llm.encode(PROMPT), SamplingParams())
        llm.abort([request])
        assert request.request.finish_reason == "abort"
    assert len(llm.engine._started) == before
    assert not llm._open


def test_bf16_and_threads_settings_are_used(llm):
    assert llm.engine.model.dtype == torch.float32
    with LLM(TINYMOE, dataclasses.replace(config("0.25"), dtype="auto", threads=1)) as own:
        assert own.engine.model.dtype == torch.bfloat16
        assert torch.get_num_threads() == 1
        assert one(own, max_tokens=5).text
