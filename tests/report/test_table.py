"""The rank x method table, as data and on a terminal of 80 columns."""

import io

from rich.console import Console

from lowrank_tune.report.table import rank_groups
from lowrank_tune.report.terminal import comparison_table


def printed(comparison) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(comparison_table(comparison))
    return console.file.getvalue().splitlines()


def test_every_rank_has_every_method_in_one_order(row, comparison_of):
    groups = rank_groups(
        comparison_of(row("power_1", 4), row("sketch", 8, 1.1), row("direct", 4, 3.0), row("svd", 8), row("svd", 4))
    )
    assert [group.rank for group in groups] == [4, 8]
    for group in groups:
        assert [cell.method for cell in group.cells] == ["svd", "direct", "sketch", "power_1"]
    assert [cell.row is None for cell in groups[0].cells] == [False, False, True, False]
    assert [cell.best for cell in groups[0].cells] == [False, True, False, False]
    assert [cell.best for cell in groups[1].cells] == [False, False, True, False]


def test_the_best_is_the_trained_method_with_the_least_ratio(row, comparison_of):
    (group,) = rank_groups(
        comparison_of(row("svd", 4, 1.0), row("randomized_svd", 4, 1.01), row("direct", 4, 5.0), row("sketch", 4, 1.2))
    )
    assert [cell.method for cell in group.cells if cell.best] == ["sketch"]


def test_a_terminal_of_80_columns_shows_every_figure(row, comparison_of):
    lines = printed(
        comparison_of(
            row("svd", 64, 1.0, 0.98931), row("randomized_svd", 64, 1.0123, 0.9891, images_per_second=1234.5),
            row("sketch", 64, 1.0345, 0.9887, token_cosine_sd=0.0021, trial_id="t"), row("svd", 128, 1.0, 0.99),
        )
    )  # fmt: skip
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    star = next(line for line in lines if "★" in line and "sketch" in line)
    assert star.split() == ["sketch", "★", "0.9887", "±", "0.0021", "1.034", "1.138", "123"]
    assert next(line for line in lines if "randomized_svd" in line).split()[-1] == "1,230"
    assert sum("—" in line for line in lines) == 2
    assert "one CPU thread (test)" in text
    assert "…" not in text
