"""Direct reads of original checkpoints: pages that can go to their place do, and every byte is the file's."""

import pickle
import random
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.offload import in_place as module
from moe.offload.formats.slot import MatrixFormat
from moe.offload.in_place import in_place
from moe.offload.layout import ALIGNMENT, ExpertLayout, ExpertSite
from moe.offload.segments import ExpertIndex, Parts, Segment
from moe.offload.stores import FileStore, MmapStore, aligned_bytes, bytes_moved
from moe.offload.stretches import reads_of
from moe.params import SamplingParams
from tests.families import IN_SLOTS, reference_model, tiny_checkpoint
from tests.moe.moe_cases import ROOT
from tests.offload.test_index_and_stores import check_store, index_of
from tests.patience import PATIENCE_S


@pytest.mark.parametrize("family", IN_SLOTS)
def test_blobs_equal_transformers(family, tmp_path, monkeypatch):
    """In every arrangement of every family, where all pieces move, however small."""
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    folder = tiny_checkpoint(family, tmp_path, max_shard_size="60KB")
    model, index = reference_model(family, folder), in_place(index_of(folder, family))
    for store in (MmapStore(index), FileStore(index, direct=False), FileStore(index, direct=True)):
        check_store(store, index, model)
        store.close()


SITE = ExpertSite(module="experts", num_experts=5, hidden_size=256, intermediate_size=512)


def checkpoint_of(path, skips, gaps):
    """An index of five experts of 768 KiB in bf16, a file each; skips: where in it the first matrix begins; gaps: bytes
    between gate and up."""
    layout, size = ExpertLayout.of(SITE, MatrixFormat(torch.bfloat16)), 512 * 256 * 2
    parts, random_bytes = [], random.Random(0)
    for expert, (skip, gap) in enumerate(zip(skips, gaps)):
        file = path / f"{expert}.bin"
        file.write_bytes(random_bytes.randbytes(skip + 3 * size + gap + 8))
        at = [skip, skip + size, skip + 2 * size + gap]  # down, gate, up, as files are sorted by name
        places = zip((at[1], at[2], at[0]), (0, size, 2 * size))
        parts.append(Parts(tuple(Segment(file, offset, size, to) for offset, to in places)))
    return ExpertIndex(sites=(SITE,), layouts=(layout,), expert_keys=frozenset(), parts=(tuple(parts),))


def test_only_the_ends_of_tensors_are_copied(tmp_path):
    index = checkpoint_of(tmp_path, skips=[264] * 5, gaps=[0] * 5)
    moved = in_place(index)
    nbytes = index.layouts[0].nbytes
    assert reads_of(index, direct=True).copied_bytes == nbytes
    assert reads_of(moved, direct=True).copied_bytes <= 3 * ALIGNMENT
    assert reads_of(moved, direct=False).copied_bytes == 0
    for known, most in ((index, nbytes + 2 * ALIGNMENT), (moved, 4 * ALIGNMENT)):
        store = FileStore(known, direct=True)
        store.read_into(0, 0, aligned_bytes(known.layouts[0].nbytes))
        assert 0 < sum(map(len, store._buffers.free)) <= most  # what went through a buffer, in whole pages
    assert moved.layouts[0].nbytes == nbytes + 2 * ALIGNMENT


def test_experts_that_lie_otherwise_are_copied(tmp_path):
    """Another shard begins elsewhere in its page, up does not follow gate, or nothing lies at whole words."""
    indexes = []
    for name, skips, gaps in (("a", [264] * 4 + [72], [0, 8, 4096, 4104, 0]), ("b", [13] * 5, [0] * 5)):
        (tmp_path / name).mkdir()
        indexes.append(checkpoint_of(tmp_path / name, skips, gaps))
    for index in indexes:
        moved = in_place(index)
        assert moved.layouts[0].nbytes == index.layouts[0].nbytes + 2 * ALIGNMENT  # slots of all layers are alike
        for expert in range(5):
            found = []
            for store in (MmapStore(index), *(FileStore(moved, direct=d) for d in (False, True))):
                blob = aligned_bytes(store.layouts[0].nbytes).fill_(7)
                assert store.read_into(0, expert, blob) == 3 * 512 * 256 * 2
                found.append(
                    {
                        name: view[0].clone().view(torch.int16)
                        for name, view in store.layouts[0].views(blob[None]).items()
                    }
                )
                assert blob.view(-1).eq(7).sum() >= store.layouts[0].nbytes - 3 * 512 * 256 * 2  # others stay
            assert all(f[name].equal(found[0][name]) for f in found for name in ("gate_up", "down"))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), direct=st.booleans(), part=st.sampled_from([ALIGNMENT, 3 * ALIGNMENT, 1 << 30]))
