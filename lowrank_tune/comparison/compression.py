"""Bytes against error on the test split: factors in few bits, beside the features themselves in few bits.

X in int8, int5 or int4, a scale a token, is the control: it needs no decomposition, and a decomposition that is not
smaller at the same error is of no use for storage. Only a batch of features is in memory.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_tune.comparison.methods import BATCH_NUMBERS, Method
from lowrank_tune.comparison.remarks import compression_words
from lowrank_tune.errors import InputError
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


@dataclass(slots=True)
class _Tally:
    """What was measured so far, a tensor a batch; and what broke, which is left out."""

    errors: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    cosines: dict[Key, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    kept: dict[tuple[Key, str], list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    models: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    broken: set[Key | str] = field(default_factory=set)

    def add(self, key: Key, figures: Figures, energy_N: Tensor) -> None:
        self.errors[key].append((figures.residual_N / energy_N).sqrt().cpu())
        self.cosines[key].append(figures.token_cosine_N.cpu())


class _Images:
    """A batch [N, T, D] in float32, as methods take it, and in float64, as it is measured; and its energy [N]."""

    def __init__(self, x_NTD: Tensor, exact_NTD: Tensor) -> None:
        self.x_NTD, self.exact_NTD = x_NTD, exact_NTD
        self.energy_N = exact_NTD.square().sum((-2, -1))


def measure_compression(
    data: FeatureMatrix, test: Sequence[int], rows: Sequence[ComparisonRow], methods: Sequence[Method], device: str
) -> Compression:
    """Measure what the features, the SVD's factors and the best trained model's take in each dtype, and what is lost.

    Args:
        data: the features.
        test: indices of the images that judge; those of nothing but zeros are passed over.
        rows: the comparison's; those of each rank's chosen model tell whose factors are stored.
        methods: what the rows are of.
        device: where the methods run.

    Raises:
        CacheError: features cannot be read.
    """
    trained = [method for method in methods if method.trial_id]
    chosen = {(row.method, row.rank) for row in rows if row.chosen}
    best = sorted(
        (method for method in trained if (method.name, method.rank) in chosen), key=lambda method: method.rank
    )
    ranks = sorted({row.rank for row in rows})
    quantised = {
        _model_key(method): QuantisedDecomposer(method.model) for method in trained if method.model is not None
    }
    tally = _Tally()
    size = max(1, BATCH_NUMBERS // (data.tokens * data.dim))
    for x_NTD in data.batches(test, size):
        seen_N = x_NTD.flatten(1).any(dim=1)
        if seen_N.any():
            x_NTD = x_NTD[seen_N].to(device)
            with torch.inference_mode():
                # What measures is in float64: converted once, for there are many measures.
                images = _Images(x_NTD, x_NTD.double())
                allowed = _store_features(images, tally)
                made = {_model_key(method): method.decompose(x_NTD) for method in trained}
                _store_factors(images, ranks, best, made, allowed, tally)
                _run_quantised(images, trained, quantised, made, tally)
    shape = (data.tokens, data.dim)
    trials = {(method.name, method.rank): method.trial_id for method in best}
    stored = _stored_rows(tally, shape, trials)
    pruned = _pruned_rows(tally, shape, trials)
    models = _model_rows(tally, trained, quantised)
    return Compression(stored, pruned, models, tuple(compression_words(stored, pruned, models)))


def _store_features(images: _Images, tally: _Tally) -> dict[str, Tensor]:
    """Measure X in each dtype; return the residual that each target allows, [N]."""
    allowed = {target: float(target) ** 2 * images.energy_N for target in TARGETS}
    for dtype in DTYPES:
        try:
            figures = measure_matrix(images.exact_NTD, restored(images.x_NTD, dtype))
        except InputError:  # larger than float16 is
            tally.broken.add((ITSELF, 0, dtype))
            continue
        tally.add((ITSELF, 0, dtype), figures, images.energy_N)
        if dtype in AS_NEAR_AS:
            allowed[dtype] = figures.residual_N
    return allowed


def _store_factors(
    images: _Images,
    ranks: Sequence[int],
    best: Sequence[Method],
    made: Mapping[str, Factors],
    allowed: Mapping[str, Tensor],
    tally: _Tally,
) -> None:
    """Measure the SVD's factors at each rank and the best trained ones; prune what has the most components of each."""
    most = min(images.x_NTD.shape[-2:])
    _in_each_dtype(images, "svd", most, ordered(baselines.svd(images.x_NTD, most)), ranks, allowed, tally)
    for method in best:
        own = allowed if method is best[-1] else {}
        factors = ordered(made[_model_key(method)])
        _in_each_dtype(images, method.name, method.rank, factors, [method.rank], own, tally)


