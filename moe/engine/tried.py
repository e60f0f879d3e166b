"""One token through the dense weights of a model whose experts are not there yet: what KV and dispatch will take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.engine.runner import run_a_token
from moe.models.blueprint import Blueprint


class TriedToken(NamedTuple):
    """What a forward of one token showed. kv: its keys and values by layer, none where it does not run packed.

    dispatch_shapes: (rows per token, K of a row) of every layer's experts.
    """

    kv: list[tuple[Tensor, Tensor]]
    dispatch_shapes: list[tuple[int, int]]

    @property
    def kv_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for layer in self.kv for t in layer)


def try_a_token(model: Any, blueprint: Blueprint, is_packed: bool, is_parallel: bool) -> TriedToken:
    """Runs one token with experts that return zeros, where anyone needs to know what it shows."""
    kv: list[tuple[Tensor, Tensor]] = []
    with _zero_experts(model, blueprint) as shapes:
        if is_packed:
            kv = run_a_token(model)
        elif is_parallel:
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    return TriedToken(kv, list(shapes))


@contextmanager
def _zero_experts(model: Any, blueprint: Blueprint) -> Iterator[Sequence[tuple[int, int]]]:
    """Inside this block experts return zeros, so that the dense part can run before the slots exist.

    Yields each layer's (rows per token, K of a row) as experts are dispatched, filled by the first forward.
    """
    modules = [model.get_submodule(site.module) for site in blueprint.index.sites]
    shapes = [(1, 1)] * len(modules)

    def zeros(layer: int) -> Any:
        def compute(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, scale_input: bool) -> Tensor:
            top_k = topk_ids.shape[1]
            shapes[layer] = (top_k, 1) if scale_input else (1, top_k)
            return torch.zeros_like(x)

        return compute

    for layer, module in enumerate(modules):
        module.compute = zeros(layer)
    try:
        yield shapes
    finally:
        for module in modules:
            module.compute = None
