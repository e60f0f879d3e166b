"""Where a model's tensors lie, and what is free there."""

import torch

from moe.offload.memory import available_memory


def find_device(name: str | None) -> torch.device:
    """None: the first GPU, else the CPU. Raises ValueError for one that torch does not have here."""
    has_gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if has_gpu else "cpu") if name is None else name)
    except RuntimeError:
        raise ValueError(f"device ({name!r}) is no device of torch; give cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device ({name!r}) is not served; give cpu, cuda or cuda:0")
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"device ({name!r}) cannot be used: torch sees no GPU here; give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device ({name!r}) cannot be used: torch sees {torch.cuda.device_count()} GPUs here")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device, wherever the tensors lie
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take where the model's tensors lie."""
    return available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
