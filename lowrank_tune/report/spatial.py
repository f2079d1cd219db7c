"""What a low-rank reconstruction does to one image, place by place.

T tokens lie on a grid of H x W places in row-major order; D dim, K channels shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from lowrank_tune.errors import InputError
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Decomposer
from lowrank_tune.records import FeatureSet, Split
from lowrank_tune.report.boxes import Box, BoxColumn, inside_boxes

_log = logging.getLogger(__name__)

Map = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Regions:
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
    error_HW: Map  # root mean squared error over all D channels, a token
    cosine_HW: Map  # cosine with the original, a token
    regions: Regions | None = None  # None where there are no boxes, or nothing outside them

    @property
    def token_cosine(self) -> float:
        """Mean over tokens of the cosine with the original."""
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
    """Refuse images that the test split does not have; `said` is where the user named them.

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
    key, x_TD = data.features.rows[split.test[image]].key, data.load([split.test[image]])[0]
    grid, shown = grid_shape(data.tokens), list(channels)
    picture, placed = photograph(data.features, key), grid[0] == grid[1]
    found = boxes.of(key, *picture.size) if boxes and picture and placed else ()
    inside_HW = inside_boxes(found, *grid)
    for rank, made in zip(networks, reconstruct(x_TD, networks), strict=True):
        reconstructions = []
        for method, y_TD in made.items():
            error_HW, cosine_HW = token_maps(x_TD, y_TD)
            maps_KHW = y_TD[:, shown].T.reshape(-1, *grid).numpy()
            regions = regions_of(error_HW, cosine_HW, inside_HW)
            reconstructions.append(Reconstruction(method, maps_KHW, error_HW, cosine_HW, regions))
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


def regions_of(error_HW: Map, cosine_HW: Map, inside_HW: NDArray[np.bool_]) -> Regions | None:
    """Compare a reconstruction inside boxes and outside; None where one of the two is empty."""
    if not inside_HW.any() or inside_HW.all():
        return None
    errors = (math.sqrt(np.square(error_HW[where]).mean()) for where in (inside_HW, ~inside_HW))
    return Regions(*errors, *(float(cosine_HW[where].mean()) for where in (inside_HW, ~inside_HW)))


def compare_regions(
    data: FeatureMatrix, split: Split, boxes: BoxColumn, rank: int, network: Decomposer | None, most: int = 128
) -> tuple[int, dict[str, Regions]]:
    """Measure the SVD and a network inside and outside the boxes of the test images, the first `most` that have one.

    Returns:
        How many images have a box, a photograph and tokens on both sides of it, and each method's means over them; none
        where the number of tokens is no square, so that their places are not known.

    Raises:
        CacheError: features cannot be read.
    """
    height, width = grid_shape(data.tokens)
    found: dict[str, list[Regions]] = {}
    for index in split.test if height == width else ():
        key = data.features.rows[index].key
        picture = photograph(data.features, key) if key in boxes.boxes else None
        inside_HW = inside_boxes(boxes.of(key, *picture.size) if picture else (), height, width)
        if not inside_HW.any() or inside_HW.all():
            continue
        x_TD = data.load([index])[0]
        (made,) = reconstruct(x_TD, {rank: network})
        for method, y_TD in made.items():
            regions = regions_of(*token_maps(x_TD, y_TD), inside_HW)
            found.setdefault(method, []).extend([regions] if regions else [])
        if len(found["svd"]) == most:
            break
    means = {
        method: Regions(*np.mean([astuple(each) for each in regions], axis=0)) for method, regions in found.items()
    }
    return len(found.get("svd", ())), means


def photograph(features: FeatureSet, key: str) -> Image.Image | None:
    """The picture behind an image's features, upright; None when no record names one that can be opened here.

    Imported tensors have none, and a study's images may lie on another machine.
    """
    try:
        records = pd.read_parquet(features.records_path, columns=["key", "path"], filters=[("key", "==", key)])
    except (OSError, ValueError, KeyError) as error:
        _log.info("%s: the images' paths cannot be read (%s)", features.records_path, error)
        return None
    for path in records["path"]:
        if isinstance(path, str) and Path(path).is_file():
            try:
                with Image.open(path) as picture:
                    return ImageOps.exif_transpose(picture).convert("RGB")
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                _log.info("%s: not shown beside its maps (%s)", path, error)
    return None
