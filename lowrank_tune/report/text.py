"""Figures and outcomes as people read them: numbers with the digits that matter, and sentences."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich import filesize

from lowrank_tune.files import read_fields
from lowrank_tune.measured import Comparison, ComparisonRow
from lowrank_tune.notes import read_notes
from lowrank_tune.records import BEST_MODEL, CONTROLS, SLOWER, FeatureSet, TrialOutcome, leading

ABSENT = "—"
BOUNDS = ("svd", "svd_weighted", "svd_rows")
"""What no method beats in flat cosine, what none beats in ρ_W, and about the best there is in token cosine."""
STOPPED = {
    "budget": "ran its full budget",
    "patience": "stopped by patience",
    "asha": "stopped by ASHA",
    "interruption": "interrupted",
    "error": "failed",
}

METHOD_NOTES = {
    "svd": "the truncated SVD of each image: the least Frobenius error there is, ρ = 1",
    "svd_weighted": "the SVD in the metric W by which the language model's answers move: ρ_W = 1, at a larger ρ",
    "svd_rows": "the SVD after each token is scaled to length one: about the best token cosine there is, at a larger ρ",
    "random_sketch": "no training: the columns of XΩ for a random Ω, orthonormalised",
    "pca_basis": "fitted, not trained: one basis for all images, the principal axes of the training split",
    "power_1": "no training: a random start and one power step in X Xᵀ",
    "gram_eigh": "no training: all eigenvectors of the image's X Xᵀ in float32, which serve every rank",
    "randomized_svd": "no training: Halko, Martinsson and Tropp's randomised SVD, width r + 25 %, two steps",
    "direct": "trained: a network regresses both factors",
    "sketch": "trained: a learned Ω, A = orth(XΩ), B = AᵀX",
    "refined": "trained: a random start, sharpened by a learned filter of the image's own X Xᵀ; B = AᵀX",
    "shared": "trained: one B for the whole data set, kept once, A = X Bᵀ: an image takes A alone; its ρ is above 1, "
    "for the SVD makes each image a B of its own",
    "refined_weighted": "refined of X in the metric W by which the answers move: near ρ_W = 1, at a larger ρ",
    "shared_weighted": "shared of X in the metric W by which the answers move",
    "x": "the features themselves, of one image alone",
    "jpeg": "no features but the picture, as a JPEG file of five qualities, encoded again when they are wanted",
    "webp": "the same with WebP files",
    "half-side": "the picture at half its side, its fewer tokens brought to the whole grid",
    "quarter-side": "the same at a quarter of its side",
}
CODER_NOTES = {
    "coded": "rounded to steps and written by an entropy coder",
    "plain": "8, 5 or 4 bits a number with a scale a token or component, or float16",
    "zlib": "plain ones packed",
    "zstd": "plain ones packed",
}
"""How what is kept becomes bytes."""


def is_trained(method: str) -> bool:
    """Tell a trained family from a bound or a control."""
    return method not in BOUNDS and method not in CONTROLS


def in_order(methods: Iterable[str]) -> list[str]:
    """Sort methods for tables and legends: bounds, trained families by name, controls; each once."""
    present = set(methods)
    return [name for name in (*BOUNDS, *sorted(filter(is_trained, present)), *CONTROLS) if name in present]


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cosine_text(value: float) -> str:
    """Four decimals, the digits in which methods differ; more where four would round up to a false 1."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.6f}" if 0.99995 <= value < 0.9999995 else f"{value:.4f}"


LEADING_LABELS = {"val_bytes_at_error": "KiB", "val_residual_ratio": "ρ", "val_mse": "MSE"}


def leading_text(figures: Mapping[str, float], labelled: bool = True) -> str:
    """What tells of a trial: `ρ 1.004`, or `71.3 KiB` that an image takes at the target error, or its MSE."""
    name = leading(figures)
    value, label = figures.get(name, math.nan), LEADING_LABELS[name]
    if name == "val_residual_ratio":
        text = ratio_text(value)
    else:
        text = ABSENT if math.isnan(value) else f"{value / 1024:.1f}" if label == "KiB" else f"{value:.4g}"
    if not labelled:
        return text
    return f"{text} KiB" if label == "KiB" else f"{label} {text}"


def setting_text(value: float | str) -> str:
    """A hyperparameter: a number in four digits, or a word."""
    return value if isinstance(value, str) else f"{value:.4g}"


