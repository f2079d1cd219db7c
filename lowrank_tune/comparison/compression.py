"""Bytes against error on the test split: factors in few bits, beside the features themselves in few bits.

X in int8, int5 or int4, a scale a token, is the control: it needs no decomposition, and a decomposition that is not
smaller at the same error is of no use for storage. Only a batch of features is in memory.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lowrank_tune.comparison.choice import Kind
from lowrank_tune.comparison.methods import Method, batches, reason_of
from lowrank_tune.comparison.remarks import compression_texts
from lowrank_tune.errors import CacheError, InputError
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.data import FeatureMatrix
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.metrics import measure, measure_matrix
from lowrank_tune.lowrank.quantization import (
    COUNT_BYTES,
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
from lowrank_tune.measured import ComparisonRow, Compression, PrunedRow, QuantisedRow, StoredRow

DTYPES = ("float16", "int8", "int5", "int4")
"""What features and factors are stored in."""
ITSELF = "x"
"""The method's name where the features themselves are stored."""
AS_NEAR_AS = ("int8", "int5", "int4")
"""Targets: the error of the same image's X in this dtype."""
TARGETS = ("0.5", "0.3", "0.2", "0.1", "0.05", "0.02", "0.01")
"""Targets: a relative error."""


def measure_compression(
    data: FeatureMatrix,
    test: Sequence[int],
    optimum: Optimum,
    rows: Sequence[ComparisonRow],
    methods: Sequence[Method],
    device: str,
) -> tuple[Compression, list[str]]:
    """Measure what the features, the SVD's factors and the chosen models' take in each dtype, and what is lost.

    Returns:
        The figures of the `test` images that are not all zeros; or none and a sentence why, for what breaks on the way
        costs a study these figures, not all.

    Raises:
        CacheError: features cannot be read.
    """
    # What shares its B is stored in another way: `rates` has it.
    chosen = {(row.method, row.rank) for row in rows if row.chosen and not row.shared_bytes}
    ranks = [row.rank for row in rows if row.method == "svd"]
    found: list[pd.DataFrame] = []
    errors: dict[Method, list[Tensor]] = defaultdict(list)
    try:
        trained = {method: QuantisedDecomposer(method.model) for method in methods if method.model is not None}
        best = sorted((method for method in trained if method.kind in chosen), key=lambda method: method.rank)
        for _, x_NTD in batches(data, test, optimum):
            with torch.inference_mode():
                batch = _Batch(x_NTD.to(device))
                batch.add_factors("svd", svd_factors(batch.x_NTD), ranks, pruned=True)
                made = {method: method.decompose(batch.x_NTD) for method in trained}
                for method in best:
                    batch.add_factors(method.name, ordered(made[method]), [method.rank], pruned=method is best[-1])
                for method, quantised in trained.items():
                    errors[method].append(batch.before_and_after(made[method], quantised))
            found += batch.frames
        models = []
        for method, quantised in trained.items():
            before, after = torch.cat(errors[method], dim=1).mean(dim=1).tolist()
            if math.isfinite(after) and method.model is not None:
                sizes = model_bytes(method.model), model_bytes(quantised.model)
                models.append(QuantisedRow(method.name, method.rank, method.trial_id, *sizes, before, after))
        trials = {method.kind: method.trial_id for method in best}
        stored, pruned = _rows(pd.concat(found), (data.tokens, data.dim), trials)
        words = tuple(compression_texts(stored, pruned, models))
        return Compression(stored, pruned, tuple(models), words=words), []
    except CacheError:
        raise
    except Exception as error:
        return Compression(), [f"bytes against error are left out: {reason_of(error)}"]


def svd_factors(x_NTD: Tensor) -> Factors:
    """The SVD with √Σ in either factor; its components are orthogonal already, which spares `ordered`."""
    a_NTR, b_NRD = baselines.svd(x_NTD, min(x_NTD.shape[-2:]))
    a_N1R = torch.linalg.vector_norm(a_NTR, dim=1, keepdim=True)
    b_NR1 = torch.linalg.vector_norm(b_NRD, dim=2, keepdim=True)
    root_NR1, tiny = (a_N1R.mT * b_NR1).sqrt(), torch.finfo(x_NTD.dtype).tiny
    return Factors(a_NTR * (root_NR1.mT / a_N1R.clamp_min(tiny)), b_NRD * (root_NR1 / b_NR1.clamp_min(tiny)))


