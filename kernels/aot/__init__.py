"""Kernels compiled for GPUs that are not here: by signatures, and by the project's own host code."""
