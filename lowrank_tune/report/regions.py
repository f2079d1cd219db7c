"""The error inside the boxes of the test images and outside them: does a network fail where it matters?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.records import Split
from lowrank_tune.report.boxes import BoxColumn, inside_boxes
from lowrank_tune.report.spatial import Regions, grid_shape, photograph, reconstruct, regions_of, token_maps

MOST_IMAGES = 128
"""Test images that are looked at, at most: the first ones that have a box."""


@dataclass(frozen=True, slots=True)
class RegionRow:
    """A method's means over the test images with boxes.

    Attributes:
        method: `svd` or the trained family.
        rank: R.
        images: how many images the means are over.
        regions: the means.
    """

    method: str
    rank: int
    images: int
    regions: Regions


def compare_regions(
    data: FeatureMatrix, split: Split, boxes: BoxColumn, rank: int, network: Decomposer | None
) -> list[RegionRow]:
    """Measure the SVD and a network inside and outside the boxes of the test images.

    Args:
        data: the study's features.
        split: whose test images are looked at.
        boxes: of the study's records.
        rank: R.
        network: a decomposer that serves it, in evaluation mode on the CPU, or None.

    Returns:
        A row a method; none where no test image has a box, a photograph and tokens on both sides, or where the number
        of tokens is no square, so that their places are not known.

    Raises:
        CacheError: features cannot be read.
    """
    grid = grid_shape(data.tokens)
    if grid[0] != grid[1]:
        return []
    found: dict[str, list[Regions]] = {}
    for index in split.test:
        if max(map(len, found.values()), default=0) == MOST_IMAGES:
            break
        key = data.features.rows[index].key
        picture = photograph(data.features, key) if key in boxes.boxes else None
        own = boxes.of(key, picture.width, picture.height) if picture else ()
        if own:
            inside_HW = inside_boxes(own, *grid)
            for method, regions in _of_image(data, index, rank, network, inside_HW):
                found.setdefault(method, []).append(regions)
    return [RegionRow(method, rank, len(regions), _mean(regions)) for method, regions in found.items()]


def _of_image(
    data: FeatureMatrix, index: int, rank: int, network: Decomposer | None, inside_HW: NDArray[np.bool_]
) -> list[tuple[str, Regions]]:
    x_TD = data.load([index])[0]
    (made,) = reconstruct(x_TD, {rank: network})
    measured = ((method, regions_of(*token_maps(x_TD, y_TD), inside_HW)) for method, y_TD in made.items())
    return [(method, regions) for method, regions in measured if regions is not None]


def _mean(regions: Sequence[Regions]) -> Regions:
    return Regions(
        error_inside=fmean(each.error_inside for each in regions),
        error_outside=fmean(each.error_outside for each in regions),
        cosine_inside=fmean(each.cosine_inside for each in regions),
        cosine_outside=fmean(each.cosine_outside for each in regions),
    )
