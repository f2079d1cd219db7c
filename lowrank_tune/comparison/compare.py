"""The post-study job: every method at every rank of the study, on images that no training saw.

N images, T tokens, D dim, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from lowrank_tune.comparison import remarks as say
from lowrank_tune.comparison.choice import Kind, choose, judge
from lowrank_tune.comparison.compression import measure_compression
from lowrank_tune.comparison.intervals import interval, paired
from lowrank_tune.comparison.methods import (
    BATCH,
    WEIGHTED_RATIO,
    Method,
    Metric,
    before_training,
    device_name,
    images_per_second,
    score,
    trained,
    training_axes,
    untrained,
)
from lowrank_tune.comparison.rate_words import rate_words
from lowrank_tune.comparison.rates import MOST_IMAGES, measure_rates
from lowrank_tune.errors import InputError
from lowrank_tune.files import read_json, write_json, write_whole
from lowrank_tune.lowrank.baselines import svd, svd_weighted
from lowrank_tune.lowrank.data import FeatureMatrix, spread
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.metrics import EXACT
from lowrank_tune.lowrank.svd import Optimum, kept_optimum
from lowrank_tune.lowrank.weighted import measure_weighted, read_metric
from lowrank_tune.measured import Comparison, ComparisonRow, Compression, Front, FrontPoint, Pictures
from lowrank_tune.records import (
    ANSWERS_METRIC,
    BYTES_AND_ERROR,
    TEST_OPTIMUM,
    VALIDATION_OPTIMUM,
    WEIGHTED,
    FeatureSet,
    Split,
    TrialOutcome,
)

NOTES = "remarks.json"
RIVALS = ("beaten_by", "level_with")


def compare(
    features: FeatureSet,
    split: Split,
    outcomes: Sequence[TrialOutcome],
    *,
    objective: str,
    seed: int,
    directory: Path,
    groups: Sequence[str] = (),
    confirmations: Sequence[TrialOutcome] = (),
    pictures: Pictures | None = None,
    device: str = "cpu",
    told: Sequence[str] = (),
) -> Comparison:
    """Measure the SVD, the controls and the best trained models on the test split, at every rank that a trial had.

    Validation chose the model behind a row by the `objective`, so its test figures are honest for that model; what
    its configuration gives with fresh seeds, `confirmations` tell. The seed draws random starts. Times on `device` are
    only worth comparing when nothing else runs. `groups` names what each of the features' images belongs with;
    `pictures` is what their files gave; `told` is what else there is to remark, and comes first. Where the `directory`
    holds a metric of the answers, ρ_W stands beside ρ.

    Raises:
        InputError: there is no trial, no test image, or no test image with a number other than 0.
        CacheError: features cannot be read.
    """
    if not outcomes or not split.test:
        lacking = "test images" if outcomes else "trials"
        raise InputError(f"{directory.name}: there are no {lacking} to compare; change the study file")
    data = FeatureMatrix(features)
    ranks = sorted({rank for outcome in outcomes for rank in outcome.config.ranks})
    # Above the images' own rank there is nothing for an SVD to leave out.
    within = [rank for rank in ranks if rank <= min(data.tokens, data.dim)]
    axes_DR = training_axes(data, split, max(within, default=1), seed).to(device)
    models, repeats, lost = trained(outcomes, confirmations, features, objective, device)
    metric = _metric(directory, data, split)
    starts = before_training(models, outcomes, data, split, device, metric.factor_DD if metric else None)
    methods = [*(method for rank in within for method in untrained(rank, axes_DR, seed)), *models]
    optimum = kept_optimum(directory / TEST_OPTIMUM, features.digest(split.test), data.batches(split.test, 16))
    hidden = [*repeats, *starts.values()]
    per_image, left_out = score(data, split.test, optimum, within, [*methods, *hidden], device, metric)
    if per_image.empty:
        raise InputError(f"{directory.name}: every test image holds nothing but zeros; look at the source images")
    own_groups = [groups[image] if groups else str(place) for place, image in enumerate(split.test)]
    per_image["group"] = [own_groups[place] for place in per_image["index"]]
    measured = set(zip(per_image["method"], per_image["rank"], strict=True))
    sound = [method for method in methods if method.kind in measured]
    speeds = _speeds(data, split, within, sound, device, metric)
    rows = make_rows(data, per_image, sound, repeats, starts, speeds)
    nested = _validated(data, split, directory, outcomes, models, device)
    rows = choose(judge(rows, partial(paired, per_image)), outcomes, objective, nested)
    compression, unmeasured = measure_compression(data, split.test, optimum, rows, sound, device)
    pictures = pictures or Pictures()
    seen = _measured(pictures, optimum, own_groups, seed)
    rates = measure_rates(data, split, seen, rows, sound, starts, own_groups, device)
    found = (*rates.rows, *pictures.rows)
    compression = replace(compression, rates=found, rate_words=tuple(rate_words(found)))
    apart = (*unmeasured, *rates.remarks, *pictures.remarks, *lost, *left_out, *_at_the_floor(optimum, within))
    said = say.about_study(features, outcomes, confirmations, rows, compression)
    comparison = Comparison(
        rows=tuple(rows),
        per_image_path=str(directory / "per_image.parquet"),
        device=device_name(device),
        remarks=(*told, *said, *apart),
        data=say.data_text(features, rows[0].n_images),
        fronts=pareto_fronts(outcomes, rows),
        compression=compression,
    )
    own = ~per_image["method"].isin({method.name for method in hidden})
    write_comparison(directory, comparison, per_image[own].reset_index(drop=True))
    return comparison


def _measured(pictures: Pictures, optimum: Optimum, groups: Sequence[str], seed: int) -> list[int]:
    """The test images whose bytes are measured: those of the pictures, where there are, that are not all zeros."""
    seen = [place for place in range(len(groups)) if optimum.energy_N[place] > 0]
    if pictures.rows:
        return [place for place in pictures.images if place in seen]
    return [seen[each] for each in spread([groups[place] for place in seen], MOST_IMAGES, seed)]


def _metric(directory: Path, data: FeatureMatrix, split: Split) -> Metric | None:
    """The metric that lies in a study's folder, and the least error in it of the test images."""
    if not (directory / ANSWERS_METRIC).is_file():
        return None
    factor_DD = read_metric(directory / ANSWERS_METRIC, data.dim)
    return Metric(factor_DD, measure_weighted(data.batches(split.test, 16), factor_DD))


