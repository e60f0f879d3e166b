"""A packed folder holds the same bits; a pack that is interrupted keeps the layers that are finished, or nothing."""

import json
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.conversion_mapping import get_model_conversion_mapping

from moe.kernels.weights import Activation
from moe.offload.cache import ExpertCache
from moe.offload.checkpoint import Checkpoint
from moe.offload.index import index_experts
from moe.offload.pack import pack
from moe.offload.requantise import target_format
from moe.offload.rounded_dense import RoundedDense
from moe.offload.stores import FileStore, MmapStore, RamStore, aligned_bytes, bytes_moved
from tests.families import (
    IN_SLOTS,
    expert_parameters,
    expert_sites,
    model_class,
    reference_model,
    tiny_checkpoint,
    tiny_config,
)


def opened(folder, family):
    with torch.device("meta"):
        model = model_class(family)(tiny_config(family))
    checkpoint = Checkpoint.open(folder)
    transforms = get_model_conversion_mapping(model)
    return checkpoint, index_experts(checkpoint, expert_sites(model), transforms, model.base_model_prefix)


@pytest.mark.parametrize("family", IN_SLOTS)
def test_packed_holds_the_same_bits(family, tmp_path):
    source = tiny_checkpoint(family, tmp_path / "original", max_shard_size="60KB")
    (source / "tokenizer.json").write_text("{}")
    (source / "training_args.bin").write_text("a pickle")
    checkpoint, index = opened(source, family)
    reports = []
    folder = pack(checkpoint, index, tmp_path / "out" / "packed", progress=lambda *at: reports.append(at))
    assert folder == tmp_path / "out" / "packed"
    assert list(folder.parent.iterdir()) == [folder]
    assert reports[-1][0] == reports[-1][1] > 0
    assert reports == sorted(reports)

    packed_checkpoint, packed = opened(folder, family)
    assert packed.layouts == index.layouts
    assert packed.dtype == index.dtype
    original = RamStore.read_from(FileStore(index, direct=False))
    for store in (MmapStore(packed), FileStore(packed, direct=False), FileStore(packed, direct=True)):
        again = RamStore.read_from(store)
        assert all(torch.equal(a, b) for a, b in zip(original.blobs, again.blobs))
    for layer, site in enumerate(packed.sites):
        for expert in range(site.num_experts):
            (segment,) = packed.segments(layer, expert)
            assert segment.offset % 4096 == segment.nbytes % 4096 == 0

    dense = set(checkpoint.tensors) - index.expert_keys
    assert set(packed_checkpoint.tensors) - packed.expert_keys == dense
    for name in dense:
        assert torch.equal(checkpoint.load(name), packed_checkpoint.load(name)), name
        assert checkpoint.load(name).dtype == packed_checkpoint.load(name).dtype
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "training_args.bin").exists()
    assert not (folder / "model.safetensors.index.json").exists()


