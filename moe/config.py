"""One record for everything a run can be told: defaults ← TOML file ← `--set offload.budget=0.25`."""

import dataclasses
import math
import operator
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from moe.comm.defaults import EAGER_BYTES
from moe.kernels.names import KernelName
from moe.offload.budget import parse_budget
from moe.placement.loop_options import LoopOptions
from moe.placement.wire_format import CombineMode, DispatcherName
from moe.plain_text import read_text

Prefetch = Literal["auto", "off", "transition", "router", "learned"]
_LARGEST = (1 << 31) - 1  # of any setting that is a number
MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadConfig:
    """Where experts live. `budget`: "6GiB", "64" (experts), "0.25" (fraction); None derives it from free memory."""

    _group: ClassVar[str] = "offload."
    budget: str | None = None
    policy: Literal["lru", "lfu"] = "lfu"
    store: Literal["file", "mmap", "ram"] = "file"
    direct: bool | None = None  # O_DIRECT; None decides by the size of the files, and by `moe probe`
    # Of store=file; None: preadv unless `moe probe` found the other faster.
    io: Literal["preadv", "deepnvme"] | None = None
    # How bf16 experts lie in slots of a CPU: as they are stored, or in 12 bits without loss (kernels/bf12.py), which
    # they become when they arrive. auto: bf12 where `moe probe` found it no slower and slots become a tenth smaller.
    keep: Literal["auto", "stored", "bf12"] = "auto"
    # Of experts in nested precision (offload/nested.py). auto: what offload.budget buys each of them; upgrade: 2 at
    # first, then what it buys those that are asked most, so that an answer depends on what was asked before.
    bits: Literal["2", "3", "4", "8", "auto", "upgrade"] = "8"
    readers: int | None = None  # threads that read; None decides by `moe probe`, else 2
    check: Literal["first", "always", "never"] = "first"  # when a packed expert is compared with its checksum
    # What the next layer will want is read ahead: by transitions that the run shows, by the next layer's own router, or
    # learned: by regressions from the layer's input, of routing.lookahead or else fitted to the run. auto: where one
    # process reads large experts from files, learned with such a file, else by the router.
    prefetch: Prefetch = "auto"

    def __post_init__(self) -> None:
        _parse_fields(self)
        if self.budget is not None:
            parse_budget(self.budget)
        _require(
            self.readers is None or 0 <= self.readers <= MOST_THREADS,
            f"offload.readers ({self.readers}) must lie in [0, {MOST_THREADS}]",
        )
        _require(
            self.prefetch in ("auto", "off") or self.readers != 0,
            f"offload.prefetch={self.prefetch} needs a thread that reads while others compute; set offload.readers=2",
        )
        _require(
            self.io != "deepnvme" or (self.store != "mmap" and self.direct is not False),
            f"offload.io=deepnvme reads past the page cache, not with offload.store={self.store} and "
            f"offload.direct={self.direct}; leave out offload.io",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """What is known of routing beforehand. `lookahead`: a file of `moe fit-lookahead`.

    `pregate` other than off is lossy: restrict:M lets a layer's router choose among the M experts that the layer before
    foretold; replace routes by what was foretold, weights too. The first layer of experts keeps its router.
    """

    _group: ClassVar[str] = "routing."
    lookahead: str | None = None
    pregate: str = "off"

    def __post_init__(self) -> None:
        _parse_fields(self)
        known = re.fullmatch(r"off|replace|restrict:[1-9]\d*", self.pregate)
        _require(known is not None, f"routing.pregate ({self.pregate!r}) must be off, replace or restrict:4")
        _require(
            self.pregate == "off" or self.lookahead is not None,
            f"routing.pregate={self.pregate} needs what foretells; make it with `moe fit-lookahead` and set "
            "routing.lookahead to its file",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How requests share a step. Units: tokens and sequences."""

    _group: ClassVar[str] = "batch."
    max_tokens: int = 512  # of one step; longer prompts are prefilled in chunks of what is left
    max_sequences: int = 16
    pool: int | None = None  # sequences that run at once; in a step max_sequences decode, those that share experts
    block_size: int = 16  # tokens of one KV block
    kv_tokens: int | None = None  # most of the KV cache; None: max_sequences contexts, in 1/4 of free memory
    prefix_sharing: bool = True
    packed: bool = True  # false runs one sequence at a time even where the architecture allows packing
    # layer_major, where all requests are known beforehand (`moe batch`): as many sequences and tokens a step as read
    # least, and offload.budget is split between their KV and the experts, anew while it runs.
    schedule: Literal["as_they_come", "layer_major"] = "as_they_come"

    @property
    def num_running(self) -> int:
        """Sequences that have KV at once."""
        return self.pool or self.max_sequences

    def for_ranks(self, count: int) -> "BatchConfig":
        """What was meant for one rank, for whoever has the requests of `count`, none of them by turns."""
        tokens, sequences = self.max_tokens * count, self.num_running * count
        return dataclasses.replace(self, max_tokens=max(tokens, sequences), max_sequences=sequences, pool=None)

    def __post_init__(self) -> None:
        _parse_fields(self)
        _require(
            self.pool is None or self.pool > self.max_sequences,
            f"batch.pool ({self.pool}) must be > batch.max_sequences ({self.max_sequences}), or there is no choice",
        )
        for name in ("max_tokens", "max_sequences", "block_size"):
            _require(getattr(self, name) >= 1, f"batch.{name} ({getattr(self, name)}) must be >= 1")
        _require(
            self.max_tokens >= self.max_sequences,
            f"batch.max_tokens ({self.max_tokens}) must be >= batch.max_sequences ({self.max_sequences}): "
            "every running sequence takes one token of a step",
        )
        _require(
            self.kv_tokens is None or self.kv_tokens >= self.block_size,
            f"batch.kv_tokens ({self.kv_tokens}) must be >= batch.block_size ({self.block_size})",
        )
        if self.schedule == "layer_major":
            chosen = {"max_tokens": 512, "max_sequences": 16, "kv_tokens": None, "pool": None, "packed": True}
            told = [name for name, default in chosen.items() if getattr(self, name) != default]
            said = ", ".join(f"batch.{name}={getattr(self, name)}" for name in told)
            _require(not told, f"batch.schedule=layer_major chooses by itself, not with {said}; leave that out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the experts. `plan`: a file of `moe place`; None places contiguous blocks."""

    _group: ClassVar[str] = "parallel."
    plan: str | None = None
    # auto: coherent where it moves less, else all_to_all. hierarchical: two steps, inside a node and across.
    dispatcher: Literal["auto", DispatcherName] = "auto"
    combine: CombineMode = "exact"  # partial: one sum per token and rank, fewer bytes, in another order of sums: lossy
    ranks_per_node: int | None = None  # None: as torchrun says; smaller, to let one machine stand for several
    broadcast_tokens: int = 8  # with collectives, up to this many per rank go to every rank: a round less, more bytes
    eager_bytes: int = EAGER_BYTES  # on the CPU, longest message that needs no handshake; 0: gloo's collectives
    timeout_seconds: int = 300  # until a rank that waits for a lost peer gives up

    def __post_init__(self) -> None:
        _parse_fields(self)
        for name, least in (("eager_bytes", 0), ("broadcast_tokens", 0), ("ranks_per_node", 1), ("timeout_seconds", 1)):
            value = getattr(self, name)
            _require(value is None or value >= least, f"parallel.{name} ({value}) must be >= {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig(LoopOptions):
    """Whether ranks re-balance themselves while they run (docs/placement.md), and how."""

    _group: ClassVar[str] = "placement."
    online: bool = False

    def __post_init__(self) -> None:
        _parse_fields(self)
        try:
            LoopOptions.__post_init__(self)
        except ValueError as error:
            raise ValueError(f"placement: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What each host of a Ray cluster asks for, and when one is given up. Limits in seconds."""

    _group: ClassVar[str] = "cluster."
    cpus_per_host: float = 1.0
    gpus_per_host: float | None = None  # None: 1 where the cluster has GPUs and device is not cpu
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"  # of hosts over nodes
    labels: str | None = None  # of the nodes that hosts may run on: "ray.io/accelerator-type=H100,region=eu"
    spares: int = 0  # hosts kept loaded beside those that serve
    replaces: bool = True  # whether another host is started for each that is lost
    least_in_memory: float = 0.0  # of all experts, in slots of the hosts that serve; with less, wait for hosts, or end
    max_losses: int = 100  # hosts that may be lost; then the run ends, with all that was finished
    # Without a sign of life from a host whose line is open, until it is killed; never under silence_steps median steps.
    silence_s: float = 3.0
    silence_steps: int = 10
    stuck_s: float = 300.0  # with signs of life, but without a finished step while it has requests
    leave_s: float = 1.0  # for hosts to leave a generation by themselves, until they are freed from what they wait for
    meet_s: float = 10.0  # for the hosts of a generation to meet
    room_s: float = 60.0  # until Ray must have placed all hosts
    load_s: float = 1800.0  # for a host that has a place to load the model
    answer_s: float = 30.0  # for an actor of this job to answer what it answers at once

    def __post_init__(self) -> None:
        _parse_fields(self)
        for name in ("silence_s", "stuck_s", "leave_s", "meet_s", "room_s", "load_s", "answer_s"):
            _require(getattr(self, name) > 0, f"cluster.{name} ({getattr(self, name)}) must be positive")
        for name in ("cpus_per_host", "spares", "least_in_memory", "max_losses", "silence_steps"):
            _require(getattr(self, name) >= 0, f"cluster.{name} ({getattr(self, name)}) must be >= 0")
        _require(self.gpus_per_host is None or self.gpus_per_host >= 0, "cluster.gpus_per_host must be >= 0")
        self.label_selector()

    def label_selector(self) -> dict[str, str]:
        """As Ray wants it. Raises ValueError."""
        pairs = [pair.partition("=") for pair in self.labels.split(",")] if self.labels else []
        _require(
            all(name and equals and value for name, equals, value in pairs),
            f"cluster.labels ({self.labels!r}) must look like ray.io/accelerator-type=H100,region=eu",
        )
        return {name: value for name, _, value in pairs}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All of a run. `dtype`: of activations and dense weights; "auto" is what the model's config says."""

    _group: ClassVar[str] = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dense: Literal["decoded", "packed"] = (
        "decoded"  # quantised dense layers: at load, or in registers (CPU; less memory)
    )
    device: str | None = None  # None: the GPU if there is one
    # Of expert compute; `kernels/names.py` says what each is. single_launch, measured over several ranks of one node:
    # one launch for all of them, if all experts are in slots.
    kernel: KernelName = "auto"
    # Decoding steps on a GPU as CUDA graphs, captured at their first step; on: refused where they cannot be.
    graphs: Literal["auto", "on", "off"] = "auto"
    # Where `measured` keeps what this machine is best at, and `moe probe` its figures, which automatic choices read.
    # None: crossover.json and probe.json of $XDG_CACHE_HOME/moe, of ~/.cache/moe where that is not set.
    crossover_table: str | None = None
    probe_file: str | None = None
    probe_first_run: bool = True  # whether a command measures what it knows nothing of yet, for some seconds
    threads: int | None = None  # of torch on the CPU; None leaves torch's own choice
    max_context: int | None = None  # tokens; None: what the model allows
    trust_remote_code: bool = False  # whether Python code that a model's folder brings may run
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _parse_fields(self)
        _require(
            self.threads is None or 1 <= self.threads <= MOST_THREADS,
            f"threads ({self.threads}) must lie in [1, {MOST_THREADS}]",
        )
        _require(
            not (self.placement.online and self.parallel.dispatcher == "coherent"),
            "placement.online=true follows tokens that go home again, which parallel.dispatcher=coherent does not let "
            "them; set parallel.dispatcher=all_to_all, or leave placement.online off",
        )
        _require(self.max_context is None or self.max_context >= 1, f"max_context ({self.max_context}) must be >= 1")

    @staticmethod
    def load(path: str | Path | None = None, settings: Iterable[str] = ()) -> "EngineConfig":
        """Reads a TOML file, then `key=value` settings over it. Raises ValueError for an unknown key or a bad value."""
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(read_text(Path(path)))
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path} is not a valid TOML file: {error}") from None
        for setting in settings:
            key, equals, text = setting.partition("=")
            _require(bool(equals), f"setting {setting!r} must look like offload.budget=0.25")
            *folders, name = key.split(".")
            target = values
            for folder in folders:
                target = target.setdefault(folder, {})
                _require(isinstance(target, dict), f"setting {key!r}: {folder} is not a group of settings")
            target[name] = text
        built: EngineConfig = _build(EngineConfig, values)
        return built

    def with_budget(self, budget: str | float) -> "EngineConfig":
        """budget: 1.0 means all experts, 64 as many."""
        return dataclasses.replace(self, offload=dataclasses.replace(self.offload, budget=str(budget)))

    @property
    def crossover_path(self) -> Path:
        return _cached(self.crossover_table, "crossover.json")

    @property
    def probe_path(self) -> Path:
        return _cached(self.probe_file, "probe.json")

    def describe(self) -> str:
        """The whole configuration, one `key = value` a line."""
        return "\n".join(f"{key} = {value!r}" for key, value in _flatten(dataclasses.asdict(self)))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _cached(setting: str | None, name: str) -> Path:
    """Where a file is kept: as the setting says, or where the user's caches are."""
    if setting is not None:
        return Path(setting).expanduser()
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path("~/.cache").expanduser()) / "moe" / name


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        _require(
            key in known,
            f"unknown setting {cls._group}{key}; known: {', '.join(cls._group + name for name in sorted(known))}",
        )
    arguments = dict(values)
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            _require(isinstance(value, dict), f"{key} is a group of settings, got {value!r}")
            arguments[key] = _build(typing.cast(type[Any], hints[key]), value)
    return cls(**arguments)


def _parse_fields(config: Any) -> None:
    """Every field as its type says, whoever wrote it: Python, TOML or a command line."""
    cls = type(config)
    for name, hint in typing.get_type_hints(cls).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(hint):
            _require(isinstance(value, typing.cast(type[Any], hint)), f"{name} is a group of settings, got {value!r}")
        elif typing.get_origin(hint) is not ClassVar:
            object.__setattr__(config, name, _parse(hint, value, cls._group + name))


def _parse(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint`: int, float, bool, str, a Literal, or one of these or None."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter with a Literal
    options = typing.get_args(hint) if is_union else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    (kind,) = [o for o in options if o is not type(None)]
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        _require(value in choices, f"{name} ({shown}) must be one of {', '.join(choices)}")
        return value
    if kind is bool:
        _require(value in (True, False, "true", "false"), f"{name} ({shown}) must be true or false")
        return value in (True, "true")
    if kind is int:
        try:
            _require(not isinstance(value, bool), "")
            number = int(value) if isinstance(value, str) else operator.index(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} ({shown}) must be a whole number") from None
        _require(number <= _LARGEST, f"{name} ({shown}) must be at most {_LARGEST}")
        return number
    if kind is float:
        try:
            _require(not isinstance(value, bool) and math.isfinite(real := float(value)), "")
            return real
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} ({shown}) must be a number") from None
    is_written = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    _require(is_written and "\0" not in str(value), f"{name} ({shown}) must be text or a number")
    return str(value)
