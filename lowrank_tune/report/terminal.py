"""The comparison on a terminal of 80 columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lowrank_tune.records import Comparison
from lowrank_tune.report.palette import is_trained
from lowrank_tune.report.table import Cell, rank_groups
from lowrank_tune.report.verdict import verdicts
from lowrank_tune.report.words import ABSENT, best_row, cosine_text, difference_text, rate_text, ratio_text, seed_texts


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