def test_packed_files_are_ordinary_safetensors(tmp_path):
    """The safetensors library reads them, and what it reads equals what transformers loads."""
    source = tiny_checkpoint("gpt_oss", tmp_path / "original", torch.bfloat16)
    model = reference_model("gpt_oss", source, torch.bfloat16)
    folder = pack(*opened(source, "gpt_oss"), tmp_path / "packed")
    _, index = opened(folder, "gpt_oss")
    for layer, (site, layout) in enumerate(zip(index.sites, index.layouts)):
        blobs = load_file(folder / f"experts-{layer:05d}.safetensors")[f"packed.experts.{layer}"]
        for expert in range(site.num_experts):
            expected = expert_parameters(model, site, expert)
            pieces = [layout.piece(name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")]
            for piece, tensor in zip(pieces, expected):
                assert torch.equal(layout.view(blobs, piece)[expert], tensor)
    assert load_file(folder / "dense.safetensors").keys() == {
        n for n in Checkpoint.open(source).tensors if "experts" not in n
    }


def test_reads_from_packed_files_go_straight_into_slots(tmp_path):
    source = tiny_checkpoint("qwen3_moe", tmp_path / "original")
    _, index = opened(pack(*opened(source, "qwen3_moe"), tmp_path / "packed"), "qwen3_moe")
    store = FileStore(index, direct=True)
    cache = ExpertCache(store, 5)
    for layer in range(3):
        for wave in cache.acquire(layer, list(range(8))):
            assert len(wave.experts) <= 5
    assert sum(s.bytes_read for s in cache.stats) == 24 * index.layouts[0].nbytes
    assert not any(map(len, store._buffers.free))  # no detour


@pytest.fixture
def packed(tmp_path):
    return pack(*opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral"), tmp_path / "packed")


def test_bad_requests(packed, tmp_path):
    checkpoint, index = opened(tmp_path / "original", "mixtral")
    with pytest.raises(ValueError, match="exists already; remove it"):
        pack(checkpoint, index, packed)
    with pytest.raises(ValueError, match="is packed already"):
        pack(*opened(packed, "mixtral"), tmp_path / "twice")


def test_packed_for_another_model(packed):
    checkpoint, index = opened(packed, "mixtral")
    sites = list(index.sites)
    with pytest.raises(ValueError, match="packed for 3 layers of experts, the model has 2"):
        index_experts(checkpoint, sites[:2])
    sites[1] = replace(sites[1], intermediate_size=30)
    with pytest.raises(ValueError, match="they differ from layer 1 on"):
        index_experts(checkpoint, sites)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=99), "version 99, this program reads 2"),
        (lambda d: d["layers"][1]["formats"][0].update(dtype="F64"), "differ from layer 1 on"),
        (lambda d: d["layers"][1]["formats"][1].update(num_groups=0.0), "differ from layer 1 on"),
        (lambda d: d["layers"][2]["pieces"][1].reverse(), "differ from layer 2 on"),
        (lambda d: d["files"].remove("experts-00001.safetensors"), r"packed\.experts\.1 is missing"),
        (lambda d: d["files"].append("experts-00009.safetensors"), "shard experts-00009.safetensors is missing"),
        (lambda d: d["files"].append("../x"), "not a file name"),
        (lambda d: d.pop("files"), "version 2"),
    ],
)
def test_damaged_description(packed, change, message):
    path = packed / "packed.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        opened(packed, "mixtral")


def test_truncated_packed_file(packed):
    path = packed / "experts-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"experts-00001\.safetensors is truncated"):
        opened(packed, "mixtral")


def test_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    arguments = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(OSError, match=r"packing needs .* KiB, 5 B are free; nothing was written"):
        pack(*arguments, tmp_path / "packed")
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


class Killed(BaseException):
    """Nobody catches it: what it leaves is what SIGKILL leaves."""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Inputs:
    """Of the experts of one layer none but the first was asked."""

    def inputs(self, layer, expert):
        return torch.arange(72.0).sin().view(2, 36)[: 2 * (expert == 0)] * (layer + 1)

    def activation(self, layer):
        return Activation(kind="silu", gated=True, interleaved=False)


HOW = {
    "as it is": lambda checkpoint: {},
    "int4": lambda checkpoint: {"experts": target_format("int4", None), "calibration": Inputs()},
    "nested": lambda checkpoint: {
        "experts": target_format("nested", None),
        "calibration": Inputs(),
        "dense": RoundedDense(checkpoint, ["model.layers.0.self_attn.q_proj.weight"], "int8"),
    },
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, OSError])
def test_a_pack_that_is_interrupted_anywhere_goes_on_from_its_finished_layers(how, error, tmp_path, monkeypatch):
    checkpoint, index = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    whole, parts = contents(pack(checkpoint, index, tmp_path / "whole", **HOW[how](checkpoint))), 0
    reads, read_into = [], FileStore.read_into

    def counted(store, layer, expert, out):
        reads.append((layer, expert))
        return read_into(store, layer, expert, out)

    monkeypatch.setattr(FileStore, "read_into", counted)
    num_experts, out = index.sites[0].num_experts, tmp_path / "packed"
    for stops_after in (1, 1, num_experts - 1, 2 * num_experts + 1, 1, 5):  # experts of each call
        begun = len(reads)

        def stop(done, total, at=begun + stops_after):
            if len(reads) == at:
                raise error

        with pytest.raises(error) as caught:
            pack(checkpoint, index, out, progress=stop, **HOW[how](checkpoint))
        assert not out.exists()
        assert reads[begun] == (parts, 0)  # what was finished is not read again
        parts += stops_after // num_experts
        if error is not Killed:
            left = f"{parts} of 3 layers are kept" if parts else "the unfinished folder was removed"
            assert left in str(caught.value)
            assert (tmp_path / ".packed.partial").exists() == bool(parts)
    begun, calls = len(reads), []
    pack(checkpoint, index, out, progress=lambda *at: calls.append(at), **HOW[how](checkpoint))
    assert {layer for layer, _ in reads[begun:]} == {2}
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)
    assert contents(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "packed", "whole"]


