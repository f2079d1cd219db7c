"""Figures and outcomes as people read them: numbers with the digits that matter, and sentences."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lowrank_tune.lowrank.svd import Spectrum
from lowrank_tune.records import Comparison, ComparisonRow, FeatureSet, TrialOutcome
from lowrank_tune.report.style import CONTROLS, in_order, is_trained

ABSENT = "—"

STOPPED = {
    "budget": "ran its full budget",
    "patience": "stopped by patience",
    "asha": "stopped by ASHA",
    "interruption": "interrupted",
    "error": "failed",
}

METHOD_NOTES = {
    "svd": "the truncated SVD of each image: the least Frobenius error there is, ρ = 1",
    "svd_rows": "the SVD after each token is scaled to length one: about the best token cosine there is, at a larger ρ",
    "random_sketch": "no training: the columns of XΩ for a random Ω, orthonormalised",
    "pca_basis": "no training beyond the mean Gram matrix: one basis for all images, from the training split",
    "power_1": "no training: a random start and one power step in X Xᵀ",
    "randomized_svd": "no training: Halko, Martinsson and Tropp's randomised SVD, width r + 25 %, two steps",
    "direct": "trained: a network regresses both factors",
    "sketch": "trained: a learned Ω, A = orth(XΩ), B = AᵀX",
    "refined": "trained: a random start, sharpened by a learned filter of the image's own X Xᵀ; B = AᵀX",
}


def cosine_text(value: float) -> str:
    """Four decimals, the digits in which methods differ; more where four would round up to a false 1."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.6f}" if 0.99995 <= value < 1 else f"{value:.4f}"


def ratio_text(value: float) -> str:
    """A residual ratio: three decimals near the optimum, fewer digits far from it."""
    if not math.isfinite(value):
        return ABSENT
    if value < 10:
        return f"{value:.3f}"
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def spread_text(mean: str, spread: float | None, decimals: int) -> str:
    """A mean with its spread, `1.214 ± 0.003`.

    Args:
        mean: as it is shown.
        spread: a standard deviation or half an interval; None where there is none.
        decimals: the mean's.
    """
    if spread is None or not math.isfinite(spread):
        return mean
    return f"{mean} ± {spread:.{decimals}f}"


def difference_text(row: ComparisonRow) -> str:
    """The token cosine minus the SVD's, image by image, and half its 95 % interval: `-0.0132 ± 0.0021`."""
    mean, low, high = row.token_cosine_minus_svd, row.token_cosine_minus_svd_low, row.token_cosine_minus_svd_high
    if mean is None:
        return ABSENT
    half = None if low is None or high is None else (high - low) / 2
    # A sign before nothing but zeros would claim a direction that four digits do not show.
    return spread_text(f"{mean:+.4f}" if abs(mean) >= 5e-5 else "0.0000", half, 4)


def seed_texts(row: ComparisonRow) -> tuple[str, str]:
    """The residual ratio and the token cosine over fresh seeds, each mean ± sd."""
    ratio, cosine = row.residual_ratio_seed_mean, row.token_cosine_seed_mean
    if ratio is None or cosine is None:
        return ABSENT, ABSENT
    return (
        spread_text(ratio_text(ratio), row.residual_ratio_seed_sd, 3 if ratio < 10 else 1),
        spread_text(cosine_text(cosine), row.token_cosine_seed_sd, 4),
    )


