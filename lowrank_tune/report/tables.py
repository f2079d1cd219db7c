"""The tables of a study, each made once for the page and the terminal."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from lowrank_tune.measured import Comparison, ComparisonRow, Compression
from lowrank_tune.records import BYTES_AT_ERROR, WEIGHTED, FeatureSet, TrialOutcome
from lowrank_tune.report.text import (
    ABSENT,
    STOPPED,
    Choice,
    RankSummary,
    cosine_text,
    count,
    difference_text,
    duration_text,
    gain_text,
    in_order,
    is_trained,
    kib_text,
    percent_text,
    rank_summaries,
    rate_text,
    ratio_interval_text,
    ratio_text,
    seed_texts,
    setting_text,
    size_text,
)

Row = TypeVar("Row")
Trainings = tuple[TrialOutcome, ...]
"""One trial, or all its repetitions."""


@dataclass(frozen=True, slots=True)
class Table:
    """Texts in rows and columns, for the page and, by `__rich__`, for a terminal of 80 columns."""

    label: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    texts: tuple[str, ...] = ()  # the columns that are no numbers
    prose: tuple[str, ...] = ()  # those of them whose texts may wrap
    terminal: tuple[str, ...] = ()  # the columns that a terminal has room for; all when empty
    grouped: bool = False  # rows whose first texts are equal stand under one heading
    trials: tuple[int, ...] = ()  # whose each row is, by number, where the page's script finds trials by it

    @classmethod
    def of(
        cls, label: str, rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]], caption: str, **more: Any
    ) -> Table:
        """Make a table of what its columns say of each row."""
        cells = tuple(tuple(column(row) for column in columns.values()) for row in rows)
        return cls(label, tuple(columns), cells, caption, **more)

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """The rows, together where they stand under one heading."""
        return [list(rows) for _, rows in groupby(self.rows, key=lambda row: row[0] if self.grouped else "")]

    @staticmethod
    def starred(row: tuple[str, ...]) -> bool:
        """Whether a row is the chosen one."""
        return any(text.endswith("★") for text in row)

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=Text(f"\n{self.label}"), caption=Text(self.caption))
        table.pad_edge, table.collapse_padding = False, True
        table.title_justify = table.caption_justify = "left"
        shown = [self.head.index(name) for name in self.terminal or self.head]
        for name in (self.head[place] for place in shown):
            table.add_column(name, justify="left" if name in self.texts else "right", no_wrap=name not in self.prose)
        for group in self.groups:
            for number, row in enumerate(group):
                texts = [row[place] if place or not number or not self.grouped else "" for place in shown]
                table.add_row(*map(Text, texts), style="bold green" if self.starred(row) else "")
            if self.grouped:
                table.add_section()
        return table


def summary_table(comparison: Comparison) -> Table:
    """The chosen model of each rank beside the SVD and the best method without training."""

    def of(row: ComparisonRow | None, told: Callable[[ComparisonRow], str]) -> str:
        return told(row) if row else ABSENT

    def without_training(row: ComparisonRow) -> str:
        return f"{row.method} {ratio_text(row.residual_ratio)}"

    columns: dict[str, Callable[[RankSummary], str]] = {
        "rank": lambda summary: str(summary.rank),
        "trained": lambda summary: of(summary.trained, lambda row: row.method),
        "cosine": lambda summary: of(summary.trained, lambda row: cosine_text(row.token_cosine_mean)),
        "SVD's": lambda summary: of(summary.svd, lambda row: cosine_text(row.token_cosine_mean)),
        "ρ": lambda summary: of(summary.trained, lambda row: ratio_text(row.residual_ratio)),
        "ρ over seeds": lambda summary: of(summary.trained, lambda row: seed_texts(row)[0]),
        "untrained": lambda summary: of(summary.control, without_training),
        "so": lambda summary: summary.text,
    }
    return Table.of(
        f"The best of each rank: {comparison.data}" if comparison.data else "The best of each rank",
        rank_summaries(comparison),
        columns,
        "trained: what validation chose, on the test images · cosine: mean token cosine, beside the SVD's · ρ: "
        "squared error over the least possible at that rank, the SVD's: 1 is perfect · over seeds: the same "
        "configuration trained again · untrained: the nearest control that takes no longer, and its ρ",
        texts=("trained", "untrained", "so"),
        prose=("so",),
        terminal=tuple(columns)[:-1],
    )


def choices_table(found: Sequence[Choice], features: FeatureSet) -> Table:
    """Which rank keeps which token cosine, and what an image takes then."""
    whole = features.tokens * features.dim * (4 if features.dtype == "float32" else 2)
    rows = []
    for choice in found:
        texts: tuple[str, ...] = ("none compared", ABSENT, ABSENT, ABSENT)
        if choice.row is not None:
            row, size = choice.row, choice.row.bytes_per_image
            taken = f"{kib_text(size)} KiB, {size / whole:.0%} of X"
            if row.shared_bytes:
                taken += f", and {size_text(row.shared_bytes)} once"
            texts = (str(row.rank), row.method, cosine_text(row.token_cosine_mean), taken)
        rows.append((f"{choice.cosine:g}", str(choice.svd_rank or ABSENT), *texts))
    return Table(
        "Ranks by the token cosine that they keep",
        ("to keep", "the SVD needs rank", "a trained model, rank", "method", "on test images", "A and B take"),
        tuple(rows),
        "The lowest rank compared whose chosen model keeps a mean token cosine on the validation images, and what an "
        "image takes then.",
        texts=("method",),
    )


def methods_table(comparison: Comparison) -> Table:
    """Every method at every rank, each group in one order: bounds, trained families, controls."""
    measured = {(row.rank, row.method): row for row in comparison.rows}
    columns: dict[str, Callable[[ComparisonRow], str]] = {
        "token cosine": lambda row: f"{cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f}",
        "ρ": lambda row: ratio_text(row.residual_ratio),
        "95 % of ρ": ratio_interval_text,
        "median ρ": lambda row: ratio_text(row.residual_ratio_median),
        "worst ρ": lambda row: ratio_text(row.residual_ratio_max),
        "images/s": lambda row: rate_text(row.images_per_second),
        "cosine − SVD": difference_text,
        "flat cosine": lambda row: cosine_text(row.flat_cosine_mean),
        "KiB an image": lambda row: kib_text(row.bytes_per_image),
    }
    shared = any(row.shared_bytes for row in comparison.rows)
    weighted = any(row.residual_ratio_weighted for row in comparison.rows)
    if weighted:
        columns["ρ_W"] = lambda row: ratio_text(row.residual_ratio_weighted)
        columns["95 % of ρ_W"] = lambda row: ratio_interval_text(row, "residual_ratio_weighted")
    if shared:
        columns["shared, KiB"] = lambda row: kib_text(row.shared_bytes) if row.shared_bytes else ABSENT
    columns["trial"] = lambda row: row.trial_id
    rows = []
    for rank in sorted({row.rank for row in comparison.rows}):
        for method in in_order(row.method for row in comparison.rows):
            row = measured.get((rank, method))
            texts = [column(row) for column in columns.values()] if row else [*[ABSENT] * (len(columns) - 1), ""]
            rows.append((str(rank), starred(row) if row else method, *texts))
    head = ("rank", "method", *columns)
    return Table(
        f"Rank x method: {comparison.data or 'test images'}",
        head,
        tuple(rows),
        "Means ± sd over the test images · ρ: residual over the SVD's, 1 is the optimum: exp(mean log ρ) with a 95 % "
        "interval over groups of images, then the middle and the worst image's · ★ the trained model of its "
        f"rank that validation chose · images/s: A and B, on {comparison.device}"
        + (" · ρ_W: ρ where errors weigh as they move the language model's answers" if weighted else "")
        + (" · shared: B, kept once for the data set and not in an image's KiB" if shared else ""),
        texts=("method", "trial"),
        terminal=("rank", "method", "token cosine", "ρ", "ρ_W" if weighted else "median ρ", "worst ρ", "images/s"),
        grouped=True,
    )


def starred(row: ComparisonRow) -> str:
    """A method's name, with a star where it is the chosen one of its rank."""
    return f"{row.method} ★" if row.chosen else row.method