def test_any_bytes_to_any_place(data, direct, part, tmp_path_factory):
    """Segments of any length that lie anywhere, in any order, in parts; what no segment fills stays as it was."""
    path, size = tmp_path_factory.getbasetemp() / "bytes.bin", 24 * ALIGNMENT + 13
    if not path.exists():
        path.write_bytes(random.Random(1).randbytes(size))
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(0, size), min_size=2, max_size=8)))
    segments, end = [], 0
    for begin, stop in data.draw(st.permutations(list(pairwise(cuts)))):
        place = end + data.draw(st.sampled_from([0, 1, 8, (begin - end) % ALIGNMENT]))
        segments.append(Segment(path, begin, stop - begin, place))
        end = place + stop - begin
    taken = segments[data.draw(st.integers(0, len(segments) - 1)) :]
    layout = ExpertLayout.of(SITE, MatrixFormat(torch.bfloat16))
    index = ExpertIndex(sites=(SITE,), layouts=(layout,), expert_keys=frozenset(), parts=((Parts(tuple(taken)),),))
    out, expected = aligned_bytes(end + ALIGNMENT).fill_(7), torch.full((end + ALIGNMENT,), 7, dtype=torch.uint8)
    for _, offset, nbytes, place, *_ in taken:
        expected[place : place + nbytes] = stored[offset : offset + nbytes]
    store = FileStore(index, direct=direct, check="never")
    moved = []
    assert bytes_moved(store._read_parts(0, 0, out, part), moved.append) == sum(s.nbytes for s in taken)
    store.close()
    assert moved == sorted(moved)
    assert all(n < sum(s.nbytes for s in taken) for n in moved)  # nobody is asked once all is there
    assert out.equal(expected)


def test_a_read_between_the_parts_of_another(tmp_path, monkeypatch):
    """What a thread reads while it stops in the middle of an expert leaves that one's bytes alone."""
    monkeypatch.setattr("moe.offload.stores.PART_BYTES", ALIGNMENT)
    index = checkpoint_of(tmp_path, skips=[13] * 5, gaps=[0] * 5)
    store, nbytes = FileStore(index, direct=True), index.layouts[0].nbytes
    alone, between = ([aligned_bytes(nbytes) for _ in range(3)] for _ in range(2))
    for expert, out in enumerate(alone):
        store.read_into(0, expert, out)
    outer = store.read_parts(0, 0, between[0])
    next(outer)
    inner = store.read_parts(0, 1, between[1])
    next(inner)
    store.read_into(0, 2, between[2])
    assert bytes_moved(inner) == bytes_moved(outer) == nbytes
    assert all(a.equal(b) for a, b in zip(alone, between))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_tokens_are_those_of_all_in_memory(family, tmp_path, monkeypatch):
    """Slots are made for direct reads where a process reads experts past the page cache and not all fit; else not."""
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    folder = tiny_checkpoint(family, tmp_path)
    answers, moved = [], []
    for budget, direct in ((1.0, True), (0.5, False), (0.5, True)):
        config = EngineConfig(offload=OffloadConfig(budget=budget, direct=direct))
        with LLM(folder, config) as llm:
            outputs = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=6, ignore_eos=True))
            answers.append([output.outputs[0].token_ids for output in outputs])
            layout, stored = llm.engine.experts.cache.store.layouts[0], llm.engine.blueprint.index.layouts[0]
            moved.append(layout != stored)
    assert answers[0] == answers[1] == answers[2]
    assert moved == [False, False, True]


THREADS = """
import os, pickle, sys, threading
import torch
torch.set_num_threads(2)
from moe.offload.stores import FileStore, RamStore, aligned_bytes

index = pickle.load(sys.stdin.buffer)
files = [FileStore(index, direct=direct) for direct in (False, True)]
stores = [*files, RamStore.read_from(files[0])]
out = aligned_bytes(index.layouts[0].nbytes)
before = len(os.listdir("/proc/self/task"))

def read():
    for store in stores:
        store.read_into(0, 1, out)
    seen.append(len(os.listdir("/proc/self/task")))

seen = []
thread = threading.Thread(target=read)
thread.start()
thread.join()
print(seen[0] - before)
"""


def test_a_reader_calls_up_no_threads(tmp_path):
    """Copying within a reader by torch's threads would give every reader as many as compute has."""
    index = pickle.dumps(checkpoint_of(tmp_path, skips=[13] * 5, gaps=[0] * 5))
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, input=index, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split() == [b"1"]  # the reader
