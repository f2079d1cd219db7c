"""How many images a second a method decomposes: A and B, no reconstruction, by itself on a fixed batch.

N images, T tokens, D dim.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

BATCH = {"cpu": 8, "cuda": 64}
"""Images in the batch that is timed; a GPU needs many to be busy."""
SECONDS = 0.3
"""What a method's timing takes at most, unless a single run of the batch takes longer."""
REPEATS = 9
"""Runs of the batch at most; their median counts."""


def images_per_second(decompose: Callable[[Tensor], object], x_NTD: Tensor) -> float:
    """Time a method on a batch, on the batch's device; on the CPU, with one thread.

    Args:
        decompose: what is timed.
        x_NTD: features [N, T, D].

    Returns:
        N over the median run's seconds, after a warm-up on one image.
    """
    with _one_thread(), torch.inference_mode():
        decompose(x_NTD[:1])
        runs: list[float] = []
        while not runs or (len(runs) < REPEATS and sum(runs) + runs[-1] <= SECONDS):
            _synchronise(x_NTD)
            start = time.perf_counter()
            decompose(x_NTD)
            _synchronise(x_NTD)
            runs.append(time.perf_counter() - start)
    return len(x_NTD) / statistics.median(runs)


def device_words(device: str) -> str:
    """Name what speeds are measured on, for people: `one CPU thread (AMD EPYC 7763)`, `NVIDIA H200`."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"one CPU thread ({_processor()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _synchronise(x_NTD: Tensor) -> None:
    if x_NTD.is_cuda:
        torch.cuda.synchronize(x_NTD.device)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # numpy has a BLAS, and threads, of its own.
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
