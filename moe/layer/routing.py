"""Between a layer's router and its experts: what was routed, who may change it, and who only looks.

    router ─▶ Routing ─▶ stages: restrict or replace ─▶ observers: recorder, lookahead, fits ─▶ experts

Every runner passes here: packed, sequential, by compiled blocks, and coherent. Without stages routing is the router's.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor


class Routing(NamedTuple):
    """One layer's routing of one forward's tokens.

    topk_ids: int [T, K], -1 = no expert; topk_weights: [T, K]; scale_input: the weights scale each expert's input
    instead of its output (Llama 4). T may be 0.
    """

    layer: int
    topk_ids: Tensor
    topk_weights: Tensor
    scale_input: bool = False


class Stage(Protocol):
    """Changes routing: a lossy mode that has a name in the config."""

    def route(self, x: Tensor, routing: Routing) -> Routing:
        """x: [T, H], what the router saw. Layers of a forward come in order, with the same tokens."""


class Observer(Protocol):
    """Sees routing as the experts will have it."""

    def routed(self, x: Tensor, routing: Routing) -> None:
        """x: [T, H], what the router saw. It may not be kept after the forward, nor changed."""


class RoutingSeam:
    """The stages and observers of one model's layers, in the order in which they were added."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.observers: list[Observer] = []

    def through(self, x: Tensor, routing: Routing) -> Routing:
        """x: [T, H]. What the experts get."""
        for stage in self.stages:
            routing = stage.route(x, routing)
        for observer in self.observers:
            observer.routed(x, routing)
        return routing


class RoutedLayer(NamedTuple):
    """One layer's routing of one step: ids int16 [T, K], weights fp32 [T, K]."""

    topk_ids: npt.NDArray[np.int16]
    topk_weights: npt.NDArray[np.float32]


class RoutingLog:
    """Keeps what is routed until it is taken; two host syncs a layer on an accelerator."""

    def __init__(self, num_layers: int) -> None:
        self._routed: list[list[RoutedLayer]] = [[] for _ in range(num_layers)]

    def routed(self, x: Tensor, routing: Routing) -> None:
        ids = routing.topk_ids.numpy(force=True).astype(np.int16)
        weights = routing.topk_weights.detach().float().numpy(force=True)
        self._routed[routing.layer].append(RoutedLayer(ids, weights))

    def take(self) -> Sequence[RoutedLayer | None]:
        """Every layer's routing since the last call, of all forwards in their order; None where there was none."""
        routed, self._routed = self._routed, [[] for _ in self._routed]
        return [RoutedLayer(*map(np.concatenate, zip(*parts))) if parts else None for parts in routed]
