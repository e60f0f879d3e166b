"""Headers are checked before anything is read; what is loaded equals what the safetensors library loads."""

import json
import random
from collections import Counter

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe.offload.checkpoint import Checkpoint
from tests.families import tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    tensors = {
        "a.weight": torch.arange(15, dtype=torch.float32).view(3, 5),
        "b.bias": torch.ones(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def test_load_equals_safetensors(folder):
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype
        assert loaded.shape == tensor.shape
        assert torch.equal(loaded, tensor)
    assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())


def test_shards_and_all_dtypes(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = tiny_checkpoint("mixtral", tmp_path / str(dtype), dtype, max_shard_size="30KB")
        checkpoint = Checkpoint.open(folder)
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2
        expected = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in expected.items())


def test_a_loaded_tensor_does_not_keep_the_file_mapped(folder):
    loaded = Checkpoint.open(folder).load("a.weight")
    (folder / "model.safetensors").write_bytes(b"")
    assert loaded.sum() == 105
    with open("/proc/self/maps") as maps:
        assert str(folder) not in maps.read()


def test_missing_shard_is_named(tmp_path):
    folder = tiny_checkpoint("mixtral", tmp_path, max_shard_size="30KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=rf"shard {victim.name} is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=f"{len(data)} bytes, the file has {len(data) - 1}|the file has {keep};"):
        Checkpoint.open(folder)


def test_file_with_more_than_its_header_says(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="longer than it should be"):
        Checkpoint.open(folder)


def test_bad_headers(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    for raw in (b"{" * length, b"[1]" + b" " * (length - 3), b"\xff" * length, b"[" * length):
        path.write_bytes(good[:8] + raw + good[8 + length :])
        with pytest.raises(ValueError, match="bad safetensors header"):
            Checkpoint.open(folder)

    changes = [
        (lambda h: h["a.weight"].update(dtype="F4"), "a.weight has dtype F4, which is not supported"),
        (lambda h: h["a.weight"].update(shape=[3, 6]), "a.weight takes 60 bytes, but F32 of shape"),
        (lambda h: h["a.weight"].update(shape=[-3, -5]), "a.weight has a bad header entry"),
        (lambda h: h["a.weight"].pop("data_offsets"), "a.weight has a bad header entry"),
        (lambda h: h.update({"a.weight": 3}), "a.weight has a bad header entry"),
        (lambda h: h["a.weight"].update(data_offsets=[1 << 40, (1 << 40) + 60]), "begins at byte"),
        (lambda h: h["b.bias"].update(data_offsets=[at - 4 for at in h["b.bias"]["data_offsets"]]), "without overlaps"),
        (lambda h: h["empty"].update(shape=[0, 1 << 70]), "empty has a bad header entry"),
    ]
    for change, message in changes:
        path.write_bytes(good)
        rewrite_header(path, change)
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(folder)


ODD = [None, True, -1, 0, 3, 1.5, "5", [], {}, 1 << 40, 1 << 70, "F64", [0, 1 << 70], [1 << 33, 1 << 33], [[3, 5]]]


def test_a_header_is_read_as_the_library_reads_it(folder):
    """Entries that are changed at random: what the library takes is read alike, what it refuses is one sentence."""
    path, rng, outcomes = folder / "model.safetensors", random.Random(0), Counter()
    good = path.read_bytes()

    def change(header):
        for _ in range(rng.randint(1, 2)):
            name, other = rng.sample([n for n in header if n != "__metadata__"], 2)
            entry, part = header[name], rng.choice(["dtype", "shape", "data_offsets", "move", "swap", "drop", "all"])
            if part == "swap":
                header[name], header[other] = header[other], entry
            elif part == "drop":
                del header[name]
            elif part == "all" or not isinstance(entry, dict):
                header[name] = rng.choice(ODD)
            elif part == "move":
                far, at = rng.randint(-8, 8), entry.get("data_offsets")
                entry["data_offsets"] = (
                    [n + far for n in at] if isinstance(at, list) and at and at[0] in range(99) else 7
                )
            else:
                entry[part] = rng.choice(ODD)

    for _ in range(600):
        path.write_bytes(good)
        rewrite_header(path, change)
        try:
            expected = load_file(path)
        except (SafetensorError, ValueError, OverflowError, RuntimeError):
            with pytest.raises(ValueError, match=str(path)):
                Checkpoint.open(folder)
            outcomes["refused"] += 1
        else:
            checkpoint = Checkpoint.open(folder)
            assert checkpoint.tensors.keys() == expected.keys()
            assert all(torch.equal(checkpoint.load(name), tensor) for name, tensor in expected.items())
            outcomes["read"] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 20, outcomes


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pickle files \(pytorch_model.bin\).*convert"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_bad_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        Checkpoint.open(tmp_path)


def test_index_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ValueError, match="not a file name in this folder"):
        Checkpoint.open(tmp_path)
