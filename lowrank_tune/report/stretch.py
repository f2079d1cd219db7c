"""Scales on which the differences that matter can be seen, for matplotlib's axes and plotly's alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Scale = Callable[[NDArray[np.float64]], NDArray[np.float64]]

# Ticks on an axis at most, roughly.
_MOST_TICKS = 14
# A method that is exact would lie at infinity on the cosine axis; beyond this it is drawn as exact.
_CLOSEST_TO_ONE = 1e-7
# Where the ratio's axis turns from logarithmic in ρ − 1 to linear: finer differences from the optimum matter to nobody.
_RATIO_GRAIN = 0.01


@dataclass(frozen=True, slots=True)
class Stretch:
    """A scale that is finer where methods differ.

    Attributes:
        forward: values to places on the axis.
        inverse: places to values.
        ticks: in order of preference: where two would touch, the earlier one stays.
        default: a value to scale an empty axis by.
    """

    forward: _Scale
    inverse: _Scale
    ticks: tuple[float, ...]
    default: float

    def place(self, values: Sequence[float]) -> list[float]:
        """Where values lie on the axis."""
        places: list[float] = self.forward(np.asarray(values, dtype=np.float64)).tolist()
        return places

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """The places at which an axis that holds these values begins and ends."""
        values = values or [self.default]
        low, high = self.place([min(values), max(values)])
        margin = 0.06 * (high - low) + 0.02
        return low - margin, high + margin

    def ticks_for(self, values: Sequence[float]) -> list[float]:
        """The ticks that such an axis has room for; there may be none."""
        low, high = self.ends(values)
        inside: list[float] = []
        for tick in self.ticks:
            (place,) = self.place([tick])
            apart = min((abs(place - other) for other in self.place(inside)), default=np.inf)
            if low <= place <= high and apart * _MOST_TICKS >= high - low:
                inside.append(tick)
        return inside


TOWARDS_ONE = Stretch(
    lambda cosine: -np.log10(np.maximum(1 - cosine, _CLOSEST_TO_ONE)),
    lambda place: 1 - 10.0**-place,
    (
        *(0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999, 0, 0.5, 0.95, 0.995, 0.9995, 0.8, 0.98, 0.998, 0.9998),
        *(0.7, 0.97, 0.997, 0.3, 0.93, 0.993, -0.5, -1),
    ),
    0.5,
)
"""Cosines by −log(1 − cosine): 0.99 and 0.999 lie as far apart as 0.9 and 0.99."""

ABOVE_ONE = Stretch(
    lambda ratio: np.log10(np.maximum(ratio - 1, -0.9 * _RATIO_GRAIN) + _RATIO_GRAIN),
    lambda place: 1 - _RATIO_GRAIN + 10.0**place,
    (1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1.1, 2, 1.02, 5, 1.2, 1.5, 1.05, 20, 50, 200, 500, 3, 1.01),
    1.0,
)
"""Residual ratios by log(ρ − 1 + 0.01): 1.02 stands apart from the optimum beside a 20."""


def tick_text(value: float, _position: float | None = None) -> str:
    """All digits of a cosine, and no more than five characters of a large number: 0.99999, 5000, 1e5."""
    return f"{value:.7g}" if abs(value) < 1e4 else f"{value:.2g}".replace("e+0", "e").replace("e+", "e")
