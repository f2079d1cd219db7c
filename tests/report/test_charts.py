"""What the interactive charts show, read from their figures."""

from dataclasses import replace

import pytest
import torch

from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.measured import Compression, Front, FrontPoint
from lowrank_tune.report.charts import (
    compression_picture,
    spectrum_of,
    spectrum_picture,
    tradeoff_picture,
)
from tests.comparison.small_study import images
from tests.report.test_tables import FOUND, STORED


def traces(chart):
    return {trace.name: trace for trace in chart.figure.data}


def test_trade_offs_fill_the_front():
    points = (FrontPoint("sketch", 3, 3, 0.25, "t", on_front=True), FrontPoint("direct", 3, 3, 0.5, "u"))
    (chart,) = tradeoff_picture([Front("search", "rank", "val_mse", "lower", points)], {"t": 7}).charts
    drawn = traces(chart)
    assert drawn["front"].x == (3,)
    assert drawn["sketch"].marker.symbol == ("diamond",)
    assert drawn["direct"].marker.symbol == ("square-open",)
    assert (drawn["sketch"].customdata, drawn["direct"].customdata) == ((7,), (None,)), "whose a point is"
    assert "On the front: t at rank 3" in chart.alt


def test_the_storage_of_one_basis_for_all_images_is_said_to_be_another():
    def storage(*points):
        return tradeoff_picture([Front("storage", "bytes_per_image", "token_cosine_mean", "higher", points)], {})

    own = [FrontPoint(method, 4, 640, 0.9) for method in ("svd", "sketch")]
    assert storage(*own).caption.endswith("a rank has the same bytes whatever the method.")
    assert storage(*own, FrontPoint("shared", 4, 256, 0.8)).caption.endswith(
        "whatever the method, but where all images share one B: of that an image takes A alone."
    )
    many = storage(*(FrontPoint("shared", rank, 64 * rank, 0.8) for rank in range(1, 40)))
    assert 2 < len(many.charts[0].figure.layout.xaxis.tickvals) < 11


def test_the_front_of_a_search_of_bytes_and_error_has_them_as_its_axes():
    points = (FrontPoint("shared", 8, 20480, 0.05, "t", on_front=True), FrontPoint("sketch", 8, 40960, 0.25, "u"))
    (chart,) = tradeoff_picture([Front("search", "val_bytes", "val_error", "lower", points)], {}).charts
    assert traces(chart)["shared"].x == (20480,)
    axis = chart.figure.layout.xaxis
    assert dict(zip(axis.tickvals, axis.ticktext, strict=True))[20480] == "20"
    assert (axis.title.text, chart.figure.layout.yaxis.title.text) == (
        "validation KiB an image (in the model's own form)", "validation relative error"
    )  # fmt: skip


def test_the_spectrum_is_the_singular_values_over_the_first():
    x_NTD = images()[:3]
    spectrum = spectrum_of(measure_optimum([x_NTD, torch.zeros(1, 16, 24)]))
    expected = torch.linalg.svdvals(x_NTD.double())
    assert spectrum.values_NK == pytest.approx((expected / expected[:, :1]).numpy(), abs=1e-6)
    energy = expected.square()
    left = 1 - energy.cumsum(1) / energy.sum(1, keepdim=True)
    assert spectrum.left_K == pytest.approx(left.mean(0).numpy(), abs=1e-9)
    assert spectrum.rank_for(spectrum.cosine_K[4]) == 5
    values, left_chart = spectrum_picture(spectrum, [3]).charts
    assert traces(values)["mean"].y == pytest.approx(spectrum.values_NK.mean(0))
    assert f"{spectrum.left_K[2]:.3g} at rank 3" in left_chart.alt
    assert spectrum_of(measure_optimum([torch.zeros(1, 16, 24)])) is None


def test_bytes_against_error_has_the_chosen_factors_of_each_rank_beside_x_itself():
    left, right = compression_picture(FOUND).charts
    drawn = {(trace.name, trace.line.dash): trace for trace in left.figure.data}
    assert [name for (name, _), trace in drawn.items() if trace.showlegend is not False] == [
        "float16", "int8", "X itself", "X in float16"
    ]  # fmt: skip
    int8, control = drawn["int8", "solid"], drawn["X itself", None]
    assert "sketch" in int8.text[0] and "svd" in drawn["int8", "dot"].text[0]
    assert int8.x == pytest.approx((1.02, 2.04), rel=1e-2)
    assert int8.y == pytest.approx((28.05, 14.025))
    assert (control.x, control.y) == ((33, 65), pytest.approx((13.2, 0.73)))
    assert "int4" in control.text[0]
    assert drawn["X in float16", "dash"].x == (128, 128)
    met = {(trace.name, trace.mode): trace.x for trace in right.figure.data}
    assert met["float16", "lines+markers"] == (30, 90)
    assert met["int8", "lines+markers"] == (15.5,)
    assert met["int8", "markers"] == (5,), "the trained ones"
    axis = right.figure.layout.xaxis
    assert axis.type == "log" and "50" in axis.ticktext


def test_bytes_against_error_without_a_trained_model_or_without_an_error():
    alone = compression_picture(Compression(tuple(row for row in STORED if not row.trial_id)))
    assert list(traces(alone.charts[0])) == ["float16", "int8", "X itself", "X in float16"]
    exact = compression_picture(Compression(tuple(replace(row, relative_error_mean=0.0) for row in STORED)))
    assert traces(exact.charts[0])["int8"].y == (1e-3, 1e-3)
