"""The rank x method table, as data and on a terminal of 80 columns."""

import io
from dataclasses import replace

from rich.console import Console

from lowrank_tune.report.text import comparison_tables, rank_groups, verdict_table


def printed(comparison, render=comparison_tables) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(render(comparison))
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
    assert sum("—" in line for line in lines) == 3
    assert "one CPU thread (test)" in text
    assert "…" not in text


def test_what_is_known_of_trained_methods_alone_fits_80_columns_too(row, comparison_of):
    pair = {
        "token_cosine_minus_svd": -0.01321,
        "token_cosine_minus_svd_low": -0.015,
        "token_cosine_minus_svd_high": -0.011,
    }
    seeds = {
        "seeds": 3, "residual_ratio_seed_mean": 1.2149, "residual_ratio_seed_sd": 0.0126,
        "token_cosine_seed_mean": 0.90641, "token_cosine_seed_sd": 0.00034,
    }  # fmt: skip
    comparison = comparison_of(
        row("svd", 128, 1.0), row("refined", 128, 1.2, trial_id="t", **pair, **seeds),
        row("direct", 128, 34.0, trial_id="u", token_cosine_minus_svd=-0.2), row("power_1", 128, 1.1),
    )  # fmt: skip
    lines = printed(replace(comparison, data="16 test images, [256, 2048] features of a checkpoint (random weights)"))
    assert max(len(line) for line in lines) <= 80
    assert "16 test images, [256, 2048] features" in " ".join(lines)
    below = lines[next(n for n, line in enumerate(lines) if line.startswith("Trained")) :]
    star = next(line for line in below if "refined ★" in line)
    assert " ".join(star.split()) == "refined ★ -0.0132 ± 0.0020 3 1.215 ± 0.013 0.9064 ± 0.0003"
    direct = next(line for line in below if "direct" in line)
    assert " ".join(direct.split()) == "128 direct -0.2000 — — —"
    assert not any("power_1" in line or "…" in line for line in below)


def test_without_a_trained_method_there_is_one_table(row, comparison_of):
    assert not any(line.startswith("Trained") for line in printed(comparison_of(row("svd", 4, 1.0))))


def test_the_verdict_fits_80_columns_with_the_longest_names(row, comparison_of):
    seeds = {
        "seeds": 3, "residual_ratio_seed_mean": 12.5, "residual_ratio_seed_sd": 1.2,
        "token_cosine_seed_mean": 0.99997, "token_cosine_seed_sd": 0.00034,
    }  # fmt: skip
    comparison = comparison_of(
        row("svd", 128, 1.0, 0.999961), row("refined", 128, 12.5, 0.999956, trial_id="t", **seeds),
        row("randomized_svd", 128, 1.012),
    )  # fmt: skip
    lines = printed(comparison, verdict_table)
    assert max(len(line) for line in lines) <= 80
    assert next(line for line in lines if "refined" in line).split()[-2:] == ["randomized_svd", "1.012"]
