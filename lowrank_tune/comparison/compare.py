"""The post-study job: every method at every rank of the study, on images that no training saw.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowrank_tune.comparison import remarks as say
from lowrank_tune.comparison.compression import measure_compression
from lowrank_tune.comparison.compression_words import verdict_words
from lowrank_tune.comparison.methods import Method, repeated, trained, untrained
from lowrank_tune.comparison.pareto import pareto_fronts
from lowrank_tune.comparison.rows import make_rows
from lowrank_tune.comparison.scoring import Kind, score
from lowrank_tune.comparison.speed import BATCH, device_words, images_per_second
from lowrank_tune.comparison.store import write_comparison
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank.dataset import FeatureMatrix
from lowrank_tune.lowrank.linalg import principal_axes
from lowrank_tune.lowrank.seeds import stream
from lowrank_tune.records import Comparison, ComparisonRow, Compression, FeatureSet, Split, TrialOutcome

PCA_IMAGES = 512
"""Training images that `pca_basis` is fitted on, at most, spread evenly over the split."""
PCA_BATCH = 16


def compare(
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    *,
    objective: str,
    seed: int,
    directory: Path,
    confirmations: Sequence[TrialOutcome] = (),
    device: str = "cpu",
) -> Comparison:
    """Measure the SVD, the controls and the best trained models on the test split, at every rank that a trial had.

    The validation split chose the model behind a row, so its test figures are honest for that model; what its
    configuration gives with other seeds, `confirmations` tell. Speeds are only worth comparing when nothing else runs.

    Args:
        features: the study's.
        split: its images; `train` fits `pca_basis`, `test` judges.
        outcomes: every trial of the study.
        objective: what picks the best trial of a family and rank: `val_residual_ratio`, `val_mse`, `val_token_cosine`.
        seed: the study's; draws the controls' random starts.
        directory: where `comparison.json`, `per_image.parquet`, `pareto.json` and `compression.json` go.
        confirmations: further trainings of the best configurations, with fresh seeds.
        device: where methods run and are timed; a GPU when the study trained on one.

    Returns:
        The rows by rank and method, and the remarks.

    Raises:
        InputError: there is no trial, no test image, or no test image with a number other than 0.
        CacheError: features cannot be read.
    """
    if not outcomes or not split.test:
        lacking = "test images" if outcomes else "trials"
        raise InputError(f"{directory.name}: there are no {lacking} to compare; change the study file")
    data = FeatureMatrix(features)
    ranks = sorted({rank for outcome in outcomes for rank in outcome.config.ranks})
    axes_DR = _training_axes(data, split, ranks[-1], seed).to(device)
    models, lost = trained(outcomes, features, objective, device)
    methods = [*(method for rank in ranks for method in untrained(rank, axes_DR, seed)), *models]
    repeats, lost_repeats = repeated(confirmations, features, device)
    per_image, left_out = score(data, split.test, ranks, [*methods, *repeats], device)
    if per_image.empty:
        raise InputError(f"{directory.name}: every test image holds nothing but zeros; look at the source images")
    measured = set(zip(per_image["method"], per_image["rank"], strict=True))
    sound = [method for method in methods if (method.name, method.rank) in measured]
    rows = make_rows(data, per_image, sound, repeats, _speeds(data, split, ranks, sound, device))
    compression, unmeasured = _compression(data, split, rows, sound, device)
    comparison = Comparison(
        rows=tuple(rows),
        per_image_path=str(directory / "per_image.parquet"),
        device=device_words(device),
        remarks=(
            *say.about_study(features, outcomes, confirmations, rows),
            *filter(None, [verdict_words(compression.stored, compression.pruned)]),
            *(*unmeasured, *lost, *lost_repeats, *left_out),
        ),
        data=say.data_words(features, rows[0].n_images),
        fronts=pareto_fronts(outcomes, rows),
        compression=compression,
    )
    own = ~per_image["method"].isin({repeat.name for repeat in repeats})
    write_comparison(directory, comparison, per_image[own].reset_index(drop=True))
    return comparison


def _compression(
    data: FeatureMatrix, split: Split, rows: Sequence[ComparisonRow], methods: Sequence[Method], device: str
) -> tuple[Compression, list[str]]:
    """Measure bytes against error; what breaks on the way costs a study these figures, not all of them."""
    try:
        return measure_compression(data, split.test, rows, methods, device), []
    except CacheError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Compression(), [f"bytes against error are left out: {reason}"]


def _training_axes(data: FeatureMatrix, split: Split, count: int, seed: int) -> Tensor:
    places = np.unique(np.linspace(0, len(split.train) - 1, min(PCA_IMAGES, len(split.train))).round().astype(int))
    images = [split.train[place] for place in places]
    return principal_axes(data.batches(images, PCA_BATCH), count, stream(seed, "control pca_basis"))


def _speeds(
    data: FeatureMatrix, split: Split, ranks: Sequence[int], methods: Sequence[Method], device: str
) -> dict[Kind, float]:
    """Time each method on the same test images, repeated where there are few; the SVD once, for it has no rank."""
    size = BATCH["cuda" if device.startswith("cuda") else "cpu"]
    x_NTD = data.load([split.test[place % len(split.test)] for place in range(size)]).to(device)
    svd = images_per_second(lambda x: torch.linalg.svd(x, full_matrices=False), x_NTD)
    speeds: dict[Kind, float] = {("svd", rank): svd for rank in ranks}
    for method in methods:
        speeds[method.name, method.rank] = images_per_second(method.decompose, x_NTD)
    return speeds
