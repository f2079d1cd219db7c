"""Bytes against error on the test split: factors in few bits, beside the features themselves in few bits.

X in int8, int5 or int4, a scale a token, is the control: it needs no decomposition, and a decomposition that is not
smaller at the same error is of no use for storage. Only a batch of features is in memory.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lowrank_tune.comparison.choice import Kind
from lowrank_tune.comparison.methods import Method, batches
from lowrank_tune.comparison.remarks import compression_texts
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.metrics import Figures, measure, measure_matrix
from lowrank_tune.lowrank.quantization import (
    QuantisedDecomposer,
    factor_bytes,
    model_bytes,
    ordered,
    packed_bytes,
    prune,
    residual_by_rank,
    restored,
    restored_factors,
)
from lowrank_tune.lowrank.svd import Optimum
from lowrank_tune.records import ComparisonRow, Compression, PrunedRow, QuantisedRow, StoredRow

DTYPES = ("float16", "int8", "int5", "int4")
"""What features and factors are stored in."""
ITSELF = "x"
"""The method's name where the features themselves are stored."""
AS_NEAR_AS = ("int8", "int5", "int4")
"""Targets: the error of the same image's X in this dtype."""
TARGETS = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.02", "0.01")
"""Targets: a relative error."""
COUNT_BYTES = 2
"""What an image needs beyond its components where their number is its own."""

Key = tuple[str, int, str]
"""A method's name, its rank and a dtype."""


def measure_compression(
    data: FeatureMatrix,
    test: Sequence[int],
    optimum: Optimum,
    rows: Sequence[ComparisonRow],
    methods: Sequence[Method],
    device: str,
) -> tuple[Compression, list[str]]:
    """Measure what the features, the SVD's factors and the chosen models' take in each dtype, and what is lost.

    Args:
        data: the features.
        test: indices of the images that judge; those of nothing but zeros are passed over.
        optimum: theirs.
        rows: the comparison's; they tell the chosen model of each rank.
        methods: what the rows are of.
        device: where the methods run.

    Returns:
        The figures; or none and a sentence why, for what breaks on the way costs a study these figures, not all.

    Raises:
        CacheError: features cannot be read.
    """
    try:
        return _measure(data, test, optimum, rows, methods, device), []
    except CacheError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Compression(), [f"bytes against error are left out: {reason}"]


def _measure(
    data: FeatureMatrix,
    test: Sequence[int],
    optimum: Optimum,
    rows: Sequence[ComparisonRow],
    methods: Sequence[Method],
    device: str,
) -> Compression:
    trained = [method for method in methods if method.model is not None]
    chosen = {(row.method, row.rank): row.rank for row in rows if row.chosen}
    best = sorted((method for method in trained if method.kind in chosen), key=lambda method: method.rank)
    ranks = sorted({row.rank for row in rows})
    measured = _Measured((data.tokens, data.dim), {method.kind: method.trial_id for method in best})
    quantised = {method.kind: QuantisedDecomposer(method.model) for method in trained if method.model is not None}
    errors: dict[Kind, list[Tensor]] = defaultdict(list)
    for _, x_NTD in batches(data, test, optimum):
        with torch.inference_mode():
            x_NTD = x_NTD.to(device)
            measured.begin(x_NTD)
            most = min(x_NTD.shape[-2:])
            measured.factors("svd", most, _svd_factors(x_NTD, most), ranks, pruned=True)
            made = {method.kind: method.decompose(x_NTD) for method in trained}
            for method in best:
                own = ordered(made[method.kind])
                measured.factors(method.name, method.rank, own, [method.rank], pruned=method is best[-1])
            for method in trained:
                errors[method.kind].append(_before_and_after(measured, made[method.kind], quantised[method.kind]))
    models = []
    for method in trained:
        before, after = torch.cat(errors[method.kind], dim=1).mean(dim=1).tolist()
        if math.isfinite(after) and method.model is not None:
            sizes = model_bytes(method.model), model_bytes(quantised[method.kind].model)
            models.append(QuantisedRow(method.name, method.rank, method.trial_id, *sizes, before, after))
    stored, pruned = measured.stored_rows(), measured.pruned_rows()
    return Compression(stored, pruned, tuple(models), tuple(compression_texts(stored, pruned, models)))


def _svd_factors(x_NTD: Tensor, rank: int) -> Factors:
    """The truncated SVD with √Σ in either factor; its components are orthogonal already, which spares `ordered`."""
    a_NTR, b_NRD = baselines.svd(x_NTD, rank)
    a_N1R, b_NR1 = (
        torch.linalg.vector_norm(a_NTR, dim=1, keepdim=True),
        torch.linalg.vector_norm(b_NRD, dim=2)[..., None],
    )
    root_NR1 = (a_N1R.mT * b_NR1).sqrt()
    tiny = torch.finfo(x_NTD.dtype).tiny
    return Factors(a_NTR * (root_NR1.mT / a_N1R.clamp_min(tiny)), b_NRD * (root_NR1 / b_NR1.clamp_min(tiny)))