def trained_table(comparison: Comparison) -> Table:
    """What is known of the trained methods alone."""
    trained = [row for row in comparison.rows if is_trained(row.method)]
    in_metric = any(row.method.endswith(WEIGHTED) for row in trained)
    return Table.of(
        "Trained: beside the SVD, and over seeds",
        sorted(trained, key=lambda row: (row.rank, row.method)),
        {
            "rank": lambda row: str(row.rank),
            "method": starred,
            "token cosine\n− SVD": difference_text,
            "training took\noff ρ, %": gain_text,
            "seeds": lambda row: str(row.seeds or ABSENT),
            "ρ\nover seeds": lambda row: seed_texts(row)[0],
            "token cosine\nover seeds": lambda row: seed_texts(row)[1],
        },
        "− SVD: difference on the same test image, mean ± 95 % interval · training took off: against the same model "
        "before its first epoch, on the same images · over seeds: the same configuration trained "
        "again, mean ± sd, which is what it gives; the trial's own training was chosen for its validation figures"
        + (f" · of …{WEIGHTED} training is told by ρ_W, which it lowers" if in_metric else ""),
        terminal=("rank", "method", "token cosine\n− SVD", "training took\noff ρ, %", "seeds", "ρ\nover seeds"),
        texts=("method",),
        grouped=True,
    )