def _speeds(
    data: FeatureMatrix,
    split: Split,
    ranks: Sequence[int],
    methods: Sequence[Method],
    device: str,
    metric: Metric | None,
) -> dict[Kind, float]:
    """Time each method, the SVD at its ranks by its quickest exact form, on the same test images."""
    size = BATCH["cuda" if device.startswith("cuda") else "cpu"]
    x_NTD = data.load([split.test[place % len(split.test)] for place in range(size)]).to(device)
    routes: dict[Kind, Any] = {("svd", rank): partial(svd, rank=rank) for rank in ranks}
    if metric:
        factor_DD = metric.factor_DD.to(device)
        routes |= {("svd_weighted", rank): partial(svd_weighted, rank=rank, factor_DD=factor_DD) for rank in ranks}
    return images_per_second(routes | {method.kind: method.decompose for method in methods}, x_NTD)


def _at_the_floor(optimum: Optimum, ranks: Sequence[int]) -> Iterator[str]:
    """Count the images on whose ρ rounding has a say: the optimum leaves next to nothing of them."""
    energy_N = optimum.energy_N[optimum.energy_N > 0]
    for rank in ranks:
        left_N = optimum.residual_NR[optimum.energy_N > 0, rank - 1]
        if number := int((left_N < EXACT * energy_N).sum()):
            yield (
                f"at rank {rank} the SVD leaves less than {EXACT:g} of the energy of {number} of {len(energy_N)} test "
                "images: their ρ is held against that floor"
            )


def make_rows(
    data: FeatureMatrix,
    per_image: pd.DataFrame,
    methods: Sequence[Method],
    repeats: Sequence[Method],
    starts: Mapping[Kind, Method],
    speeds: Mapping[Kind, float],
) -> list[ComparisonRow]:
    """Make a row of each method and of the SVD at each rank, by rank, from `score`'s table of all that are given."""
    table = over_images(per_image)
    figures: Any = table.astype(object).to_dict("index")
    trials = {method.kind: method.trial_id for method in methods}
    shared = {method.kind for method in methods if isinstance(method.model, Shared)}
    rows = []
    for kind in sorted(speeds, key=lambda kind: kind[1]):
        trial_id, size = trials.get(kind, ""), kind[1] * data.dtype.itemsize
        again = [each.kind for each in repeats if (each.confirms, each.rank) == (trial_id, kind[1])]
        seeds = table[table.index.isin(again)]
        known: dict[str, Any] = dict(figures[kind])
        for name, column in (("residual_ratio", "residual_ratio"), ("token_cosine", "token_cosine_mean")):
            known |= {f"{name}_seed_mean": seeds[column].mean(), f"{name}_seed_sd": seeds[column].std()}
        if kind in starts and starts[kind].kind in table.index:
            # Of ρ, as the logarithm's mean gives it.
            ratio = WEIGHTED_RATIO if kind[0].endswith(WEIGHTED) else "residual_ratio"
            logs = paired(per_image, kind, starts[kind].kind, ratio)
            gain, low, high = (0.0 - math.expm1(value) for value in logs)
            known |= {"training_gain": gain, "training_gain_low": high, "training_gain_high": low}
        known = {name: None if pd.isna(value) else value for name, value in known.items()}
        known |= {"bytes_per_image": size * (data.tokens if kind in shared else data.tokens + data.dim)}
        known |= {"images_per_second": speeds[kind], "trial_id": trial_id, "seeds": len(seeds)}
        known |= {"shared_bytes": size * data.dim if kind in shared else 0}
        rows.append(ComparisonRow(*kind, **known))
    return rows