def ratio_text(value: float | None) -> str:
    """A residual ratio: three decimals near the optimum, fewer digits far from it."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if value < 1000:
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def difference_text(row: ComparisonRow) -> str:
    """The token cosine minus the SVD's, and half its 95 % interval: `-0.0132 ± 0.0021`."""
    mean, low, high = row.token_cosine_minus_svd, row.token_cosine_minus_svd_low, row.token_cosine_minus_svd_high
    if mean is None:
        return ABSENT
    # A sign before nothing but zeros would claim a direction that four digits do not show.
    text = f"{mean:+.4f}" if abs(mean) >= 5e-5 else "0.0000"
    return text if low is None or high is None else f"{text} ± {(high - low) / 2:.4f}"


def ratio_interval_text(row: ComparisonRow, name: str = "residual_ratio") -> str:
    """The 95 % interval of ρ, or another figure like it: `1.005–1.008`."""
    low, high = (getattr(row, f"{name}_{end}") for end in ("low", "high"))
    return ABSENT if low is None or high is None else f"{ratio_text(low)}–{ratio_text(high)}"


def gain_text(row: ComparisonRow) -> str:
    """What training took off ρ, in percent, with its 95 % interval: `0.31 (0.20 to 0.42)`."""
    gain, low, high = row.training_gain, row.training_gain_low, row.training_gain_high
    if gain is None:
        return ABSENT
    text = f"{100 * gain:z.2f}"
    return text if low is None or high is None else f"{text} ({100 * low:z.2f} to {100 * high:z.2f})"


def seed_texts(row: ComparisonRow) -> tuple[str, str]:
    """The residual ratio and the token cosine over fresh seeds, each mean ± sd."""
    ratio, cosine = row.residual_ratio_seed_mean, row.token_cosine_seed_mean
    if cosine is None:
        return ABSENT, ABSENT
    ratio_sd, cosine_sd = row.residual_ratio_seed_sd, row.token_cosine_seed_sd
    spread = "" if ratio is None or ratio_sd is None else f" ± {ratio_sd:.3f}" if ratio < 10 else f" ± {ratio_sd:.1f}"
    return f"{ratio_text(ratio)}{spread}", cosine_text(cosine) + ("" if cosine_sd is None else f" ± {cosine_sd:.4f}")


def kib_text(size: float) -> str:
    """Bytes in KiB, one decimal."""
    return f"{size / 1024:,.1f}"


def size_text(size: float) -> str:
    """Bytes in the unit that suits them, three significant digits: `1.11 KiB`, `4.61 MiB`."""
    exponent, unit = (1, "KiB") if size < 1024**2 else (2, "MiB") if size < 1024**3 else (3, "GiB")
    value = size / 1024**exponent
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def percent_text(share: float) -> str:
    """Three significant digits: `0.736 %`."""
    return f"{100 * share:.3g} %"


def rate_text(value: float) -> str:
    """Images a second, three significant digits, thousands separated."""
    if not math.isfinite(value) or value <= 0:
        return ABSENT
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def duration_text(seconds: float) -> str:
    """A duration in the two largest units that matter: `0.4 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def training_sentence(outcomes: Sequence[TrialOutcome]) -> str:
    """Say what the trials took."""
    epochs, took = _spent(outcomes)
    return f"{count(len(outcomes), 'trial')} trained for {count(epochs, 'epoch')} in all, {took} of training."


def _spent(outcomes: Sequence[TrialOutcome]) -> tuple[int, str]:
    """The epochs and the time that trainings took."""
    return sum(outcome.epochs for outcome in outcomes), duration_text(sum(outcome.seconds for outcome in outcomes))


@dataclass(frozen=True, slots=True)
class RankSummary:
    """The methods that matter at a rank, where they were measured."""

    rank: int
    svd: ComparisonRow | None
    trained: ComparisonRow | None  # the one that validation chose
    control: ComparisonRow | None  # the nearest that takes no longer than the trained one, else the nearest of all

    @property
    def text(self) -> str:
        """The judgement: `0.4 % above the least possible error; level with gram_eigh, without training`."""
        if self.trained is None:
            return "no trained model"
        ours = self.trained.residual_ratio
        if not ours:
            return "above the images' own rank, where there is no ρ"
        excess = f"{(ours - 1) * 100:.1f} % above" if ours < 2 else f"{ratio_text(ours)} times"
        text = f"{excess} the least possible error" if ours >= 1.0005 else "at the least possible error"
        if self.trained.shared_bytes:
            return f"{text}, by one B for all images"
        for said, names in (("beaten by", self.trained.beaten_by), ("level with", self.trained.level_with)):
            if names:
                return f"{text}; {said} {names.partition(',')[0]}"
        return f"{text}; no control beats it" if self.trained.n_groups > 1 else text


def rank_summaries(comparison: Comparison) -> list[RankSummary]:
    """Judge every rank of a comparison, by rising rank."""
    chosen = {row.rank: row for row in comparison.best_of_each_rank()}
    found = []
    for rank in sorted({row.rank for row in comparison.rows}):
        rows = [row for row in comparison.rows if row.rank == rank]
        controls = [row for row in rows if row.method in CONTROLS]
        svd, trained = next((row for row in rows if row.method == "svd"), None), chosen.get(rank)
        least = trained.images_per_second / (1 + SLOWER) if trained else 0.0
        quick = [row for row in controls if row.images_per_second >= least] or controls
        control = min(quick, key=lambda row: (row.residual_ratio or math.inf, -row.images_per_second), default=None)
        found.append(RankSummary(rank, svd, trained, control))
    return found


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rank keeps a token cosine."""

    cosine: float
    svd_rank: int | None  # the least at which the SVD keeps it on the test images; None when not known, or none does
    row: ComparisonRow | None  # of the lowest rank compared whose chosen model keeps it; None where none does


