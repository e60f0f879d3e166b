"""What goes wrong with one request stays with it; and who may use an engine, when, and after what."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file, save_file

from moe.batch import run_batch
from moe.config import EngineConfig, OffloadConfig
from moe.engine.grammar import Constraint
from moe.engine.sampling import Sampler
from moe.guard import Guard, UnusableError
from moe.llm import LLM
from moe.params import SamplingParams, StructuredOutputsParams
from tests.moe.moe_cases import TINYMOE, check_whole, config, greedy
from tests.moe.test_memory import write_checkpoint
from tests.patience import PATIENCE_S

POISONED = 2047  # its embedding overflows


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    folder = shutil.copytree(TINYMOE, tmp_path_factory.mktemp("poison") / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][POISONED] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with LLM(folder, config("0.5", max_tokens=64, max_sequences=8)) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("0.5", max_tokens=64, max_sequences=4)) as llm:
        yield llm


def line(custom_id, prompt, **body):
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 1.0, "seed": 5} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": 2, "temperature": 0}], ids=["sampled", "n", "logprobs"])
def test_logits_that_are_not_finite_end_their_own_request(poisoned, tmp_path, extra):
    good = [line(f"g{i}", [1, 2, 3 + i]) for i in range(6)]
    lines = [*good[:2], line("bad", [1, POISONED, 3], **extra), *good[2:]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run_batch(poisoned, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    results = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "not finite" in results.pop("bad")["error"]["message"]
    alone = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    for i, result in enumerate(results[f"g{i}"] for i in range(6)):
        text = poisoned.generate([1, 2, 3 + i], alone)[0].outputs[0].text
        assert result["response"]["body"]["choices"][0]["text"] == text
    check_whole(poisoned)


def test_generate_says_which_answer_failed(poisoned):
    outputs = poisoned.generate([[1, 2], [POISONED, 1]], greedy(5))
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error"]
    assert "not finite" in outputs[1].outputs[0].error
    with pytest.raises(ValueError, match="not finite"):
        list(poisoned.stream([POISONED, 1]))
    check_whole(poisoned)


@pytest.mark.parametrize("where", ["sampler", "text", "text at its end", "form"])
def test_any_exception_of_one_request_is_its_own(llm, monkeypatch, where):
    params = greedy(6)
    if where == "form":  # which binds nothing
        params = dataclasses.replace(params, structured_outputs=StructuredOutputsParams(regex="(?s:.*)"))
    elif where == "text":  # which is read at every step
        params = dataclasses.replace(params, stop=("no such text",))
    right = llm.generate([[5, 6], [7, 8]], params)
    steps = []

    def fail_once(self, *arguments):
        steps.append(self)
        if len(steps) == 3:
            raise RecursionError("deep inside")
        return whole(self, *arguments)

    if where == "sampler":
        whole = Sampler.edits
        monkeypatch.setattr(Sampler, "edits", fail_once)
    elif where == "form":
        whole = Constraint.is_complete
        monkeypatch.setattr(Constraint, "is_complete", fail_once)
    else:
        whole = type(llm.tokenizer).decode
        calls = []

        def decode(self, ids, **options):
            calls.append(ids)
            if len(calls) == (5 if where == "text" else 2):
                raise RecursionError("deep inside")
            return whole(self, ids, **options)

        monkeypatch.setattr(type(llm.tokenizer), "decode", decode)
    outputs = [o.outputs[0] for o in llm.generate([[5, 6], [7, 8]], params)]
    failed = [o for o in outputs if o.finish_reason == "error"]
    assert len(failed) == 1
    assert "deep inside" in failed[0].error
    for got, expected in zip(outputs, right):
        if got.error is None:
            assert got.token_ids == expected.outputs[0].token_ids
    check_whole(llm)


def test_what_fails_in_making_a_result_is_its_lines_own(llm, tmp_path, monkeypatch):
    whole, calls = LLM.completion, []

    def completion(self, generation):
        calls.append(generation)
        if len(calls) == 2:
            raise RecursionError("deep inside")
        return whole(self, generation)

    monkeypatch.setattr(LLM, "completion", completion)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line(f"r{i}", [1, 2, 3 + i])) + "\n" for i in range(6)))
    run_batch(llm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    results = [json.loads(one) for one in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(results) == 6
    (failed,) = (r["error"] for r in results if r["error"])
    assert "deep inside" in failed["message"]
    check_whole(llm)


def test_seeds(llm):
    free = SamplingParams(max_tokens=12, temperature=1.0, n=2)
    texts = [o.text for _ in range(5) for o in llm.generate("Once upon a time", free)[0].outputs]
    assert len(set(texts)) >= 8
    told = SamplingParams(max_tokens=12, temperature=1.0, n=2, seed=3)
    first, again = (llm.generate("Once upon a time", told)[0].outputs for _ in range(2))
    assert [o.text for o in first] == [o.text for o in again]
    assert first[0].text != first[1].text


def test_n_is_queued_as_there_is_room(llm):
    params = SamplingParams(max_tokens=2, temperature=1.0, n=200)
    most = 0

    def step():
        nonlocal most
        most = max(most, len(llm._open))
        return type(llm).step(llm)

    llm.step = step
    try:
        (output,) = llm.generate("A", params)
    finally:
        del llm.step
    assert [o.index for o in output.outputs] == list(range(200))
    assert most <= 4 * 4


def test_closed():
    llm = LLM(TINYMOE, config("1.0"))
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("A"), llm.step, lambda: llm.add([1], greedy()), lambda: list(llm.stream("A"))):
        with pytest.raises(UnusableError, match="is closed; load it again"):
            call()


def test_a_second_thread_is_refused_and_the_first_goes_on(llm):
    right = llm.generate("A", greedy(60))
    got = []
    thread = threading.Thread(target=lambda: got.append(llm.generate(["A"] * 20, greedy(60))))
    with llm.guard:
        thread_refused = []

        def refused():
            try:
                llm.generate("A")
            except UnusableError as error:
                thread_refused.append(str(error))

        other = threading.Thread(target=refused)
        other.start()
        other.join()
    assert "in use by another thread" in thread_refused[0]
    thread.start()
    thread.join()
    assert got[0][0].outputs[0].token_ids == right[0].outputs[0].token_ids
    check_whole(llm)


def test_a_fork_is_refused_in_one_sentence(llm):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(PATIENCE_S))
            llm.close()  # no effect
            llm.generate("A")
        except UnusableError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    assert b"cannot be used after a fork; load it in a process that multiprocessing's 'spawn' started" in os.read(
        reader, 1000
    )
    os.close(reader)
    os.waitpid(child, 0)
    assert llm.generate("A", greedy(2))


def test_a_fork_computes_with_one_thread_and_refuses_to_wait_for_others(tmp_path):
    """Torch's threads are not in it: a step would wait for them forever."""
    program = """
import multiprocessing, os, sys
from moe import LLM, SamplingParams
from moe.config import EngineConfig
from moe.guard import UnusableError

def tokens(threads):
    with LLM(sys.argv[1], EngineConfig(dtype="float32", threads=threads)) as llm:
        (answer,) = llm.generate("Once upon a time, there was", SamplingParams(max_tokens=8, temperature=0))
        return answer.outputs[0].token_ids

if __name__ == "__main__":
    expected = tokens(2)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1) as pool:
        assert pool.apply(tokens, (1,)) == expected
        for many in (2, None):
            try:
                pool.apply(tokens, (many,))
                raise SystemExit("waited for nobody?")
            except UnusableError as error:
                assert f"is a fork of {os.getpid()}, which had loaded a model" in str(error)
    assert multiprocessing.get_context("spawn").Pool(1).apply(tokens, (2,)) == expected
    assert tokens(2) == expected
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    (tmp_path / "program.py").write_text(program)  # a spawned process imports it
    subprocess.run([sys.executable, tmp_path / "program.py", TINYMOE], check=True, timeout=PATIENCE_S, env=environment)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Experts above 256 KiB, so that reader threads load them."""
    folder = tmp_path_factory.mktemp("slow") / "model"
    write_checkpoint(folder, 3, 32, 256, 160)
    with LLM(folder, EngineConfig(dtype="float32", threads=1, offload=OffloadConfig(budget="8"))) as llm:
        yield llm


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.heavy)])
def test_interrupts_at_random_moments(slow, tmp_path, count):
    """Each ends the call or comes after it; the engine is whole and says the same as before."""
    prompts = [list(range(i + 1, i + 20)) for i in range(6)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    right = [o.outputs[0].token_ids for o in slow.generate(prompts, params)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line(f"l{i}", p, max_tokens=8)) + "\n" for i, p in enumerate(prompts * 5)))
    rng = random.Random(count)

    def stream():
        return [piece for prompt in prompts for piece in slow.stream(prompt, params)]

    def batch():
        run_batch(slow, source, tmp_path / f"out{rng.random()}.jsonl")

    calls = {"generate": lambda: slow.generate(prompts * 5, params), "stream": stream, "batch": batch}
    interrupted = 0
    for _ in range(count):
        call = rng.choice(list(calls.values()))
        timer = threading.Timer(0.001 + 0.1 * rng.random(), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            call()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        slow.abort(list(slow._open.values()))  # a stream that was interrupted on its way out
        check_whole(slow)
    assert interrupted > count // 2
    assert [o.outputs[0].token_ids for o in slow.generate(prompts, params)] == right
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_impatient_second_interrupt_comes_through_and_the_model_is_closed(monkeypatch):
    monkeypatch.setattr("moe.guard._PATIENCE", 0.01)
    guard = Guard("the model")

    def interrupt_twice():
        with guard:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("it must come here")

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    with pytest.raises(UnusableError, match="interrupted in the middle of a step"), guard:
        pass


def test_one_writer_of_an_output_file(llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line("a", "Once")) + "\n")
    seen = []

    def second(progress):
        if not seen:
            seen.append(1)
            with pytest.raises(ValueError, match=r"another process is writing .*out\.jsonl; wait for it"):
                run_batch(llm, source, target)

    assert run_batch(llm, source, target, second).finished == 1
    assert len(target.read_text().splitlines()) == 1


