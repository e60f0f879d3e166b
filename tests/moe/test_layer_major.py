"""Sequences, KV and slots of an offline batch: the least bytes by brute force, the same tokens, and clear refusals."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.batch import batch_workload, lines_done, run_batch
from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.engine.layer_major import Sizes, Workload, best_split
from moe.llm import LLM
from moe.offload.slot_runs import slab_bytes
from moe.params import SamplingParams
from tests.moe.moe_cases import TINYMOE, check_whole

SIZES = Sizes([64] * 2, [8] * 2, [8] * 2, num_ranks=1, top_k=2, kv_bytes=3, row_bytes=5, token_bytes=1, block_size=4)
LAYER_MAJOR = BatchConfig(schedule="layer_major")
PROMPTS = ["Once upon a time", "ROMEO:\nO, she", "def read(self", "Two plus two is"]


def least_bytes(work, sizes, memory, room):
    """Every number of sequences with every number of slots: (bytes, steps, sequences, slots) of the best."""
    found = []
    total, tokens = sum(sizes.num_experts), sum(work.prompts)
    contexts = sorted((p + a for p, a in zip(work.prompts, work.answers)), reverse=True)
    of_size = [
        sum(c for b, c in zip(sizes.expert_bytes, sizes.num_experts) if b == size) for size in sizes.expert_bytes
    ]
    in_step = max(512, min(tokens, int(room / 16)))
    for n in range(1, len(contexts) + 1):
        kv = sum(-(-c // sizes.block_size) for c in contexts[:n]) * sizes.block_size * sizes.kv_bytes
        steps = max(-(-sum(a - 1 for a in work.answers) // n), max(a - 1 for a in work.answers))
        chunk = min(max(in_step, n), -(-tokens * n // len(contexts)))
        for slots in range(min(max(2 * sizes.top_k, -(-total // min(of_size))), total), total + 1):
            used = kv + slab_bytes(sizes.expert_bytes, sizes.num_experts, slots)
            if used > memory or used + n * sizes.row_bytes > room:
                continue
            read = 0.0
            for nbytes, count in zip(sizes.expert_bytes, sizes.num_experts):
                for times, asking in ((steps, n), (-(-tokens // chunk), chunk)):
                    read += times * count * nbytes * (1 - (1 - sizes.top_k / count) ** asking) * (1 - slots / total)
            found.append((read, steps, n, -slots))
    return min(found, default=None)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12),
    expert_bytes=st.lists(st.sampled_from([32, 64, 100]), min_size=1, max_size=3),
    counts=st.integers(2, 6),
    top_k=st.integers(1, 2),
    kv_bytes=st.integers(1, 9),
    memory=st.integers(1, 3000),
    spare=st.integers(-200, 400),
)
def test_no_other_split_reads_less(requests, expert_bytes, counts, top_k, kv_bytes, memory, spare):
    sizes = SIZES._replace(
        expert_bytes=expert_bytes,
        num_experts=[counts] * len(expert_bytes),
        chosen_from=[counts] * len(expert_bytes),
        top_k=top_k,
        kv_bytes=kv_bytes,
    )
    work = Workload([p for p, _ in requests], [a for _, a in requests])
    expected = least_bytes(work, sizes, memory, memory + spare)
    if expected is None:
        with pytest.raises(ValueError, match="for the longest request"):
            best_split(work, sizes, memory, memory + spare)
        return
    found = best_split(work, sizes, memory, memory + spare)
    assert found.read_bytes == pytest.approx(expected[0], rel=1e-9, abs=1e-6)  # sums in another order
    used = found.kv_tokens * kv_bytes + slab_bytes(expert_bytes, sizes.num_experts, found.slots)
    assert used <= memory
    assert used + found.sequences * sizes.row_bytes <= memory + spare


def test_what_is_chosen_follows_what_is_scarce():
    answers = Workload([8] * 64, [64] * 64)
    assert best_split(answers, SIZES, 1e6, 1e6).slots == 16  # all of them: nothing to read, and then the fewest steps
    assert best_split(answers, SIZES, 1e6, 1e6).sequences == 64
    # Prompts read the same however many decode: where they are long and answers short, slots are worth more.
    large = SIZES._replace(expert_bytes=[640] * 2, kv_bytes=1, token_bytes=1000)
    long_prompts = best_split(Workload([70] * 64, [2] * 64), large, 9000, 1e6)
    long_answers = best_split(answers, large, 9000, 1e6)
    assert (long_prompts.sequences, long_prompts.slots) == (8, 13)
    assert (long_answers.sequences, long_answers.slots) == (62, 7)


def test_answers_without_a_limit_have_what_the_context_holds():
    assert Workload([3, 90, 100], [None, 20, 5]).within(100) == Workload([3, 90], [97, 10])


def write(path, *bodies):
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": b} for n, b in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no request\n")
    return path


def texts(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {e["id"]: e["response"] and [c["text"] for c in e["response"]["body"]["choices"]] for e in entries}


def test_a_file_has_the_same_tokens_and_reads_less(tmp_path):
    bodies = [
        {"model": "m", "prompt": PROMPTS[n % 4] + " x" * (n % 5), "max_tokens": 16, "temperature": 0} for n in range(40)
    ]
    bodies[3] |= {"n": 2, "temperature": 0.9, "seed": 1}
    source = write(tmp_path / "in.jsonl", *bodies)
    read, said = {}, {}
    for name, batch in {"usual": BatchConfig(), "layer_major": LAYER_MAJOR}.items():
        config = EngineConfig(threads=1, batch=batch, offload=OffloadConfig(budget="3MiB", prefetch="off"))
        target = tmp_path / f"{name}.jsonl"
        work = batch_workload(TINYMOE, config, source, lines_done(target)) if batch is LAYER_MAJOR else None
        with LLM(TINYMOE, config, workload=work) as llm:
            state = llm.engine.state()
            run_batch(llm, source, target)
            check_whole(llm)
            read[name], said[name] = sum(s.bytes_read for s in llm.engine.layer_stats()), texts(target)
            preempted, notes = llm.engine.stats.preemptions, llm.notes
    assert said["usual"] == said["layer_major"]
    assert len(said["usual"]) == 41
    assert read["layer_major"] < 0.75 * read["usual"]
    assert preempted == 0
    blob = state.slot_bytes // state.slots
    assert state.slot_bytes + state.blocks * 16 * 2304 <= 3 << 20  # a token's KV: 6 layers of K and V, 3 x 32 in bf16
    assert state.slot_bytes + state.blocks * 16 * 2304 > (3 << 20) - blob
    (note,) = [note for note in notes if "layer_major" in note]
    assert "of 41 requests" in note
    assert f"{state.slots} of 96 experts" in note
    # What is left of a run that was stopped, and of one that is done.
    work = batch_workload(TINYMOE, EngineConfig(), source, lines_done(target))
    assert work == Workload([], [])
    lines = target.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith('{"id": "line-4"')]
    target.write_text("".join(kept))
    assert batch_workload(TINYMOE, EngineConfig(), source, lines_done(target)).answers == [16, 16]
    with LLM(TINYMOE, config, workload=work) as llm:
        assert llm.generate("A", SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "workload", "said"),
    [
        ({}, None, "must know all requests beforehand: use it with `moe batch`"),
        (
            {"offload": OffloadConfig(budget="1MiB")},
            Workload([400], [100]),
            r"needs 1.1 MiB for the longest request \(512",
        ),
        (
            {"offload": OffloadConfig(budget="900TiB")},
            Workload([1000] * 10**6, [24] * 10**6),
            "is more than the memory",
        ),
    ],
)
def test_refusals(settings, workload, said):
    with pytest.raises(ValueError, match=said):
        LLM(TINYMOE, EngineConfig(batch=LAYER_MAJOR, **settings), workload=workload)


def test_what_it_chooses_is_not_set():
    for told in ({"max_tokens": 1024}, {"max_sequences": 8}, {"kv_tokens": 512}, {"pool": 64}, {"packed": False}):
        with pytest.raises(ValueError, match=f"not with batch.{next(iter(told))}="):
            replace(LAYER_MAJOR, **told)
    with pytest.raises(ValueError, match="which hosts hand to each other"):
        LLM(TINYMOE, EngineConfig(batch=LAYER_MAJOR), hosts=2)
