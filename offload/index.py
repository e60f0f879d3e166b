"""Which bytes of which file make up one expert's blob: names to matrices to segments."""

from collections.abc import Sequence
from typing import Any

from moe.offload.checkpoint import Checkpoint
from moe.offload.conversions import Conversions, Weight
from moe.offload.expert_parts import layer_parts
from moe.offload.formats.find import Found, find_matrices
from moe.offload.formats.stored import Quantisation, StoredMatrix
from moe.offload.layout import ExpertSite
from moe.offload.packed import index_packed
from moe.offload.segments import ExpertIndex


def index_experts(
    checkpoint: Checkpoint,
    sites: Sequence[ExpertSite],
    transforms: Sequence[Any] = (),
    base_model_prefix: str = "",
    found: Found | None = None,
) -> ExpertIndex:
    """Finds every expert of `sites` in `checkpoint`, original or packed.

    transforms: `transformers.conversion_mapping.get_model_conversion_mapping(model)` of the model on the meta device;
    base_model_prefix: the model's own ("model"), for checkpoints saved without it. Neither is used for a packed folder.
    found: what of the checkpoint is quantised; None: looked for here, as a folder without configuration.
    Raises ValueError for missing, misshapen or mixed expert tensors, naming the layer and expert.
    """
    if not sites:
        return ExpertIndex(sites=(), layouts=(), expert_keys=frozenset(), parts=())
    if checkpoint.packed is not None:
        return index_packed(checkpoint, sites)
    if found is None:
        found = find_matrices(checkpoint.tensors, Quantisation())
    weights: dict[str, Weight] = {k: info for k, info in checkpoint.tensors.items() if k not in found.companions}
    weights |= found.matrices
    stacks = Conversions(weights, found.problems, sites, transforms, base_model_prefix).stacks()
    made = [layer_parts(layer, site, stack) for layer, (site, stack) in enumerate(zip(sites, stacks))]
    used = [view.info for stack in stacks for each in stack.values() for views in each for view in views]
    coded = {key for info in used if isinstance(info, StoredMatrix) for key in info.keys}
    places = {(info.path, info.offset) for info in used if not isinstance(info, StoredMatrix)}
    return ExpertIndex(
        sites=tuple(sites),
        layouts=tuple(layout for layout, _ in made),
        expert_keys=frozenset(coded | {k for k, i in checkpoint.tensors.items() if (i.path, i.offset) in places}),
        parts=tuple(parts for _, parts in made),
    )
