"""Packed experts by DeepNVMe: the same bytes as preadv's, from locked memory, whole pages only; clear refusals.

Most tests run over a double of the handle; those marked `deepspeed` over DeepSpeed's own (`make test-deepspeed`).
"""

import os
import sys
import threading

import pytest
import torch

from moe.config import OffloadConfig
from moe.engine.choices import choose_reads
from moe.launch.measure import deepnvme_rates
from moe.models.blueprint import read_blueprint
from moe.offload import deepnvme
from moe.offload.cache import ExpertCache
from moe.offload.deepnvme import DeepNvmeStore, LockedReads
from moe.offload.pack import pack
from moe.offload.stores import FileStore, RamStore, aligned_bytes
from moe.placement.machine import Reads, disk_of
from tests.launch.test_measure import TINYMOE, figures


class Sectors:
    """A double of `aio_handle`: as strict as it should be, and counts what is read into memory that it did not lock."""

    def __init__(self):
        self.locked, self.freed, self.unlocked_reads, self.thread = [], 0, 0, threading.get_ident()

    def new_cpu_locked_tensor(self, num_elem, example):
        assert example.dtype == torch.uint8
        self.locked.append(aligned_bytes(num_elem))
        return self.locked[-1]

    def free_cpu_locked_tensor(self, tensor):
        self.freed += 1
        return True

    def is_pinned(self, buffer):
        return any(
            own.data_ptr() <= buffer.data_ptr() and buffer.data_ptr() + buffer.nbytes <= own.data_ptr() + own.nbytes
            for own in self.locked
        )

    def sync_pread(self, buffer, filename, file_offset):
        assert threading.get_ident() == self.thread, "two threads share a handle"
        assert not (file_offset | buffer.nbytes | buffer.data_ptr()) % 512
        self.unlocked_reads += not self.is_pinned(buffer)
        file = os.open(filename, os.O_RDONLY)
        done = os.preadv(file, [buffer.numpy().data], file_offset)
        os.close(file)
        return int(done == buffer.nbytes)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepnvme") / "packed"
    blueprint = read_blueprint(TINYMOE)
    pack(blueprint.checkpoint, blueprint.index, folder)
    return read_blueprint(folder)


def test_the_same_bytes_as_preadv_by_several_threads(packed):
    made = []
    store = DeepNvmeStore(packed.index, handles=lambda: made.append(Sectors()) or made[-1])
    cache = ExpertCache(store, 20, num_readers=3)
    for layer, expected in enumerate(RamStore.read_from(FileStore(packed.index, direct=False)).blobs):
        for wave in cache.acquire(layer, range(len(expected))):
            for expert, slot in zip(wave.experts, wave.slots):
                assert torch.equal(cache.slab.of_layer(layer)[slot, : expected.shape[1]], expected[expert])
    cache.check()
    cache.close()
    assert made
    assert not sum(handle.unlocked_reads for handle in made)
    locked = sum(len(handle.locked) for handle in made)
    store.close()
    assert sum(handle.freed for handle in made) == locked


def test_locked_memory_is_read_into_without_a_copy(packed):
    handle = Sectors()
    (segment,) = packed.index.segments(0, 3)
    out = handle.new_cpu_locked_tensor(segment.nbytes, torch.empty(0, dtype=torch.uint8))
    LockedReads(lambda: handle).read(segment.path, segment.offset, out)
    assert len(handle.locked) == 1
    assert torch.equal(out, RamStore.read_from(FileStore(packed.index, direct=False)).blobs[0][3])


def test_what_cannot_be_read_is_an_error_that_names_the_file(packed, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(8192))
    reads = LockedReads(Sectors)
    with pytest.raises(OSError, match="the file ends after 8192 bytes, 12288 are needed") as error:
        reads.read(path, 4096, aligned_bytes(8192))
    assert error.value.filename == str(path)
    with pytest.raises(AssertionError):
        reads.read(path, 512, aligned_bytes(4096))

    class Failing(Sectors):
        def sync_pread(self, buffer, filename, file_offset):
            return -1

    with pytest.raises(OSError, match="DeepNVMe says -1"):
        LockedReads(Failing).read(path, 0, aligned_bytes(4096))


def test_refusals_are_sentences(monkeypatch, packed):
    with pytest.raises(ValueError, match="`moe pack` the model first"):
        DeepNvmeStore(read_blueprint(TINYMOE).index, handles=Sectors)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", None)
    with pytest.raises(ValueError, match=r"pip install 'moeflow\[deepspeed\]', or leave out offload.io=deepnvme"):
        DeepNvmeStore(packed.index)
    with pytest.raises(ValueError, match="reads past the page cache"):
        OffloadConfig(io="deepnvme", direct=False)


def test_the_probe_measures_it_as_it_measures_preadv(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    found = list(deepnvme_rates(path, Sectors, (1 << 16, 1 << 30), (1, 2), 1 << 18))
    assert [(r.how, r.nbytes, r.depth) for r in found] == [("deepnvme", 1 << 16, 1), ("deepnvme", 1 << 16, 2)]
    assert all(r.bytes_per_s > 0 for r in found)


@pytest.mark.parametrize(
    ("rate", "is_here", "io"), [(3e9, True, "deepnvme"), (1.05e9, True, "preadv"), (3e9, False, "preadv")]
)
def test_it_is_chosen_where_the_probe_found_it_faster(monkeypatch, packed, rate, is_here, io):

    monkeypatch.setattr("moe.engine.choices.is_built", lambda: is_here)
    machine = figures(1e9, {1: 1e9, 2: 1e9})
    disk = disk_of(packed.folder)
    reads = (*next(iter(machine.disks.values())), Reads("deepnvme", 1 << 18, 2, rate))
    machine.disks.clear()
    machine.disks[disk] = reads
    offload, choices = choose_reads(OffloadConfig(direct=True), packed, machine)
    assert offload.io == io
    assert any(choice.setting == "offload.io" for choice in choices)
    assert choose_reads(OffloadConfig(direct=True), read_blueprint(TINYMOE), machine)[0].io == "preadv"


@pytest.mark.deepspeed
@pytest.mark.skipif(not deepnvme.is_built(), reason="make test-deepspeed builds it")
def test_deepspeeds_own_handle_reads_what_preadv_reads(packed):
    """1000 random reads, of which some by two threads at once; into a slot and into locked memory."""
    store, twin = DeepNvmeStore(packed.index), FileStore(packed.index, direct=True)
    generator = torch.Generator().manual_seed(0)
    nbytes = packed.index.layouts[0].nbytes
    picks = [(int(a) % 6, int(b) % 16) for a, b in torch.randint(1 << 30, (1000, 2), generator=generator)]

    def read(some):
        ours, theirs = aligned_bytes(nbytes), aligned_bytes(nbytes)
        for layer, expert in some:
            ours.fill_(7)
            assert store.read_into(layer, expert, ours) == twin.read_into(layer, expert, theirs)
            wrong.extend([(layer, expert)] * (not torch.equal(ours, theirs)))

    wrong = []
    threads = [threading.Thread(target=read, args=(picks[n::2],)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.close()
    twin.close()
