"""What offline scripts for vLLM pass: taken, ignored with a note, or refused with a sentence, as the docs say."""

import pytest

from moe import porting
from moe.config import EngineConfig
from moe.engine.sampling import Sampler
from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.moe_cases import ROOT, TINYMOE, config, greedy
from tests.moe.test_sampling import V, random_logits

DOCS = (ROOT / "docs" / "porting.md").read_text()
PROMPT = "Once upon a time, there was"


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("1.0", max_tokens=64)) as llm:
        yield llm


def test_the_docs_have_every_argument():
    for name in (*porting.SETTINGS, *porting.IGNORED, *porting.REFUSED, *porting.CALL_OPTIONS):
        assert f"| `{name}` |" in DOCS, name
    for name in SamplingParams.__dataclass_fields__:
        assert f"`{name}`" in DOCS or name in ("bad_words_ids", "end_token_ids"), name


def test_arguments_of_a_model():
    options = {
        "dtype": "half",
        "max_model_len": 77,
        "max_num_seqs": 3,
        "enforce_eager": True,
        "tensor_parallel_size": 1,
    }
    made, notes = porting.with_options(EngineConfig(), options | {"quantization": None, "max_num_batched_tokens": None})
    assert (made.dtype, made.max_context, made.batch.max_sequences) == ("float16", 77, 3)
    assert notes == ["enforce_eager is ignored: there are no graphs to leave out"]
    with pytest.raises(ValueError, match="tensor_parallel_size=4 is not offered: attention is not split"):
        porting.with_options(EngineConfig(), {"tensor_parallel_size": 4})
    with pytest.raises(TypeError, match="no argument 'tensor_paralel_size'"):
        porting.with_options(EngineConfig(), {"tensor_paralel_size": 4})


def test_forms_of_a_call(llm):
    params = SamplingParams(max_tokens=5, temperature=None, top_k=-1, stop=None, logit_bias=None)
    ids = llm.encode(PROMPT)
    outputs = llm.generate(
        [{"prompt": PROMPT}, {"prompt_token_ids": ids}], sampling_params=params, use_tqdm=False, lora_request=None
    )
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert (outputs[0].prompt, outputs[1].prompt) == (PROMPT, None)
    for output in outputs:
        assert output.finished
        assert output.request_id.isdecimal()
        assert output.metrics.arrival <= output.metrics.first_token <= output.metrics.finished
        assert output.outputs[0].index == 0
    with pytest.raises(ValueError, match="only prompt and prompt_token_ids are served"):
        llm.generate({"prompt": PROMPT, "multi_modal_data": {}})
    with pytest.raises(ValueError, match="lora_request=5 is not offered"):
        llm.generate(PROMPT, lora_request=5)
    with pytest.raises(ValueError, match="prompt_logprobs is not offered"):
        llm.generate(PROMPT, SamplingParams(prompt_logprobs=1))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    several = llm.chat([[{"role": "user", "content": c}] for c in (PROMPT, "A")], params, chat_template=template)
    assert several[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert len(several) == 2


def test_a_bar_if_it_is_asked_for(llm, capfd):
    llm.generate([PROMPT] * 2, greedy(2), use_tqdm=True)
    assert "2/2" in capfd.readouterr().err
    llm.generate([PROMPT] * 2, greedy(2))
    assert capfd.readouterr().err == ""


def test_ends(llm):
    free = llm.generate(PROMPT, greedy(30))[0].outputs[0]
    stop = free.text[10:14]
    kept = llm.generate(PROMPT, SamplingParams(max_tokens=30, stop=stop, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == free.text[: free.text.index(stop) + len(stop)]
    assert kept.stop_reason == stop
    late = llm.generate(PROMPT, SamplingParams(max_tokens=30, stop=stop, min_tokens=20))[0].outputs[0]
    assert len(late.token_ids) >= 20
    token = free.token_ids[4]
    ended = llm.generate(PROMPT, SamplingParams(max_tokens=30, stop_token_ids=[token], min_tokens=8))[0].outputs[0]
    assert len(ended.token_ids) > 8
    assert token not in ended.token_ids[:8]
    assert llm.generate(PROMPT, SamplingParams(max_tokens=3, detokenize=False))[0].outputs[0].text == ""
    unbounded = llm.generate([3] * 1000, SamplingParams(max_tokens=None))[0].outputs[0]
    assert len(unbounded.token_ids) == 24 or unbounded.finish_reason == "stop"


def test_biases_and_bans(llm):
    first = llm.generate(PROMPT, greedy(1))[0].outputs[0].token_ids[0]

    def second(**params):
        return llm.generate(PROMPT, SamplingParams(max_tokens=1, **params))[0].outputs[0].token_ids[0]

    assert second(logit_bias={first: -100}) != first
    assert second(logit_bias={7: 100}) == 7
    assert second(allowed_token_ids=[5, 9]) in (5, 9)
    word = llm.tokenizer.decode([first])
    assert second(bad_words=[word.strip()]) != first
    with pytest.raises(ValueError, match="logit_bias names token 9999"):
        second(logit_bias={9999: 1})


def test_penalties_count_what_they_should():
    logits = random_logits(4)
    best = int(logits.argmax())

    def choice(tokens, num_prompt, **params):
        return Sampler(SamplingParams(**params), num_prompt).sample(logits, tokens)

    assert choice([best] * 5, 5, presence_penalty=2, frequency_penalty=2) == best  # of the prompt: not counted
    assert choice([0] + [best] * 9, 1, frequency_penalty=2) != best
    scores = logits.clone()
    said = [3, 3, 5]
    for token in set(said):
        scores[token] -= 1.5 + 0.5 * said.count(token)
    assert choice([1, *said], 1, presence_penalty=1.5, frequency_penalty=0.5) == int(scores.argmax())
    with pytest.raises(ValueError, match="leave no token to choose"):
        Sampler(SamplingParams(bad_words_ids=[[t] for t in range(V)])).sample(logits, [0])
    with pytest.raises(ValueError, match="leave no token to choose"):
        Sampler(SamplingParams(temperature=1.0, allowed_token_ids=[1], bad_words_ids=[[1]])).sample(logits, [0])
