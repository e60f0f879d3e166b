"""What `moe info` says of a model, from its blueprint."""

from moe.models.blueprint import Blueprint
from moe.models.neighbours import why_not_packed
from moe.offload.requantise import sizes
from moe.summary import Layer, Rounded, Summary


def summarise(blueprint: Blueprint) -> Summary:
    """Reads no weights."""
    index = blueprint.index
    layers = zip(index.sites, index.layouts)
    return Summary(
        architecture=f"{type(blueprint.skeleton).__name__} ({blueprint.config.model_type})",
        max_context=blueprint.max_context,
        dense_bytes=blueprint.dense_bytes,
        decoded=blueprint.quantised.labels(blueprint.coded_dense),
        why_alone=why_not_packed(blueprint.skeleton, blueprint.max_context),
        layers=tuple(Layer(s.num_experts, s.hidden_size, s.intermediate_size, each.nbytes) for s, each in layers),
        top_k=blueprint.top_k,
        expert_formats=blueprint.expert_formats,
        is_packed=blueprint.checkpoint.packed is not None,
        rounded={name: Rounded(*found) for name, found in sizes(index).items()} if index.sites else {},
    )
