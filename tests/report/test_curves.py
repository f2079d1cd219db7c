"""What the curves show, read from the Figure objects, not from pixels."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from lowrank_tune.lowrank.svd import Spectrum
from lowrank_tune.report.curves import draw_losses, loss_pictures, rank_curve
from lowrank_tune.report.style import look_of, thinned
from lowrank_tune.report.text import BOUNDS, CONTROLS, in_order
from tests.comparison.small_study import make_outcome, make_row
from tests.report.conftest import history


def drawn(figure: Figure) -> None:
    """Draw as a file would be: matplotlib computes ticks and layout only then, and warnings are errors."""
    figure.savefig(io.BytesIO(), format="png")


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_the_rank_curve_draws_every_methods_two_figures_and_the_svds_cosine_between_the_ranks():
    rows = [make_row("svd", rank, 1.0, 1 - 0.4 / rank) for rank in (4, 16)]
    rows += [make_row("sketch", rank, 1 + 1 / rank, 1 - 0.5 / rank, trial_id="t") for rank in (16, 4)]
    cosines = np.linspace(0.5, 0.9, 20)
    figure = rank_curve(rows, Spectrum(np.ones((1, 20)), cosines, np.zeros(20), 1))
    drawn(figure)
    cosine, ratio = figure.axes
    assert cosine.get_xlabel() == ratio.get_xlabel() == "rank"
    assert cosine.get_ylabel() == "token cosine (finer towards 1)"
    assert ratio.get_ylabel() == "residual ratio ρ (finer towards 1)"
    assert list(lines(cosine)["sketch"].get_xdata()) == [4, 16]
    assert list(lines(cosine)["sketch"].get_ydata()) == pytest.approx([1 - 0.5 / 4, 1 - 0.5 / 16])
    assert list(lines(ratio)["sketch"].get_ydata()) == pytest.approx([1.25, 1.0625])
    assert list(lines(ratio)["svd"].get_ydata()) == [1, 1]
    between = cosine.get_lines()[-1]
    assert list(between.get_xdata()) == list(range(4, 17))
    assert list(between.get_ydata()) == pytest.approx(cosines[3:16])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["svd", "sketch"]
    assert [text.get_text() for text in cosine.get_xticklabels()] == ["4", "16"]


def test_where_there_is_a_metric_a_third_chart_has_the_ratio_in_it():
    rows = [make_row("svd", rank, residual_ratio_weighted=1.4) for rank in (4, 16)]
    rows += [make_row("svd_weighted", rank, 1.3, residual_ratio_weighted=1.0) for rank in (4, 16)]
    rows += [make_row("shared", rank, 2.0, residual_ratio_weighted=each) for rank, each in ((4, 3.0), (32, None))]
    figure = rank_curve(rows)
    drawn(figure)
    in_metric = figure.axes[2]
    assert in_metric.get_ylabel() == "ρ_W, in the metric of the answers (finer towards 1)"
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in in_metric.get_lines()] == [
        ([4, 16], [1.4, 1.4]), ([4, 16], [1.0, 1.0]), ([4], [3.0]),
    ]  # fmt: skip
    assert len(figure.axes) == 3 and len(rank_curve([make_row("svd", 4)]).axes) == 2


def test_the_axes_are_finer_towards_one_and_hold_an_exact_method_beside_a_bad_one():
    rows = [make_row("svd", 4, 1.0, 1.0), make_row("randomized_svd", 4, 1.01), make_row("sketch", 4, 1.02, 0.99)]
    figure = rank_curve([*rows, make_row("direct", 4, 100.0, -0.2)])
    drawn(figure)

    def heights(axes, *values):
        return axes.transAxes.inverted().transform(axes.transData.transform([(4, value) for value in values]))[:, 1]

    cosine, ratio = figure.axes
    ratios = heights(ratio, 1, 1.01, 1.02, 100)
    assert np.diff(ratios).min() > 0.03 and 0 <= ratios[0] < ratios[-1] <= 1
    cosines = heights(cosine, -0.2, 0.9, 0.99, 0.999, 1 - 1e-7)
    assert 0 <= cosines[0] < cosines[-1] <= 1
    assert cosines[2] - cosines[1] == pytest.approx(cosines[3] - cosines[2], rel=1e-3)


@pytest.mark.parametrize("spread", [(1.0, 1.0), (1.0, 1.004), (1.0, 3.0), (1.0, 1e9)])
def test_any_span_of_ratios_has_at_least_two_ticks_inside(spread):
    figure = rank_curve([make_row("svd", 4, spread[0]), make_row("sketch", 4, spread[1])])
    drawn(figure)
    axes = figure.axes[1]
    low, high = axes.get_ylim()
    inside = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(inside) <= 16


def test_many_ranks_get_ticks_that_do_not_touch():
    ranks = list(range(1, 257))
    shown = thinned(ranks)
    assert len(shown) <= 10
    assert min(np.diff(np.log(shown))) >= np.log(256) / 9 - 1e-9
    assert thinned([16, 32, 64, 128]) == [16, 32, 64, 128]


def test_every_method_of_a_plot_looks_different():
    trained = ["direct", "sketch", "refined", "new_one", "new_two"]
    methods = in_order([*BOUNDS, *CONTROLS, *trained])
    looks = [look_of(method, methods) for method in methods]
    assert len({(look.color, look.marker) for look in looks}) == len(methods)
    assert len({look.marker for look in looks}) == len(methods)


def test_loss_curves_show_four_series_their_drop_their_best_epoch_and_why_a_trial_failed():
    figure = Figure()
    failed = make_outcome(
        status="failed", stopped_by="error", epochs=1, best_epoch=0, best={}, reason="cost $5^{ and _"
    )
    draw_losses(figure, failed, [{"epoch": 1.0, "lr": 0.01}])
    drawn(figure)
    assert figure.get_suptitle() == "r003-sketch-0000: failed (1 epoch)\ncost $5^{ and _"
    assert not any("best epoch" in lines(axes) for axes in figure.axes)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite values"]
    # The figure is used again: nothing of the trials before may stay.
    draw_losses(figure, failed, history(2, start=1e6))
    draw_losses(figure, make_outcome(stopped_by="patience"), history(5))
    drawn(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "training loss", "validation MSE", "validation residual ratio ρ", "learning rate"
    ]  # fmt: skip
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "epoch", "epoch"]
    mse = figure.axes[1]
    assert list(mse.get_lines()[0].get_ydata()) == pytest.approx([1.0, 0.5, 1 / 3, 0.25, 0.2])
    star = lines(mse)["best epoch"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (4, pytest.approx(0.25))
    assert [line.get_xdata()[0] for line in mse.get_lines() if line.get_linestyle() == ":"] == [2.5]
    assert figure.get_suptitle() == "r003-sketch-0000: stopped by patience (4 epochs), best at epoch 4 (★)"


def test_the_curves_of_a_training_that_goes_by_bytes_show_them():
    outcome = make_outcome(stopped_by="patience")
    figure, config = Figure(), replace(outcome.config, target_error=0.05)
    draw_losses(figure, replace(outcome, config=config), [row | {"val_bytes_at_error": 4e4} for row in history(3)])
    assert figure.axes[2].get_ylabel() == "validation bytes at the target error"
    assert list(figure.axes[2].get_lines()[0].get_ydata()) == [4e4] * 3


def test_the_rank_curve_has_whiskers_over_seeds_where_there_are_seeds():
    seeds = {
        "seeds": 3, "residual_ratio_seed_mean": 1.3, "residual_ratio_seed_sd": 0.5,
        "token_cosine_seed_mean": 0.9, "token_cosine_seed_sd": 0.2,
    }  # fmt: skip
    one = {"seeds": 1, "residual_ratio_seed_mean": 1.2, "token_cosine_seed_mean": 0.95}
    rows = [make_row("sketch", 4, 1.2, trial_id="t", **seeds), make_row("sketch", 8, 1.2, trial_id="u", **one)]
    figure = rank_curve([make_row("svd", 4, 1.0), make_row("svd", 8, 1.0), *rows])
    drawn(figure)
    whiskers = [
        [list(line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "_"] for axes in figure.axes
    ]
    assert whiskers == [
        [pytest.approx([0.7, 0.9, 1.0]), pytest.approx([0.95] * 3)],
        [pytest.approx([1.0, 1.3, 1.8]), pytest.approx([1.2] * 3)],
    ]
    assert "mean ± sd over fresh seeds" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_trials_curves_are_drawn_again_only_when_its_history_is_newer(study):
    trials = [(study.outcomes[0], history(4)), (study.outcomes[2], [])]
    (picture,) = loss_pictures(trials)
    picture.path.write_bytes(b"kept")
    loss_pictures(trials)
    assert picture.path.read_bytes() == b"kept"
    os.utime(picture.path, (1, 1))
    loss_pictures(trials)
    assert picture.path.read_bytes() != b"kept"