def _before_and_after(measured: _Measured, factors: Factors, quantised: QuantisedDecomposer) -> Tensor:
    """Relative errors [2, N] of a model's factors and of its int8 self's, not finite where that breaks."""
    before_N = after_N = residual_by_rank(measured.exact_NTD, factors)[:, -1]
    if quantised.matrices:
        try:
            again = quantised(measured.x_NTD, rank=factors.a_NTR.shape[-1])
            after_N = residual_by_rank(measured.exact_NTD, again)[:, -1]
        except RuntimeError:  # torch raises its linear algebra's errors as this
            after_N = torch.full_like(before_N, torch.nan)
    return (torch.stack([before_N, after_N]) / measured.energy_N).sqrt().cpu()


class _Measured:
    """What was measured of the batches so far, an image a row; what broke on one of them is left out of the figures."""

    def __init__(self, shape: tuple[int, int], trials: dict[Kind, str]) -> None:
        self._shape, self._trials = shape, trials
        self._stored: list[pd.DataFrame] = []
        self._kept: list[pd.DataFrame] = []
        self._broken: set[Key] = set()

    def begin(self, x_NTD: Tensor) -> None:
        """Take the next batch, and measure X itself in each dtype."""
        # What measures is in float64: converted once, for there are many measures.
        self.x_NTD, self.exact_NTD = x_NTD, x_NTD.double()
        self.energy_N = self.exact_NTD.square().sum((-2, -1))
        self._allowed = {target: float(target) ** 2 * self.energy_N for target in TARGETS}
        for dtype in DTYPES:
            try:
                figures = measure_matrix(self.exact_NTD, restored(x_NTD, dtype))
            except InputError:  # larger than float16 is
                self._broken.add((ITSELF, 0, dtype))
                continue
            self._add((ITSELF, 0, dtype), figures)
            if dtype in AS_NEAR_AS:
                self._allowed[dtype] = figures.residual_N

    def factors(self, name: str, most: int, factors: Factors, ranks: Sequence[int], *, pruned: bool) -> None:
        """Measure ordered factors of rank `most` in each dtype: their leading `ranks`, and each image's fewest."""
        for dtype in DTYPES:
            try:
                for rank in ranks:
                    leading = Factors(factors.a_NTR[..., :rank], factors.b_NRD[:, :rank])
                    self._add((name, rank, dtype), measure(self.exact_NTD, *restored_factors(leading, dtype)))
                residual_NR = residual_by_rank(self.exact_NTD, restored_factors(factors, dtype)) if pruned else None
            except InputError:  # larger than float16 is
                self._broken.update((name, rank, dtype) for rank in (*ranks, most))
                continue
            if residual_NR is None:
                continue
            for target, allowed_N in self._allowed.items():
                kept_N = prune(residual_NR, allowed_N)
                left_N = residual_NR.gather(1, kept_N.clamp_min(0)[:, None])[:, 0]
                self._kept.append(self._frame((name, most, dtype), left_N, target=target, kept=kept_N.cpu().numpy()))

    def _add(self, key: Key, figures: Figures) -> None:
        self._stored.append(self._frame(key, figures.residual_N, cosine=figures.token_cosine_N.cpu().numpy()))

    def _frame(self, key: Key, residual_N: Tensor, **more: object) -> pd.DataFrame:
        error_N = (residual_N / self.energy_N).sqrt().cpu().numpy()
        return pd.DataFrame({"method": key[0], "rank": key[1], "dtype": key[2], "error": error_N, **more})

    def stored_rows(self) -> tuple[StoredRow, ...]:
        """What each method takes at each rank in each dtype, by rank."""
        key: Any
        rows = []
        for key, images in pd.concat(self._stored).groupby(["method", "rank", "dtype"], sort=False):
            name, rank, dtype = key
            if key in self._broken or not np.isfinite(images["error"]).all():
                continue
            size = packed_bytes(self._shape, dtype) if name == ITSELF else factor_bytes(*self._shape, rank, dtype)
            error, cosine = images["error"], images["cosine"]
            figures = float(error.mean()), float(error.max()), float(cosine.mean())
            trial_id = self._trials.get((name, rank), "")
            rows.append(StoredRow(name, rank, dtype, len(images), size, *figures, trial_id))
        return tuple(sorted(rows, key=lambda row: (row.rank, row.method != "svd", DTYPES.index(row.dtype))))

    def pruned_rows(self) -> tuple[PrunedRow, ...]:
        """What factors take where each image keeps the fewest components that meet a target."""
        key: Any
        rows = []
        for key, images in pd.concat(self._kept).groupby(["method", "rank", "dtype", "target"], sort=False):
            name, rank, dtype, target = key
            kept, met = images["kept"], int((images["kept"] >= 0).sum())
            if (name, rank, dtype) in self._broken:
                continue
            figures: dict[str, Any] = {}
            if met == len(images):
                sizes = [COUNT_BYTES + factor_bytes(*self._shape, int(count), dtype) for count in kept]
                figures = {
                    "rank_mean": float(kept.mean()),
                    "rank_max": int(kept.max()),
                    "bytes_per_image": sum(sizes) / len(sizes),
                    "relative_error_mean": float(images["error"].mean()),
                    "relative_error_max": float(images["error"].max()),
                }
            trial_id = self._trials.get((name, rank), "")
            rows.append(PrunedRow(name, rank, dtype, target, len(images), met, **figures, trial_id=trial_id))
        return tuple(rows)
