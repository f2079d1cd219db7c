"""The tables of a study, each made once for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from lowrank_tune.records import Comparison, Compression, FeatureSet, TrialOutcome
from lowrank_tune.report.text import (
    ABSENT,
    STOPPED,
    Choice,
    cosine_text,
    difference_text,
    duration_text,
    in_order,
    is_trained,
    rank_summaries,
    rate_text,
    ratio_text,
    seed_texts,
)


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
    rows = []
    for summary in rank_summaries(comparison):
        trained, control, svd = summary.trained, summary.control, summary.svd
        rows.append(
            (
                str(summary.rank),
                trained.method if trained else ABSENT,
                cosine_text(trained.token_cosine_mean) if trained else ABSENT,
                cosine_text(svd.token_cosine_mean) if svd else ABSENT,
                ratio_text(trained.residual_ratio_mean) if trained else ABSENT,
                seed_texts(trained)[0] if trained else ABSENT,
                f"{control.method} {ratio_text(control.residual_ratio_mean)}" if control else ABSENT,
                summary.text,
            )
        )
    head = ("rank", "trained", "cosine", "SVD's", "ρ", "ρ over seeds", "untrained", "so")
    return Table(
        f"The best of each rank: {comparison.data}" if comparison.data else "The best of each rank",
        head,
        tuple(rows),
        "trained: what validation chose, on the test images · cosine: mean token cosine, beside the SVD's · ρ: "
        "squared error over the least possible at that rank, the SVD's: 1 is perfect · over seeds: the same "
        "configuration trained again · untrained: the best control and its ρ",
        texts=("trained", "untrained", "so"),
        prose=("so",),
        terminal=head[:-1],
    )


def choices_table(found: Sequence[Choice], features: FeatureSet) -> Table:
    """Which rank keeps which token cosine, and what an image takes then."""
    whole = features.tokens * features.dim * (4 if features.dtype == "float32" else 2)
    rows = []
    for choice in found:
        texts: tuple[str, ...] = ("none compared", ABSENT, ABSENT, ABSENT)
        if choice.row is not None:
            row, size = choice.row, choice.row.bytes_per_image
            taken = f"{size / 1024:,.1f} KiB, {size / whole:.0%} of X"
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
    methods, chosen = in_order(row.method for row in comparison.rows), comparison.best_of_each_rank()
    measured = {(row.rank, row.method): row for row in comparison.rows}
    rows = []
    for rank in sorted({row.rank for row in comparison.rows}):
        for method in methods:
            row = measured.get((rank, method))
            texts: tuple[str, ...] = (ABSENT,) * 7 + ("",)
            if row is not None:
                texts = (
                    f"{cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f}",
                    ratio_text(row.residual_ratio_mean),
                    ratio_text(row.residual_ratio_max),
                    rate_text(row.images_per_second),
                    difference_text(row),
                    cosine_text(row.flat_cosine_mean),
                    f"{row.bytes_per_image / 1024:,.1f}",
                    row.trial_id,
                )
            rows.append((str(rank), f"{method} ★" if row in chosen else method, *texts))
    first = ("rank", "method", "token cosine", "ρ", "worst ρ", "images/s")
    return Table(
        f"Rank x method: {comparison.data or 'test images'}",
        (*first, "cosine − SVD", "flat cosine", "KiB an image", "trial"),
        tuple(rows),
        "Means ± sd over the test images · ρ: residual over the SVD's, 1 is the optimum · ★ the trained model of its "
        f"rank that validation chose · images/s: A and B, on {comparison.device}",
        texts=("method", "trial"),
        terminal=first,
        grouped=True,
    )


def trained_table(comparison: Comparison) -> Table:
    """What is known of the trained methods alone."""
    chosen = comparison.best_of_each_rank()
    rows = [
        (
            str(row.rank),
            f"{row.method} ★" if row in chosen else row.method,
            difference_text(row),
            str(row.seeds or ABSENT),
            *seed_texts(row),
        )
        for row in sorted(comparison.rows, key=lambda row: (row.rank, row.method))
        if is_trained(row.method)
    ]
    return Table(
        "Trained: beside the SVD, and over seeds",
        ("rank", "method", "token cosine\n− SVD", "seeds", "ρ\nover seeds", "token cosine\nover seeds"),
        tuple(rows),
        "− SVD: difference on the same test image, mean ± 95 % interval · over seeds: the same configuration trained "
        "again, mean ± sd, which is what it gives; the trial's own training was chosen for its validation figures",
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
    chosen = {name: comparison.best_of_each_rank() for name, comparison in comparisons.items()}
    found.sort(key=lambda pair: (pair[1].rank, pair[1].residual_ratio_mean))
    rows = [
        (
            str(row.rank),
            name,
            f"{row.method} ★" if row in chosen[name] else row.method,
            cosine_text(row.token_cosine_mean),
            ratio_text(row.residual_ratio_mean),
            ratio_text(row.residual_ratio_max),
        )
        for name, row in found
    ]
    return Table(
        "Studies side by side, by rank and ρ",
        ("rank", "study", "method", "token cosine", "ρ", "worst ρ"),
        tuple(rows),
        "ρ: residual over the SVD's, 1 is the optimum · ★ the trained model that its study's validation chose",
        texts=("study", "method"),
        prose=("study",),
        grouped=True,
    )


def trials_table(outcomes: Sequence[TrialOutcome]) -> Table:
    """How every trial ended, with its validation figures."""
    rows = []
    for trial in sorted(outcomes, key=lambda trial: (trial.config.rank, trial.config.family, trial.config.number)):
        config, best, ending = trial.config, trial.best, STOPPED[trial.stopped_by]
        settings = {"lr": config.lr, "weight decay": config.weight_decay, "batch": config.batch_size}
        rows.append(
            (
                config.trial_id,
                ratio_text(best.get("val_residual_ratio", math.nan)),
                cosine_text(best.get("val_token_cosine", math.nan)),
                str(trial.best_epoch or ABSENT),
                str(trial.epochs),
                duration_text(trial.seconds),
                f"{ending}: {trial.reason}" if trial.reason else ending,
                # A name and its value stay on one line.
                ", ".join(f"{name}\u00a0{value:.4g}" for name, value in (settings | config.family_params).items()),
            )
        )
    return Table(
        "Trials",
        ("trial", "ρ", "token cosine", "best epoch", "epochs", "time", "how it ended", "settings"),
        tuple(rows),
        "Validation figures at each trial's best epoch.",
        texts=("trial", "how it ended", "settings"),
        prose=("how it ended", "settings"),
    )


def compression_tables(compression: Compression) -> tuple[Table, ...]:
    """What an error takes, the factors of each rank and dtype, and the trained models in int8."""
    stored = compression.stored
    whole = next((row.bytes_per_image for row in stored if (row.method, row.dtype) == ("x", "float16")), None)
    trained = any(row.trial_id for row in stored)
    factors = [
        (
            "X itself" if row.method == "x" else f"{row.method}, rank {row.rank}",
            row.dtype,
            _kib(row.bytes_per_image),
            f"{row.bytes_per_image / whole:.1%}" if whole else ABSENT,
            _percent(row.relative_error_mean),
            _percent(row.relative_error_max),
            cosine_text(row.token_cosine_mean),
        )
        for row in stored
        if row.method == "x" or bool(row.trial_id) is trained
    ]
    models = [
        (
            f"{row.method}, rank {row.rank}",
            _kib(row.model_bytes),
            _kib(row.quantised_bytes) if row.quantised_bytes != row.model_bytes else "no learned matrix",
            _percent(row.relative_error_mean),
            _percent(row.quantised_relative_error_mean),
        )
        for row in compression.models
    ]
    tables = (
        _targets_table(compression),
        Table(
            "Factors at each rank and dtype",
            ("stored", "as", "KiB an image", "of X in float16", "relative error", "worst image", "token cosine"),
            tuple(factors),
            "Every image at the same rank, scales included; compression.json has the SVD's, too.",
            texts=("stored",),
        ),
        Table(
            "The trained models with int8 matrices",
            ("model", "float32, KiB", "int8, KiB", "relative error", "in int8"),
            tuple(models),
            "Weights only, a scale a row, by torchao. Relative error: of the factors that the model makes.",
            texts=("model",),
        ),
    )
    return tables if models else tables[:2]


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
            name = f"as {target} of X: {_percent(at.relative_error_mean)}"
        texts = [f"{_kib(at.bytes_per_image)}, {at.dtype}" if at else ABSENT]
        for method in ("svd", trained):
            own = [row for row in compression.pruned if (row.target, row.method) == (target, method)]
            sizes = [(row.bytes_per_image, row) for row in own if row.bytes_per_image is not None]
            size, row = min(sizes, key=lambda pair: pair[0], default=(0.0, None))
            texts.append(f"{_kib(size)}, {row.dtype}, {row.rank_mean:.0f} components" if row else ABSENT)
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


def _kib(size: float) -> str:
    return f"{size / 1024:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
