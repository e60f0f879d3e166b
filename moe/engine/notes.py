"""What a user should know about how a model is served, before it runs."""

import re
from collections.abc import Sequence

from moe.config import EngineConfig
from moe.models.blueprint import Blueprint
from moe.models.families import why_resident
from moe.models.load import unread_keys
from moe.offload.nested import describe

_LAYER = re.compile(r"(.*?\blayers\.)(\d+)\.")


def lossy_modes(config: EngineConfig) -> list[str]:
    """What this run was told to do that changes what the model says."""
    said = []
    if config.routing.pregate != "off":
        said += [f"routing.pregate={config.routing.pregate} changes what the model says; `moe evaluate` measures it"]
    if config.offload.bits == "upgrade":
        said += ["offload.bits=upgrade lets an answer depend on what was asked before it; prefixes are not shared"]
    return said


def notes_on(blueprint: Blueprint, dense: str, own: Sequence[Sequence[int]] | None = None) -> list[str]:
    """What a user should know about how this model is served. own: a rank's experts, by layer; None = all."""
    text = blueprint.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    declared = max((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), default=0)
    note = blueprint.format_note(dense)
    formats = list(filter(None, (note, describe(blueprint.index, own))))
    formats += _layers_not_read(blueprint) + _tensors_not_read(blueprint)
    if (blueprint.folder / "adapter_config.json").is_file():
        formats += [
            "the adapter beside the model (adapter_config.json) is not used; merge it with peft if it should be"
        ]
    if blueprint.experts:
        return formats
    if declared > 1:
        return formats + [
            f"{blueprint.config.model_type} keeps its {declared} experts in modules that cannot be served from slots "
            f"({why_resident(blueprint.skeleton)}): the whole model is in memory"
        ]
    return formats + ["this model is dense: it has no experts, the whole model is in memory"]


def _tensors_not_read(blueprint: Blueprint) -> list[str]:
    names = unread_keys(blueprint)
    if not names:
        return []
    said = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
    return [
        f"{said} of the files' layers not used, first {names[0]}: the model that config.json describes has no such "
        "weight (transformers leaves them out, too); mend the config if it should"
    ]


def _layers_not_read(blueprint: Blueprint) -> list[str]:
    """Layers beside those that have the experts, beyond the number that the config gives."""
    count = getattr(blueprint.config.get_text_config(), "num_hidden_layers", None)
    found = [_LAYER.match(name) for name in blueprint.index.expert_keys]
    stems = tuple({match[1] for match in found if match is not None})
    numbers = {
        int(match[2]) for match in map(_LAYER.match, blueprint.checkpoint.tensors) if match and match[1] in stems
    }
    if not isinstance(count, int) or not numbers or max(numbers) < count:
        return []
    beyond = sorted(number for number in numbers if number >= count)
    said = f"{beyond[0]}" if len(beyond) == 1 else f"{beyond[0]} to {beyond[-1]}"
    return [
        f"layers {said} of the files are not read, config.json counts {count} (num_hidden_layers); mend it if they "
        "are not those that predict further tokens"
    ]
