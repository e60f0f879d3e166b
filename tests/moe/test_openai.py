"""OpenAI's forms: real bodies are read, what is not supported is named, results are what the client's types take."""

import json
import math
import random
import shutil

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from moe.answers import chat_logprobs, chunk_body, chunk_choice
from moe.batch import run_batch
from moe.llm import LLM
from moe.openai import CHAT, COMPLETIONS, BadRequest, parse_request
from moe.params import Logprob
from tests.moe.moe_cases import ROOT, TINYMOE, config

TEMPLATE = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
)
BODIES = [json.loads(line) for line in (ROOT / "tests" / "moe" / "batch_bodies.jsonl").read_text().splitlines()]
REFUSED = {"tools": "tools"}


def chat_folder(parent, template=TEMPLATE):
    """The demo model with a chat template."""
    folder = shutil.copytree(TINYMOE, parent / "model")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = chat_folder(tmp_path_factory.mktemp("chat"))
    with LLM(folder, config("1.0", max_tokens=64, max_context=96)) as llm:
        yield llm


@pytest.fixture(scope="module")
def results(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in BODIES))
    run_batch(llm, folder / "in.jsonl", folder / "out.jsonl")
    return {r["custom_id"]: r for r in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}


def test_real_bodies_are_served_or_refused_by_the_name_of_a_field(results):
    for line in BODIES:
        result = results[line["custom_id"]]
        if (field := REFUSED.get(line["custom_id"])) is not None:
            assert f"{field} (" in result["error"]["message"]
            assert "not supported" in result["error"]["message"]
        else:
            assert result["error"] is None, result


def test_every_body_is_what_the_official_client_reads(results):
    kinds = set()
    for result in results.values():
        if result["error"] is None:
            body = result["response"]["body"]
            kind = ChatCompletion if body["object"] == "chat.completion" else Completion
            kinds.add(kind)
            kind.model_validate(body)
            assert body["model"] == "any"
    assert kinds == {ChatCompletion, Completion}
    chat = ChatCompletion.model_validate(results["chat-logprobs"]["response"]["body"]).choices[0].logprobs.content
    assert [len(one.top_logprobs) for one in chat] == [2] * 4
    assert (
        "".join(one.token for one in chat)
        == results["chat-logprobs"]["response"]["body"]["choices"][0]["message"]["content"]
    )


def test_a_chat_runs_to_the_context_a_completion_as_far_as_the_format_says(llm, results):
    usage = results["chat-no-max_tokens"]["response"]["body"]["usage"]
    assert usage["total_tokens"] == 96 or usage["completion_tokens"] < 80
    assert usage["completion_tokens"] > 16
    assert results["completion-no-max_tokens"]["response"]["body"]["usage"]["completion_tokens"] == 16


def test_requests_without_a_seed_differ(results):
    texts = {results[f"no-seed-{i}"]["response"]["body"]["choices"][0]["text"] for i in range(10)}
    assert len(texts) >= 6


def test_what_the_model_recommends_is_used_where_the_request_is_silent():
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    params = parse_request(COMPLETIONS, {"prompt": "a", "top_p": 0.5}, recommended).params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 20)
    assert parse_request(COMPLETIONS, {"prompt": "a"}).params.temperature == 1.0
    assert parse_request(CHAT, {"messages": [{"role": "user", "content": "a"}]}).params.max_tokens is None


def test_chunks_are_what_the_official_client_reads():
    ask = parse_request(
        CHAT, {"messages": [{"role": "user", "content": "a"}], "stream": True, "logprobs": True, "top_logprobs": 1}
    )
    step = {5: Logprob(-math.inf, 9, "é"), 6: Logprob(-0.5, 1, "b")}
    choice = chunk_choice(ask, 0, "é", None, [step], first=True)
    body = chunk_body(ask, [choice], request_id="1", created=1, model="m")
    chunk = ChatCompletionChunk.model_validate(json.loads(json.dumps(body, allow_nan=False)))
    assert chunk.choices[0].delta.content == "é"
    assert chunk.choices[0].logprobs.content[0].logprob == -9999.0
    assert [one["token"] for one in chat_logprobs([step], 1)["content"][0]["top_logprobs"]] == ["b"]
    ask = parse_request(COMPLETIONS, {"prompt": "a", "stream": True})
    body = chunk_body(ask, [chunk_choice(ask, 0, "b", "stop", None, first=True)], request_id="1", created=1, model="m")
    Completion.model_validate(body)


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    10**400,
    1.5,
    math.nan,
    math.inf,
    "",
    "text",
    "\ud800",
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
]
FIELDS = [
    *{field for line in BODIES for field in line["body"]},
    "top_k",
    "min_p",
    "bad_words",
    "stop_token_ids",
    "x",
    "logit_bias",
]


def fuzzed(number):
    """A line of a batch file with some of its parts replaced by anything."""
    rng = random.Random(number)
    line = json.loads(json.dumps(rng.choice(BODIES)))
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.25:
            line[rng.choice(["custom_id", "method", "url", "body"])] = rng.choice(VALUES)
        elif isinstance(line["body"], dict):
            line["body"][rng.choice(FIELDS)] = rng.choice(VALUES)
    return line | {"custom_id": f"f{number}"} if rng.random() < 0.9 else line


@pytest.mark.parametrize(
    "numbers", [range(60), pytest.param(range(60, 500), marks=pytest.mark.heavy)], ids=["sample", "all"]
)
def test_fuzzed_lines_get_an_answer_or_a_sentence(llm, tmp_path, numbers):
    text = "".join(json.dumps(fuzzed(n)) + "\n" for n in numbers)
    for number in list(numbers)[::7]:  # and some that are cut
        text += json.dumps(fuzzed(number))[: random.Random(number).randint(0, 200)] + "\n"
    (tmp_path / "in.jsonl").write_text(text)
    progress = run_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    entries = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    assert len({e["id"] for e in entries}) == len(entries) == progress.total
    for entry in entries:
        assert (entry["error"] is None) != (entry["response"] is None)
        if entry["error"] is not None:
            assert entry["error"]["code"] == "invalid_request", entry
            assert "Traceback" not in entry["error"]["message"]
    assert 0 < progress.failed < progress.total


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_bodies_that_are_none(body):
    with pytest.raises(BadRequest, match="body must be a JSON object"):
        parse_request(CHAT, body)
