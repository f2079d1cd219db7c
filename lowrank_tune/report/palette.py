"""One look for every method, in every plot: colours that the colour-blind tell apart, and a marker beside each.

The colours are those of Okabe and Ito (2008), "Color Universal Design". Trained families are solid and strong,
controls dashed and lighter, the SVD black: a reader sees the kind of a line before reading the legend.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CONTROLS = ("random_sketch", "pca_basis", "power_1", "randomized_svd")
"""Methods without training, weakest first; the SVD and its row-normalised form stand apart as bounds."""

BOUNDS = ("svd", "svd_rows")
"""What no method beats in flat cosine, and about the best there is in token cosine."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn.

    Attributes:
        color: hex RGB.
        marker: matplotlib's marker code.
        line: matplotlib's line style.
        width: points.
    """

    color: str
    marker: str
    line: str
    width: float


_KNOWN = {
    "svd": Look("#000000", "o", "-", 1.8),
    "svd_rows": Look("#000000", "x", ":", 1.2),
    "random_sketch": Look("#E69F00", "v", "--", 1.2),
    "pca_basis": Look("#56B4E9", "^", "--", 1.2),
    "power_1": Look("#7F7F7F", "<", "--", 1.2),
    "randomized_svd": Look("#CC79A7", ">", "--", 1.2),
    "direct": Look("#D55E00", "s", "-", 2.2),
    "sketch": Look("#0072B2", "D", "-", 2.2),
    "refined": Look("#009E73", "P", "-", 2.2),
}
_FURTHER = (
    Look("#882255", "X", "-", 2.2),
    Look("#332288", "h", "-", 2.2),
    Look("#999933", "p", "-", 2.2),
    Look("#117733", "d", "-", 2.2),
)


def is_trained(method: str) -> bool:
    """Tell a trained family from a bound or a control."""
    return method not in BOUNDS and method not in CONTROLS


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort methods for tables and legends: bounds, then trained families by name, then controls; each once."""
    present = set(methods)
    trained = sorted(method for method in present if is_trained(method))
    return [method for method in (*BOUNDS, *trained, *CONTROLS) if method in present]


def look_of(method: str, methods: Iterable[str] = ()) -> Look:
    """Choose a method's look.

    Args:
        method: its name.
        methods: all that share the plot; a family that has no look of its own gets one that differs from theirs.
    """
    if method in _KNOWN:
        return _KNOWN[method]
    unknown = sorted({name for name in (*methods, method) if name not in _KNOWN})
    return _FURTHER[unknown.index(method) % len(_FURTHER)]
