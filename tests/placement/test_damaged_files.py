"""Damaged traces, plans and topologies: one sentence that names the file, whatever is wrong with it, and no crash."""

import json
import random

import numpy as np
import pytest

from moe.placement.plan import Plan
from moe.placement.topology import Topology
from moe.placement.trace import RoutingTrace
from tests.placement.instances import topic_trace

ODD = [None, True, -1, 0, 10**12, 1e308, float("nan"), "", "x", [], {}, [[]], [1, [2]], [[0, 1], [0]], [1.5], ["a"]]
READERS = {".npz": RoutingTrace.load, ".safetensors": RoutingTrace.load, ".plan": Plan.load, ".topology": Topology.load}


def write(folder, suffix):
    path = folder / f"file{suffix}"
    if suffix == ".plan":
        Plan.random(2, 6, 3, seed=1).with_result(bound=1.0).save(path)
    elif suffix == ".topology":
        Topology.preset("2xh200x2").save(path)
    else:
        topic_trace(30, 2, 6, 2, seed=1, length=10).save(path)
    return path


def damage_bytes(data, draw):
    data = bytearray(data)
    kind = draw.choice(["flip", "cut", "swap", "zeros", "repeat"])
    at, size = draw.randrange(len(data)), draw.randrange(1, 40)
    if kind == "flip":
        for _ in range(size):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "swap":
        data[at : at + size] = draw.randbytes(size)
    elif kind == "zeros":
        data[at : at + size] = bytes(size)
    else:
        data[at:at] = data[at : at + size]
    return bytes(data)


def damage_json(data, draw):
    fields = json.loads(data)
    name = draw.choice(sorted(fields))
    kind = draw.choice(["value", "drop", "add", "inside", "root"])
    if kind == "drop":
        del fields[name]
    elif kind == "add":
        fields["more"] = draw.choice(ODD)
    elif kind == "inside" and isinstance(fields[name], list) and fields[name]:
        fields[name][draw.randrange(len(fields[name]))] = draw.choice(ODD)
    elif kind == "root":
        fields = draw.choice(ODD)
    else:
        fields[name] = draw.choice(ODD)
    return json.dumps(fields).encode()


def read_damaged(path, draw):
    """Whether it was still readable. Raises what is not a sentence."""
    is_json = path.suffix in (".plan", ".topology")
    data = (damage_json if is_json and draw.random() < 0.7 else damage_bytes)(path.read_bytes(), draw)
    other = path.with_name(f"damaged{path.suffix}")
    other.write_bytes(data)
    said = ""
    try:
        READERS[path.suffix](other)
    except (ValueError, OSError) as error:
        said = str(error)
    assert not said or "damaged" in said, said
    assert "\n" not in said, said
    return not said


def check(folder, suffix, count, seed):
    path, draw = write(folder, suffix), random.Random(seed)
    READERS[suffix](path)
    readable = sum(read_damaged(path, draw) for _ in range(count))
    assert readable < 0.5 * count  # most damage is seen; a flipped digit may still be a good file


@pytest.mark.parametrize("suffix", READERS)
def test_damaged_files(suffix, tmp_path):
    check(tmp_path, suffix, 60, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", READERS)
def test_many_damaged_files(suffix, tmp_path):
    check(tmp_path, suffix, 500, seed=1)


def test_what_is_said_of_a_plan_names_the_field(tmp_path):
    path = write(tmp_path, ".plan")
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"num_ranks": "three"}))
    with pytest.raises(ValueError, match="num_ranks is a str, it must be int"):
        Plan.load(path)
    path.write_text(json.dumps(fields | {"phy2log": [[0, 1], [0]]}))
    with pytest.raises(ValueError, match="phy2log must be rows of one length"):
        Plan.load(path)
    assert np.array(fields["phy2log"]).ndim == 2
