"""Routing traces: which experts every token chose in every layer, the one format that feeds the whole system.

A trace is written by the engine or made by `moe.placement.importers`, and read by placement, the cache simulator,
the predictors and the planner. Arrays are never pickled: files are `.npz` (allow_pickle=False) or `.safetensors`.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe.placement.schema import Kinds, checked
from moe.placement.wire_format import ModelSizes
from moe.placement.written import written_whole

PREFILL, DECODE = 0, 1
FORMAT = "moe-routing-trace-2"
FORMATS = {"moe-routing-trace-1", FORMAT}  # the first does not say the sizes
_META: Mapping[str, Kinds] = {"format": (str,), "num_experts": (int,), "model": (str,), "domain": (str, type(None))}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTrace:
    """The experts of N tokens in L layers, K per layer, in the order in which the model saw the tokens.

    expert_ids: int16 [N, L, K], -1 = no expert (a dense layer, or a token that chose fewer).
    sequence_lengths: int32 [sequences], consecutive slices of the token axis; they sum to N. N may be 0.
    num_experts: E, logical experts per layer. model: any string that names the model the trace came from.
    weights: float32 or float16 [N, L, K], gate weights, or None. phase: uint8 [N], 0 prefill, 1 decode, or None.
    domain: what the text was, or None. sizes: what makes bytes of tokens and experts, or None if not known.
    Raises ValueError for wrong shapes, ids outside [-1, E), an expert named twice by one token, wrong lengths.
    """

    expert_ids: NDArray[np.int16]
    sequence_lengths: NDArray[np.int32]
    num_experts: int
    model: str
    weights: NDArray[np.floating[Any]] | None = None
    phase: NDArray[np.uint8] | None = None
    domain: str | None = None
    sizes: ModelSizes | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= np.iinfo(np.int16).max:
            raise ValueError(f"num_experts ({self.num_experts}) must lie between 1 and {np.iinfo(np.int16).max}")
        ids = _integers("expert_ids", self.expert_ids, np.dtype(np.int16), -1, self.num_experts - 1, ndim=3)
        num_tokens, num_layers, top_k = ids.shape
        if num_layers < 1 or top_k < 1:
            raise ValueError(f"expert_ids has shape {ids.shape}; a trace needs at least one layer and one expert slot")
        if top_k > self.num_experts:
            raise ValueError(
                f"expert_ids has {top_k} slots per token but the model has only {self.num_experts} experts"
            )
        _reject_repeated(ids)
        lengths = _integers("sequence_lengths", self.sequence_lengths, np.dtype(np.int32), 1, None, ndim=1)
        if int(lengths.sum(dtype=np.int64)) != num_tokens:
            raise ValueError(
                f"sequence_lengths sum to {int(lengths.sum(dtype=np.int64))} but expert_ids has {num_tokens} tokens"
            )
        object.__setattr__(self, "expert_ids", _frozen(ids))
        object.__setattr__(self, "sequence_lengths", _frozen(lengths))
        if self.weights is not None:
            weights = np.asarray(self.weights)
            if weights.dtype not in (np.float16, np.float32):
                raise ValueError(f"weights must be float32 or float16, not {weights.dtype}; convert them first")
            if weights.shape != ids.shape:
                raise ValueError(f"weights has shape {weights.shape}, expert_ids {ids.shape}; they must be equal")
            if not np.isfinite(weights).all():
                raise ValueError("weights holds NaN or infinity; record finite gate weights or leave them out")
            object.__setattr__(self, "weights", _frozen(weights))
        if self.phase is not None:
            phase = _integers("phase", self.phase, np.dtype(np.uint8), PREFILL, DECODE, ndim=1)
            if phase.shape != (num_tokens,):
                raise ValueError(f"phase has {phase.shape[0]} entries for {num_tokens} tokens; give one per token")
            object.__setattr__(self, "phase", _frozen(phase))

    @property
    def num_tokens(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[2])

    @property
    def num_sequences(self) -> int:
        return int(self.sequence_lengths.shape[0])

    @property
    def sequence_starts(self) -> NDArray[np.int64]:
        """First token of every sequence, and N at the end: int64 [sequences + 1]."""
        return np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])

    def select(self, sequences: Sequence[int] | NDArray[np.integer[Any]] | slice) -> "RoutingTrace":
        """The trace of some sequences, in the order given; a copy. Raises ValueError for an index out of range."""
        chosen = np.arange(self.num_sequences)[sequences] if isinstance(sequences, slice) else np.asarray(sequences)
        chosen = chosen.astype(np.int64).reshape(-1)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.num_sequences):
            raise ValueError(f"sequences {chosen.min()}..{chosen.max()} asked of a trace of {self.num_sequences}")
        starts = self.sequence_starts
        spans = [np.arange(starts[s], starts[s + 1]) for s in chosen]
        return self._pick(np.concatenate(spans) if spans else np.empty(0, np.int64), self.sequence_lengths[chosen])

    def only(self, phase: int) -> "RoutingTrace":
        """The tokens of one phase, 0 prefill or 1 decode; sequences that have none of them disappear."""
        if self.phase is None:
            raise ValueError("this trace does not say which tokens are prefill and which decode; record the phase")
        keep = self.phase == phase
        owner = np.repeat(np.arange(self.num_sequences), self.sequence_lengths)
        lengths = np.bincount(owner[keep], minlength=self.num_sequences)
        return self._pick(np.flatnonzero(keep), lengths[lengths > 0].astype(np.int32))

    def split(self, fraction: float, seed: int = 0) -> tuple["RoutingTrace", "RoutingTrace"]:
        """Two disjoint traces, cut between sequences: `fraction` of the sequences to fit, the rest held out.

        Sequences are drawn without replacement from `seed`; both parts keep at least one and the original order.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction ({fraction}) must lie strictly between 0 and 1")
        if self.num_sequences < 2:
            raise ValueError(f"a trace of {self.num_sequences} sequence(s) cannot be split; record at least two")
        count = min(max(round(fraction * self.num_sequences), 1), self.num_sequences - 1)
        order = np.random.default_rng(seed).permutation(self.num_sequences)
        return self.select(np.sort(order[:count])), self.select(np.sort(order[count:]))

    @staticmethod
    def concat(traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """One trace after the other. All must be of one model and shape; a field that one lacks is dropped."""
        if not traces:
            raise ValueError("concat needs at least one trace")
        first = traces[0]
        for other in traces[1:]:
            for name in ("model", "num_experts", "num_layers", "top_k"):
                mine, theirs = getattr(first, name), getattr(other, name)
                if mine != theirs:
                    raise ValueError(f"cannot join traces: {name} is {mine!r} in one, {theirs!r} in another")
        weights = [t.weights for t in traces if t.weights is not None]
        phases = [t.phase for t in traces if t.phase is not None]
        domains = {t.domain for t in traces}
        sizes = {t.sizes for t in traces if t.sizes is not None}
        if len(sizes) > 1:
            raise ValueError(f"cannot join traces: sizes are {' and '.join(map(str, sizes))}")
        return RoutingTrace(
            expert_ids=np.concatenate([t.expert_ids for t in traces]),
            sequence_lengths=np.concatenate([t.sequence_lengths for t in traces]),
            num_experts=first.num_experts,
            model=first.model,
            weights=np.concatenate(weights) if len(weights) == len(traces) else None,
            phase=np.concatenate(phases) if len(phases) == len(traces) else None,
            domain=domains.pop() if len(domains) == 1 else None,
            sizes=sizes.pop() if sizes else None,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the trace as `.npz` (compressed) or `.safetensors`, by the name's ending."""
        path = Path(path)
        arrays: dict[str, Any] = {"expert_ids": self.expert_ids, "sequence_lengths": self.sequence_lengths}
        if self.weights is not None:
            arrays["weights"] = self.weights
        if self.phase is not None:
            arrays["phase"] = self.phase
        meta = {"format": FORMAT, "num_experts": self.num_experts, "model": self.model, "domain": self.domain}
        meta["sizes"] = None if self.sizes is None else self.sizes.stored()
        if path.suffix not in (".npz", ".safetensors"):
            raise ValueError(
                f"{path}: a trace is written as .npz or .safetensors, not as {path.suffix or 'no suffix'!r}"
            )
        with written_whole(path) as part:
            if path.suffix == ".npz":
                with part.open("wb") as file:
                    np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)
            else:
                tensors = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
                save_file(tensors, part, metadata={"trace": json.dumps(meta)})

    @staticmethod
    def load(path: str | PathLike[str]) -> "RoutingTrace":
        """Read a trace written by `save`. Raises ValueError if the file is not one, FileNotFoundError if absent."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no trace at {path}")
        if path.suffix == ".npz":
            arrays = read_npz(path)
            text = None if "meta" not in arrays else str(arrays.pop("meta"))
        elif path.suffix == ".safetensors":
            arrays, text = _read_safetensors(path)
        else:
            raise ValueError(f"{path}: a trace is a .npz or .safetensors file")
        if text is None or not {"expert_ids", "sequence_lengths"} <= arrays.keys():
            raise ValueError(
                f"{path} is not a routing trace ({', '.join(sorted(arrays)) or 'no arrays'}); see importers"
            )
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: what it says of itself is not JSON: {error}") from None
        found = meta.get("format") if isinstance(meta, dict) else None
        if not isinstance(found, str) or found not in FORMATS:
            raise ValueError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
        sizes = ModelSizes.of(str(path), meta.pop("sizes", None) if found == FORMAT else None)
        told = checked(str(path), meta, _META)
        try:
            return RoutingTrace(
                expert_ids=arrays["expert_ids"],
                sequence_lengths=arrays["sequence_lengths"],
                num_experts=told["num_experts"],
                model=told["model"],
                weights=arrays.get("weights"),
                phase=arrays.get("phase"),
                domain=told["domain"],
                sizes=sizes,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _pick(self, tokens: NDArray[np.int64], lengths: NDArray[Any]) -> "RoutingTrace":
        return RoutingTrace(
            expert_ids=self.expert_ids[tokens],
            sequence_lengths=lengths,
            num_experts=self.num_experts,
            model=self.model,
            weights=None if self.weights is None else self.weights[tokens],
            phase=None if self.phase is None else self.phase[tokens],
            domain=self.domain,
            sizes=self.sizes,
        )


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a plain .npz file. Raises ValueError, naming it, if it is none."""
    try:
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, NotImplementedError, struct.error) as error:
        damage = "" if isinstance(error, ValueError) else f": {error}"  # numpy's own advise to run the file's code
        raise ValueError(f"{path} cannot be read as a plain .npz file{damage}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], str | None]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("trace")  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _integers(
    name: str, values: Any, dtype: np.dtype[Any], low: int, high: int | None, *, ndim: int
) -> NDArray[np.integer[Any]]:
    """`values` as `dtype` after checking that they are integers within [low, high] and have `ndim` axes."""
    array = np.asarray(values)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, it has shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    if array.size:
        least, most = int(array.min()), int(array.max())
        if least < low or (high is not None and most > high):
            raise ValueError(
                f"{name} runs from {least} to {most}; allowed is {low} to {'any' if high is None else high}"
            )
    return array.astype(dtype, copy=False)


def _reject_repeated(ids: NDArray[np.integer[Any]]) -> None:
    ordered = np.sort(ids, axis=2)
    repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    if repeated.any():
        token, layer, slot = (int(axis[0]) for axis in np.nonzero(repeated))
        raise ValueError(f"token {token} names expert {int(ordered[token, layer, slot])} twice in layer {layer}")


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view, so that a trace cannot change under its readers."""
    view = array.view()
    view.flags.writeable = False
    return view
