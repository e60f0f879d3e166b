"""Between a layer's router and its experts: what was routed, of whose tokens, who may change it, who only looks.

    forward begins ─▶ StepContext
    router ─▶ Routing ─▶ stages: restrict, replace, remap ─▶ observers: recorder, lookahead, turns, fits ─▶ experts

Every runner passes here: packed, sequential, by compiled blocks, coherent, and forwards that only other ranks have.
Without stages routing is the router's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

NOBODY = -1  # tokens of no request


class Span(NamedTuple):
    """Tokens of one sequence that are side by side in a forward: places [start, end), of which [0, num_prompt) prompt.

    sequence: the number of its request, `NOBODY` if there is none; owner: the rank that numbers it.
    """

    sequence: int
    start: int
    end: int
    num_prompt: int
    owner: int = 0


@dataclass(frozen=True, slots=True)
class StepContext:
    """Whose tokens the rows of a forward are, in their order. Of an encoder-decoder: the decoder's."""

    spans: tuple[Span, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return [span.end - span.start for span in self.spans]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def phase_of_token(self) -> npt.NDArray[np.uint8]:
        """[T]: 0 of a prompt, 1 of an answer, as a trace has it."""
        phases = [np.arange(span.start, span.end) >= span.num_prompt for span in self.spans]
        return np.concatenate([np.empty(0, np.uint8), *phases]).astype(np.uint8)

    def only(self, spans: Iterable[int]) -> "StepContext":
        """Of these spans alone, by their numbers."""
        return StepContext(tuple(self.spans[n] for n in spans))


def on_host(tensor: Tensor) -> npt.NDArray[Any]:
    """Its numbers: on a CPU at once, ten times as fast as with `force`; elsewhere by a host sync."""
    return tensor.numpy() if tensor.is_cpu else tensor.numpy(force=True)


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

    def route(self, x: Tensor, routing: Routing, step: StepContext) -> Routing:
        """x: [T, H], what the router saw. Layers of a forward come in order, with the same tokens."""


class Observer(Protocol):
    """Sees routing as the experts will have it."""

    def begin(self, step: StepContext) -> None:
        """A forward begins; the one before may have been interrupted."""

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        """x: [T, H], what the router saw. It may not be kept after the forward, nor changed; ids and weights are new in
        every forward and nobody writes to them, so that they may be kept."""


class RoutingSeam:
    """The stages and observers of one model's layers, in the order in which they were added."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.observers: list[Observer] = []
        self._step = StepContext()

    def begin(self, step: StepContext) -> None:
        """A forward of these tokens begins."""
        self._step = step
        for observer in self.observers:
            observer.begin(step)

    def through(self, x: Tensor, routing: Routing, step: StepContext | None = None) -> Routing:
        """x: [T, H]. What the experts get. step: of these rows, None = of the forward that has begun."""
        step = self._step if step is None else step
        for stage in self.stages:
            routing = stage.route(x, routing, step)
        for observer in self.observers:
            observer.routed(x, routing, step)
        return routing


class RoutedLayer(NamedTuple):
    """One layer's routing of one forward: ids int16 [T, K], weights fp32 [T, K]."""

    topk_ids: npt.NDArray[np.int16]
    topk_weights: npt.NDArray[np.float32]


class WholeForwards:
    """An observer that hands over a forward's routing when its last layer was routed; an interrupted one's, never.

    Two host syncs a layer on an accelerator. Raises ValueError where a layer sees other rows than the forward's tokens.
    """

    def __init__(self, num_layers: int, take: Callable[[StepContext, Sequence[RoutedLayer]], None]) -> None:
        self.num_layers, self._take = num_layers, take
        self._layers: list[RoutedLayer] = []

    def begin(self, step: StepContext) -> None:
        self._layers = []

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        if routing.layer != len(self._layers) or len(routing.topk_ids) != step.num_tokens:
            raise ValueError(
                f"layer {routing.layer} routed {len(routing.topk_ids)} rows as number {len(self._layers)} of a step of "
                f"{step.num_tokens} tokens; cannot be traced"
            )
        ids = routing.topk_ids.numpy(force=True).astype(np.int16)
        self._layers.append(RoutedLayer(ids, routing.topk_weights.detach().float().numpy(force=True)))
        if len(self._layers) == self.num_layers:
            layers, self._layers = self._layers, []
            self._take(step, layers)
