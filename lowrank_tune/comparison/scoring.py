"""Every method's figures on every test image, streamed: no more than a batch of features is in memory.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lowrank_tune.comparison.methods import Method
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.metrics import Figures, measure, residual_ratio
from lowrank_tune.lowrank.oracle import Optimum, measure_optimum

BATCH_NUMBERS = 2**23
"""Numbers of features in memory at a time: 16 images of [256, 2048]."""

Kind = tuple[str, int]
"""A method's name and rank."""


def score(
    data: FeatureMatrix, test: Sequence[int], ranks: Sequence[int], methods: Sequence[Method], device: str
) -> tuple[pd.DataFrame, list[str]]:
    """Measure the SVD at every rank, from one eigendecomposition an image, and every method, in float64.

    Args:
        data: the features.
        test: indices of the images that judge.
        ranks: at which ranks.
        methods: beside the SVD, each at one of the ranks; one a (name, rank).
        device: where the methods run.

    Returns:
        A row a (method, rank, image): `method`, `rank`, `key`, `index` (the position in `test`), `token_cosine`,
        `flat_cosine`, `mse`, `residual` and `residual_ratio`, every number finite; and a sentence for each method that
        broke on an image, none of whose rows are there, and for images of zeros, on which no ratio means anything.

    Raises:
        CacheError: features cannot be read.
    """
    frames: list[pd.DataFrame] = []
    broken: dict[Kind, str] = {}
    measured = 0
    for places, x_NTD, optimum in _batches(data, test):
        keys = [data.features.rows[test[place]].key for place in places]
        images = pd.DataFrame({"key": keys, "index": places})
        measured += len(images)
        x_NTD = x_NTD.to(device)
        exact_NTD = x_NTD.double()
        best = {rank: optimum.at(rank) for rank in ranks}
        figures: dict[Kind, Figures] = {("svd", rank): best[rank] for rank in ranks}
        for method in methods:
            kind = (method.name, method.rank)
            if kind not in broken:
                result = _figures(method, x_NTD, exact_NTD)
                if isinstance(result, str):
                    broken[kind] = result
                else:
                    figures[kind] = result
        for kind, of_kind in figures.items():
            ratio_N = residual_ratio(of_kind.residual_N, best[kind[1]].residual_N, optimum.energy_N)
            frames.append(_frame(kind, images, of_kind, ratio_N))
    remarks = [f"{name} at rank {rank} is left out: {reason}" for (name, rank), reason in broken.items()]
    if measured < len(test):
        remarks.append(f"{len(test) - measured} of {len(test)} test images hold nothing but zeros and are left out")
    if not frames:
        return pd.DataFrame(), remarks
    table = pd.concat(frames, ignore_index=True)
    whole = [kind not in broken for kind in zip(table["method"], table["rank"], strict=True)]
    return table[whole].reset_index(drop=True), remarks


def _batches(data: FeatureMatrix, test: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Optimum]]:
    """Yield the positions, features and optimum of the test images that are not all zeros."""
    size = max(1, BATCH_NUMBERS // (data.tokens * data.dim))
    for start in range(0, len(test), size):
        x_NTD = data.load(test[start : start + size])
        seen_N = x_NTD.flatten(1).any(dim=1)
        if seen_N.any():
            x_NTD = x_NTD[seen_N]
            yield (start + np.flatnonzero(seen_N.numpy())).tolist(), x_NTD, measure_optimum([x_NTD])


def _figures(method: Method, x_NTD: Tensor, exact_NTD: Tensor) -> Figures | str:
    """Measure a method on a batch, given in float32 and in float64; return why not, when it breaks on it."""
    try:
        with torch.inference_mode():
            figures = Figures(*(figure_N.cpu() for figure_N in measure(exact_NTD, *method.decompose(x_NTD))))
    except RuntimeError as error:  # torch raises its linear algebra's and its memory's errors as this
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    finite = all(bool(figure_N.isfinite().all()) for figure_N in figures)
    return figures if finite else "its factors are not finite on every test image"


def _frame(kind: Kind, images: pd.DataFrame, figures: Figures, ratio_N: Tensor) -> pd.DataFrame:
    columns = {
        "token_cosine": figures.token_cosine_N,
        "flat_cosine": figures.flat_cosine_N,
        "mse": figures.mse_N,
        "residual": figures.residual_N,
        "residual_ratio": ratio_N,
    }
    numbers = {name: values_N.numpy() for name, values_N in columns.items()}
    return images.assign(method=kind[0], rank=kind[1], **numbers)[["method", "rank", "key", "index", *numbers]]
