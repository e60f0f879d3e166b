"""Batch files: nothing finished is lost, nothing is done twice, and a bad line hurts only itself."""

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from moe.batch import BatchProgress, finished_batch, run_batch
from moe.config import EngineConfig
from moe.llm import LLM
from moe.params import SamplingParams
from tests.moe.moe_cases import ROOT, TINYMOE, check_whole, config

PROMPTS = ["Once upon a time", "ROMEO:\nO, she", "def read(self", "Two plus two is", "A", "The cat sat on"]


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("0.5", max_tokens=64, max_sequences=4)) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    yield
    assert not llm.engine.has_work
    check_whole(llm)


def request(custom_id, prompt="Once upon a time", *, url="/v1/completions", **body):
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0} | body,
    }


def write(path, lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path):
    entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for entry in entries:
        if entry["response"] is not None:
            assert entry["response"]["body"].pop("created") > 1.7e9  # the only thing that two runs do not share
    return {entry["id"]: entry for entry in entries} if len({e["id"] for e in entries}) == len(entries) else None


def run(llm, tmp_path, *lines):
    """The results of these lines, by the number of the line."""
    progress = run_batch(llm, write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    results = read(tmp_path / "out.jsonl")
    assert progress.finished == progress.total == len(results)
    assert progress.failed == sum(r["error"] is not None for r in results.values())
    return {int(key.removeprefix("line-")): value for key, value in results.items()}


def text_of(result):
    return result["response"]["body"]["choices"][0]["text"]


def test_answers_are_those_of_generate(llm, tmp_path):
    results = run(llm, tmp_path, *(request(f"r{n}", p, max_tokens=5 + n) for n, p in enumerate(PROMPTS)))
    for n, prompt in enumerate(PROMPTS):
        (answer,) = llm.generate(prompt, SamplingParams(max_tokens=5 + n))[0].outputs
        result = results[n + 1]
        body = result["response"]["body"]
        assert result["custom_id"] == f"r{n}"
        assert result["response"]["status_code"] == 200
        assert body["choices"][0]["text"] == answer.text
        assert body["choices"][0]["finish_reason"] == answer.finish_reason
        assert body["usage"]["completion_tokens"] == len(answer.token_ids)
        assert body["usage"]["prompt_tokens"] == len(llm.encode(prompt))
        assert body["usage"]["total_tokens"] == len(answer.token_ids) + len(llm.encode(prompt))


def test_fields_of_a_request(llm, tmp_path):
    long = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24))[0].outputs[0].text
    stop = long[20:24]
    tokens = llm.encode(PROMPTS[0])
    results = run(
        llm,
        tmp_path,
        request("three", temperature=0.9, n=3, seed=5, top_p=0.9, top_k=40, min_p=0.01, max_tokens=12),
        request("logprobs", logprobs=2),
        request("stop", stop=stop, max_tokens=24),
        request("stops", stop=["nowhere in it", stop], max_completion_tokens=24),
        request("tokens", tokens),
        request("ignored", stream=False, user="me"),
        request("nulls", n=None, seed=None, stop=None, logprobs=None, top_p=None),
    )
    three = results[1]["response"]["body"]["choices"]
    assert [c["index"] for c in three] == [0, 1, 2]
    assert len({c["text"] for c in three}) == 3
    assert results[1]["response"]["body"]["usage"]["completion_tokens"] <= 36
    alone = [
        llm.generate(
            PROMPTS[0],
            SamplingParams(max_tokens=12, temperature=0.9, seed=5 + n, top_p=0.9, top_k=40, min_p=0.01),
        )[0]
        for n in range(3)
    ]
    assert [c["text"] for c in three] == [a.outputs[0].text for a in alone]

    (answer,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4, logprobs=2))[0].outputs
    logprobs = results[2]["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [llm.tokenizer.decode([t]) for t in answer.token_ids]
    chosen = [step[token] for token, step in zip(answer.token_ids, answer.logprobs)]
    assert logprobs["token_logprobs"] == pytest.approx([one.logprob for one in chosen], abs=1e-5)
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 4
    assert logprobs["text_offset"][0] == 0

    for line in (3, 4):
        choice = results[line]["response"]["body"]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (long[: long.index(stop)], "stop")
    assert text_of(results[5]) == text_of(results[6]) == text_of(results[7]) == text_of(results[2])


BAD_LINES = [
    (b'{"custom_id": "a", "body": ', "not valid JSON"),
    (b"\xff\xfe", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b"[1, 2]", "must be a JSON object with a custom_id"),
    (b"{}", "custom_id"),
    ({**request("a"), "custom_id": 7}, "custom_id"),
    ({**request("a"), "url": "/v1/embeddings"}, "/v1/embeddings"),
    ({**request("a"), "url": ["/v1/completions"]}, "/v1/completions"),
    ({**request("a"), "method": "GET"}, "POST"),
    ({**request("a"), "body": None}, "body must be a JSON object"),
    (request("a", colour="red", beams=2), "unknown fields beams, colour"),
    (request("a", best_of=2), "best_of (2) is not supported"),
    (request("a", tools=[{"type": "function"}]), "tools are of /v1/chat/completions"),
    (request("a", response_format={"type": "json_schema"}), "response_format must be of type"),
    (request("a", guided_regex="(a"), "structured_outputs.regex is not supported"),
    (request("a", frequency_penalty=3), "frequency_penalty (3.0) must lie in [-2, 2]"),
    (request("a", logit_bias={"5000": 1}), "logit_bias names token 5000, outside the vocabulary of 2048"),
    (request("a", logit_bias=[1]), "logit_bias must be an object"),
    (request("a", n=129), "n (129) must be <= 128"),
    (request("a", stream=True), "stream (true) is not supported"),
    (request("a", ["one", "two"]), "one prompt a line"),
    (request("a", None), "prompt must be a string or a list of token ids"),
    (request("a", []), "prompt must be a string or a list of token ids"),
    (request("a", [True, 2]), "prompt must be a string or a list of token ids"),
    (request("a", [5, 2048]), "token 2048 is outside the vocabulary of 2048"),
    (request("a", [-1]), "outside the vocabulary"),
    (request("a", [3] * 1024), "1024 tokens, the context holds 1024"),
    (request("a", "\ud800"), "not valid text"),
    (request("a", max_tokens=0), "max_tokens (0) must be >= 1"),
    (request("a", max_tokens="4"), "max_tokens ('4') must be a whole number"),
    (request("a", max_tokens=True), "whole number"),
    (request("a", temperature="hot"), "temperature ('hot') must be a number"),
    (request("a", temperature=-1), "temperature (-1.0) must"),
    (request("a", temperature=float("nan")), "temperature (nan) must"),
    (request("a", temperature=10**400), "temperature"),
    (request("a", temperature=1e-40), "temperature (1e-40) must"),
    (request("a", repetition_penalty=1e-40), "repetition_penalty"),
    (request("a", repetition_penalty=float("inf")), "repetition_penalty"),
    (request("a", top_p=-1), "top_p (-1.0) must lie in [0, 1]"),
    (request("a", seed=2**80), "seed"),
    (request("a", seed=-(2**63) - 1), "seed"),
    (request("a", top_logprobs=2), "top_logprobs (2) needs logprobs: true"),
    (request("a", stream_options={"continuous_usage_stats": True}), "of which include_usage is supported"),
    (request("a", stream_options=[1]), "stream_options must be an object"),
    (request("a", stream_options={"include_usage": 1}), "include_usage (1) must be true or false"),
    (request("a", n=0), "n (0) must lie in [1, 16384]"),
    (request("a", stop=5), "stop must be a string or a list of strings"),
    (request("a", stop=[5]), "stop must be a string or a list of strings"),
    (request("a", stop=[""]), "stop strings must not be empty"),
    (request("a", logprobs=-1), "logprobs (-1)"),
    (request("a", logprobs=21), "logprobs (21) must be <= 20"),
    (request("a", prompt_logprobs=21), "prompt_logprobs (21) must be <= 20"),
    (request("a", logprobs=True, top_logprobs=21), "top_logprobs (21) must be <= 20"),
    (request("a", stop="x" * 10_001), "stop must have at most 10000 characters in all"),
    (request("a", logprobs="many"), "logprobs ('many') must be"),
    (request("a", logprobs=True, top_logprobs=[1]), "top_logprobs"),
    (request("a", url="/v1/chat/completions"), "messages must be a list"),
    (request("a", url="/v1/chat/completions", messages=["hello"]), "messages must be a list"),
    (request("a", url="/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]), "no chat template"),
]


def test_a_bad_line_gets_a_sentence_of_its_own_and_the_others_are_served(llm, tmp_path):
    lines = [request("first"), *(line for line, _ in BAD_LINES), request("last")]
    results = run(llm, tmp_path, *lines)
    assert results[1]["error"] is results[len(lines)]["error"] is None
    assert text_of(results[1]) == text_of(results[len(lines)]) != ""
    for number, (line, words) in enumerate(BAD_LINES, 2):
        error = results[number]["error"]
        assert error is not None, line
        assert error["message"].startswith(f"line {number}: "), error
        if not isinstance(line, dict):  # the others use one name
            assert words in error["message"], (line, error)
        assert results[number]["response"] is None


@pytest.mark.parametrize(("line", "words"), [pair for pair in BAD_LINES if isinstance(pair[0], dict)])
def test_what_a_bad_request_is_told(llm, tmp_path, line, words):
    (result,) = run(llm, tmp_path, line).values()
    assert words in result["error"]["message"]


def test_a_name_used_twice(llm, tmp_path):
    results = run(llm, tmp_path, request("a"), request("b"), request("a", PROMPTS[1]))
    assert [results[n]["error"] is None for n in (1, 2, 3)] == [True, True, False]
    assert "custom_id 'a' was used by line 1" in results[3]["error"]["message"]
    # The error was written first. A run that is resumed between the two still serves line 1.
    kept = [e for e in (tmp_path / "out.jsonl").read_bytes().splitlines(True) if b'"line-1"' not in e]
    (tmp_path / "out.jsonl").write_bytes(b"".join(kept))
    assert run(llm, tmp_path, request("a"), request("b"), request("a", PROMPTS[1])) == results


def test_odd_characters_survive(llm, tmp_path):
    prompt = "line\u2028separator\x0b\x85 and 你好 \U0001f600"
    lines = [json.dumps(request("\u2028é\x85", prompt), ensure_ascii=False).encode(), request("\ud83d half a pair")]
    results = run(llm, tmp_path, b"", *lines, b"   ")
    assert results[2]["custom_id"] == "\u2028é\x85"
    assert results[3]["custom_id"] == "\ud83d half a pair"
    assert text_of(results[2]) == llm.generate(prompt, SamplingParams(max_tokens=4))[0].outputs[0].text
    again = run_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (again.resumed, again.total) == (2, 2)


def test_empty_input(llm, tmp_path):
    assert run(llm, tmp_path) == {}
    assert run(llm, tmp_path, b"", b"  ") == {}


KILLED = """
import os, signal, sys
import torch
from moe.batch import run_batch
from moe.llm import LLM
from tests.moe.moe_cases import TINYMOE, config

torch.set_num_threads(1)
def kill(progress):
    if progress.finished >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
with LLM(TINYMOE, config("0.5", max_tokens=64, max_sequences=4)) as llm:
    run_batch(llm, sys.argv[1], sys.argv[2], kill)
"""


def test_killed_and_resumed(llm, tmp_path):
    lines = [request(f"r{n}", PROMPTS[n % 6], max_tokens=3 + 2 * (n % 5)) for n in range(20)]
    lines[7] = b"not json"
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, source, target], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = target.read_bytes()
    assert 5 <= len(read(target)) < 20
    with target.open("ab") as file:
        file.write(b'{"id": "line-20", "custom_id": "r1')  # the write that the kill cut off
    seen: list[BatchProgress] = []
    progress = run_batch(llm, source, target, lambda p: seen.append(p))
    assert target.read_bytes().startswith(before)
    assert progress.resumed == len(before.splitlines())
    assert progress.finished == progress.total == 20
    results = read(target)
    assert set(results) == {f"line-{n}" for n in range(1, 21)}
    whole = tmp_path / "whole.jsonl"
    run_batch(llm, source, whole)
    assert read(whole) == results
    after = target.read_bytes()
    assert run_batch(llm, source, target).resumed == 20
    assert target.read_bytes() == after


def test_lines_may_be_added_to_the_input(llm, tmp_path):
    run(llm, tmp_path, request("a"))
    assert [r["custom_id"] for r in run(llm, tmp_path, request("a"), request("b")).values()] == ["a", "b"]


def test_a_line_that_has_changed_is_not_answered_by_its_former_result(llm, tmp_path):
    lines = [request("a"), b"broken", request("b", "Once")]
    run(llm, tmp_path, *lines)
    before = (tmp_path / "out.jsonl").read_bytes()
    again = json.dumps(dict(reversed(lines[0].items())), indent=None, separators=(",", ":")).encode()
    assert run_batch(llm, write(tmp_path / "in.jsonl", [again, *lines[1:]]), tmp_path / "out.jsonl").resumed == 3
    for changed in (request("b", "Twice"), request("b", "Once", max_tokens=9)):
        source = write(tmp_path / "in.jsonl", [*lines[:2], changed])
        with pytest.raises(ValueError, match="has a result for line 3, which asks for something else now"):
            run_batch(llm, source, tmp_path / "out.jsonl")
        with pytest.raises(ValueError, match="asks for something else now"):
            finished_batch(TINYMOE, EngineConfig(), source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_answers_of_another_model_or_with_other_settings_are_not_mixed(llm, tmp_path):
    run(llm, tmp_path, request("a"), b"broken", request("b"))
    whole = (tmp_path / "out.jsonl").read_bytes()
    bodies = [r["response"]["body"] for r in read(tmp_path / "out.jsonl").values() if r["response"]]
    assert {body["system_fingerprint"] for body in bodies} == {llm.system_fingerprint}
    other = tmp_path / "other"
    shutil.copytree(TINYMOE, other)
    (other / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    source, exact = tmp_path / "in.jsonl", EngineConfig(threads=1)
    answered = next(line for line in whole.splitlines(keepends=True) if b"moe-" in line)
    for before in (whole, answered):
        (tmp_path / "out.jsonl").write_bytes(before)
        for model, settings in ((other, exact), (TINYMOE, EngineConfig(dtype="bfloat16", threads=1))):
            with pytest.raises(ValueError, match="has answers of another model, or with other settings"):
                finished_batch(model, settings, source, tmp_path / "out.jsonl")  # before any is loaded
            with LLM(model, settings) as another, pytest.raises(ValueError, match="of another model"):
                run_batch(another, source, tmp_path / "out.jsonl")
            assert (tmp_path / "out.jsonl").read_bytes() == before
    with LLM(TINYMOE, config("8", max_sequences=2)) as few_slots:  # which change no answer
        assert run_batch(few_slots, source, tmp_path / "out.jsonl").finished == 3


def test_a_broken_config_of_a_model_that_answered_is_one_sentence(llm, tmp_path):
    run(llm, tmp_path, request("a"))
    shutil.copytree(TINYMOE, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        finished_batch(tmp_path / "other", EngineConfig(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_output_of_another_file_is_refused_and_stays_as_it_is(llm, tmp_path):
    run(llm, tmp_path, request("a"), b"broken")
    before = (tmp_path / "out.jsonl").read_bytes() + b'{"id": "line-2", "cust'
    (tmp_path / "out.jsonl").write_bytes(before)
    for other in ([request("b")], [request("b"), request("a")], [b"nothing"], []):
        source = write(tmp_path / "other.jsonl", other)
        with pytest.raises(ValueError, match="it is the output of another file"):
            run_batch(llm, source, tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"My notes\nwithout an end", b'{"id": "x-1", "custom_id": "a"}\n{"id', b"[]\n", b'{"id": 5}\n', b"no end"],
)
def test_file_that_is_no_output_is_refused_and_stays_as_it_is(llm, tmp_path, content):
    source = write(tmp_path / "in.jsonl", [request("a")])
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(ValueError, match="is no result of this program"):
        run_batch(llm, source, tmp_path / "notes")
    assert (tmp_path / "notes").read_bytes() == content


def test_input_as_output(llm, tmp_path):
    source = write(tmp_path / "in.jsonl", [request("a"), request("b")])
    source.write_bytes(source.read_bytes()[:-1])
    before = source.read_bytes()
    with pytest.raises(ValueError, match="is no result of this program"):
        run_batch(llm, source, source)
    assert source.read_bytes() == before


@contextmanager
def file_size_limit(nbytes):
    """Writes beyond it fail as on a full disk: partly, then with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(llm, tmp_path):
    lines = [request(f"r{n}", PROMPTS[n % 6]) for n in range(8)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    with file_size_limit(1000), pytest.raises(OSError, match="all finished lines are kept: make room") as caught:
        run_batch(llm, source, target)
    assert caught.value.errno == errno.EFBIG
    assert str(target) in str(caught.value)
    before = target.read_bytes()
    assert before.endswith(b"\n")
    assert 1 <= len(read(target)) < 8
    assert not llm.engine.has_work  # what was on its way was dropped: the same engine can go on
    progress = run_batch(llm, source, target)
    assert progress.resumed == len(before.splitlines())
    assert set(read(target)) == {f"line-{n}" for n in range(1, 9)}


def test_interrupted_run_leaves_the_engine_usable(llm, tmp_path):
    source = write(tmp_path / "in.jsonl", [request(f"r{n}", max_tokens=20) for n in range(8)])

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(llm, source, tmp_path / "out.jsonl", interrupt)
    assert not llm.engine.has_work
    assert run_batch(llm, source, tmp_path / "out.jsonl").finished == 8


def test_chat(llm, tmp_path, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    chat = {"url": "/v1/chat/completions"}
    messages = [{"role": "user", "content": "Tell me about a cat."}]
    results = run(
        llm,
        tmp_path,
        request("a", None, **chat, messages=messages),
        request("b", None, **chat, messages=[{"role": "user"}]),
        request("c", None, **chat, messages=[{"role": "tool", "content": "x"}]),
        request("d", None, **chat, messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        request("e", None, **chat, messages=messages, logprobs=True, top_logprobs=1),
    )
    (expected,) = llm.chat(messages, SamplingParams(max_tokens=4))
    assert (
        expected.outputs[0].text
        == llm.generate("user: Tell me about a cat.\nassistant:", SamplingParams(max_tokens=4))[0].outputs[0].text
    )
    body = results[1]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": expected.outputs[0].text,
        "refusal": None,
    }
    assert len(results[5]["response"]["body"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert results[4]["response"]["body"]["choices"][0]["message"]["content"]  # parts of text are joined
    assert "has no content" in results[2]["error"]["message"]
    assert "chat template" in results[3]["error"]["message"]
    assert "no tools here" in results[3]["error"]["message"]
