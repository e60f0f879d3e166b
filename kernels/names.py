"""The kernels that a run may be told to compute experts with, by the names of its settings."""

from typing import Literal

# reference: the specification in torch. cpu: compiled for this machine. grouped: Triton, sort and grouped GEMMs.
# single_launch: Triton, dispatch, compute and combine in one launch. measured: of the last two the faster by the
# machine's own table. auto: cpu on the CPU, measured on a GPU.
KernelName = Literal["auto", "reference", "cpu", "grouped", "single_launch", "measured"]
