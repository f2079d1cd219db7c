"""The sentences that a reader of the figures must not miss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from lowrank_tune.measured import ComparisonRow, Compression, PrunedRow, QuantisedRow, StoredRow
from lowrank_tune.records import WEIGHTED, FeatureSet, TrialOutcome

FEW_IMAGES = 10
"""Test images below which a mean and a worst case say little."""
SHOWN = 5e-5
"""The least part of ρ that is told: gains have two decimals of a percent."""


def data_text(features: FeatureSet, test_images: int) -> str:
    """What the figures were measured on: `16 test images, [256, 2048] features of tiny (random weights)`."""
    images = "1 test image" if test_images == 1 else f"{test_images} test images"
    shape = f"[{features.tokens}, {features.dim}]"
    return f"{images}, {shape} features of {features.encoder} ({features.weights} weights)"


def about_study(
    features: FeatureSet,
    outcomes: Sequence[TrialOutcome],
    confirmations: Sequence[TrialOutcome],
    rows: Sequence[ComparisonRow],
    compression: Compression,
) -> list[str]:
    """Say everything that a study's records give cause to say; there is at least one row."""
    return [
        *about_data(features, rows[0].n_images, rows[0].n_groups),
        *about_rivals(rows),
        *about_training(rows),
        *about_shared(rows, len(features.rows)),
        *about_trials(outcomes, rows),
        *about_confirmations(confirmations, rows),
        *filter(None, [which_are_beaten(compression.stored, compression.pruned)]),
    ]


def about_data(features: FeatureSet, test_images: int, test_groups: int) -> list[str]:
    """Say what the features are worth."""
    remarks = []
    if features.weights == "random":
        remarks.append("random weights: these figures show the pipeline, not the science")
    elif features.weights != "pretrained":
        remarks.append("unknown weights: what made these features is not recorded, so compare within this study only")
    if features.quarantined:
        remarks.append(f"{features.quarantined} of the source's records had no usable image and are not in any figure")
    if test_images == 1:
        remarks.append(
            "one test image only: no spread over images is known, the sd is given as 0, and nothing is said of what "
            "beats what; raise split.test"
        )
    elif test_images < FEW_IMAGES:
        remarks.append(f"only {test_images} test images: means and worst cases are rough")
    if test_groups == 1 < test_images:
        remarks.append(
            f"all {test_images} test images belong to one group: no interval can be given, so nothing is said of what "
            "beats what; raise split.test"
        )
    elif test_groups < min(FEW_IMAGES, test_images):
        remarks.append(f"the {test_images} test images come from only {test_groups} groups: intervals are wide")
    return remarks


def about_rivals(rows: Sequence[ComparisonRow]) -> list[str]:
    """Call out what beats each trained family, or is level with it."""
    by_kind = {(row.method, row.rank): row for row in rows}
    remarks = []
    for row in rows:
        first, *others = (row.beaten_by or row.level_with).split(", ")
        if not first:
            continue
        best = by_kind[first, row.rank]
        verb = "beats" if row.beaten_by else "is level with"
        verbs = ("does", "do") if row.beaten_by else ("is", "are")
        also = f"; so {verbs[len(others) > 1]} {' and '.join(others)}" if others else ""
        how = "fitted but not trained" if first == "pca_basis" else "without training"
        remarks.append(
            f"at rank {row.rank} {first}, {how}, {verb} {row.method}: "
            f"ρ {_ratio(best.residual_ratio)} against {_ratio(row.residual_ratio)}, "
            f"{_plain(best.images_per_second)} against {_plain(row.images_per_second)} images/s{also}"
        )
    return remarks


def about_training(rows: Sequence[ComparisonRow]) -> list[str]:
    """Say where a trained model is no nearer than the same model before its first epoch.

    What shares its B is trained for bytes, which ρ does not tell.
    """
    remarks = []
    nothing: dict[str, list[str]] = {}
    for row in rows:
        gain, low, high = row.training_gain, row.training_gain_low, row.training_gain_high
        if gain is None or low is None or high is None or row.shared_bytes:
            continue
        ratio = "ρ_W" if row.method.endswith(WEIGHTED) else "ρ"
        if high < -SHOWN:
            remarks.append(
                f"at rank {row.rank} training made {row.method} worse: its {ratio} rose by {-100 * gain:.2f} % "
                f"({-100 * high:.2f} to {-100 * low:.2f})"
            )
        elif low <= SHOWN:
            nothing.setdefault(row.method, []).append(
                f"rank {row.rank} ({100 * gain:z.2f} % off {ratio}, {100 * low:z.2f} to {100 * high:z.2f})"
            )
    for method, ranks in nothing.items():
        remarks.append(f"training adds nothing measurable to {method} here, at {', '.join(ranks)}")
    return remarks