def choices(comparison: Comparison, svd_rank: Callable[[float], int | None]) -> list[Choice]:
    """Say which rank keeps which token cosine, as the validation images tell; the test images only report.

    From the highest cosine that the lowest rank compared keeps to the first one that no rank does.
    """
    trained = [row for row in comparison.best_of_each_rank() if row.val_token_cosine is not None]
    found: list[Choice] = []
    for cosine in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999) if trained else ():
        keeps = (row for row in trained if (row.val_token_cosine or -1.0) >= cosine)
        choice = Choice(cosine, svd_rank(cosine), next(keeps, None))
        if choice.row is trained[0]:
            found.clear()
        found.append(choice)
        if choice.row is None:
            break
    return found


def rank_sentence(found: Sequence[Choice]) -> str:
    """Say which rank to take; empty where there is nothing to say."""
    parts = []
    for choice in found[-2:]:
        row = choice.row
        if row is None:
            needs = f", which takes the SVD rank {choice.svd_rank}" if choice.svd_rank else ""
            parts.append(f"No rank compared keeps {choice.cosine:g}{needs}.")
        elif choice is found[-1] or found[-1].row is None:
            needs = f"; the SVD itself needs rank {choice.svd_rank}" if choice.svd_rank else ""
            parts.append(
                f"To keep a token cosine of {choice.cosine:g}, take rank {row.rank}, the lowest of those compared "
                f"whose model does on the validation images ({row.method}, {cosine_text(row.token_cosine_mean)} on the "
                f"test images{needs})."
            )
    return " ".join(parts)


def at_rank(comparison: Comparison, rank: int | None) -> Comparison:
    """The rows of one rank and the remarks not about another one; all when None."""
    if rank is None:
        return comparison
    rows = tuple(row for row in comparison.rows if row.rank == rank)
    named = ((remark, re.findall(r"\brank (\d+)", remark, re.IGNORECASE)) for remark in comparison.remarks)
    remarks = tuple(remark for remark, ranks in named if not ranks or str(rank) in ranks)
    return replace(comparison, rows=rows, remarks=remarks)


def study_cost(
    directory: Path, features: FeatureSet, outcomes: Sequence[TrialOutcome], confirmations: Sequence[TrialOutcome]
) -> list[tuple[str, str]]:
    """List what a study took, as names and texts."""
    ends: Counter[str] = Counter(outcome.stopped_by for outcome in outcomes)
    ended = ", ".join(f"{ends[stop]} {words}" for stop, words in STOPPED.items() if ends[stop])
    (spent, seconds), (again, more) = map(_spent, (outcomes, confirmations))
    budget = sum(trial.config.epochs for trial in outcomes)
    lines = [
        ("Trials", f"{len(outcomes)}: {ended}" if outcomes else "0"),
        ("Epochs", f"{spent} of {budget} that no early stop would have taken" if spent < budget else str(spent)),
        ("Training time of the trials", seconds),
    ]
    if confirmations:
        lines.append(("Trained again with fresh seeds", f"{len(confirmations)}, {count(again, 'epoch')}, {more}"))
    try:
        status = read_fields(directory / "status.json")
        end = datetime.fromisoformat(status["ended"]) if status.get("ended") else datetime.now(UTC)
        lines.append(("Start to end", duration_text((end - datetime.fromisoformat(status["started"])).total_seconds())))
    except (ValueError, KeyError, TypeError):
        pass  # a study of a program that was killed while it began
    lines += [("Note", note) for note in read_notes(directory)]
    shards = {Path(features.directory) / "shards" / row.shard for row in features.rows}
    cache, models = (
        filesize.decimal(sum(path.stat().st_size for path in paths if path.is_file()))
        for paths in (shards, (directory / "trials").glob(f"*/{BEST_MODEL}"))
    )
    images = count(len(features.rows), "image")
    lines.append(("Feature cache", f"{cache} for {images}; other studies with these features share it"))
    return [*lines, ("Trained models", models)]