def comparison_tables(comparison: Comparison) -> Group:
    """The rank x method table and, where there is any, what is known of the trained methods alone."""
    trained = trained_table(comparison)
    return Group(methods_table(comparison), *([trained] if trained.rows else []))


def studies_table(comparisons: Mapping[str, Comparison]) -> Table:
    """Several studies side by side: at each rank every method of each, by ρ."""
    found = [(name, row) for name, comparison in comparisons.items() for row in comparison.rows]
    return Table.of(
        "Studies side by side, by rank and ρ",
        sorted(found, key=lambda pair: (pair[1].rank, pair[1].residual_ratio or math.inf)),
        {
            "rank": lambda pair: str(pair[1].rank),
            "study": lambda pair: pair[0],
            "method": lambda pair: starred(pair[1]),
            "token cosine": lambda pair: cosine_text(pair[1].token_cosine_mean),
            "ρ": lambda pair: ratio_text(pair[1].residual_ratio),
            "median ρ": lambda pair: ratio_text(pair[1].residual_ratio_median),
            "worst ρ": lambda pair: ratio_text(pair[1].residual_ratio_max),
        },
        "ρ: residual over the SVD's, 1 is the optimum · ★ the trained model that its study's validation chose",
        texts=("study", "method"),
        prose=("study",),
        grouped=True,
    )


def trials_table(outcomes: Sequence[TrialOutcome], repetitions: Sequence[TrialOutcome] = ()) -> Table:
    """How every trial ended, with its validation figures; below it, in one row, what its repetitions gave."""
    again = defaultdict[str, list[TrialOutcome]](list)
    for repetition in repetitions:
        again[repetition.config.confirms].append(repetition)

    def figure(name: str, text: Callable[[float], str], spread: str) -> Callable[[Trainings], str]:
        return lambda same: _mean_text([trial.best[name] for trial in same if name in trial.best], text, spread)

    def epochs(numbers: Sequence[float]) -> str:
        return _mean_text(numbers, lambda number: f"{number:.1f}".removesuffix(".0"), ".1f")

    def name(same: Trainings) -> str:
        first = same[0].config
        return f"{first.confirms}, {count(len(same), 'fresh seed')}" if first.confirms else first.trial_id

    targets = {trial.config.target_error for trial in outcomes if trial.config.target_error is not None}
    by_size = sorted(outcomes, key=lambda trial: (trial.config.rank, trial.config.family, trial.config.number))
    rows = [same for trial in by_size for same in ((trial,), tuple(again[trial.config.trial_id])) if same]
    return Table.of(
        "Trials",
        rows,
        {
            "trial": name,
            **{f"KiB at {target:.3g} error": figure(BYTES_AT_ERROR, kib_text, "") for target in targets},
            "ρ": figure("val_residual_ratio", ratio_text, ".3f"),
            "token cosine": figure("val_token_cosine", cosine_text, ".4f"),
            "best epoch": lambda same: epochs([trial.best_epoch for trial in same if trial.best_epoch]),
            "epochs": lambda same: epochs([trial.epochs for trial in same]),
            "time": lambda same: duration_text(sum(trial.seconds for trial in same)),
            "how it ended": _ending_text,
            "settings": lambda same: _settings_text(same[0]) if not same[0].config.confirms else "the same",
        },
        "Validation figures at each trial's best epoch."
        + (" Of repetitions with fresh seeds the mean ± sd, and their time in all." if repetitions else ""),
        texts=("trial", "how it ended", "settings"),
        prose=("how it ended", "settings"),
        trials=tuple(same[0].config.number for same in rows),
    )


def _mean_text(values: Sequence[float], text: Callable[[float], str], spread: str) -> str:
    """A figure, or of several their mean ± sd, the latter in its own format or as the mean is written."""
    if not values:
        return ABSENT
    mean = text(statistics.fmean(values))
    if len(values) == 1:
        return mean
    sd = statistics.stdev(values)
    return f"{mean} ± {format(sd, spread) if spread else text(sd)}"


