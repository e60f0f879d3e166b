"""What a user should know about how a model is served, before it runs."""

from moe.config import EngineConfig
from moe.models.blueprint import Blueprint
from moe.models.families import why_resident
from moe.offload.nested import describe


def lossy_modes(config: EngineConfig) -> list[str]:
    """What this run was told to do that changes what the model says."""
    if config.routing.pregate == "off":
        return []
    return [f"routing.pregate={config.routing.pregate} changes what the model says; `moe evaluate` measures how much"]


def notes_on(blueprint: Blueprint, dense: str) -> list[str]:
    """What a user should know about how this model is served."""
    text = blueprint.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    declared = max((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), default=0)
    note = blueprint.format_note(dense)
    formats = list(filter(None, (note, describe(blueprint.index))))
    if blueprint.experts:
        return formats
    if declared > 1:
        return formats + [
            f"{blueprint.config.model_type} keeps its {declared} experts in modules that cannot be served from slots "
            f"({why_resident(blueprint.skeleton)}): the whole model is in memory"
        ]
    return formats + ["this model is dense: it has no experts, the whole model is in memory"]