def rate_text(value: float) -> str:
    """Images a second, three significant digits, thousands separated."""
    if not math.isfinite(value) or value <= 0:
        return ABSENT
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def duration_text(seconds: float) -> str:
    """A duration in the two largest units that matter: `0.4 s`, `52 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def summary(comparison: Comparison, outcomes: Sequence[TrialOutcome], *, seeds: bool = True) -> list[str]:
    """Say in plain words what the study found: a sentence a rank, one on its repetitions, and what it took.

    Args:
        comparison: the post-study figures.
        outcomes: every trial of the study.
        seeds: say what the repetitions gave; a table may say it already.

    Returns:
        Sentences; the comparison's remarks are not repeated among them.
    """
    ranks = sorted({row.rank for row in comparison.rows})
    sentences = [_rank_sentence([row for row in comparison.rows if row.rank == rank]) for rank in ranks]
    sentences += [_seeds_sentence(row) for row in comparison.rows if row.seeds and seeds]
    if outcomes:
        epochs = count(sum(trial.epochs for trial in outcomes), "epoch")
        spent = duration_text(sum(trial.seconds for trial in outcomes))
        sentences.append(f"{count(len(outcomes), 'trial')} trained for {epochs} in all, {spent} of training.")
    return sentences


def _rank_sentence(rows: Sequence[ComparisonRow]) -> str:
    optimum = next((row for row in rows if row.method == "svd"), None)
    trained = best_row(row for row in rows if is_trained(row.method))
    control = best_row(row for row in rows if row.method in CONTROLS)
    bound = f"SVD's {cosine_text(optimum.token_cosine_mean)} token cosine" if optimum else "an optimum not measured"
    beside = f"the best control, {control.method}, {_figures(control)}" if control else "no control was measured"
    if trained is None:
        return f"At rank {rows[0].rank} no trained model stands beside {bound}; {beside}."
    return f"At rank {rows[0].rank} {trained.method} reaches {_figures(trained, bound)}; {beside}."


def _seeds_sentence(row: ComparisonRow) -> str:
    ratio, cosine = seed_texts(row)
    return (
        f"At rank {row.rank} the configuration of {row.trial_id}, trained again with {count(row.seeds, 'fresh seed')}, "
        f"reaches ρ {ratio} and a token cosine of {cosine}."
    )


def _figures(row: ComparisonRow, bound: str = "") -> str:
    of_bound = f" of {bound}" if bound else ""
    return f"{cosine_text(row.token_cosine_mean)}{of_bound} (ρ {ratio_text(row.residual_ratio_mean)})"


def best_row(rows: Iterable[ComparisonRow]) -> ComparisonRow | None:
    """The row nearest to the optimum: the least mean residual ratio, the faster one of equals; None among none."""
    return min(rows, key=lambda row: (row.residual_ratio_mean, -row.images_per_second), default=None)


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it must be."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


WANTED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Token cosines that a reader may want to keep."""
_LEVEL = 1e-3