def _ending_text(same: Trainings) -> str:
    if not same[0].config.confirms:
        return ": ".join(filter(None, (STOPPED[same[0].stopped_by], same[0].reason)))
    ends = Counter(STOPPED[trial.stopped_by] for trial in same)
    return "trained again: " + ", ".join(f"{number} {end}" for end, number in ends.items())


def _settings_text(trial: TrialOutcome) -> str:
    config = trial.config
    known = {"lr": config.lr, "weight decay": config.weight_decay, "batch": config.batch_size}
    # A name and its value stay on one line.
    return ", ".join(f"{name}\u00a0{setting_text(value)}" for name, value in (known | config.family_params).items())


def compression_tables(compression: Compression) -> tuple[Table, ...]:
    """What an error takes, unless rates tell; the factors of each rank and dtype, and the trained models in int8."""
    stored = compression.stored
    whole = next((row.bytes_per_image for row in stored if (row.method, row.dtype) == ("x", "float16")), None)
    trained = any(row.trial_id for row in stored)
    factors = Table.of(
        "Factors at each rank and dtype",
        (row for row in stored if row.method == "x" or bool(row.trial_id) is trained),
        {
            "stored": lambda row: "X itself" if row.method == "x" else f"{row.method}, rank {row.rank}",
            "as": lambda row: row.dtype,
            "KiB an image": lambda row: kib_text(row.bytes_per_image),
            "of X in float16": lambda row: f"{row.bytes_per_image / whole:.1%}" if whole else ABSENT,
            "relative error": lambda row: percent_text(row.relative_error_mean),
            "worst image": lambda row: percent_text(row.relative_error_max),
            "token cosine": lambda row: cosine_text(row.token_cosine_mean),
        },
        "Every image at the same rank, scales included; compression.json has the SVD's, too.",
        texts=("stored",),
    )
    models = Table.of(
        "The trained models with int8 matrices",
        compression.models,
        {
            "model": lambda row: f"{row.method}, rank {row.rank}",
            "float32, KiB": lambda row: kib_text(row.model_bytes),
            "int8, KiB": lambda row: (
                kib_text(row.quantised_bytes) if row.quantised_bytes != row.model_bytes else "no learned matrix"
            ),
            "relative error": lambda row: percent_text(row.relative_error_mean),
            "in int8": lambda row: percent_text(row.quantised_relative_error_mean),
        },
        "Weights only, a scale a row, by torchao. Relative error: of the factors that the model makes.",
        texts=("model",),
    )
    # What an error takes, the rates tell in every way there is.
    targets = [] if compression.rates else [_targets_table(compression)]
    return (*targets, factors, *([models] if models.rows else []))


def _targets_table(compression: Compression) -> Table:
    controls = [row for row in compression.stored if row.method == "x"]
    trained = next((row.method for row in compression.pruned if row.method != "svd"), "")
    rows = []
    for target in dict.fromkeys(row.target for row in compression.pruned):
        at = next((row for row in controls if row.dtype == target), None)
        if at is None:
            met = [row for row in controls if row.relative_error_max <= float(target)]
            at = min(met, key=lambda row: row.bytes_per_image, default=None)
            name = f"{100 * float(target):g} %"
        else:
            name = f"as {target} of X: {percent_text(at.relative_error_mean)}"
        texts = [f"{kib_text(at.bytes_per_image)}, {at.dtype}" if at else ABSENT]
        for method in ("svd", trained):
            own = [row for row in compression.pruned if (row.target, row.method) == (target, method)]
            sizes = [(row.bytes_per_image, row) for row in own if row.bytes_per_image is not None]
            size, row = min(sizes, key=lambda pair: pair[0], default=(0.0, None))
            texts.append(f"{kib_text(size)}, {row.dtype}, {row.rank_mean:.0f} components" if row else ABSENT)
        rows.append((name, *texts))
    return Table(
        "Bytes for an error that every image keeps",
        ("relative error at most", "X itself, KiB", "the SVD's factors, KiB", f"{trained or 'trained'} factors, KiB"),
        tuple(rows),
        "The fewest bytes an image, on average, at which every test image is as near. Factors: the dtype that takes "
        "the fewest, and the components an image keeps on average. The SVD may keep as many as there are, trained "
        f"factors as many as the highest rank compared; {ABSENT} where that does not do.",
        texts=("relative error at most",),
    )
