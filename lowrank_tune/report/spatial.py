"""What a low-rank reconstruction does to one image, place by place.

T tokens lie on a grid of H x W places in row-major order; D dim, K channels shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import open_picture
from lowrank_tune.features.images import read_original
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.records import FeatureSet, Split
from lowrank_tune.report.boxes import Box, BoxColumn

logger = logging.getLogger(__name__)

Map = NDArray[np.float64]


class Regions(NamedTuple):
    """A reconstruction inside an image's boxes and outside: root mean squared error, and mean token cosine."""

    error_inside: float
    error_outside: float
    cosine_inside: float
    cosine_outside: float


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One method's reconstruction of the image."""

    method: str
    maps_KHW: Map  # its values of the shown channels
    error_HW: Map  # a token's root mean squared error over all D channels
    cosine_HW: Map  # a token's cosine with the original
    regions: Regions | None = None  # None where there are no boxes, or nothing outside them

    @property
    def token_cosine(self) -> float:
        """Mean over tokens."""
        return float(self.cosine_HW.mean())


@dataclass(frozen=True, slots=True)
class SpatialView:
    """One test image, its channels and its reconstructions at one rank."""

    image: int  # position in the test split, from 0
    rank: int
    channels: tuple[int, ...]
    original_KHW: Map
    norm_HW: Map  # the length of each token
    reconstructions: tuple[Reconstruction, ...]  # the SVD's first, then the network's where there is one
    photograph: Image.Image | None  # squeezed to a square, as the encoder saw it; None where its file is not at hand
    boxes: tuple[Box, ...] = ()  # in fractions of the image's sides
    placed: bool = True  # whether the grid is the image's: a number of tokens that is no square leaves it a guess


def grid_shape(tokens: int) -> tuple[int, int]:
    """The most nearly square grid of so many tokens, (rows, columns), no taller than wide: 256 -> 16x16, 12 -> 3x4."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def check_images(images: Sequence[int], test_images: int, said: str = "report.images") -> None:
    """Refuse images that the test split does not have, as an InputError; `said` is where the user named them."""
    for image in images:
        if not 0 <= image < test_images:
            has = "1 image, number 0" if test_images == 1 else f"{test_images} images, numbers 0 to {test_images - 1}"
            raise InputError(f"{said}: there is no image {image}; the test split has {has}: choose among them")


def check_shown(
    features: FeatureSet,
    split: Split,
    images: Sequence[int],
    channels: Sequence[int] | int,
    rank: int | None,
    trained: Sequence[int] = (),
) -> None:
    """Refuse images, channels or a rank that a study does not have, as an InputError; `trained` are its trials'."""
    check_images(images, len(split.test), "images")
    for channel in () if isinstance(channels, int) else channels:
        if not 0 <= channel < features.dim:
            has = f"channels 0 to {features.dim - 1}"
            raise InputError(f"channel {channel}: these features have {has}; choose among them")
    highest = max([min(features.tokens, features.dim), *trained])
    if rank is not None and not 1 <= rank <= highest:
        raise InputError(f"rank {rank}: these features have ranks 1 to {highest}; choose among them")


def spatial_views(
    data: FeatureMatrix,
    split: Split,
    image: int,
    *,
    networks: Mapping[int, Decomposer | None],
    channels: Sequence[int],
    boxes: BoxColumn | None = None,
) -> Iterator[SpatialView]:
    """Reconstruct a test image, the SVD's way and by each rank's network, where it has one: a view a rank."""
    key, x_TD = data.features.rows[split.test[image]].key, data.load([split.test[image]])[0]
    grid, shown = grid_shape(data.tokens), list(channels)
    picture, placed = photograph(data.features, key), grid[0] == grid[1]
    found = boxes.of(key, *picture.size) if boxes and picture and placed else ()
    inside_HW = inside_boxes(found, *grid)
    for rank, made in zip(networks, reconstruct(x_TD, networks), strict=True):
        reconstructions = []
        for method, y_TD in made.items():
            maps_KHW, by_token = y_TD[:, shown].T.reshape(-1, *grid).numpy(), token_maps(x_TD, y_TD)
            reconstructions.append(Reconstruction(method, maps_KHW, *by_token, regions_of(*by_token, inside_HW)))
        yield SpatialView(
            image=image,
            rank=rank,
            channels=tuple(channels),
            original_KHW=x_TD[:, shown].T.double().reshape(-1, *grid).numpy(),
            norm_HW=x_TD.double().norm(dim=1).reshape(grid).numpy(),
            reconstructions=tuple(reconstructions),
            photograph=picture.resize((448, 448)) if picture else None,
            boxes=found,
            placed=placed,
        )


