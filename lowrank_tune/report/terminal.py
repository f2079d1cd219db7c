"""The comparison on a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from lowrank_tune.records import Comparison
from lowrank_tune.report.table import Cell, rank_groups
from lowrank_tune.report.words import ABSENT, cosine_text, rate_text, ratio_text


def comparison_table(comparison: Comparison) -> Table:
    """Render the rank x method table.

    Args:
        comparison: the post-study figures.

    Returns:
        A table of at most 80 columns; at each rank the best trained method is marked with a star and in bold.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Test images: rank x method", title_justify="left", pad_edge=False)
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


def _cells(cell: Cell) -> list[str]:
    name = f"{cell.method} ★" if cell.best else cell.method
    row = cell.row
    if row is None:
        return [name, ABSENT, ABSENT, ABSENT, ABSENT]
    return [
        name,
        f"{cosine_text(row.token_cosine_mean)} ± {row.token_cosine_sd:.4f}",
        ratio_text(row.residual_ratio_mean),
        ratio_text(row.residual_ratio_max),
        rate_text(row.images_per_second),
    ]
