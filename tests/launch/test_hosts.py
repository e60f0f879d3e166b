"""Four hosts in network namespaces, two nodes of two ranks: the batch that torchrun writes is that of one process."""

from pathlib import Path

import pytest

from bench.hosts import Shape, hosts, measure, run_ranks, trunk_bytes, why_not
from moe.batch import run_batch
from moe.config import EngineConfig
from moe.llm import LLM
from tests.moe.test_parallel import results_of
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [Shape(mbit=100), Shape(mbit=100, delay_ms=5.0)]


@pytest.mark.heavy
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_link_is_no_better_than_its_shape(shape):
    if reason := why_not(shape):
        pytest.skip(f"no hosts here: {reason}")
    with hosts(shape) as names:
        given = measure(names)
    assert given.round_trip_ms >= 2 * shape.delay_ms
    assert given.mbit <= 1.03 * shape.mbit  # a token bucket lets the first 256 kB of 10 MB pass at once


@pytest.mark.heavy
@pytest.mark.parametrize("dispatcher", ["all_to_all", "hierarchical", "coherent"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hosts_write_the_batch_of_one_process(dispatcher, shape, tmp_path):
    if reason := why_not(shape):
        pytest.skip(f"no hosts here: {reason}")
    source, target = ROOT / "examples" / "batch.jsonl", tmp_path / "four.jsonl"
    command = ["-m", "moe.launch.torchrun", "examples/tinymoe", str(source), str(target), "--experts-in-memory=0.25"]
    command += [f"--set=parallel.dispatcher={dispatcher}", "--set=dtype=float32"]
    with hosts(shape) as names:
        run_ranks(names, command, timeout_s=PATIENCE_S)
        assert trunk_bytes(names) > 1e5  # tokens did cross the link
    with LLM(ROOT / "examples" / "tinymoe", EngineConfig(dtype="float32")) as llm:
        run_batch(llm, source, tmp_path / "one.jsonl")

    assert results_of(target) == results_of(tmp_path / "one.jsonl")
