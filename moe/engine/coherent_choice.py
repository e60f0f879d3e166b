"""Whether a run decodes coherently: what the model allows, and what the bytes and the link say."""

from collections.abc import Callable
from typing import Any, NamedTuple

from moe.comm.errors import Task
from moe.comm.groups import Groups, timed_all_to_all
from moe.comm.lost import in_collective
from moe.placement.topology import Link, probe_link

# model_type of layers that are plain: h += attention, h += mlp, each behind one norm, with a router `mlp.gate`; and
# what each adds to its routed experts. The tests compare every one of them with transformers' own forward.
SHARED_EXPERTS = {
    "mixtral": "none",
    "olmoe": "none",
    "qwen2_moe": "gated",
    "qwen3_moe": "none",
    "deepseek_v2": "added",
    "deepseek_v3": "added",
}


def why_not_coherent(config: Any, max_context: int, is_packed: bool) -> str | None:
    """The reason why this model cannot decode coherently; None if it can."""
    if config.model_type not in SHARED_EXPERTS:
        return f"layers of {config.model_type} are not known to be plain; it works for {', '.join(SHARED_EXPERTS)}"
    if not is_packed:
        return "sequences run one at a time (batch.packed=false)"
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" not in getattr(config, "layer_types", ["sliding_attention"]):
        window = None
    if window is not None and window < max_context:
        return f"its attention sees {window} of {max_context} tokens; set max_context to {window} or less"
    return None


class Costs(NamedTuple):
    """What one token costs in one layer. p: share of the experts that are on other ranks, over all ranks and layers."""

    kv_bytes: float
    result_bytes: float  # of one expert's result, as it travels
    p: float
    top_k: int
    num_ranks: int


def why_coherent(costs: Costs, tokens: int, link: Callable[[], Link]) -> tuple[bool, str]:
    """Whether to decode coherently, and why. tokens: of a rank's step; link: measures the slowest link when needed."""
    extra, saved = costs.kv_bytes * (costs.num_ranks - 1), costs.result_bytes * costs.p
    figures = (
        f"K/V of a token for {costs.num_ranks - 1} other ranks {extra:.0f} bytes a layer, results saved {saved:.0f}"
    )
    if extra < saved:
        return True, figures
    if costs.top_k > 1:
        return False, f"{figures}, and with {costs.top_k} experts a token no round is saved"
    latency, seconds = link().latency, tokens * (extra - saved) / link().bandwidth
    return latency > seconds, f"{figures}; a saved round is {latency * 1e6:.0f} µs, the bytes {seconds * 1e6:.0f} µs"


def measure_link(groups: Groups) -> Link:
    """Latency and bandwidth of an all-to-all as these ranks see it, the same on all. A collective; 15 to 45 of them."""
    assert groups.world is not None
    with in_collective(groups, Task("measuring the link")):
        return probe_link(timed_all_to_all(groups, groups.world, groups.world_size), (1 << 10, 1 << 16, 1 << 20))
