"""What a path that is no checkpoint probably is, and what to do about it."""

import json
import re
from pathlib import Path

_PICKLES = {".bin", ".pt", ".pth"}
_OF_A_MODEL = {".json", ".safetensors", ".model"}
LFS_POINTER = b"version https://git-lfs"


def check_files(folder: Path) -> None:
    """Raises ValueError for a file of a model that is a link to nothing, or a git-lfs pointer. Reads small files."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OF_A_MODEL:
            continue
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to {path.readlink()}, which is not there; download the model again")
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ValueError(f"{path} is a git-lfs pointer, not the file; run `git lfs pull` in its folder")


def why_not_a_folder(path: Path) -> str:
    """A sentence about `path`, which is no folder."""
    if path.suffix == ".gguf" and path.is_file():
        return (
            f"{path} is a GGUF file, which is not served in place; write a packed folder with "
            "`moe pack FILE.gguf OUT --config FOLDER` (FOLDER: config.json and tokenizer of the original model)"
        )
    if path.is_file():
        return f"{path} is not a folder but a file; give the folder of the Hugging Face checkpoint that it belongs to"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
        return (
            f"{path} is not a folder; if it is a name on the Hugging Face hub, download it first with "
            f"`hf download {path} --local-dir FOLDER` and give that folder"
        )
    return f"{path} is not a folder; give the folder of a Hugging Face checkpoint"


def why_no_weights(folder: Path) -> str:
    """A sentence about a folder without model.safetensors and without the index of its shards."""
    names = sorted(p.name for p in folder.iterdir())
    if "adapter_config.json" in names:
        return (
            f"{folder} holds an adapter for {_base_of(folder)}, not a model; merge it into its base with peft's "
            "merge_and_unload, save that, and give the folder"
        )
    gguf = [n for n in names if n.endswith(".gguf")]
    if gguf:
        return why_not_a_folder(folder / gguf[0])
    if any(n.startswith("consolidated") for n in names):
        return (
            f"{folder} holds only consolidated weights, in their author's own layout; download the model-*.safetensors "
            "files and model.safetensors.index.json of the same model"
        )
    if any(n.endswith(".safetensors") for n in names):
        shards = [n for n in names if n.endswith(".safetensors")]
        return (
            f"{folder} has {shards[0]} but no model.safetensors.index.json, which says where each tensor is; download "
            "that file too"
        )
    pickles = [n for n in names if Path(n).suffix in _PICKLES]
    if pickles:
        return (
            f"{folder} holds only pickle files ({pickles[0]}), which can run code when read; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    return f"{folder} has neither model.safetensors nor model.safetensors.index.json"


def _base_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"
