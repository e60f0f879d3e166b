"""What is kept of a machine comes back as it was, or is refused in one sentence; between figures it is interpolated."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from moe.placement.machine import (
    Attention,
    Exchange,
    Machine,
    Overhead,
    Rate,
    Reads,
    disk_of,
    load_machine,
    machine_name,
    measures_alone,
    save_machine,
)
from tests.patience import PATIENCE_S


def machine(name="one", **fields):
    rates = (Rate("expert", "int8", 1, 4, 4e-10), Rate("expert", "int8", 1, 1, 1e-10), Rate("dense", "bf", 2, 1, 9.0))
    return Machine(
        name=name,
        when="today",
        cores=2,
        memory={1: 1e10, 2: 1.5e10},
        rates=rates,
        attention=Attention(1e9, 2e9),
        overhead=Overhead(*map(float, range(1, 10))),
        copy_bytes_per_s=1e9,
        exchange=(Exchange(2, 1.0, 2.0, 3.0, 4.0),),
        **{"disks": {"/dev/a ext4": (Reads("direct", 1 << 20, 2, 5e8), Reads("direct", 1 << 22, 1, 9e8))}, **fields},
    )


def test_what_is_saved_is_loaded_and_other_machines_stay(tmp_path):
    file = tmp_path / "new" / "probe.json"
    one, other = machine(), machine("other", disks={})
    save_machine(file, one)
    save_machine(file, other)
    assert load_machine(file, "one") == one
    assert load_machine(file, "other") == other
    assert load_machine(file, "a third") is None
    assert load_machine(tmp_path / "none", "one") is None
    assert [p.name for p in file.parent.iterdir()] == ["probe.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda one: one.pop("when"), r"missing \['when'\]"),
        (lambda one: one.update(rates=[[1, 2]]), "run `moe probe` again"),
        (lambda one: one.update(memory={"a": 1}), "run `moe probe` again"),
        (lambda one: one.update(cores="2"), "cores is a str"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, damage, words):
    file = tmp_path / "probe.json"
    save_machine(file, machine())
    stored = json.loads(file.read_text())
    damage(stored["one"])
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=words):
        load_machine(file, "one")
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_machine(file, "one")


def test_rows_between_measured_ones():
    one = machine()
    found = [one.seconds_per_weight("expert", "int8", rows, 1) for rows in (0.5, 1, 2, 4, 8)]
    assert found == pytest.approx([1e-10, 1e-10, 2e-10, 4e-10, 8e-10])
    assert one.seconds_per_weight("dense", "bf", 1, 1) == 9.0  # the nearest number of threads
    with pytest.raises(ValueError, match="no expert in int3 was measured on this machine; known: int8"):
        one.seconds_per_weight("expert", "int3", 1, 1)


def test_reads_between_measured_sizes_at_the_nearest_depth():
    disk = "/dev/a ext4"
    reads = (Reads("direct", 1 << 20, 2, 5e8), Reads("direct", 1 << 20, 1, 1e9), Reads("direct", 1 << 22, 1, 4e9))
    one = machine(disks={disk: reads})
    assert one.read_bytes_per_s(disk, "direct", 3 << 20, 8) == pytest.approx(5e8)
    assert one.read_bytes_per_s(disk, "direct", 1 << 10, 1) == pytest.approx(1e9)
    assert one.read_bytes_per_s(disk, "direct", 1 << 21, 1) == pytest.approx(2e9)  # 1 MiB takes as long as 4 MiB
    assert one.read_bytes_per_s(disk, "direct", 1 << 23, 1) == pytest.approx(4e9)
    assert one.read_bytes_per_s(disk, "cached", 1 << 20, 1) is None
    assert one.read_bytes_per_s("/dev/b", "direct", 1 << 20, 1) is None


def test_the_deepest_mount_is_the_disk(tmp_path):
    (tmp_path / "deep").mkdir()
    mounts = tmp_path / "mountinfo"
    lines = ["1 0 8:1 / / rw - ext4 /dev/root rw", f"2 1 8:2 / {tmp_path}/deep rw shared:1 - xfs /dev/nvme0 rw"]
    mounts.write_text("\n".join(lines) + "\n")
    assert disk_of(tmp_path / "deep", mounts) == "/dev/nvme0 xfs"
    assert disk_of(tmp_path, mounts) == "/dev/root ext4"


def test_a_machine_is_named_by_its_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Fast One\nmodel name\t: Fast One\n")
    assert machine_name(2, "avx2", info) == "Fast One, 2 cores, avx2"
    assert machine_name(2, "avx2", tmp_path / "none") == "unknown processor, 2 cores, avx2"


def test_who_measures_while_another_does_waits_and_forgets_nothing(tmp_path):
    file, entered, waits = tmp_path / "new" / "machines.json", threading.Event(), threading.Event()

    def measure(disk, goes_on):
        with measures_alone(file, waits.set):
            entered.set()
            known = load_machine(file, "one")
            assert goes_on()
            disks = {} if known is None else known.disks
            save_machine(file, replace(machine("one"), disks={**disks, disk: ()}))

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(measure, "first", lambda: waits.wait(PATIENCE_S))
        assert entered.wait(PATIENCE_S)
        pool.submit(measure, "second", lambda: True).result(PATIENCE_S)
        first.result(PATIENCE_S)
    assert set(load_machine(file, "one").disks) == {"first", "second"}