@dataclass(frozen=True, slots=True)
class RankVerdict:
    """The methods that matter at a rank.

    Attributes:
        rank: R.
        svd: the bound, where it was measured.
        trained: the best trained method, where there is one.
        control: the best method without training beside the SVDs, where there is one.
    """

    rank: int
    svd: ComparisonRow | None
    trained: ComparisonRow | None
    control: ComparisonRow | None

    @property
    def word(self) -> str:
        """The judgement in a few words, `0.4 % above the least possible error; beats every control`."""
        if self.trained is None:
            return "no trained model"
        text = excess_text(self.trained.residual_ratio_mean)
        if self.control is None:
            return text
        ours, theirs = self.trained.residual_ratio_mean, self.control.residual_ratio_mean
        if abs(ours - theirs) < _LEVEL:
            return f"{text}; level with {self.control.method}"
        if ours < theirs:
            return f"{text}; beats every control"
        return f"{text}; {self.control.method}, without training, is nearer"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rank keeps a token cosine.

    Attributes:
        cosine: what is wanted.
        svd_rank: the least rank at which the SVD keeps it; None when it is not known or no rank does.
        row: the trained row of the lowest rank compared that keeps it; None where none does.
    """

    cosine: float
    svd_rank: int | None
    row: ComparisonRow | None


def verdicts(comparison: Comparison) -> list[RankVerdict]:
    """Judge every rank of a comparison, by rising rank."""
    found = []
    for rank in sorted({row.rank for row in comparison.rows}):
        rows = [row for row in comparison.rows if row.rank == rank]
        found.append(
            RankVerdict(
                rank,
                next((row for row in rows if row.method == "svd"), None),
                best_row(row for row in rows if is_trained(row.method)),
                best_row(row for row in rows if row.method in CONTROLS),
            )
        )
    return found


def choices(comparison: Comparison, spectrum: Spectrum | None) -> list[Choice]:
    """Say which rank keeps which token cosine.

    Args:
        comparison: the post-study figures.
        spectrum: of the test images; None leaves the SVD's rank unknown.

    Returns:
        From the highest cosine that the lowest rank compared keeps to the first one that no rank does; none without a
        trained method.
    """
    trained = sorted((row for row in comparison.rows if is_trained(row.method)), key=_by_rank)
    if not trained:
        return []
    found = []
    for cosine in WANTED:
        row = next((row for row in trained if row.token_cosine_mean >= cosine), None)
        found.append(Choice(cosine, spectrum.rank_for(cosine) if spectrum else None, row))
    first = max((place for place, choice in enumerate(found) if _is_lowest(choice, trained)), default=0)
    last = next((place for place, choice in enumerate(found) if choice.row is None), len(found) - 1)
    return found[first : last + 1]


def rank_sentence(found: Sequence[Choice]) -> str:
    """Say in one sentence which rank to take; empty where there is nothing to say."""
    kept = [choice for choice in found if choice.row is not None]
    lost = next((choice for choice in found if choice.row is None), None)
    if not kept and lost is None:
        return ""
    parts = []
    if kept and kept[-1].row is not None:
        choice, row = kept[-1], kept[-1].row
        needs = f"; the SVD itself needs rank {choice.svd_rank}" if choice.svd_rank else ""
        parts.append(
            f"To keep a token cosine of {choice.cosine:g}, take rank {row.rank}, the lowest of those compared at which "
            f"a trained model does ({row.method}, {cosine_text(row.token_cosine_mean)}{needs})."
        )
    if lost is not None:
        needs = f", which takes the SVD rank {lost.svd_rank}" if lost.svd_rank else ""
        parts.append(f"No rank compared keeps {lost.cosine:g}{needs}.")
    return " ".join(parts)


def excess_text(ratio: float) -> str:
    """A residual ratio as people say it: `0.4 % above the least possible error`."""
    excess = (ratio - 1) * 100
    if excess < 0.05:
        return "at the least possible error"
    if excess < 100:
        return f"{excess:.1f} % above the least possible error"
    return f"{ratio_text(ratio)} times the least possible error"


def _by_rank(row: ComparisonRow) -> tuple[int, float]:
    return row.rank, -row.token_cosine_mean


def _is_lowest(choice: Choice, trained: Sequence[ComparisonRow]) -> bool:
    return choice.row is not None and choice.row.rank == trained[0].rank


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one rank.

    Attributes:
        method: its name.
        row: its figures; None where this method has none at this rank.
        best: whether it is the trained method nearest to the optimum at this rank.
    """

    method: str
    row: ComparisonRow | None
    best: bool


@dataclass(frozen=True, slots=True)
class RankGroup:
    """All methods at one rank; every group of a table has the same methods in the same order."""

    rank: int
    cells: tuple[Cell, ...]


def rank_groups(comparison: Comparison) -> list[RankGroup]:
    """Arrange a comparison by rank, then method: bounds, trained families, controls.

    Args:
        comparison: the post-study figures.

    Returns:
        One group a rank, ascending.
    """
    methods = in_order(row.method for row in comparison.rows)
    groups = []
    for rank in sorted({row.rank for row in comparison.rows}):
        rows = {row.method: row for row in comparison.rows if row.rank == rank}
        best = best_row(row for row in rows.values() if is_trained(row.method))
        cells = (Cell(method, rows.get(method), best is not None and rows.get(method) is best) for method in methods)
        groups.append(RankGroup(rank, tuple(cells)))
    return groups


def comparison_tables(comparison: Comparison) -> Group:
    """Render the rank x method table and, below it, what is known of the trained methods alone.

    Args:
        comparison: the post-study figures.

    Returns:
        Tables of at most 80 columns; at each rank the best trained method is marked with a star and in bold.
    """
    tables = [_methods_table(comparison)]
    if any(is_trained(row.method) for row in comparison.rows):
        tables.append(_trained_table(comparison))
    return Group(*tables)


