"""Paths that are no checkpoint are recognised, and the sentence says what to do."""

import json
import shutil
from pathlib import Path

import pytest

from moe.offload.checkpoint import Checkpoint
from tests.moe.moe_cases import TINYMOE

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
CASES = {
    "adapter": (
        {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/base"})},
        "an adapter for org/base",
    ),
    "adapter, damaged": ({"adapter_config.json": "{"}, "an adapter for another model"),
    "gguf": ({"model-Q4_K_M.gguf": "GGUF"}, r"model-Q4_K_M\.gguf is a GGUF file.*moe pack FILE\.gguf"),
    "consolidated": ({"consolidated.safetensors": ""}, "only consolidated weights"),
    "no index": ({"model-00001-of-00002.safetensors": ""}, r"no model\.safetensors\.index\.json"),
    "pickle": ({"pytorch_model.bin": ""}, "only pickle files"),
    "empty": ({"config.json": "{}"}, "has neither"),
    "pointer": ({"model.safetensors": POINTER}, "is a git-lfs pointer.*git lfs pull"),
    "short": ({"model.safetensors": "abc"}, "not a whole safetensors file"),
}


@pytest.mark.parametrize("case", CASES)
def test_folders(case, tmp_path):
    files, message = CASES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer.model"])
def test_any_file_of_a_model_that_is_not_there_is_named(name, tmp_path):
    """A cache whose blobs were deleted, and a clone without its large files."""
    folder = shutil.copytree(TINYMOE, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/none")
    with pytest.raises(ValueError, match=rf"{name} is a link to ../blobs/none, which is not there"):
        Checkpoint.open(folder)
    (folder / name).unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer"):
        Checkpoint.open(folder)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").write_text("GGUF")
    (tmp_path / "y.safetensors").write_text("")
    for path, message in (
        ("Qwen/Qwen3-30B-A3B", "hf download Qwen/Qwen3-30B-A3B --local-dir"),
        ("x.gguf", "is a GGUF file"),
        ("y.safetensors", "not a folder but a file"),
        ("./nowhere", "is not a folder; give the folder"),
        (str(tmp_path / "a" / "b"), "is not a folder; give the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(Path(path))
