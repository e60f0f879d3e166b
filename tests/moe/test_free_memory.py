"""Whom the free memory is for: ranks of one machine share it, and a host copy of the experts is beside slots."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

import moe.engine.assemble as assemble
import moe.engine.device as device
import moe.engine.engine as engine
import moe.offload.memory as memory
import moe.offload.promised as promised
import moe.offload.stores as stores
from moe.cluster.host import ExpertHost, sharers_of
from moe.cluster.lines import Lines
from moe.cluster.messages import Together, Where
from moe.comm.membership import process_groups
from moe.config import BatchConfig, EngineConfig, OffloadConfig, ParallelConfig
from moe.engine.engine import Engine
from moe.engine.share import Share
from moe.llm import LLM
from moe.offload.stores import RamStore
from moe.params import SamplingParams
from moe.placement.plan import Plan
from tests.distributed import spawn
from tests.moe.moe_cases import TINYMOE
from tests.patience import PATIENCE_S

MIB = 1 << 20
EXPERTS = 96 * 144 * 1024  # bytes of all in slots
UNSEEN = device._UNSEEN  # bytes that a process never takes
BATCH = BatchConfig(max_tokens=16, max_sequences=2, kv_tokens=160)


def config(**offload) -> EngineConfig:
    return EngineConfig(threads=1, batch=BATCH, offload=OffloadConfig(prefetch="off", **offload))


def taken(engine: Engine) -> int:
    """KV and slots as they may become."""
    split = engine.loaded.split
    return split.one.nbytes if split is not None else engine.loaded.memory.kv_bytes + engine.state().slot_bytes


def rank_takes(free: int) -> tuple[int, int]:
    device.available_memory, device.own_promised = (
        (lambda: free),
        (lambda: 0),
    )  # this process is a rank of this test alone
    with process_groups() as groups:
        with LLM(TINYMOE, config(), groups=groups) as llm:
            return taken(llm.engine), llm.engine.state().slots


def test_ranks_of_a_machine_share_what_is_free(monkeypatch):
    """Half of the experts each, and memory in which either's share has room, but not both."""
    free = 2 * UNSEEN + 14 * MIB
    (first, slots), (second, _) = spawn(2, rank_takes, free)
    assert 0 < slots < 48
    assert 7 * MIB < first + second <= 14 * MIB
    monkeypatch.setattr(device, "available_memory", lambda: free)
    alone = Engine(TINYMOE, config(), share=Share(Plan.contiguous(6, 16, 2), 0))
    assert alone.state().slots == 48
    alone.close()


def filling(make, take):
    """`make_experts` that takes the memory of its slots at once."""

    def make_and_fill(*arguments, **more):
        experts = make(*arguments, **more)
        take(experts.slots.cache.slot_bytes, "slots")
        return experts

    return make_and_fill


def unequal_rank_takes(folder: Path, slow: int) -> tuple[int, int, int]:
    """On a machine whose ranks load 10 MiB of dense weights each, one of them late, and fill what they take."""
    rank, load, make = int(os.environ["RANK"]), assemble.load_model, assemble.make_experts

    def take(nbytes: int, what: str) -> None:
        (folder / f"{what}_{rank}").write_bytes(bytes(nbytes))

    def load_late(*arguments, **more):
        time.sleep(0.5 if rank == slow else 0)
        dense = load(*arguments, **more)
        take(10 * MIB, "dense")
        return dense

    assemble.load_model, assemble.make_experts = load_late, filling(make, take)  # of this rank alone
    device.available_memory = lambda: 2 * UNSEEN + 34 * MIB - sum(path.stat().st_size for path in folder.iterdir())
    device.own_promised = lambda: 0
    with process_groups() as groups:
        with LLM(TINYMOE, config(), groups=groups) as llm:
            return taken(llm.engine), llm.engine.state().slots, llm.engine.loaded.memory.scheduler.pool.num_blocks


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_of_unequal_speed_take_alike(slow, tmp_path):
    """A quick one waits with counting until the others have loaded, a slow one is left as much as it took."""
    (first, slots, blocks), second = spawn(2, unequal_rank_takes, tmp_path, slow)
    assert second == (first, slots, blocks)
    assert 0 < slots < 48
    assert 2 * first <= 14 * MIB


def host_takes(free: int, count: int, port: int) -> tuple[int, int]:
    device.available_memory, device.own_memory, device._shared_memory = (lambda: free), (lambda: 0), (lambda: 0)
    return takes_as_host(count, port)


def takes_as_host(count: int, port: int) -> tuple[int, int]:
    lines = Lines("127.0.0.1", "word")
    where = Where("127.0.0.1", lines.port, "word", "job", port)
    sharers = sharers_of(where, Together(count, 1), "here")
    host = ExpertHost(str(TINYMOE), config(), int(os.environ["RANK"]), (0, 2), where, sharers=sharers)
    return taken(host.engine), host.engine.state().slots


def test_hosts_that_load_on_a_node_at_once_share_what_is_free():
    free = 2 * UNSEEN + 14 * MIB
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ((alone, slots),) = spawn(1, host_takes, free, 1, store.port)
    assert slots == 48
    for shared, slots in spawn(2, host_takes, free, 2, store.port):
        assert 0 < slots < 48
        assert shared < min(alone, 7 * MIB)


