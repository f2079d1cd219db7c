"""Which storage wins where, in words: a control that is not beaten is said to be so."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_tune.records import PrunedRow, QuantisedRow, StoredRow


def compression_words(
    stored: Sequence[StoredRow], pruned: Sequence[PrunedRow], models: Sequence[QuantisedRow]
) -> list[str]:
    """Say what factors take at the error of X in few bits, what few bits cost factors, and what they cost the models.

    Args:
        stored: the features themselves, and factors by rank.
        pruned: factors with a rank an image, by target.
        models: each trained model, quantised.
    """
    return [
        *(_against(control, pruned) for control in controls_of(stored)),
        *_of_factors(stored),
        *_of_models(models),
    ]


def verdict_words(stored: Sequence[StoredRow], pruned: Sequence[PrunedRow]) -> str:
    """Say in one sentence which of the controls are beaten; empty where there is none."""
    by: dict[str, list[str]] = {}
    for control in controls_of(stored):
        by.setdefault(_beaten_by(control, pruned), []).append(control.dtype)
    parts = [
        f"{_listed(dtypes)} of X {'is' if len(dtypes) == 1 else 'are'} {verdict}" for verdict, dtypes in by.items()
    ]
    return "bytes against error: " + "; ".join(parts) if parts else ""


def controls_of(stored: Sequence[StoredRow]) -> list[StoredRow]:
    """The features themselves in few bits, by rising error."""
    return [row for row in stored if row.method == "x" and row.dtype != "float16"]


def smallest(pruned: Sequence[PrunedRow], target: str, method: str) -> PrunedRow | None:
    """The factors of a method that meet a target on every image in the fewest bytes; None where none do.

    Args:
        pruned: factors with a rank an image.
        target: as in `PrunedRow`.
        method: `svd`, or the trained family.
    """
    own = [row for row in pruned if (row.target, row.method) == (target, method) and row.bytes_per_image is not None]
    return min(own, key=lambda row: row.bytes_per_image or 0.0, default=None)


def _against(control: StoredRow, pruned: Sequence[PrunedRow]) -> str:
    said = [
        f"{control.dtype} of X takes {kib(control.bytes_per_image)} an image at a relative error of "
        f"{percent(control.relative_error_mean)}"
    ]
    for method in _methods([row for row in pruned if row.target == control.dtype]):
        row = smallest(pruned, control.dtype, method)
        whose = "the SVD's factors" if method == "svd" else f"{method}'s factors"
        if row is None or row.bytes_per_image is None:
            own = [other for other in pruned if (other.method, other.target) == (method, control.dtype)]
            nearest = max(own, key=lambda other: other.n_met)
            said.append(
                f"{whose}, up to rank {nearest.rank}, come as near on {nearest.n_met} of {nearest.n_images} images"
            )
        else:
            said.append(
                f"as near on every image, {whose} take {kib(row.bytes_per_image)} ({row.dtype}, "
                f"{row.rank_mean:.0f} components an image)"
            )
    return f"{'; '.join(said)}: {control.dtype} of X is {_beaten_by(control, pruned)}."


def _beaten_by(control: StoredRow, pruned: Sequence[PrunedRow]) -> str:
    winners = []
    for method in _methods(pruned):
        row = smallest(pruned, control.dtype, method)
        if row is not None and row.bytes_per_image is not None and row.bytes_per_image < control.bytes_per_image:
            winners.append("the SVD's factors" if method == "svd" else f"{method}'s factors")
    if not winners:
        return "not beaten by factors"
    only = " only" if winners == ["the SVD's factors"] and len(_methods(pruned)) > 1 else ""
    return f"beaten by {' and '.join(winners)}{only}"


def _of_factors(stored: Sequence[StoredRow]) -> list[str]:
    """What few bits cost the best trained factors of the highest rank, or the SVD's where nothing was trained."""
    own = [row for row in stored if row.trial_id] or [row for row in stored if row.method == "svd"]
    last = [row for row in own if row.rank == max(row.rank for row in own)]
    if not last:
        return []
    texts = [f"{row.dtype} {kib(row.bytes_per_image)} at {percent(row.relative_error_mean)}" for row in last]
    return [f"Factors of {last[0].method} at rank {last[0].rank}: {', '.join(texts)}."]


def _of_models(models: Sequence[QuantisedRow]) -> list[str]:
    """What int8 matrices cost each family's model of the highest rank."""
    words = []
    for family in sorted({row.method for row in models}):
        row = max((row for row in models if row.method == family), key=lambda row: row.rank)
        if row.quantised_bytes == row.model_bytes:
            words.append(
                f"{family} has learned no matrix, so quantising its model has nothing to do "
                f"({kib(row.model_bytes)} at rank {row.rank}, most of it random numbers that a seed draws)."
            )
        else:
            words.append(
                f"The {family} model of rank {row.rank} in int8 takes {kib(row.quantised_bytes)} instead of "
                f"{kib(row.model_bytes)}; the error of its factors goes from {percent(row.relative_error_mean)} to "
                f"{percent(row.quantised_relative_error_mean)}."
            )
    return words


def _methods(pruned: Sequence[PrunedRow]) -> list[str]:
    """The SVD, then what was trained."""
    return sorted({row.method for row in pruned}, key=lambda method: (method != "svd", method))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def kib(size: float) -> str:
    """Bytes as people read them: `513 KiB`, `8.3 KiB`."""
    value = size / 1024
    return f"{value:,.0f} KiB" if value >= 100 else f"{value:.3g} KiB"


def percent(share: float) -> str:
    """Three significant digits: `0.736 %`."""
    return f"{100 * share:.3g} %"