def reconstruct(x_TD: Tensor, networks: Mapping[int, Decomposer | None]) -> Iterator[dict[str, Tensor]]:
    """Reconstruct an image [T, D] at several ranks: in float64 [T, D] by method, the SVD's first."""
    x = x_TD.double()
    # Its left singular vectors are the Gram matrix's eigenvectors: several times faster than an SVD.
    u_TK = torch.linalg.eigh(x @ x.T).eigenvectors.flip(1)
    for rank, network in networks.items():
        made = {"svd": u_TK[:, :rank] @ (u_TK[:, :rank].T @ x)}
        if network is not None:
            with torch.inference_mode():
                a_NTR, b_NRD = network(x_TD[None], rank)
            made[network.family] = a_NTR[0].double() @ b_NRD[0].double()
        yield made


def token_maps(x_TD: Tensor, y_TD: Tensor) -> tuple[Map, Map]:
    """Root mean squared error and cosine of each token of a reconstruction [T, D], each [H, W]."""
    x_TD, grid = x_TD.double(), grid_shape(len(x_TD))
    error_T = (x_TD - y_TD).square().mean(dim=1).sqrt()
    return error_T.reshape(grid).numpy(), torch.cosine_similarity(x_TD, y_TD, dim=1).reshape(grid).numpy()


def regions_of(error_HW: Map, cosine_HW: Map, inside_HW: NDArray[np.bool_] | None) -> Regions | None:
    """Compare a reconstruction inside boxes and outside; None where `inside_boxes` knows no such places."""
    if inside_HW is None:
        return None
    errors = (math.sqrt(np.square(error_HW[where]).mean()) for where in (inside_HW, ~inside_HW))
    return Regions(*errors, *(float(cosine_HW[where].mean()) for where in (inside_HW, ~inside_HW)))


def compare_regions(
    data: FeatureMatrix, split: Split, boxes: BoxColumn, rank: int, network: Decomposer | None, most: int = 128
) -> tuple[int, dict[str, Regions]]:
    """Measure the SVD and a network inside and outside the boxes of test images.

    Returns:
        How many images have a box, a photograph and tokens on both sides of it, `most` of them at most, and each
        method's means over them; none where the places of tokens are not known.
    """
    height, width = grid_shape(data.tokens)
    found: dict[str, list[Regions]] = {}
    for index in split.test if height == width else ():
        key = data.features.rows[index].key
        picture = photograph(data.features, key) if key in boxes.boxes else None
        inside_HW = inside_boxes(boxes.of(key, *picture.size) if picture else (), height, width)
        if inside_HW is None:
            continue
        x_TD = data.load([index])[0]
        (made,) = reconstruct(x_TD, {rank: network})
        for method, y_TD in made.items():
            found.setdefault(method, []).extend(filter(None, [regions_of(*token_maps(x_TD, y_TD), inside_HW)]))
        if len(found["svd"]) == most:
            break
    means = {method: Regions(*np.mean(regions, axis=0).tolist()) for method, regions in found.items()}
    return len(found.get("svd", ())), means


def photograph(features: FeatureSet, key: str) -> Image.Image | None:
    """The picture behind an image's features, as they saw it; None where no record names one that is here unchanged."""
    try:
        return open_picture(read_original(features, key), None)  # its features were within features.max_pixels
    except (OSError, UnusableError) as error:
        logger.info("not shown beside its maps: %s", error)
        return None


def inside_boxes(boxes: Iterable[Box], height: int, width: int) -> NDArray[np.bool_] | None:
    """Mark the tokens [H, W] whose centre lies in a box, and the one at its centre; None where they are all or none."""
    inside = np.zeros((height, width), dtype=bool)
    y_H1, x_1W = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None, :] + 0.5) / width
    for x0, y0, x1, y1 in boxes:
        inside |= (x_1W >= x0) & (x_1W < x1) & (y_H1 >= y0) & (y_H1 < y1)
        inside[min(int((y0 + y1) / 2 * height), height - 1), min(int((x0 + x1) / 2 * width), width - 1)] = True
    return inside if inside.any() and not inside.all() else None