def unequal_host_takes(folder: Path, port: int, late: str) -> tuple[int, int]:
    """As `unequal_rank_takes`; rank 1 begins, or has loaded its dense weights, when the other has taken all."""
    rank, load, make = os.environ["RANK"], assemble.load_model, assemble.make_experts

    def wait(what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while rank == "1" and what == late and not (folder / "slots_0").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def take(nbytes: int, what: str) -> None:
        (folder / f"new_{rank}").write_bytes(bytes(nbytes))
        (folder / f"new_{rank}").rename(folder / f"{what}_{rank}")

    def load_and_take(*arguments, **more):
        dense = load(*arguments, **more)
        wait("loads")
        take(10 * MIB, "dense")
        return dense

    assemble.load_model, assemble.make_experts = load_and_take, filling(make, take)  # of this host alone
    sizes = lambda which: sum(path.stat().st_size for path in folder.glob(which))  # noqa: E731
    device.available_memory = lambda: 2 * UNSEEN + 34 * MIB - sizes("[ds]*")
    device.own_memory = lambda: sizes(f"[ds]*_{rank}")
    device._shared_memory = lambda: 0
    wait("begins")
    return takes_as_host(2, port)


@pytest.mark.parametrize("late", ["begins", "loads", ""])
def test_hosts_of_unequal_speed_take_alike(late, tmp_path):
    """Whenever each comes to count: of what was free before any of them loaded."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (first, slots), second = spawn(2, unequal_host_takes, tmp_path, store.port, late)
    assert second == (first, slots)
    assert 0 < slots < 48
    assert 2 * first <= 14 * MIB


def late_host_takes(free: int, port: int, folder: str) -> int:
    """Rank 1 loads when rank 0 serves, whose slots are empty; the machine has `free` without either."""
    rank, deadline = os.environ["RANK"], time.monotonic() + PATIENCE_S
    memory._of_machine = lambda proc: free  # of this process alone: what hosts take really is nothing beside it
    memory._of_control_groups = lambda *_: iter(())
    memory.owed_by_processes = lambda proc, _: promised.owed_by_processes(proc, Path(folder))
    engine.Promise = lambda: promised.Promise(Path(folder))
    device.available_memory, device._shared_memory = memory.available_memory, lambda: 0
    first, second = Path(folder).parent / "first", Path(folder).parent / "second"
    while rank == "1" and not first.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lines = Lines("127.0.0.1", "word")
    where = Where("127.0.0.1", lines.port, "word", "job", port)
    asked, sharers = config(budget="50%") if rank == "0" else config(), sharers_of(where, Together(1, 1), "here")
    host = ExpertHost(str(TINYMOE), asked, int(rank), (0, 1), where, sharers=sharers)
    assert 0 < host.engine.state().slots < 96
    (first if rank == "0" else second).touch()
    while not second.exists():  # the first lives until the other has counted
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return taken(host.engine)


def test_a_host_that_comes_later_does_not_count_what_others_are_still_to_fill(tmp_path):
    (tmp_path / "shared").mkdir()
    free = UNSEEN + 12 * MIB
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = spawn(2, late_host_takes, free, store.port, str(tmp_path / "shared"))
    assert first + second <= 12 * MIB


def rank_joins_later(free: int, dispatcher: str) -> tuple[int, int, list[int]]:
    device.available_memory, device.own_promised = (lambda: free), (lambda: 0)
    engine = Engine(TINYMOE, replace(config(), parallel=ParallelConfig(dispatcher=dispatcher)))
    most = engine.loaded.split.one.memory
    with process_groups() as groups:
        engine.join(groups)
        taken, state = engine.loaded.split.one.nbytes, engine.state()
        assert state.slots > 48 if dispatcher == "all_to_all" else state.slots == 48  # its share, and what was there
        said = []
        for peers in (None, groups):
            engine.join(peers)
            params = SamplingParams(max_tokens=100, ignore_eos=True, temperature=0)
            request = engine.add_request([5, 6, 7], params)
            engine.start()
            while engine.has_work:
                engine.step()
                assert engine.why_not_whole() is None
            said.append(request.tokens)
        engine.join(None)
    engine.close()
    assert said[0] == said[1]
    return taken, most, said[0]


@pytest.mark.parametrize("dispatcher", ["all_to_all", "coherent"])
def test_a_process_that_joins_ranks_later_has_no_more_memory(dispatcher):
    """Alone its slots had that of KV, which coherent ranks have for themselves."""
    for taken, most, said in spawn(2, rank_joins_later, UNSEEN + 14 * MIB, dispatcher):
        assert (most - 144 * 1024 if dispatcher == "all_to_all" else 0) < taken <= most
        assert len(said) == 103


def test_a_host_copy_is_no_longer_free(monkeypatch):
    copies, read_from = [], RamStore.read_from
    free = EXPERTS + UNSEEN + 10 * MIB
    monkeypatch.setattr(RamStore, "read_from", lambda files: copies.append(1) or read_from(files))
    monkeypatch.setattr(device, "available_memory", lambda: free - EXPERTS * len(copies))
    with LLM(TINYMOE, config(store="ram")) as llm:
        assert 0 < llm.engine.state().slots < 96
        assert taken(llm.engine) <= 10 * MIB


def test_a_host_copy_that_is_larger_than_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(stores, "available_memory", lambda: 3 * MIB)
    with pytest.raises(ValueError, match=r"store=ram keeps all experts in host memory: 13.5 MiB, .* 3.0 MiB are free"):
        LLM(TINYMOE, config(store="ram"))