def verdict_table(comparison: Comparison) -> Table:
    """Render the best of each rank beside the SVD and the best method without training, in at most 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, title=f"The best of each rank: {comparison.data}", pad_edge=False)
    table.collapse_padding = True
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "cosine: mean token cosine, beside the SVD's · ρ: squared error over the least possible at that rank, the "
        "SVD's: 1 is perfect · over seeds: the same configuration trained again · untrained: the best control and its ρ"
    )
    for name in ("rank", "trained", "cosine", "SVD's", "ρ", "ρ over seeds", "untrained"):
        table.add_column(name, justify="left" if "trained" in name else "right", no_wrap=True)
    for verdict in verdicts(comparison):
        trained, control, svd = verdict.trained, verdict.control, verdict.svd
        table.add_row(
            Text(str(verdict.rank), style="bold"),
            trained.method if trained else ABSENT,
            cosine_text(trained.token_cosine_mean) if trained else ABSENT,
            cosine_text(svd.token_cosine_mean) if svd else ABSENT,
            Text(ratio_text(trained.residual_ratio_mean) if trained else ABSENT, style="bold green"),
            seed_texts(trained)[0] if trained else ABSENT,
            f"{control.method} {ratio_text(control.residual_ratio_mean)}" if control else ABSENT,
        )
    return table


def at_rank(comparison: Comparison, rank: int | None) -> Comparison:
    """The rows of one rank, and the remarks that are not about another one; all of them when None."""
    if rank is None:
        return comparison
    rows = tuple(row for row in comparison.rows if row.rank == rank)
    named = ((remark, re.search(r"\brank (\d+)", remark, re.IGNORECASE)) for remark in comparison.remarks)
    remarks = tuple(remark for remark, match in named if match is None or int(match.group(1)) == rank)
    return replace(comparison, rows=rows, remarks=remarks)


def studies_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Render several studies side by side: at each rank every method of each, the nearest to the optimum first.

    Args:
        comparisons: by study id.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Studies side by side, by rank and ρ", pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.caption = "ρ: residual over the SVD's, 1 is the optimum · ★ best trained of all · bold: trained"
    for name in ("rank", "study", "method", "token cosine", "ρ", "worst ρ"):
        table.add_column(name, justify="left" if name in ("study", "method") else "right", no_wrap=name != "study")
    found = [(name, row) for name, comparison in comparisons.items() for row in comparison.rows]
    for rank in sorted({row.rank for _, row in found}):
        own = sorted(
            ((name, row) for name, row in found if row.rank == rank), key=lambda pair: pair[1].residual_ratio_mean
        )
        best = best_row(row for _, row in own if is_trained(row.method))
        for place, (name, row) in enumerate(own):
            table.add_row(
                Text(str(rank) if place == 0 else "", style="bold"),
                name,
                f"{row.method} ★" if row is best else row.method,
                cosine_text(row.token_cosine_mean),
                ratio_text(row.residual_ratio_mean),
                ratio_text(row.residual_ratio_max),
                style="bold green" if row is best else "bold" if is_trained(row.method) else "",
            )
        table.add_section()
    return table


def _methods_table(comparison: Comparison) -> Table:
    title = comparison.data or "test images"
    table = Table(box=box.SIMPLE_HEAD, title=f"Rank x method: {title}", title_justify="left", pad_edge=False)
    table.caption = f"ρ: residual over the SVD's, 1 is the optimum · ★ best trained · images/s: {comparison.device}"
    table.caption_justify = "left"
    table.add_column("rank", justify="right")
    table.add_column("method", no_wrap=True)
    table.add_column("token cosine", justify="right", no_wrap=True)
    table.add_column("ρ", justify="right", no_wrap=True)
    table.add_column("worst ρ", justify="right", no_wrap=True)
    table.add_column("images/s", justify="right", no_wrap=True)
    for group in rank_groups(comparison):
        for place, cell in enumerate(group.cells):
            rank = str(group.rank) if place == 0 else ""
            style = "bold green" if cell.best else ("" if cell.row else "dim")
            table.add_row(Text(rank, style="bold"), *_cells(cell), style=style)
        table.add_section()
    return table


def _trained_table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Trained: beside the SVD, and over seeds", pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "− SVD: difference on the same image, mean ± 95 % interval · over seeds: the same configuration trained "
        "again, mean ± sd"
    )
    table.add_column("rank", justify="right")
    table.add_column("method", no_wrap=True)
    table.add_column("token cosine\n− SVD", justify="right", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    table.add_column("ρ\nover seeds", justify="right", no_wrap=True)
    table.add_column("token cosine\nover seeds", justify="right", no_wrap=True)
    for group in rank_groups(comparison):
        cells = [cell for cell in group.cells if is_trained(cell.method) and cell.row is not None]
        for place, cell in enumerate(cells):
            if cell.row is not None:
                texts = [difference_text(cell.row), str(cell.row.seeds or ABSENT), *seed_texts(cell.row)]
                rank = Text(str(group.rank) if place == 0 else "", style="bold")
                table.add_row(rank, _name(cell), *texts, style="bold green" if cell.best else "")
        table.add_section()
    return table


def _name(cell: Cell) -> str:
    return f"{cell.method} ★" if cell.best else cell.method


def _cells(cell: Cell) -> list[str]:
    row = cell.row
    if row is None:
        return [_name(cell), ABSENT, ABSENT, ABSENT, ABSENT]
    return [
        _name(cell),
        f"{cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f}",
        ratio_text(row.residual_ratio_mean),
        ratio_text(row.residual_ratio_max),
        rate_text(row.images_per_second),
    ]


def study_cost(
    directory: Path, features: FeatureSet, outcomes: Sequence[TrialOutcome], confirmations: Sequence[TrialOutcome]
) -> list[tuple[str, str]]:
    """List what a study took, as names and texts.

    Args:
        directory: the study's; its `status.json` tells when it started.
        features: the study's.
        outcomes: every trial.
        confirmations: the repetitions of the best.
    """
    ends: Counter[str] = Counter(outcome.stopped_by for outcome in outcomes)
    told = ", ".join(f"{ends[stop]} {words}" for stop, words in STOPPED.items() if ends[stop])
    shards = {row.shard for row in features.rows}
    lines = [
        ("Trials", f"{len(outcomes)}: {told}" if outcomes else "0"),
        ("Epochs", _epochs(outcomes)),
        ("Training time of the trials", duration_text(sum(outcome.seconds for outcome in outcomes))),
    ]
    if confirmations:
        again = duration_text(sum(outcome.seconds for outcome in confirmations))
        epochs = count(sum(outcome.epochs for outcome in confirmations), "epoch")
        lines.append(("Trained again with fresh seeds", f"{len(confirmations)}, {epochs}, {again}"))
    lines += [
        ("Start to end", _wall(directory)),
        (
            "Feature cache",
            f"{bytes_text(_size(Path(features.directory) / 'shards' / name for name in shards))} for "
            f"{count(len(features.rows), 'image')}; other studies with these features share it",
        ),
        ("Trained models", bytes_text(_size((directory / "trials").glob("*/best_model.safetensors")))),
    ]
    return [(name, text) for name, text in lines if text]


def bytes_text(size: int) -> str:
    """A size in the largest unit that gives three digits: `12.6 MB`."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _epochs(outcomes: Sequence[TrialOutcome]) -> str:
    spent, budget = sum(trial.epochs for trial in outcomes), sum(trial.config.epochs for trial in outcomes)
    saved = f" of {budget} that no early stop would have taken" if spent < budget else ""
    return f"{spent}{saved}"


def _wall(directory: Path) -> str:
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
        started = datetime.fromisoformat(status["started"])
        ended = datetime.fromisoformat(status["ended"]) if status.get("ended") else datetime.now(UTC)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return duration_text((ended - started).total_seconds())


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


_log = logging.getLogger(__name__)


def read_history(directory: Path) -> list[dict[str, float]]:
    """Read a trial's `history.json`.

    Args:
        directory: the trial's directory.

    Returns:
        One mapping an epoch, in order, with the finite numbers among its entries. Empty when the trial left no history
        or a damaged one: a report shows what there is.
    """
    path = directory / "history.json"
    try:
        epochs: Any = json.loads(path.read_text(encoding="utf-8"))
        return [{key: float(value) for key, value in epoch.items() if _is_number(value)} for epoch in epochs]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _log.warning("%s cannot be read (%s); the report goes without this trial's curves", path, error)
        return []


def series(history: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The epochs at which a figure is known, and its values there."""
    points = [(epoch["epoch"], epoch[name]) for epoch in history if "epoch" in epoch and name in epoch]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