def about_shared(rows: Sequence[ComparisonRow], images: int) -> list[str]:
    """Say why one B for all images is further off than an SVD of its rank, and what B is among so many images."""
    remarks = []
    shared = sorted((row for row in rows if row.shared_bytes), key=lambda row: (row.method, row.rank))
    for method, same in groupby(shared, key=lambda row: row.method):
        own = list(same)
        ratios = [f"{_ratio(row.residual_ratio)} at rank {row.rank}" for row in own if row.residual_ratio is not None]
        sizes = ", ".join(
            f"{kib(row.shared_bytes)} at rank {row.rank} ({kib(row.shared_bytes / images)} an image)" for row in own
        )
        told = f": {', '.join(ratios)}" if ratios else ""
        remarks.append(
            f"{method} has one B for all images, which is no image's best: its ρ is above 1{told}. An image keeps A "
            f"alone, and the {images} images together one B: {sizes}"
        )
        if above := [str(row.rank) for row in own if row.residual_ratio is None]:
            remarks.append(
                f"{method} has no ρ at rank {' and '.join(above)}, where an SVD leaves nothing of an image of as few "
                "tokens"
            )
    return remarks


def about_trials(outcomes: Sequence[TrialOutcome], rows: Sequence[ComparisonRow]) -> list[str]:
    """Say which trials did not end well, and which family and rank is left without a model."""
    remarks = []
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    pruned, cut = (sum(outcome.stopped_by == end for outcome in outcomes) for end in ("asha", "interruption"))
    if failed:
        remarks.append(f"{len(failed)} of {len(outcomes)} trials failed: {_reasons(failed)}")
    if pruned:
        were = "was" if pruned == 1 else "were"
        remarks.append(f"{pruned} of {len(outcomes)} trials {were} stopped early by the scheduler")
    if cut:
        were = "was" if cut == 1 else "were"
        remarks.append(f"{cut} of {len(outcomes)} trials {were} still at work as the search ended, and can go on")
    remarks += _about_what_is_required(outcomes)
    measured = {(row.method, row.rank) for row in rows}
    tried = Counter((outcome.config.method, rank) for outcome in outcomes for rank in outcome.config.ranks)
    for (method, rank), number in sorted(tried.items()):
        if (method, rank) not in measured:
            trials = "its one trial" if number == 1 else f"its {number} trials"
            remarks.append(f"rank {rank} has no {method} model: {trials} left none that can be used")
    return remarks


def _about_what_is_required(outcomes: Sequence[TrialOutcome]) -> list[str]:
    """Say of which ranks no trial holds what the study requires, and how near the nearest came."""
    remarks = []
    with_model = sorted((each for each in outcomes if each.best_epoch), key=lambda each: each.config.ranks)
    for ranks, trials in groupby(with_model, key=lambda each: each.config.ranks):
        nearest = min(trials, key=lambda each: (each.config.excess(each.best), each.config.number))
        if not nearest.feasible:
            has = ", ".join(
                f"{name} {_plain(nearest.best.get(name, math.nan))} where {_plain(most)} is the most"
                for name, most in nearest.config.require.items()
            )
            remarks.append(
                f"no trial of rank {', '.join(map(str, ranks))} holds what search.require asks for, so none is its "
                f"best: the nearest, {nearest.config.trial_id}, has {has}"
            )
    return remarks


def about_confirmations(confirmations: Sequence[TrialOutcome], rows: Sequence[ComparisonRow]) -> list[str]:
    """Say which repetitions failed, and whose figures stand in no row."""
    remarks = []
    standing = {row.trial_id for row in rows}
    for trial_id in dict.fromkeys(outcome.config.confirms for outcome in confirmations):
        own = [outcome for outcome in confirmations if outcome.config.confirms == trial_id]
        failed = [outcome for outcome in own if outcome.status == "failed"]
        if failed:
            remarks.append(f"{len(failed)} of {len(own)} repetitions of {trial_id} failed: {_reasons(failed)}")
        if trial_id not in standing:
            remarks.append(f"{trial_id} was repeated, but its own model is in no row, so neither are its repetitions")
    return remarks


def _reasons(failed: Sequence[TrialOutcome]) -> str:
    """Count why trainings failed, the most frequent reasons first."""
    reasons = Counter(outcome.reason or "no reason given" for outcome in failed)
    told = "; ".join(f"{reason} ({number}x)" if number > 1 else reason for reason, number in reasons.most_common(3))
    return told + ("; and others" if len(reasons) > 3 else "")