def over_images(per_image: pd.DataFrame) -> pd.DataFrame:
    """Fold the images of each (method, rank): means, what they spread by, and intervals over groups of images."""
    best = per_image[per_image["method"] == "svd"].set_index(["rank", "index"])["token_cosine"]
    table = per_image.join(best.rename("svd"), on=["rank", "index"])
    table = table.assign(difference=table["token_cosine"] - table["svd"], log=np.log(table["residual_ratio"]))
    images = table.groupby(["method", "rank"], sort=False)
    folded = images.agg(
        n_images=("key", "size"),
        token_cosine_mean=("token_cosine", "mean"),
        token_cosine_sd=("token_cosine", "std"),
        flat_cosine_mean=("flat_cosine", "mean"),
        mse_mean=("mse", "mean"),
        residual_ratio_mean=("residual_ratio", "mean"),
        residual_ratio_max=("residual_ratio", "max"),
        residual_ratio_median=("residual_ratio", "median"),
        n_groups=("group", "nunique"),
    ).fillna({"token_cosine_sd": 0.0})
    averaged: dict[str, tuple[str, Any]] = {"residual_ratio": ("log", np.exp)}
    averaged["token_cosine_minus_svd"] = "difference", pd.Series
    if WEIGHTED_RATIO in table:
        table = table.assign(log_weighted=np.log(table[WEIGHTED_RATIO]))
        averaged[WEIGHTED_RATIO] = "log_weighted", np.exp
    for name, (column, back) in averaged.items():
        mean, half = interval(table, column)
        for end, value in (("", mean), ("_low", mean - half), ("_high", mean + half)):
            folded[name + end] = back(value)
    return folded


def _mean_ratios(per_image: pd.DataFrame) -> pd.Series:
    """exp(mean log ρ) at each (method, rank), as `metrics.mean_ratio`."""
    log = np.log(per_image["residual_ratio"])
    ratios: pd.Series = np.exp(log.groupby([per_image["method"], per_image["rank"]]).mean())
    return ratios


def _validated(
    data: FeatureMatrix,
    split: Split,
    directory: Path,
    outcomes: Sequence[TrialOutcome],
    models: Sequence[Method],
    device: str,
) -> dict[Kind, dict[str, float]]:
    """Measure the models that serve several ranks on the validation split, at each rank."""
    several = {outcome.config.trial_id for outcome in outcomes if outcome.config.nested_ranks}
    nested = [model for model in models if model.trial_id in several]
    if not nested:
        return {}
    of = data.features.digest(split.validation)
    optimum = kept_optimum(directory / VALIDATION_OPTIMUM, of, data.batches(split.validation, 16))
    ranks = sorted({model.rank for model in nested if model.rank <= min(data.tokens, data.dim)})
    table, _ = score(data, split.validation, optimum, ranks, nested, device)
    if table.empty:
        return {}
    table = table[table["method"] != "svd"]
    means = table.groupby(["method", "rank"])[["mse", "token_cosine"]].mean()
    means["residual_ratio"] = _mean_ratios(table)
    figures: Any = means.add_prefix("val_").to_dict("index")
    return dict(figures)


def pareto_fronts(outcomes: Iterable[TrialOutcome], rows: Iterable[ComparisonRow]) -> tuple[Front, ...]:
    """Work out both trade-offs: `search`, where it has a candidate, and `storage`.

    Pruned trials are candidates; those of nested ranks are not, for their figures are means over several ranks. Where
    the search counts bytes, they are what is paid.
    """
    sound = [trial for trial in outcomes if trial.status != "failed" and not trial.config.nested_ranks]
    x, y = BYTES_AND_ERROR if any("val_bytes" in trial.best for trial in sound) else ("rank", "val_mse")
    trials = [
        FrontPoint(trial.config.method, trial.config.rank, figures[x], figures[y], trial.config.trial_id)
        for trial, figures in ((trial, {"rank": trial.config.rank, **trial.best}) for trial in sound)
        if x in figures and y in figures
    ]
    methods = [
        FrontPoint(row.method, row.rank, x=row.bytes_per_image, y=row.token_cosine_mean, trial_id=row.trial_id)
        for row in rows
    ]
    search = Front("search", x, y, "lower", _marked(trials, "lower"))
    storage = Front("storage", "bytes_per_image", "token_cosine_mean", "higher", _marked(methods, "higher"))
    return tuple(front for front in (search, storage) if front.points)


