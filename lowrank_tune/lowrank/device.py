"""The one place that asks for a GPU, and that knows when its memory does not suffice."""

from __future__ import annotations

import torch


def device_for(gpus: float) -> str:
    """Where a worker computes that was given so many GPUs, or a part of one: `cuda` if torch sees one, else `cpu`."""
    return "cuda" if gpus and torch.cuda.is_available() else "cpu"


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory or this machine's did not suffice."""
    # torch has a class of its own for its tensors' memory on a GPU alone: not for what a GPU's driver and libraries
    # need, nor for the CPU's.
    told = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in told)
