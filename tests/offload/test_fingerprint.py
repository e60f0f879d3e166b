"""Folders of the same weights have one fingerprint, however they are cut into files; others have another."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.models.blueprint import read_blueprint
from moe.offload.checkpoint import Checkpoint
from moe.offload.fingerprint import fingerprint
from moe.offload.pack import pack
from tests.families import tiny_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def of(folder) -> str:
    return fingerprint(Checkpoint.open(folder))


def packed(folder, out) -> str:
    blueprint = read_blueprint(folder)
    return of(pack(blueprint.checkpoint, blueprint.index, out))


def change_tensors(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()  # the loaded tensors map it
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, path)


def change_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values, indent=7))


def test_copies_shards_and_who_wrote_them_are_the_same(original, folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name].clone() for name in own}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    change_config(folder, transformers_version="0.0.1", _name_or_path="elsewhere")
    assert of(folder) == of(original)
    assert len(of(folder)) == 16


@pytest.mark.parametrize("part", ["embed_tokens", "gate.weight", "experts", "q_proj", "norm", "lm_head"])
def test_other_values_of_any_kind_of_tensor_are_seen(original, folder, part):
    seen = []

    def change(name, tensor):
        seen.extend([name] if part in name else [])
        return tensor * 1.01 if part in name else tensor

    change_tensors(folder, change)
    assert seen
    assert of(folder) != of(original)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_differs_is_seen(original, folder, layer):
    """Of few layers each is looked at, of many the first and the last."""
    change_tensors(folder, lambda name, tensor: tensor * 1.01 if f"layers.{layer}." in name else tensor)
    assert of(folder) != of(original)


@pytest.mark.parametrize("num_layers", [9, 12, 32, 101])
def test_of_many_layers_the_first_and_the_last_are_looked_at(num_layers, tmp_path):
    """Whatever their numbers sort like as text: a model that is tuned further may keep all but its last layers."""

    def written(changed: int | None) -> str:
        layers = {
            f"model.layers.{n}.mlp.gate.weight": torch.full([4, 4], n + (n == changed) / 2) for n in range(num_layers)
        }
        save_file(layers, tmp_path / "model.safetensors")
        return of(tmp_path)

    seen = [n for n in range(num_layers) if written(n) != written(None)]
    assert (seen[0], seen[-1]) == (0, num_layers - 1)
    assert max(b - a for a, b in pairwise(seen)) <= -(-num_layers // 7)


def test_another_config_is_seen(original, folder):
    change_config(folder, rms_norm_eps=1e-3)
    assert of(folder) != of(original)


def test_one_value_of_a_packed_expert_is_seen(original, folder, tmp_path):
    before = packed(original, tmp_path / "packed")
    assert before != of(original)
    assert before == packed(folder, tmp_path / "again")
    expert = next(name for name in load_file(folder / "model.safetensors") if "experts" in name)

    def change(name, tensor):
        if name == expert:
            tensor = tensor.clone()
            tensor.view(-1)[0] += 1
        return tensor

    change_tensors(folder, change)
    assert packed(folder, tmp_path / "changed") != before
