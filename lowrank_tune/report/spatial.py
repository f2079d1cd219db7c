"""What a low-rank reconstruction does to one image, place by place.

T tokens lie on a grid of H x W places in row-major order; D dim, K channels shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.records import FeatureSet, Split
from lowrank_tune.report.boxes import Box, BoxColumn, inside_boxes

_log = logging.getLogger(__name__)

_PHOTOGRAPH_PIXELS = 448

Map = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regions:
    """A reconstruction inside an image's boxes and outside them.

    Attributes:
        error_inside: root mean squared error of an element over the tokens in a box.
        error_outside: likewise over the others.
        cosine_inside: mean token cosine over the tokens in a box.
        cosine_outside: likewise over the others.
    """

    error_inside: float
    error_outside: float
    cosine_inside: float
    cosine_outside: float


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One method's reconstruction of the image.

    Attributes:
        method: `svd` or the trained family.
        maps_KHW: its values of the shown channels.
        error_HW: root mean squared error over all D channels, a token.
        cosine_HW: cosine with the original, a token.
        regions: inside the boxes and outside; None where there are no boxes, or nothing outside them.
    """

    method: str
    maps_KHW: Map
    error_HW: Map
    cosine_HW: Map
    regions: Regions | None = None

    @property
    def token_cosine(self) -> float:
        """Mean over tokens of the cosine with the original."""
        return float(self.cosine_HW.mean())


@dataclass(frozen=True, slots=True)
class Photograph:
    """The picture behind an image's features.

    Attributes:
        pixels: RGB, squeezed to a square as the encoder saw it [448, 448, 3].
        width: of the upright file, in pixels.
        height: likewise.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SpatialView:
    """One test image, its channels and its reconstructions at one rank.

    Attributes:
        image: position in the test split, from 0.
        key: the image's key.
        rank: R of every reconstruction.
        channels: which of the D channels are shown.
        original_KHW: their values.
        norm_HW: the length of each token.
        reconstructions: the SVD's first, then the network's where there is one.
        photograph: the picture, or None where its file is not at hand.
        boxes: the image's, in fractions of its sides.
        placed: whether the grid is known to be the image's; a number of tokens that is no square leaves it a guess.
    """

    image: int
    key: str
    rank: int
    channels: tuple[int, ...]
    original_KHW: Map
    norm_HW: Map
    reconstructions: tuple[Reconstruction, ...]
    photograph: Photograph | None
    boxes: tuple[Box, ...] = ()
    placed: bool = True


def grid_shape(tokens: int) -> tuple[int, int]:
    """The most nearly square grid of so many tokens, (rows, columns), no taller than wide: 256 -> 16x16, 12 -> 3x4."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def check_images(images: Sequence[int], test_images: int, said: str = "report.images") -> None:
    """Refuse images that the test split does not have.

    Args:
        images: positions in the test split, from 0.
        test_images: how many it has.
        said: where the user named them.

    Raises:
        InputError: naming the first that is not there, and how many are.
    """
    for image in images:
        if not 0 <= image < test_images:
            has = "1 image, number 0" if test_images == 1 else f"{test_images} images, numbers 0 to {test_images - 1}"
            raise InputError(f"{said}: there is no image {image}; the test split has {has}: choose among them")


def check_channels(channels: Sequence[int], dim: int) -> None:
    """Refuse channels that the features do not have.

    Raises:
        InputError: naming the first that is not there, and how many are.
    """
    for channel in channels:
        if not 0 <= channel < dim:
            raise InputError(f"channel {channel}: these features have channels 0 to {dim - 1}; choose among them")


def spatial_views(
    data: FeatureMatrix,
    split: Split,
    image: int,
    *,
    networks: Mapping[int, Decomposer | None],
    channels: Sequence[int],
    boxes: BoxColumn | None = None,
) -> Iterator[SpatialView]:
    """Reconstruct one test image at several ranks, by the SVD and by a network.

    Args:
        data: the study's features.
        split: whose test images are counted.
        image: position in the test split, from 0.
        networks: of each rank a trained decomposer that serves it, in evaluation mode on the CPU, or None.
        channels: which channels to show, at least one.
        boxes: of the study's records.

    Yields:
        A view a rank, in the order of `networks`.

    Raises:
        InputError: the test split has no such image, or the features no such channel.
        CacheError: its features cannot be read.
    """
    check_images([image], len(split.test))
    check_channels(channels, data.dim)
    row = data.features.rows[split.test[image]]
    x_TD = data.load([split.test[image]])[0]
    grid = grid_shape(data.tokens)
    picture = photograph(data.features, row.key)
    placed = grid[0] == grid[1]
    found = boxes.of(row.key, picture.width, picture.height) if boxes and picture and placed else ()
    inside_HW = inside_boxes(found, *grid) if found else None
    for rank, made in zip(networks, reconstruct(x_TD, networks), strict=True):
        yield SpatialView(
            image=image,
            key=row.key,
            rank=rank,
            channels=tuple(channels),
            original_KHW=_maps(x_TD[:, list(channels)].T, grid),
            norm_HW=_maps(x_TD.double().norm(dim=1), grid),
            reconstructions=tuple(
                _reconstruction(name, x_TD, y_TD, channels, inside_HW) for name, y_TD in made.items()
            ),
            photograph=picture,
            boxes=found,
            placed=placed,
        )


