"""The spectrum of the test features: how much of an image lies in how few directions.

N images, K = min(T, D) singular values, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.oracle import measure_optimum
from lowrank_tune.report.scales import quiet_grid
from lowrank_tune.report.stretch import tick_text

MOST_IMAGES = 128
"""Test images that the spectrum is taken of, at most, spread evenly over the split."""
_BATCH = 8
# Beyond this part of the first singular value float16 features hold nothing but rounding.
_FLOOR = 1e-5


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of some images, each image's over its own first, and what the SVD keeps of them at every rank.

    Attributes:
        values_NK: σ_j / σ_1, falling [N, K].
        cosine_K: the truncated SVD's token cosine at ranks 1..K, mean over images.
        left_K: the share of ‖X‖² that it leaves at those ranks, mean over images.
        test_images: how many the split has; N are of them.
    """

    values_NK: NDArray[np.float64]
    cosine_K: NDArray[np.float64]
    left_K: NDArray[np.float64]
    test_images: int

    @property
    def ranks(self) -> NDArray[np.int64]:
        """1..K."""
        return np.arange(1, self.values_NK.shape[1] + 1)

    def rank_for(self, cosine: float) -> int | None:
        """The least rank at which the SVD keeps this mean token cosine; None when rounding keeps it from any."""
        enough = np.flatnonzero(self.cosine_K >= cosine)
        return int(enough[0]) + 1 if len(enough) else None


def measure_spectrum(data: FeatureMatrix, test: Sequence[int]) -> Spectrum | None:
    """Take the spectrum of test images.

    Args:
        data: the features.
        test: indices of the test images.

    Returns:
        Of the images that are not all zeros; None when there is none.

    Raises:
        CacheError: features cannot be read.
    """
    places = np.unique(np.linspace(0, len(test) - 1, min(MOST_IMAGES, len(test))).round().astype(int))
    seen = [index for index in (test[place] for place in places) if data.load([index]).any()]
    if not seen:
        return None
    count = min(data.tokens, data.dim)
    optimum = measure_optimum(data.batches(seen, _BATCH))
    residual_NK = optimum.residual_NR[:, :count].numpy()
    energy_N1 = optimum.energy_N.numpy()[:, None]
    squares_NK = -np.diff(np.concatenate([energy_N1, residual_NK], axis=1), axis=1)
    values_NK = np.sqrt(np.maximum(squares_NK, 0))
    return Spectrum(
        values_NK=values_NK / values_NK[:, :1],
        cosine_K=optimum.token_cosine_NR[:, :count].mean(dim=0).numpy(),
        left_K=(residual_NK / energy_N1).mean(axis=0),
        test_images=len(test),
    )


def shown_ranks(spectrum: Spectrum) -> NDArray[np.int64]:
    """The ranks whose singular values are more than rounding, at least the first."""
    mean_K = spectrum.values_NK.mean(axis=0)
    return spectrum.ranks[: max(1, int((mean_K > _FLOOR).sum()))]


def spectrum_figure(spectrum: Spectrum, ranks: Sequence[int]) -> Figure:
    """Draw the spectrum, and what the SVD leaves at each rank.

    Args:
        spectrum: from `measure_spectrum`.
        ranks: the study's, marked.
    """
    shown = shown_ranks(spectrum)
    values_NK = spectrum.values_NK[:, : len(shown)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    values, left = figure.subplots(1, 2)
    low, high = np.maximum(values_NK.min(axis=0), _FLOOR), values_NK.max(axis=0)
    values.fill_between(shown, low, high, color="#0072B2", alpha=0.2, linewidth=0)
    values.plot(shown, values_NK.mean(axis=0), color="#0072B2", linewidth=1.8)
    values.set_title("Singular values over the first: mean and range over images", fontsize=11)
    left.plot(shown, np.maximum(spectrum.left_K[: len(shown)], _FLOOR**2), color="#000000", linewidth=1.8)
    left.set_title("Share of the squared norm that the SVD leaves", fontsize=11)
    for axes in (values, left):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("rank")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
        axes.xaxis.set_minor_locator(NullLocator())
        for rank in ranks:
            axes.axvline(rank, color="#888888", linestyle=":", linewidth=1)
        quiet_grid(axes)
    return figure
