"""What a low-rank reconstruction does to one image, place by place.

T tokens lie on a grid of H x W places in row-major order; D dim, K channels shown.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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

_log = logging.getLogger(__name__)

_PHOTOGRAPH_PIXELS = 448

Map = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """One method's reconstruction of the image.

    Attributes:
        method: `svd` or the trained family.
        maps_KHW: its values of the shown channels.
        error_HW: root mean squared error over all D channels, a token.
        token_cosine: mean over tokens of the cosine with the original.
    """

    method: str
    maps_KHW: Map
    error_HW: Map
    token_cosine: float


@dataclass(frozen=True, slots=True)
class SpatialView:
    """One test image, its channels and its reconstructions.

    Attributes:
        image: position in the test split, from 0.
        key: the image's key.
        rank: R of every reconstruction.
        channels: which of the D channels are shown.
        original_KHW: their values.
        norm_HW: the length of each token.
        reconstructions: the SVD's first, then the network's where there is one.
        photograph: RGB pixels [h, w, 3], or None where its file is not at hand.
    """

    image: int
    key: str
    rank: int
    channels: tuple[int, ...]
    original_KHW: Map
    norm_HW: Map
    reconstructions: tuple[Reconstruction, ...]
    photograph: NDArray[np.uint8] | None


def grid_shape(tokens: int) -> tuple[int, int]:
    """The most nearly square grid of so many tokens, (rows, columns), no taller than wide: 256 -> 16x16, 12 -> 3x4."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return height, tokens // height


def check_images(images: Sequence[int], test_images: int) -> None:
    """Refuse images that the test split does not have.

    Args:
        images: positions in the test split, from 0.
        test_images: how many it has.

    Raises:
        InputError: naming the first that is not there, and how many are.
    """
    for image in images:
        if not 0 <= image < test_images:
            has = "1 image, number 0" if test_images == 1 else f"{test_images} images, numbers 0 to {test_images - 1}"
            raise InputError(f"report.images: there is no image {image}; the test split has {has}: choose among them")


def spatial_view(
    data: FeatureMatrix, split: Split, image: int, *, rank: int, channels: int, network: Decomposer | None
) -> SpatialView:
    """Reconstruct one test image at a rank, by the SVD and by a network.

    Args:
        data: the study's features.
        split: whose test images are counted.
        image: position in the test split, from 0.
        rank: R of the SVD and of the network, which must serve it.
        channels: how many channels to show, the first ones; all D when there are fewer.
        network: a trained decomposer in evaluation mode on the CPU, or None.

    Raises:
        InputError: the test split has no such image.
        CacheError: its features cannot be read.
    """
    check_images([image], len(split.test))
    index = split.test[image]
    x_TD = data.load([index])[0]
    shown = tuple(range(min(channels, data.dim)))
    grid = grid_shape(data.tokens)
    u, s, vh = torch.linalg.svd(x_TD.double(), full_matrices=False)
    reconstructions = [_reconstruction("svd", x_TD, (u[:, :rank] * s[:rank]) @ vh[:rank], shown)]
    if network is not None:
        with torch.inference_mode():
            a_NTR, b_NRD = network(x_TD[None], rank)
        reconstructions.append(_reconstruction(network.family, x_TD, a_NTR[0].double() @ b_NRD[0].double(), shown))
    return SpatialView(
        image=image,
        key=data.features.rows[index].key,
        rank=rank,
        channels=shown,
        original_KHW=_maps(x_TD[:, list(shown)].T, grid),
        norm_HW=_maps(x_TD.double().norm(dim=1), grid),
        reconstructions=tuple(reconstructions),
        photograph=photograph(data.features, data.features.rows[index].key),
    )


def _reconstruction(method: str, x_TD: Tensor, y_TD: Tensor, channels: Sequence[int]) -> Reconstruction:
    x_TD, grid = x_TD.double(), grid_shape(len(x_TD))
    return Reconstruction(
        method=method,
        maps_KHW=_maps(y_TD[:, list(channels)].T, grid),
        error_HW=_maps((x_TD - y_TD).square().mean(dim=1).sqrt(), grid),
        token_cosine=float(torch.cosine_similarity(x_TD, y_TD, dim=1).mean()),
    )


def _maps(values: Tensor, grid: tuple[int, int]) -> Map:
    maps: Map = values.double().reshape(*values.shape[:-1], *grid).numpy()
    return maps


def photograph(features: FeatureSet, key: str) -> NDArray[np.uint8] | None:
    """The picture behind an image's features, squeezed to a square as the encoder saw it.

    Args:
        features: whose records name the images' files.
        key: the image's key.

    Returns:
        RGB pixels [h, w, 3]; None when no record names a picture that can be opened here: imported tensors have none,
        and a study's images may lie on another machine.
    """
    for path in _paths(features, key):
        try:
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
                return np.asarray(upright.resize((_PHOTOGRAPH_PIXELS, _PHOTOGRAPH_PIXELS)))
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
