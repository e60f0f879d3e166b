"""What offline scripts for vLLM pass: taken, ignored with a note, or refused with a sentence, as the docs say."""

import ast
import inspect
import re

import pytest
import torch

from moe import porting
from moe.config import EngineConfig
from moe.engine.sampling import Sampler, choose
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


def rows_of(heading: str) -> list[tuple[list[str], str]]:
    """Of one table of the docs: names, and what is said of them."""
    section = DOCS.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", names), said) for names, said in rows]


VALUES = {"dtype": "bfloat16", "enable_prefix_caching": False, "trust_remote_code": True, "max_num_seqs": 5}


def setting(config: EngineConfig, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(("names", "said"), rows_of("`LLM(model, …)`"))
def test_every_row_of_the_models_arguments(names, said):
    (name,) = names
    if said.startswith("sets "):
        value = VALUES.get(name, 48)
        made, notes = porting.with_options(EngineConfig(), {name: value})
        assert setting(made, re.fullmatch("sets `(.*)`", said)[1]) == value
        assert notes == []
    elif said.startswith("ignored: "):
        assert porting.with_options(EngineConfig(), {name: 3})[1] == [f"{name} is {said}"]
    else:
        check_refused(said, lambda value: porting.with_options(EngineConfig(), {name: value}))


def check_refused(said: str, call) -> None:
    values, why = re.fullmatch(r"refused unless (.*?): (.*)", said).groups()
    for neutral in re.findall("`([^`]+)`", values):
        call(ast.literal_eval(neutral))
    with pytest.raises(ValueError, match=f"is not offered: {re.escape(why)}"):
        call("something")


OF_CALLS = {  # what the rows say in words is tested in the functions named
    "prompts": "test_forms_of_a_call",
    "messages": "test_forms_of_a_call",
    "sampling_params": "test_forms_of_a_call",
    "use_tqdm": "test_a_bar_if_it_is_asked_for",
    "chat_template": "test_forms_of_a_call",
}


@pytest.mark.parametrize(("names", "said"), rows_of("`generate` and `chat`"))
def test_every_row_of_a_calls_arguments(llm, names, said):
    if said.startswith("refused"):
        check_refused(said, lambda value: llm.generate([[1, 2]], greedy(1), **{names[0]: value}))
        return
    assert OF_CALLS[names[0]] in globals()
    taken = {*inspect.signature(llm.generate).parameters, *inspect.signature(llm.chat).parameters}
    assert set(names) <= taken


@pytest.mark.parametrize(("names", "said"), rows_of("`SamplingParams`"))
def test_every_row_of_sampling(llm, names, said):
    fields = SamplingParams.__dataclass_fields__
    for name in names:
        if said.startswith("unknown"):
            with pytest.raises(TypeError, match=name):
                SamplingParams(**{name: None})
        elif name in ("structured_outputs", "guided_decoding"):  # what they do: tests/moe/test_structured.py
            assert SamplingParams(**{name: {"choice": ["a"]}}).structured_outputs is not None
        else:
            value = {"temperature": 0.5, "logit_bias": {1: 1}, "stop": ["x"], "bad_words": ["x"], "top_p": 0.5}.get(
                name
            )
            value = value or {"stop_token_ids": [1], "allowed_token_ids": [1, 2], "min_p": 0.5}.get(name, 1)
            assert name in fields
            assert llm.generate([[1, 2]], SamplingParams(**{"max_tokens": 1, name: value}))[0].finished
            assert SamplingParams(**{name: None}) == SamplingParams() or name == "max_tokens"
    for default in re.findall(r"default (\d+)", said):
        assert getattr(SamplingParams(), names[0]) == float(default)


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
    both = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
    for options in (both, dict(reversed(both.items()))):  # one allows the other
        assert porting.with_options(EngineConfig(), options)[0].batch.max_tokens == 1
    assert porting.with_options(EngineConfig(), {"dtype": torch.bfloat16})[0].dtype == "bfloat16"
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
    with pytest.raises(ValueError, match="must be SamplingParams"):
        llm.generate(PROMPT, {"max_tokens": 1})
    with pytest.raises(ValueError, match="lora_request=5 is not offered"):
        llm.generate(PROMPT, lora_request=5)
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
    with pytest.raises(ValueError, match="stop strings need text"):
        SamplingParams(stop=stop, detokenize=False)
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
        return choose(logits[None], [(Sampler(SamplingParams(**params), num_prompt), tokens)])[0].token

    assert choice([best] * 5, 5, presence_penalty=2, frequency_penalty=2) == best  # of the prompt: not counted
    assert choice([0] + [best] * 9, 1, frequency_penalty=2) != best
    scores = logits.clone()
    said = [3, 3, 5]
    for token in set(said):
        scores[token] -= 1.5 + 0.5 * said.count(token)
    assert choice([1, *said], 1, presence_penalty=1.5, frequency_penalty=0.5) == int(scores.argmax())
    for params in (
        SamplingParams(bad_words_ids=[[t] for t in range(V)]),
        SamplingParams(temperature=1.0, allowed_token_ids=[1], bad_words_ids=[[1]]),
    ):
        assert "leave no token to choose" in choose(logits[None], [(Sampler(params), [0])])[0].error
