"""Forecasts of coming layers' routing: ridge regressions from what a layer's router sees, in closed form.

    x_l [H] ─▶ scores of layer l + d [E]: the logits that its router will have, or where these do not decide, its choice

One regression per layer and distance, W = (AᵀA + λI)⁻¹ AᵀY with A = [x, 1]; only sums are kept, so that text streams
through. The residual's spread says how sure a score is. Cf. Pre-gated MoE (ISCA 2024), whose pre-gates are trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.layer.routers import PlainRouter
from moe.layer.routing import Routing, StepContext
from moe.placement.written import written_whole

Kind = Literal["logits", "selection"]
_FORMAT = "moe lookahead 1"


class Regression(NamedTuple):
    """weight: fp32 [H + 1, E], the last row the constant; spread: fp32 [E], standard deviation of the residual."""

    weight: Tensor
    spread: Tensor


class Forecast:
    """What a file of `moe fit-lookahead` holds. regressions: by (layer, distance), layers of experts only."""

    def __init__(self, kind: Kind, top_k: int, regressions: dict[tuple[int, int], Regression], model: str = "") -> None:
        self.kind, self.top_k, self.regressions, self.model = kind, top_k, regressions, model

    @property
    def distances(self) -> int:
        return max((d for _, d in self.regressions), default=0)

    def scores(self, layer: int, distance: int, x: Tensor) -> Tensor:
        """x: [T, H], what the router of `layer` sees. fp32 [T, E] of layer + distance: the higher, the likelier."""
        weight = self.regressions[layer, distance].weight
        return x.float() @ weight[:-1] + weight[-1]

    def probability(self, layer: int, distance: int, x: Tensor) -> Tensor:
        """fp32 [T, E]: that a token will want each expert. The cut is taken as known, the residual as normal."""
        scores = self.scores(layer, distance, x)
        if scores.shape[1] <= self.top_k:
            return torch.ones_like(scores)
        best = scores.topk(self.top_k + 1).values
        cut = best[:, -2:].mean(dim=1, keepdim=True)
        sure: Tensor = torch.special.ndtr((scores - cut) / self.regressions[layer, distance].spread)
        return sure

    def to(self, device: torch.device) -> "Forecast":
        moved = {key: Regression(*(t.to(device) for t in one)) for key, one in self.regressions.items()}
        return Forecast(self.kind, self.top_k, moved, self.model)

    def save(self, path: str | Path) -> None:
        tensors = {
            f"{l}.{d}.{name}": t for (l, d), one in self.regressions.items() for name, t in one._asdict().items()
        }
        said = {"format": _FORMAT, "kind": self.kind, "top_k": str(self.top_k), "model": self.model}
        with written_whole(path) as part:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, part, said)

    @staticmethod
    def load(path: str | Path, num_experts: Sequence[int], hidden_size: int) -> "Forecast":
        """num_experts: by layer. Raises ValueError for a file that is none, or of a model of other shapes."""
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                for name in file.keys():  # noqa: SIM118  it is no dict
                    layer, distance, part = name.split(".")
                    found.setdefault((int(layer), int(distance)), {})[part] = file.get_tensor(name)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no lookahead file ({error}); make one with `moe fit-lookahead`") from None
        if said.get("format") != _FORMAT:
            raise ValueError(f"{path} is no lookahead file; make one with `moe fit-lookahead`")
        regressions = {key: Regression(**parts) for key, parts in found.items()}
        for (layer, distance), one in regressions.items():
            to = num_experts[layer + distance] if layer + distance < len(num_experts) else -1
            if one.weight.shape != (hidden_size + 1, to):
                raise ValueError(
                    f"{path} foretells {one.weight.shape[1]} experts from {len(one.weight) - 1} values at layer "
                    f"{layer}, distance {distance}; this model has {to} and {hidden_size}: it was fitted to another "
                    f"({said.get('model')})"
                )
        if missing := [n for n in range(len(num_experts) - 1) if (n, 1) not in regressions]:
            raise ValueError(f"{path} has nothing to say of layer {missing[0] + 1}: it was fitted to another model")
        kind: Kind = "logits" if said["kind"] == "logits" else "selection"
        return Forecast(kind, int(said["top_k"]), regressions, said.get("model", ""))


class RidgeFit:
    """Sums over tokens, and the regressions they give. An observer of routing.

    routers: of all layers, for `kind` logits; None for selection. Takes 8 (H + 1)² bytes a layer and 8 (H +
    1) E a regression; rows are added in blocks of `ROWS`.
    """

    ROWS = 64

    def __init__(
        self,
        hidden_size: int,
        num_experts: Sequence[int],
        top_k: int,
        distances: int,
        routers: Sequence[PlainRouter] | None,
    ) -> None:
        self.num_experts, self.top_k, self.routers = list(num_experts), top_k, routers
        layers, wide = range(len(self.num_experts)), hidden_size + 1
        self.pairs = [(n, d) for n in layers for d in range(1, distances + 1) if n + d < len(layers)]
        self.sums = {f"inputs.{n}": torch.zeros(wide, wide, dtype=torch.float64) for n in layers[:-1]}
        self.sums |= {f"targets.{n}": torch.zeros(e, dtype=torch.float64) for n, e in enumerate(self.num_experts)}
        for n, d in self.pairs:
            self.sums[f"both.{n}.{d}"] = torch.zeros(wide, self.num_experts[n + d], dtype=torch.float64)
        self.num_tokens = 0
        self._rows: list[tuple[Tensor, Tensor]] = []  # of this forward, by layer: A [T, H + 1], Y [T, E]
        self._block: list[list[tuple[Tensor, Tensor]]] = []

    def begin(self, step: StepContext) -> None:
        self._rows = []

    def routed(self, x: Tensor, routing: Routing, step: StepContext) -> None:
        """x: [T, H]. Layers of a forward come in order."""
        assert routing.layer == len(self._rows), (routing.layer, len(self._rows))
        self._rows.append((with_one(x), self._target(routing.layer, x, routing.topk_ids).double().cpu()))
        if routing.layer == len(self.num_experts) - 1:
            self._block.append(self._rows)
            self._rows = []
            if sum(len(rows[0][0]) for rows in self._block) >= self.ROWS:
                self.flush()

    def flush(self) -> None:
        """Adds what has come since the last block."""
        block, self._block = self._block, []
        rows = [tuple(map(torch.cat, zip(*parts))) for parts in zip(*block)]
        if not rows:
            return
        self.num_tokens += len(rows[0][0])
        for n, (a, y) in enumerate(rows):
            if f"inputs.{n}" in self.sums:
                self.sums[f"inputs.{n}"] += a.T @ a
            self.sums[f"targets.{n}"] += (y * y).sum(0)
        for n, d in self.pairs:
            self.sums[f"both.{n}.{d}"] += rows[n][0].T @ rows[n + d][1]

    def solve(self, layer: int, ridge: float) -> dict[tuple[int, int], Regression]:
        """The regressions from `layer`, of what was flushed. Costs (H + 1)³ operations."""
        gram = self.sums[f"inputs.{layer}"]
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        found = {}
        for n, d in self.pairs:
            if n == layer:
                both, squares = self.sums[f"both.{n}.{d}"], self.sums[f"targets.{n + d}"]
                weight = torch.cholesky_solve(both, factor)
                left = squares - 2 * (weight * both).sum(0) + (weight * (gram @ weight)).sum(0)
                spread = (left.clamp(min=0) / max(1, self.num_tokens)).sqrt().clamp(min=1e-6)
                found[n, d] = Regression(weight.float(), spread.float())
        return found

    def forecast(self, ridge: float = 10.0, model: str = "") -> Forecast:
        """Raises ValueError without tokens."""
        self.flush()
        if not self.num_tokens:
            raise ValueError("there are no tokens to fit a lookahead to")
        solved: dict[tuple[int, int], Regression] = {}
        for layer in range(len(self.num_experts) - 1):
            solved |= self.solve(layer, ridge)
        return Forecast("selection" if self.routers is None else "logits", self.top_k, solved, model)

    def _target(self, layer: int, x: Tensor, topk_ids: Tensor) -> Tensor:
        if self.routers is None:
            return selection(topk_ids, self.num_experts[layer])
        scores = self.routers[layer].logits(x)
        return scores - scores.mean(dim=1, keepdim=True)  # a router's choice does not see what is added to all


def with_one(x: Tensor) -> Tensor:
    """[T, H + 1] fp64 on the CPU."""
    x = x.double().cpu()
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def selection(topk_ids: Tensor, num_experts: int) -> Tensor:
    """[T, E]: 1 where a token chose an expert, else 0. -1 chooses none."""
    chosen = torch.zeros(len(topk_ids), num_experts + 1, device=topk_ids.device)
    return chosen.scatter_(1, topk_ids.long() % (num_experts + 1), 1.0)[:, :-1]


def read_sums(fit: RidgeFit, path: Path, digest: str) -> int:
    """Goes on where `write_sums` stopped. Returns how many texts are in the sums; 0 if the file is of another fit.

    digest: of the texts.
    """
    try:
        with safe_open(str(path), "pt") as file:
            said = file.metadata() or {}
            if set(file.keys()) != set(fit.sums) or said.get("digest") != digest:
                return 0
            sums = {name: file.get_tensor(name) for name in fit.sums}
    except SafetensorError:
        return 0
    if any(sums[name].shape != fit.sums[name].shape for name in sums):
        return 0
    fit.sums, fit.num_tokens = sums, int(said["tokens"])
    return int(said["texts"])


def write_sums(fit: RidgeFit, path: Path, digest: str, num_texts: int) -> None:
    """The sums so far, in one step: a run that is stopped meanwhile finds the ones before."""
    fit.flush()
    with written_whole(path) as part:
        save_file(fit.sums, part, {"tokens": str(fit.num_tokens), "texts": str(num_texts), "digest": digest})
