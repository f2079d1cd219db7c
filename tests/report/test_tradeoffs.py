"""The trade-offs' picture, read from the Figure object."""

import io

import pytest

from lowrank_tune.records import Front, FrontPoint
from lowrank_tune.report.charts import pareto_figure

SEARCH = Front(
    "search", "rank", "val_mse", "lower",
    (
        FrontPoint("sketch", 4, 4, 0.5, "r004-sketch-0000", on_front=True),
        FrontPoint("direct", 4, 4, 50.0, "r004-direct-0001"),
        FrontPoint("sketch", 8, 8, 0.2, "r008-sketch-0002", on_front=True),
    ),
)  # fmt: skip
STORAGE = Front(
    "storage", "bytes_per_image", "token_cosine_mean", "higher",
    (FrontPoint("svd", 4, 4096, 0.99, on_front=True), FrontPoint("direct", 4, 4096, 0.5)),
)  # fmt: skip


def test_members_are_filled_and_joined_and_the_others_hollow():
    figure = pareto_figure([SEARCH, STORAGE])
    figure.savefig(io.BytesIO(), format="png")
    search, storage = figure.axes
    joined, *points = search.get_lines()
    assert (list(joined.get_xdata()), list(joined.get_ydata())) == ([4, 8], [0.5, 0.2])
    assert [point.get_markerfacecolor() == "none" for point in points] == [False, True, False]
    assert (search.get_xlabel(), search.get_ylabel(), search.get_yscale()) == ("rank", "validation MSE", "log")
    assert storage.get_xlabel() == "KiB an image, A and B"
    assert [text.get_text() for text in storage.get_xticklabels()] == ["4"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["svd", "direct", "sketch", "front"]


@pytest.mark.parametrize("front", [SEARCH, STORAGE])
def test_one_trade_off_is_one_panel(front):
    assert len(pareto_figure([front]).axes) == 1
