"""What the optimum at every rank costs, beside a single SVD, and how exact it is.

    .venv/bin/python scripts/bench_oracle.py [--tokens 256] [--dim 2048] [--images 8]

One CPU thread, about a minute; on a synthetic set with a power-law spectrum. Every number comes from this one run:
compare ratios, not machines. Wanted: at most 0.25 of an SVD in float32 and in float64, and a cosine error below 1e-6.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

# numpy's and torch's BLAS read it when imported.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

from lowrank_tune.lowrank.svd import measure_optimum


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--images", type=int, default=8)
    sizes = parser.parse_args()
    torch.set_num_threads(1)
    x_NTD = _features(sizes.images, sizes.tokens, sizes.dim)
    routes: dict[str, Callable[[Tensor], object]] = {
        "oracle, every rank": lambda x_TD: measure_optimum([x_TD[None]]),
        "torch.linalg.svd float32": lambda x_TD: torch.linalg.svd(x_TD, full_matrices=False),
        "torch.linalg.svd float64": lambda x_TD: torch.linalg.svd(x_TD.double(), full_matrices=False),
    }
    seconds = _time(routes, x_NTD)
    oracle = seconds["oracle, every rank"]
    print(f"[{sizes.tokens}, {sizes.dim}], {sizes.images} images, 1 thread\n")
    print(f"{'route':<26}{'ms an image':>12}{'oracle / route':>16}")
    for name, value in seconds.items():
        print(f"{name:<26}{value * 1e3:>12.2f}{oracle / value:>16.3f}")
    token, flat, residual = _errors(x_NTD)
    print(f"\nlargest difference from numpy's float64 SVD, over images and ranks: token cosine {token:.1e}, "
          f"flat cosine {flat:.1e}, residual / energy {residual:.1e}")  # fmt: skip


def _features(images: int, tokens: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    count = min(tokens, dim)
    sigma = torch.arange(1, count + 1).pow(-0.8)[:, None]
    axes = sigma * torch.randn(count, dim, generator=generator)
    norms = torch.exp(0.6 * torch.randn(images, tokens, 1, generator=generator))
    return norms * (torch.randn(images, tokens, count, generator=generator) @ axes)


def _time(routes: dict[str, Callable[[Tensor], object]], x_NTD: Tensor) -> dict[str, float]:
    """Return the median seconds an image; routes take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in routes}
    for place, x_TD in enumerate([x_NTD[0], *x_NTD]):
        for name, route in routes.items():
            started = time.perf_counter()
            route(x_TD)
            if place > 0:  # the first image warms up
                times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}


def _errors(x_NTD: Tensor) -> tuple[float, float, float]:
    """Return the largest differences in token cosine, flat cosine and residual / energy from reconstructions."""
    optimum = measure_optimum([x_NTD])
    worst = np.zeros(3)
    for image, x_TD in enumerate(x_NTD.double().numpy()[:2]):
        u, s, vt = np.linalg.svd(x_TD, full_matrices=False)
        for rank in range(1, len(s)):
            y_TD = (u[:, :rank] * s[:rank]) @ vt[:rank]
            norms_T = np.linalg.norm(x_TD, axis=1) * np.linalg.norm(y_TD, axis=1)
            token = ((x_TD * y_TD).sum(axis=1) / norms_T).mean()
            flat = (x_TD * y_TD).sum() / (np.linalg.norm(x_TD) * np.linalg.norm(y_TD))
            residual = np.square(x_TD - y_TD).sum()
            best = optimum.at(rank)
            error = (
                token - best.token_cosine_N[image].item(),
                flat - best.flat_cosine_N[image].item(),
                (residual - best.residual_N[image].item()) / optimum.energy_N[image].item(),
            )
            worst = np.maximum(worst, np.abs(error))
    return float(worst[0]), float(worst[1]), float(worst[2])


if __name__ == "__main__":
    main()