def _marked(points: Sequence[FrontPoint], better: Literal["lower", "higher"]) -> tuple[FrontPoint, ...]:
    """Sort candidates by cost and mark those that none dominates; equals stand or fall together."""
    less = 1.0 if better == "lower" else -1.0
    marked: list[FrontPoint] = []
    best: tuple[float, float] | None = None
    for point in sorted(points, key=lambda point: (point.x, less * point.y)):
        cost = (point.x, less * point.y)
        on_front = best is None or cost[1] < best[1] or cost == best
        best = cost if on_front else best
        marked.append(replace(point, on_front=on_front))
    return tuple(marked)


def write_comparison(directory: Path, comparison: Comparison, per_image: pd.DataFrame) -> None:
    """Write a comparison's files, each whole or not at all, every figure finite.

    `comparison.json` is a list by contract, so what is said of it lies in a file of its own.
    """
    table = pa.Table.from_pandas(per_image, preserve_index=False)
    write_whole(Path(comparison.per_image_path), lambda path: pq.write_table(table, path))
    rows = [asdict(row) for row in comparison.rows]
    # What follows from the machine's times stands apart, so that a study run again gives the same figures to the byte.
    rivals = [{name: row.pop(name) for name in RIVALS} for row in rows]
    write_json(directory / "comparison.json", rows)
    notes = {name: getattr(comparison, name) for name in ("device", "data", "remarks")}
    write_json(directory / NOTES, notes | {"rivals": rivals})
    write_json(directory / "pareto.json", comparison.fronts)
    write_json(directory / "compression.json", comparison.compression)


def read_comparison(directory: Path, objective: str) -> Comparison | None:
    """Read what `write_comparison` wrote, if it did; by the objective an older comparison's best models are chosen now.

    Raises:
        InputError: its files are damaged.
    """
    if not (directory / "comparison.json").is_file():
        return None
    per_image_path, compression_path = directory / "per_image.parquet", directory / "compression.json"
    try:
        notes = read_json(directory / NOTES) if (directory / NOTES).exists() else _old_notes(per_image_path)
        told = read_json(directory / "comparison.json")
        rivals = notes.get("rivals", [{}] * len(told))
        rows = [ComparisonRow(**(row | theirs)) for row, theirs in zip(told, rivals, strict=True)]
        if not all("residual_ratio" in row for row in told):
            rows = _averaged_anew(rows, pd.read_parquet(per_image_path))
        if not any(row.chosen for row in rows):
            files = [directory / "trials" / row.trial_id / "outcome.json" for row in rows if row.trial_id]
            rows = choose(rows, [TrialOutcome.read(file) for file in files if file.is_file()], objective)
        fronts = TypeAdapter(tuple[Front, ...]).validate_json((directory / "pareto.json").read_bytes())
        # A study that was compared before there was one has none.
        held = compression_path.read_bytes() if compression_path.exists() else b"{}"
        compression = TypeAdapter(Compression).validate_json(held)
        device, data, remarks = notes["device"], notes["data"], tuple(notes["remarks"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{directory}: no readable comparison lies there ({' '.join(str(error).split())}); measure it again with "
            f"`lowrank-tune compare {directory.name} --again`"
        ) from error
    return Comparison(tuple(rows), str(per_image_path), device, remarks, data, fronts, compression)


def _averaged_anew(rows: Sequence[ComparisonRow], per_image: pd.DataFrame) -> list[ComparisonRow]:
    """Complete rows from before ρ was averaged by its logarithm and the groups were known: by their images."""
    middle, median = _mean_ratios(per_image), per_image.groupby(["method", "rank"])["residual_ratio"].median()
    return [
        replace(
            row,
            residual_ratio=float(middle[row.method, row.rank]),
            residual_ratio_median=float(median[row.method, row.rank]),
        )
        for row in rows
    ]


def _old_notes(per_image_path: Path) -> dict[str, Any]:
    """What older comparisons have in the table's metadata."""
    held = pq.read_schema(per_image_path).metadata or {}
    device, data, remarks = (held.get(f"lowrank_tune.{name}".encode(), b"") for name in ("device", "data", "remarks"))
    return {"device": device.decode(), "data": data.decode(), "remarks": json.loads(remarks or "[]")}
