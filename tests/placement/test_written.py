"""A file is written whole or not at all, by everything that writes one: a full disk leaves what stood there."""

import ast
import errno
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from moe.layer.ridge import Forecast, Regression, RidgeFit, write_sums
from moe.placement.machine import Machine, Rate, save_machine
from moe.placement.plan import Plan
from moe.placement.stats.report import Picture, save_png, write_page
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from moe.placement.written import written_whole
from tests.test_layout import ROOT, sources


def trace():
    ids = np.argsort(np.random.default_rng(0).random((500, 2, 8)), axis=-1)[..., :2].astype(np.int16)
    return RoutingTrace(expert_ids=ids, sequence_lengths=np.array([500], np.int32), num_experts=8, model="m")


def forecast():
    return Forecast("logits", 2, {(0, 1): Regression(torch.zeros(40, 40), torch.zeros(40))}, "m")


def machine():
    rate = Rate("experts", "bfloat16", 1, 1, 1e-9)
    fields = {"when": "now", "cores": 2, "memory": {1: 1e9}, "rates": (rate,), "copy_bytes_per_s": 1e9}
    return Machine(name="name " * 20, **fields)


WRITERS = {
    "trace.npz": lambda path: trace().save(path),
    "trace.safetensors": lambda path: trace().save(path),
    "plan.json": lambda path: Plan.contiguous(8, 64, 4).save(path),
    "topology.json": lambda path: Topology.preset("16xh200x8").save(path),
    "page.html": lambda path: write_page(path, "title", ["words " * 1000]),
    "picture.png": lambda path: save_png(path, {"Load": Picture(np.ones((4, 8)), "layer", "expert", "tokens")}),
    "machines.json": lambda path: save_machine(path, machine()),
    "sums.safetensors": lambda path: write_sums(RidgeFit(16, [8, 8], 2, 1, None), path, "digest", 1),
    "lookahead.safetensors": lambda path: forecast().save(path),
}


@contextmanager
def files_of_at_most(num_bytes):
    """As a disk that is full: the kernel refuses what comes after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("was_there", [False, True])
def test_a_full_disk_leaves_what_stood_there(tmp_path, name, was_there):
    path = tmp_path / name
    if was_there:
        WRITERS[name](path)
    before = path.read_bytes() if was_there else b""
    with files_of_at_most(100), pytest.raises(OSError, match="nothing was written: make room") as caught:
        WRITERS[name](path)
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ([name] if was_there else [])
    assert not was_there or path.read_bytes() == before
    WRITERS[name](path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.stat().st_size > 100


def test_an_interrupt_leaves_what_stood_there(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def write():
        with written_whole(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_links_are_followed_and_devices_written_themselves(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    with written_whole(link) as part:
        part.write_text("new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    with pytest.raises(OSError, match="nothing was written") as caught, written_whole("/dev/full") as part:
        part.write_text("new")
    assert caught.value.errno == errno.ENOSPC


def calls_that_write(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            is_nowhere = [ast.unparse(a) for a in node.args[:1]] == ["os.devnull"]
            is_open = name == "open" and not is_nowhere and any("w" in str(mode) for mode in modes)
            if is_open or name in ("write_text", "write_bytes", "save_file", "savez", "savez_compressed", "savefig"):
                yield node


def test_nothing_else_writes_a_file_of_a_user():
    """Besides: what grows while a run lasts, and what lies in a folder that is itself made whole or thrown away."""
    known = {"launch/recording.py", "launch/measure_ranks.py", "moe/models/gguf.py"}
    found = 0
    for path in [p for folder in ("placement", "launch", "moe") for p in sources(folder)]:
        tree = ast.parse(path.read_text())
        inside = set()
        for block in ast.walk(tree):
            if isinstance(block, ast.With) and "written_whole" in ast.unparse(block.items[0]):
                inside |= {id(node) for node in ast.walk(block)}
        for call in calls_that_write(tree):
            assert id(call) in inside or path.relative_to(ROOT).as_posix() in known, f"{path}:{call.lineno}"
            found += id(call) in inside
    assert found >= 10