class _Batch:
    """Some images [N, T, D] and what is measured of them, in `frames` an image a row.

    What a dtype cannot hold, or what is not finite, has an error that is not.
    """

    def __init__(self, x_NTD: Tensor) -> None:
        # What measures is in float64: converted once, for there are many measures.
        self.x_NTD, self._exact_NTD = x_NTD, x_NTD.double()
        self._energy_N = self._exact_NTD.square().sum((-2, -1))
        self._allowed = {target: float(target) ** 2 * self._energy_N for target in TARGETS}
        self.frames: list[pd.DataFrame] = []
        for dtype in DTYPES:
            try:
                figures = measure_matrix(self._exact_NTD, restored(x_NTD, dtype))
            except InputError:  # larger than float16 is
                self._add((ITSELF, 0, dtype))
                continue
            self._add((ITSELF, 0, dtype), figures.residual_N, cosine=figures.token_cosine_N.cpu().numpy())
            if dtype in AS_NEAR_AS:
                self._allowed[dtype] = figures.residual_N

    def add_factors(self, name: str, factors: Factors, ranks: Sequence[int], *, pruned: bool) -> None:
        """Measure ordered factors in each dtype: their leading `ranks`, and where `pruned` each image's fewest."""
        most = factors.a_NTR.shape[-1]
        for dtype in DTYPES:
            try:
                for rank in ranks:
                    leading = Factors(factors.a_NTR[..., :rank], factors.b_NRD[:, :rank])
                    figures = measure(self._exact_NTD, *restored_factors(leading, dtype))
                    self._add((name, rank, dtype), figures.residual_N, cosine=figures.token_cosine_N.cpu().numpy())
                residual_NR = residual_by_rank(self._exact_NTD, restored_factors(factors, dtype))
            except InputError:  # larger than float16 is
                for rank in ranks:
                    self._add((name, rank, dtype))
                residual_NR = torch.full_like(self._energy_N, torch.inf)[:, None]
            for target, allowed_N in self._allowed.items() if pruned else ():
                kept_N = prune(residual_NR, allowed_N)
                left_N = residual_NR.gather(1, kept_N.clamp_min(0)[:, None])[:, 0]
                self._add((name, most, dtype), left_N, target=target, kept=kept_N.cpu().numpy())

    def before_and_after(self, factors: Factors, quantised: QuantisedDecomposer) -> Tensor:
        """Relative errors [2, N] of a model's factors and of its int8 self's, not finite where that breaks."""
        before_N = after_N = residual_by_rank(self._exact_NTD, factors)[:, -1]
        if quantised.matrices:
            try:
                again = quantised(self.x_NTD, rank=factors.a_NTR.shape[-1])
                after_N = residual_by_rank(self._exact_NTD, again)[:, -1]
            except RuntimeError:  # torch raises its linear algebra's errors as this
                after_N = torch.full_like(before_N, torch.nan)
        return (torch.stack([before_N, after_N]) / self._energy_N).sqrt().cpu()

    def _add(self, key: tuple[str, int, str], residual_N: Tensor | None = None, target: str = "", **more: Any) -> None:
        error = np.inf if residual_N is None else (residual_N / self._energy_N).sqrt().cpu().numpy()
        columns = {"method": key[0], "rank": key[1], "dtype": key[2], "target": target, "error": error, **more}
        self.frames.append(pd.DataFrame(columns, index=range(len(self._energy_N))))


def _rows(
    table: pd.DataFrame, shape: tuple[int, int], trials: Mapping[Kind, str]
) -> tuple[tuple[StoredRow, ...], tuple[PrunedRow, ...]]:
    """Fold the images: what each method takes at each rank in each dtype, by rank, and what pruned factors take."""
    stored: list[StoredRow] = []
    pruned: list[PrunedRow] = []
    key: Any
    for key, images in table.groupby(["method", "rank", "dtype", "target"], sort=False):
        name, rank, dtype, target = key
        if not np.isfinite(images["error"]).all():
            continue
        errors = float(images["error"].mean()), float(images["error"].max())
        trial_id, count = trials.get((name, rank), ""), len(images)
        if not target:
            size = packed_bytes(shape, dtype) if name == ITSELF else factor_bytes(*shape, rank, dtype)
            cosine = float(images["cosine"].mean())
            stored.append(StoredRow(name, rank, dtype, count, size, *errors, cosine, trial_id))
            continue
        kept, met = images["kept"], int((images["kept"] >= 0).sum())
        figures: dict[str, Any] = {}
        if met == count:
            size = sum(COUNT_BYTES + factor_bytes(*shape, int(components), dtype) for components in kept)
            figures = {"rank_mean": float(kept.mean()), "rank_max": int(kept.max()), "bytes_per_image": size / count}
            figures |= dict(zip(("relative_error_mean", "relative_error_max"), errors, strict=True))
        pruned.append(PrunedRow(name, rank, dtype, target, count, met, **figures, trial_id=trial_id))
    stored.sort(key=lambda row: (row.rank, row.method != "svd", DTYPES.index(row.dtype)))
    return tuple(stored), tuple(pruned)
