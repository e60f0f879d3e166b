"""What only one device has: all layers of a step in one call, or as a graph; and why it is not used."""

import torch

from moe.config import EngineConfig
from moe.engine.choices import AutoChoice
from moe.engine.runner import PackedRunner, Runner
from moe.layer.experts import SlotExperts


def use_paths(
    config: EngineConfig, device: torch.device, runner: Runner, experts: SlotExperts | None, max_context: int
) -> AutoChoice | None:
    """Lets layers of a planned model be one call on a CPU, and decoding steps be captured on a GPU, as `graphs` says.

    Returns what was chosen of graphs, None on a CPU. Raises ValueError where `graphs=on` cannot be.
    """
    if experts is not None and isinstance(runner, PackedRunner) and runner.plan is not None:
        runner.plan.use(experts.in_one_call)
    reason = _why_no_graphs(device, runner, experts)
    if config.graphs == "on" and reason is not None:
        raise ValueError(f"graphs=on cannot be: {reason}; set graphs=auto")
    if config.graphs == "off" or device.type == "cpu":
        return None
    if reason is None and isinstance(runner, PackedRunner) and experts is not None:
        from moe.engine.graphs import CudaCapture, DecodeGraphs

        runner.replays = DecodeGraphs(runner, experts, max_context, CudaCapture())
    return AutoChoice("graphs", "off" if reason else "on", reason or "every shape of a decoding step is static")


def _why_no_graphs(device: torch.device, runner: Runner, experts: SlotExperts | None) -> str | None:
    if device.type == "cpu":
        return "there is no GPU"
    if not isinstance(runner, PackedRunner) or experts is None or runner.kv.alone is None:
        return "decoding tokens do not attend by block tables, or no experts are in slots"
    from moe.engine.graphs import why_not

    return why_not(runner, experts)
