"""Mini-batches where a training wants them: in memory, or on a device that holds all features when they fit.

N images, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lowrank_tune.lowrank.dataset import FeatureMatrix

RESIDENT_FRACTION = 0.25
"""Of a device's free memory, the most that the features may take: four trials may share one device, and a trial needs
room for its own work."""
_COPIED_AT_ONCE = 64


class MiniBatches(Protocol):
    """Gives the features of some images on one device."""

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return the features of some images, float32 [n, T, D]; the tensor belongs to the caller."""

    def lend(self, indices: Sequence[int]) -> Tensor:
        """As `load`, but the tensor may be overwritten by the next call."""


@lru_cache(maxsize=1)
def batches_on(data: FeatureMatrix, device: str) -> MiniBatches:
    """The mini-batches for a device; the same object again for the next trial of this process.

    On a GPU the features are held as a whole when they take no more than `RESIDENT_FRACTION` of its free memory.
    """
    if torch.device(device).type != "cuda":
        return Mapped(data)
    size = len(data) * data.tokens * data.dim * data.dtype.itemsize
    if fits(size, torch.cuda.mem_get_info(device)[0]):
        try:
            return Resident(data, device)
        except torch.OutOfMemoryError:  # another trial was quicker
            torch.cuda.empty_cache()
    return Streamed(data, device)


def fits(size: int, free: int) -> bool:
    """Whether features of `size` bytes are held on a device with `free` bytes."""
    return size <= RESIDENT_FRACTION * free


class Mapped:
    """Batches on the CPU, copied out of the mapped cache.

    Args:
        data: The features.
    """

    def __init__(self, data: FeatureMatrix) -> None:
        self._data = data
        self._buffer_NTD = torch.empty(0, data.tokens, data.dim)

    def load(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.load`."""
        return self._data.load(indices)

    def lend(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.lend`."""
        if len(indices) > len(self._buffer_NTD):
            self._buffer_NTD = torch.empty(len(indices), self._data.tokens, self._data.dim)
        return self._data.load(indices, out=self._buffer_NTD[: len(indices)])


class Resident:
    """Batches of features that a device holds as a whole, in the dtype of the cache.

    Args:
        data: The features.
        device: Where to hold them.
    """

    def __init__(self, data: FeatureMatrix, device: str) -> None:
        self._all_NTD = torch.empty(len(data), data.tokens, data.dim, dtype=data.dtype, device=device)
        for start in range(0, len(data), _COPIED_AT_ONCE):
            part = range(start, min(start + _COPIED_AT_ONCE, len(data)))
            self._all_NTD[start : start + len(part)] = data.load(part, data.dtype).to(device)

    def load(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.load`."""
        chosen = torch.tensor(indices, dtype=torch.int64).to(self._all_NTD.device)
        return self._all_NTD.index_select(0, chosen).float()

    def lend(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.lend`."""
        return self.load(indices)


class Streamed:
    """Batches that are copied to a device through two page-locked buffers, one filled while the other is on its way.

    Args:
        data: The features.
        device: Where the batches go, in the cache's dtype; they are converted there, so that half the bytes travel.
    """

    def __init__(self, data: FeatureMatrix, device: str) -> None:
        self._data = data
        self._device = torch.device(device)
        self._buffers: list[Tensor] = [torch.empty(0, data.tokens, data.dim, dtype=data.dtype)] * 2
        on_gpu = self._device.type == "cuda"
        self._sent = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def load(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.load`."""
        self._turn = 1 - self._turn
        if self._sent:
            self._sent[self._turn].synchronize()
        if len(indices) > len(self._buffers[self._turn]):
            shape = (len(indices), self._data.tokens, self._data.dim)
            pinned = self._device.type == "cuda"
            self._buffers[self._turn] = torch.empty(shape, dtype=self._data.dtype, pin_memory=pinned)
        host_NTD = self._data.load(indices, out=self._buffers[self._turn][: len(indices)])
        x_NTD = torch.empty_like(host_NTD, device=self._device).copy_(host_NTD, non_blocking=True)
        if self._sent:
            self._sent[self._turn].record(torch.cuda.current_stream(self._device))
        return x_NTD.float()

    def lend(self, indices: Sequence[int]) -> Tensor:
        """As `MiniBatches.lend`."""
        return self.load(indices)
