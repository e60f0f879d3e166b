"""Shared fixtures: where the optional real data lies, poisoned allocations; Ctrl-C as on a terminal, an empty cache."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from tests import ray_environment  # noqa: F401  # before Ray is imported

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported anywhere in the test process
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What `moe probe` knows of the machine that tests run on would choose for them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="moe-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def poisoned_empty():
    """`torch.empty` returns NaN, and scratch memory of the compiled helper holds it: a forgotten write is seen."""
    from moe.kernels.cpu import load_helper

    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    helper = load_helper()
    if helper is not None:
        helper.moe_cpu_poison_scratch(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded traces and texts that stands beside a developer's checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"recorded data not found at {folder}; this test needs it, the project does not")
    return folder