def interrupted(arguments, out, **how):
    """One layer is finished."""

    def stop(done, total):
        if done > total // 2:
            raise Killed

    with pytest.raises(Killed):
        pack(*arguments, out, progress=stop, **how)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "experts-00000.safetensors").unlink(),
        lambda folder: (folder / "experts-00000.safetensors").write_bytes(b""),
        lambda folder: (folder / "experts-00000.safetensors").open("r+b").write(b"\1"),
        lambda folder: (folder / "journal.jsonl").unlink(),
        lambda folder: (folder / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes()[:-9]),
        lambda folder: (folder / "journal.jsonl").write_bytes(b"\0" * 99 + b"\n"),
        lambda folder: (folder / "tokenizer.json").write_text("of another model"),
    ],
)
def test_what_is_kept_is_compared_with_its_checksums(spoil, tmp_path):
    arguments = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    whole = contents(pack(*arguments, tmp_path / "whole"))
    interrupted(arguments, tmp_path / "packed")
    spoil(tmp_path / ".packed.partial")
    assert contents(pack(*arguments, tmp_path / "packed")) == whole


def test_another_request_begins_again(tmp_path):
    arguments = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    how = {"experts": target_format("int8", None)}
    whole = contents(pack(*arguments, tmp_path / "whole", **how))
    interrupted(arguments, tmp_path / "packed")
    assert contents(pack(*arguments, tmp_path / "packed", **how)) == whole


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_a_write_that_fails(limit, tmp_path):
    """The kernel itself refuses writes above a file size, as a full disk does."""
    arguments = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"packing stopped \(File too large\).*the unfinished folder was removed"):
            pack(*arguments, tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["original"]


def test_an_expert_in_parts_is_the_expert(tmp_path, monkeypatch):
    """One part a read, the last may be shorter; a flipped bit is found when the last part is there."""
    checkpoint, index = opened(tiny_checkpoint("qwen3_moe", tmp_path / "original"), "qwen3_moe")
    _, packed = opened(pack(checkpoint, index, tmp_path / "packed"), "qwen3_moe")
    whole, nbytes = RamStore.read_from(FileStore(packed, direct=False)), packed.layouts[0].nbytes
    for part, direct in ((4096, True), (12288, True), (1 << 20, True), (4096, False)):
        monkeypatch.setattr("moe.offload.stores.PART_BYTES", part)
        out = aligned_bytes(nbytes)
        moved = []
        assert bytes_moved(FileStore(packed, direct=direct).read_parts(0, 1, out), moved.append) == nbytes
        assert moved == [*range(part, nbytes, part)]
        assert torch.equal(out, whole.blobs[0][1])
    (segment,) = packed.segments(0, 1)
    with segment.path.open("r+b") as file:
        file.seek(segment.offset)
        byte = file.read(1)[0]
        file.seek(segment.offset)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setattr("moe.offload.stores.PART_BYTES", 4096)
    with pytest.raises(OSError, match="layer 0, expert 1"):
        bytes_moved(FileStore(packed, direct=True).read_parts(0, 1, aligned_bytes(nbytes)))
