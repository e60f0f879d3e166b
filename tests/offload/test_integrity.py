"""A flipped bit, a file of another model, two writers of one folder: each is an error that says which and where."""

import hashlib
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pack import opened

from moe.offload.check import check_folder
from moe.offload.layout import ALIGNMENT
from moe.offload.pack import pack
from moe.offload.stores import FileStore, MmapStore, RamStore, aligned_bytes
from tests.families import tiny_checkpoint
from tests.patience import PATIENCE_S


def packed(folder, seed=0):
    source = tiny_checkpoint("mixtral", folder / "original")
    if seed:
        tensors = load_file(source / "model.safetensors")
        save_file({k: v + seed for k, v in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    return pack(*opened(source, "mixtral"), folder / "packed")


def flip(path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_is_named(tmp_path):
    folder = packed(tmp_path)
    checkpoint, index = opened(folder, "mixtral")
    assert list(check_folder(checkpoint, index)) == []
    segment = index.segments(1, 3)[0]
    flip(segment.path, segment.offset + 777)
    blob = aligned_bytes(index.layouts[1].nbytes)
    for store in (FileStore(index), FileStore(index, direct=True), MmapStore(index)):
        store.read_into(1, 2, blob)
        with pytest.raises(OSError, match=r"layer 1, expert 3: .*damaged or belongs.*experts-00001\.safetensors"):
            store.read_into(1, 3, blob)
    assert FileStore(index, check="never").read_into(1, 3, blob) == index.layouts[1].nbytes
    with pytest.raises(OSError, match="layer 1, expert 3"):
        RamStore.read_from(FileStore(index))
    (said,) = check_folder(checkpoint, index)
    assert "layer 1, expert 3" in said


def test_when_reads_are_checked(tmp_path):
    """The first read of an expert finds damage; a later one only where every read is checked."""
    _, index = opened(packed(tmp_path), "mixtral")
    segment, blob = index.segments(0, 0)[0], aligned_bytes(index.layouts[0].nbytes)
    stores = {when: FileStore(index, direct=False, check=when) for when in ("first", "always")}
    for store in stores.values():
        store.read_into(0, 0, blob)
    flip(segment.path, segment.offset)
    stores["first"].read_into(0, 0, blob)
    with pytest.raises(OSError, match="layer 0, expert 0"):
        stores["always"].read_into(0, 0, blob)


def test_a_layer_file_of_another_model(tmp_path):
    folder, other = packed(tmp_path / "a"), packed(tmp_path / "b", seed=1)
    (folder / "experts-00002.safetensors").write_bytes((other / "experts-00002.safetensors").read_bytes())
    _, index = opened(folder, "mixtral")
    with pytest.raises(OSError, match=r"layer 2, expert 0: .*another model.*experts-00002"):
        FileStore(index).read_into(2, 0, aligned_bytes(index.layouts[2].nbytes))


def test_missing_checksums_and_damaged_dense_tensors(tmp_path):
    folder = packed(tmp_path)
    flip(folder / "dense.safetensors", ALIGNMENT + 5)
    (said,) = check_folder(*opened(folder, "mixtral"))
    assert "is not what was packed" in said
    about = json.loads((folder / "packed.json").read_text())
    about["checksums"][1].pop()
    (folder / "packed.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="7 checksums of layer 1 are missing"):
        opened(folder, "mixtral")


def test_original_folders_are_checked_as_far_as_can_be(tmp_path):
    folder = tiny_checkpoint("qwen3_moe", tmp_path)
    assert list(check_folder(*opened(folder, "qwen3_moe"))) == []
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    path = folder / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (notes / "model.safetensors.metadata").write_text(f"0123\n{digest}\n1.0\n")
    assert list(check_folder(*opened(folder, "qwen3_moe"))) == []
    flip(path, path.stat().st_size - 3)
    assert any("is not the file that was downloaded" in said for said in check_folder(*opened(folder, "qwen3_moe")))
    tensors = load_file(path)
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][2, 3] = torch.nan
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    said = list(check_folder(*opened(folder, "qwen3_moe")))
    assert any("tensor model.norm.weight holds numbers that are not finite" in s for s in said)
    assert any("layer 1, expert 5: gate_up holds numbers" in s for s in said)


def test_one_writer_at_a_time(tmp_path):
    arguments = opened(tiny_checkpoint("mixtral", tmp_path / "original"), "mixtral")
    began, goes_on, failed = threading.Event(), threading.Event(), []

    def wait(done, total):
        began.set()
        goes_on.wait(PATIENCE_S)

    writer = threading.Thread(target=pack, args=(*arguments, tmp_path / "packed"), kwargs={"progress": wait})
    writer.start()
    assert began.wait(PATIENCE_S)
    try:
        pack(*arguments, tmp_path / "packed")
    except ValueError as error:
        failed.append(str(error))
    goes_on.set()
    writer.join()
    assert "is being packed by another process" in failed[0]
    _, index = opened(tmp_path / "packed", "mixtral")
    RamStore.read_from(FileStore(index))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "packed"]
    (tmp_path / ".again.partial").mkdir()  # what a killed process leaves
    pack(*arguments, tmp_path / "again")