@pytest.mark.parametrize("size", [-1, 2**31, 2**64, 10**400], ids=["-1", "31", "64", "400 digits"])
def test_an_integer_of_any_size_is_served_or_refused_in_a_sentence(llm, size):
    """Of every parameter that takes integers, and of a prompt: the answer is its own, or ValueError says why not."""
    numbers = (int, float, int | None)
    asked = [{one.name: size} for one in dataclasses.fields(SamplingParams) if one.type in numbers]
    asked += [{"stop_token_ids": [size]}, {"allowed_token_ids": [1, size]}, {"logit_bias": {size: 1.0}}]
    asked += [{"stop_token_ids": [size], "min_tokens": 1}]
    asked += [{"bad_words_ids": [[size]]}, {"bad_words_ids": [[1, size]]}]
    assert len(asked) >= 17
    most = llm.engine.limits.max_context - 3  # an answer of any length ends soon
    prompts = [[1] * most if "max_tokens" in one else [1, 2, 3] for one in asked] + [[1, size]]
    served = 0
    for prompt, one in zip(prompts, [*asked, {}]):
        for temperature in (0.0, 1.0):
            given = {"max_tokens": 2, "temperature": temperature, "seed": 1} | one
            try:
                (out,) = llm.generate([prompt], SamplingParams(**given))
            except ValueError:
                continue
            assert out.outputs[0].token_ids, one
            assert out.outputs[0].finish_reason in ("length", "stop"), (one, out)
            served += 1
    assert served >= 4  # of both kinds of drawing, top_k among them
    check_whole(llm)