def _in_each_dtype(
    images: _Images,
    name: str,
    most: int,
    factors: Factors,
    ranks: Sequence[int],
    allowed: Mapping[str, Tensor],
    tally: _Tally,
) -> None:
    for dtype in DTYPES:
        try:
            for rank in ranks:
                leading = Factors(factors.a_NTR[..., :rank], factors.b_NRD[:, :rank])
                figures = measure(images.exact_NTD, *restored_factors(leading, dtype))
                tally.add((name, rank, dtype), figures, images.energy_N)
            residual_NR = residual_by_rank(images.exact_NTD, restored_factors(factors, dtype)) if allowed else None
        except InputError:  # larger than float16 is
            tally.broken.update((name, rank, dtype) for rank in (*ranks, most))
            continue
        if residual_NR is not None:
            for target, allowed_N in allowed.items():
                kept_N = prune(residual_NR, allowed_N)
                left_N = residual_NR.gather(1, kept_N.clamp_min(0)[:, None])[:, 0]
                tally.kept[(name, most, dtype), target].append((kept_N.cpu(), (left_N / images.energy_N).sqrt().cpu()))


def _model_key(method: Method) -> str:
    return f"{method.trial_id} {method.rank}"


def _run_quantised(
    images: _Images,
    trained: Sequence[Method],
    quantised: Mapping[str, QuantisedDecomposer],
    made: Mapping[str, Factors],
    tally: _Tally,
) -> None:
    """Measure each trained model's factors, and those of its int8 self."""
    for method in trained:
        key = _model_key(method)
        if key not in quantised or key in tally.broken:
            continue
        before_N = after_N = residual_by_rank(images.exact_NTD, made[key])[:, -1]
        if quantised[key].matrices:
            try:
                factors = quantised[key](images.x_NTD, rank=method.rank)
            except RuntimeError:  # torch raises its linear algebra's errors as this
                tally.broken.add(key)
                continue
            after_N = residual_by_rank(images.exact_NTD, factors)[:, -1]
        tally.models[key].append((torch.stack([before_N, after_N]) / images.energy_N).sqrt().cpu())


def _stored_rows(tally: _Tally, shape: tuple[int, int], trials: Mapping[tuple[str, int], str]) -> tuple[StoredRow, ...]:
    rows = []
    for key, parts in tally.errors.items():
        name, rank, dtype = key
        error_N, cosine_N = torch.cat(parts), torch.cat(tally.cosines[key])
        if key in tally.broken or not error_N.isfinite().all():
            continue
        rows.append(
            StoredRow(
                method=name,
                rank=rank,
                dtype=dtype,
                n_images=len(error_N),
                bytes_per_image=packed_bytes(shape, dtype) if name == ITSELF else factor_bytes(*shape, rank, dtype),
                relative_error_mean=error_N.mean().item(),
                relative_error_max=error_N.max().item(),
                token_cosine_mean=cosine_N.mean().item(),
                trial_id=trials.get((name, rank), ""),
            )
        )
    return tuple(sorted(rows, key=lambda row: (row.rank, row.method != "svd", DTYPES.index(row.dtype))))


def _pruned_rows(tally: _Tally, shape: tuple[int, int], trials: Mapping[tuple[str, int], str]) -> tuple[PrunedRow, ...]:
    rows = []
    for (key, target), parts in tally.kept.items():
        if key in tally.broken:
            continue
        name, rank, dtype = key
        kept_N = torch.cat([kept for kept, _ in parts])
        met = int((kept_N >= 0).sum())
        row = PrunedRow(name, rank, dtype, target, len(kept_N), met, trial_id=trials.get((name, rank), ""))
        rows.append(row if met < len(kept_N) else _met(row, shape, kept_N, torch.cat([error for _, error in parts])))
    return tuple(rows)


def _met(row: PrunedRow, shape: tuple[int, int], kept_N: Tensor, error_N: Tensor) -> PrunedRow:
    sizes = [COUNT_BYTES + factor_bytes(*shape, rank, row.dtype) for rank in kept_N.tolist()]
    return PrunedRow(
        row.method,
        row.rank,
        row.dtype,
        row.target,
        row.n_images,
        row.n_met,
        rank_mean=kept_N.double().mean().item(),
        rank_max=int(kept_N.max()),
        bytes_per_image=sum(sizes) / len(sizes),
        relative_error_mean=error_N.mean().item(),
        relative_error_max=error_N.max().item(),
        trial_id=row.trial_id,
    )


def _model_rows(
    tally: _Tally, trained: Sequence[Method], quantised: Mapping[str, QuantisedDecomposer]
) -> tuple[QuantisedRow, ...]:
    rows = []
    for method in trained:
        key = _model_key(method)
        if key in tally.broken or key not in tally.models or method.model is None:
            continue
        before, after = torch.cat(tally.models[key], dim=1).mean(dim=1).tolist()
        if math.isfinite(after):
            sizes = model_bytes(method.model), model_bytes(quantised[key].model)
            rows.append(QuantisedRow(method.name, method.rank, method.trial_id, *sizes, before, after))
    return tuple(rows)