def reconstruct(x_TD: Tensor, networks: Mapping[int, Decomposer | None]) -> Iterator[dict[str, Tensor]]:
    """Reconstruct an image at several ranks; the SVD is computed once.

    Args:
        x_TD: its features [T, D].
        networks: as for `spatial_views`.

    Yields:
        A rank's reconstructions [T, D] in float64 by method, the SVD's first.
    """
    u, s, vh = torch.linalg.svd(x_TD.double(), full_matrices=False)
    for rank, network in networks.items():
        made = {"svd": (u[:, :rank] * s[:rank]) @ vh[:rank]}
        if network is not None:
            with torch.inference_mode():
                a_NTR, b_NRD = network(x_TD[None], rank)
            made[network.family] = a_NTR[0].double() @ b_NRD[0].double()
        yield made


def token_maps(x_TD: Tensor, y_TD: Tensor) -> tuple[Map, Map]:
    """Root mean squared error and cosine of each token of a reconstruction, each [H, W].

    Args:
        x_TD: the original [T, D].
        y_TD: its reconstruction [T, D].
    """
    x_TD, grid = x_TD.double(), grid_shape(len(x_TD))
    error_HW = _maps((x_TD - y_TD).square().mean(dim=1).sqrt(), grid)
    return error_HW, _maps(torch.cosine_similarity(x_TD, y_TD, dim=1), grid)


def regions_of(error_HW: Map, cosine_HW: Map, inside_HW: NDArray[np.bool_]) -> Regions | None:
    """Compare a reconstruction inside boxes and outside; None where one of the two is empty."""
    if not inside_HW.any() or inside_HW.all():
        return None
    return Regions(
        error_inside=float(np.sqrt(np.square(error_HW[inside_HW]).mean())),
        error_outside=float(np.sqrt(np.square(error_HW[~inside_HW]).mean())),
        cosine_inside=float(cosine_HW[inside_HW].mean()),
        cosine_outside=float(cosine_HW[~inside_HW].mean()),
    )


def _reconstruction(
    method: str, x_TD: Tensor, y_TD: Tensor, channels: Sequence[int], inside_HW: NDArray[np.bool_] | None
) -> Reconstruction:
    error_HW, cosine_HW = token_maps(x_TD, y_TD)
    return Reconstruction(
        method=method,
        maps_KHW=_maps(y_TD[:, list(channels)].T, grid_shape(len(x_TD))),
        error_HW=error_HW,
        cosine_HW=cosine_HW,
        regions=None if inside_HW is None else regions_of(error_HW, cosine_HW, inside_HW),
    )


def _maps(values: Tensor, grid: tuple[int, int]) -> Map:
    maps: Map = values.double().reshape(*values.shape[:-1], *grid).numpy()
    return maps


def photograph(features: FeatureSet, key: str) -> Photograph | None:
    """The picture behind an image's features.

    Args:
        features: whose records name the images' files.
        key: the image's key.

    Returns:
        None when no record names a picture that can be opened here: imported tensors have none, and a study's images
        may lie on another machine.
    """
    for path in _paths(features, key):
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
                pixels = np.asarray(upright.resize((_PHOTOGRAPH_PIXELS, _PHOTOGRAPH_PIXELS)))
                return Photograph(pixels, *upright.size)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            _log.info("%s: not shown beside its maps (%s)", path, error)
    return None


def _paths(features: FeatureSet, key: str) -> list[Path]:
    try:
        records: Any = pd.read_parquet(features.records_path, columns=["key", "path"], filters=[("key", "==", key)])
    except (OSError, ValueError, KeyError) as error:
        _log.info("%s: the images' paths cannot be read (%s)", features.records_path, error)
        return []
    return [Path(path) for path in records["path"] if isinstance(path, str) and path and Path(path).is_file()]