def _ratio(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.3f}" if value < 10 else _plain(value)


def _plain(value: float) -> str:
    """Four significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def compression_texts(
    stored: Sequence[StoredRow], pruned: Sequence[PrunedRow], models: Sequence[QuantisedRow]
) -> list[str]:
    """Say what factors take at the error of X in few bits, and what few bits cost factors and models."""
    texts = []
    for control, smallest in _controls(stored, pruned):
        size, error = kib(control.bytes_per_image), percent(control.relative_error_mean)
        said = [f"{control.dtype} of X takes {size} an image at a relative error of {error}"]
        for method, row in smallest.items():
            if row.bytes_per_image is not None:
                kept = f"{row.dtype}, {row.rank_mean:.0f} components an image"
                said.append(f"as near on every image, {_whose(method)} take {kib(row.bytes_per_image)} ({kept})")
            else:
                met = f"{row.n_met} of {row.n_images} images"
                said.append(f"{_whose(method)}, up to rank {row.rank}, come as near on {met}")
        texts.append(f"{'; '.join(said)}: {control.dtype} of X is {_beaten_by(control, smallest)}.")
    # Of the best trained factors of the highest rank, or of the SVD's where nothing was trained.
    own = [row for row in stored if row.trial_id] or [row for row in stored if row.method == "svd"]
    last = [row for row in own if row.rank == max(row.rank for row in own)]
    if last:
        costs = [f"{row.dtype} {kib(row.bytes_per_image)} at {percent(row.relative_error_mean)}" for row in last]
        texts.append(f"Factors of {last[0].method} at rank {last[0].rank}: {', '.join(costs)}.")
    for model in {
        model.method: model for model in sorted(models, key=lambda model: (model.method, model.rank))
    }.values():
        if model.quantised_bytes == model.model_bytes:
            texts.append(
                f"{model.method} has learned no matrix, so quantising its model has nothing to do "
                f"({kib(model.model_bytes)} at rank {model.rank}, most of it random numbers that a seed draws)."
            )
        else:
            texts.append(
                f"The {model.method} model of rank {model.rank} in int8 takes {kib(model.quantised_bytes)} instead of "
                f"{kib(model.model_bytes)}; the error of its factors goes from {percent(model.relative_error_mean)} to "
                f"{percent(model.quantised_relative_error_mean)}."
            )
    return texts


def which_are_beaten(stored: Sequence[StoredRow], pruned: Sequence[PrunedRow]) -> str:
    """Say in one sentence which of the controls are beaten; empty where there is none."""
    by: dict[str, list[str]] = {}
    for control, smallest in _controls(stored, pruned):
        by.setdefault(_beaten_by(control, smallest), []).append(control.dtype)
    parts = []
    for beaten, dtypes in by.items():
        parts.append(f"{listed(dtypes)} of X {'is' if len(dtypes) == 1 else 'are'} {beaten}")
    return "bytes against error: " + "; ".join(parts) if parts else ""


def _controls(
    stored: Sequence[StoredRow], pruned: Sequence[PrunedRow]
) -> Iterator[tuple[StoredRow, dict[str, PrunedRow]]]:
    """X itself in few bits, by rising error, each with the factors of every method, the SVD's first, that rival it.

    Those are the ones that are as near on every image in the fewest bytes; where none is, that are so on most images.
    """
    for control in (row for row in stored if row.method == "x" and row.dtype != "float16"):
        own = sorted(
            (row for row in pruned if row.target == control.dtype),
            key=lambda row: (row.method != "svd", row.method, row.bytes_per_image or math.inf, -row.n_met),
        )
        yield control, {method: next(rows) for method, rows in groupby(own, key=lambda row: row.method)}


def _beaten_by(control: StoredRow, smallest: Mapping[str, PrunedRow]) -> str:
    beating = [name for name, row in smallest.items() if (row.bytes_per_image or math.inf) < control.bytes_per_image]
    only = " only" if beating == ["svd"] and len(smallest) > 1 else ""
    return f"beaten by {' and '.join(map(_whose, beating))}{only}" if beating else "not beaten by factors"


def _whose(method: str) -> str:
    return "the SVD's factors" if method == "svd" else f"{method}'s factors"


def kib(size: float) -> str:
    """Bytes as people read them: `513 KiB`, `8.3 KiB`."""
    value = size / 1024
    return f"{value:,.0f} KiB" if value >= 100 else f"{value:.3g} KiB"


def percent(share: float) -> str:
    """Three significant digits: `0.736 %`."""
    return f"{100 * share:.3g} %"


def listed(texts: Sequence[str], word: str = "and") -> str:
    """`a, b and c`."""
    return f" {word} ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
