"""Independent random streams from one seed."""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return a generator on the CPU for one purpose of one seed; other purposes' numbers are independent of its."""
    words = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)
