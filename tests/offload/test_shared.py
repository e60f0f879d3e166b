"""One host copy per node without a collective: whoever comes first reads, a dead reader's part is read again."""

import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from moe.models.blueprint import read_blueprint
from moe.offload.files_in_use import open_in_use
from moe.offload.index import ExpertIndex
from moe.offload.shared import SharedStore
from moe.offload.stores import FileStore, RamStore
from tests.families import tiny_checkpoint
from tests.patience import NEVER_S, PATIENCE_S

FORK = multiprocessing.get_context("fork")


class Counting:
    """A store that says what it was asked for, and may kill its process at one read."""

    def __init__(self, index: ExpertIndex, deadly_read: int = -1) -> None:
        self.files = FileStore(index)
        self.layouts, self.num_experts = self.files.layouts, self.files.num_experts
        self.reads, self.deadly_read = 0, deadly_read

    def read_into(self, layer: int, expert: int, out: torch.Tensor) -> int:
        if self.reads == self.deadly_read:
            os.kill(os.getpid(), signal.SIGKILL)
        self.reads += 1
        return self.files.read_into(layer, expert, out)

    def close(self) -> None:
        self.files.close()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ExpertIndex:
    return read_blueprint(tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"))).index


def in_another_process(function, *args) -> int:
    process = FORK.Process(target=function, args=args)
    process.start()
    process.join(PATIENCE_S)
    return process.exitcode


def read_and_die(index: ExpertIndex, folder: Path, at: int) -> None:
    SharedStore(Counting(index, at), "job", folder)
    os.kill(os.getpid(), signal.SIGKILL)


def total(index: ExpertIndex) -> int:
    return sum(site.num_experts for site in index.sites)


def same(store: SharedStore, index: ExpertIndex) -> bool:
    expected = RamStore.read_from(FileStore(index))
    return all(torch.equal(a, b) for a, b in zip(store.blobs, expected.blobs, strict=True))


def test_a_second_process_finds_everything_read_and_the_last_takes_the_name_away(index, tmp_path):
    first, second = Counting(index), Counting(index)
    one, two = SharedStore(first, "job", tmp_path), SharedStore(second, "job", tmp_path)
    assert (first.reads, second.reads) == (total(index), 0)
    assert same(two, index)
    one.close()
    assert two.path.exists()
    two.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 3, 1000])
def test_what_a_killed_process_had_read_is_kept_and_the_rest_is_read(index, tmp_path, at):
    assert in_another_process(read_and_die, index, tmp_path, at) == -signal.SIGKILL
    source = Counting(index)
    store = SharedStore(source, "job", tmp_path)
    assert source.reads == total(index) - min(at, total(index))
    assert same(store, index)
    store.close()


def begin_and_stop(path: Path, sender) -> None:
    fcntl.lockf(open_in_use(path), fcntl.LOCK_EX, 1, 7)
    sender.send("reads part 7")
    time.sleep(NEVER_S)


def test_a_process_that_does_not_go_on_with_its_part_is_not_waited_for_for_ever(index, tmp_path):
    receiver, sender = FORK.Pipe(duplex=False)
    stopped = FORK.Process(target=begin_and_stop, args=(tmp_path / "moe-experts-job", sender))
    stopped.start()
    receiver.recv()
    with pytest.raises(OSError, match=r"has not read its part .* in 0\.1 s: it may be stopped.*moe-experts-job"):
        SharedStore(Counting(index), "job", tmp_path, part_s=0.1)
    stopped.kill()
    stopped.join(PATIENCE_S)
    store = SharedStore(Counting(index), "job", tmp_path)
    assert same(store, index)
    store.close()


def test_files_of_dead_jobs_go_and_those_of_living_ones_stay(index, tmp_path):
    assert in_another_process(read_and_die, index, tmp_path, 1000) == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["moe-experts-job"]
    living = SharedStore(Counting(index), "living", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["moe-experts-living"]
    other = SharedStore(Counting(index), "other", tmp_path)
    assert living.path.exists()
    for store in (living, other):
        store.close()


def test_a_forgotten_name_is_gone_and_the_memory_is_not(index, tmp_path):
    store = SharedStore(Counting(index), "job", tmp_path)
    store.forget_name()
    assert list(tmp_path.iterdir()) == []
    assert same(store, index)
    store.close()


def test_too_little_memory_names_the_file(index, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"the host copy of all experts takes \d+ bytes.*moe-experts-job"):
        SharedStore(Counting(index), "job", tmp_path)
    assert list(tmp_path.iterdir()) == []
