"""Models of several modalities, served for text: what only other inputs reach is never built nor read.

A composite model keeps its language model beside vision towers, audio towers and projectors. A prompt of tokens runs
through the language model alone, so the rest is replaced by modules without weights, which refuse to be called.
"""

from typing import Any

import torch
from torch import nn

CODE_OF_MODELS = ("transformers.models.", "transformers_modules.")  # modules whose classes loading replaces by name


class Absent(nn.Module):
    """In front of a module that text does not reach: keeps its attributes and, until `prune`, hollow children.

    The model that it stands in may reach into it while it is built.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            super().__init__(*args, **kwargs)
        hollow(self)

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ValueError(f"{type(self).__name__} is for images, sound or video, this model is served for text only")


def absent_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(original.__name__, (Absent, original), {})


def hollow(module: nn.Module) -> None:
    """Makes of a module on the meta device what its absent class would be."""
    for one in module.modules():
        one._parameters.clear()
        one._buffers.clear()
        setattr(one, "_is_hf_initialized", True)  # noqa: B010, nn.Module's types know no flags


def prune(model: nn.Module) -> None:
    """Drops what is left inside the absent modules of a model that is built."""
    for module in [one for one in model.modules() if isinstance(one, Absent)]:
        module._modules.clear()


def is_patchable(cls: type[nn.Module]) -> bool:
    """Whether loading finds the class by its name in a module of transformers' (or of a folder's own code)."""
    return cls.__module__.startswith(CODE_OF_MODELS)


def beside_the_text(model: Any) -> dict[str, type[nn.Module]]:
    """Modules, by name, that a composite model has weights in and text does not reach; empty for a model of text.

    model: built on the meta device. They are the largest modules that are neither on the way to the language model or
    to its embeddings and head, nor in them, of classes that nothing kept has too.
    """
    if model.config.get_text_config() is model.config or model.config.is_encoder_decoder:
        return {}
    parts = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    names = {module: name for name, module in model.named_modules()}
    if model in parts or not all(part in names for part in parts):
        return {}
    kept = [names[part] for part in parts]
    shared = {type(module) for part in parts for module in part.modules()}
    found: dict[str, type[nn.Module]] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = prefix + child_name
            if any(one == name for one in kept):
                continue
            if any(one.startswith(name + ".") for one in kept):
                visit(child, name + ".")
            elif any(True for _ in child.parameters()) and is_patchable(type(child)) and type(child) not in shared:
                found[name] = type(child)

    visit(model, "")
    return found
