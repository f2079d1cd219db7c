"""The page of several studies: the best by rank, curves over each other, and where the study files differ."""

from dataclasses import replace

import pytest

from lowrank_tune.report.studies import Shown, differences_table, write_studies_page
from lowrank_tune.report.style import ABOVE_ONE
from tests.comparison.small_study import make_outcome, make_row
from tests.report.conftest import history, make_comparison
from tests.report.test_report import Page


@pytest.fixture
def studies():
    settings = {"name": "one", "search": {"method": "tpe", "trials": 20}, "target_error": None}
    found = {}
    for number, name in enumerate(("one-0000", "two-0001")):
        outcome = make_outcome("sketch", 3, number)
        row = make_row("sketch", 3, 1.2 + number / 10, trial_id=outcome.config.trial_id)
        comparison = make_comparison(make_row("svd", 3, 1.0), row)
        found[name] = Shown(comparison, settings, [(outcome, history(2 + number))])
    changed = settings | {"search": {"method": "random", "trials": 20}, "target_error": 0.05}
    return found | {"two-0001": replace(found["two-0001"], settings=changed)}


def test_the_page_is_whole_and_tells_the_best_by_rank_with_its_interval(studies, tmp_path):
    write_studies_page(studies, ["the studies' test images <differ>"], tmp_path / "compare.html")
    page = Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert "the studies' test images <differ>" in page.text
    assert "3 | one-0000 | sketch | 1.200 | 1.188–1.212 |" in page.text
    assert "| two-0001 | sketch | 1.300 | 1.287–1.313 |" in page.text or "two-0001 | sketch | 1.300" in page.text
    assert (
        "[Line chart of val_residual_ratio against epochs at rank 3, a line a study: one-0000, two-0001.]" in page.text
    )
    assert all(link.startswith(("#", "data:,")) for link in page.links)


def test_intervals_are_drawn_about_the_best_and_curves_over_each_other(studies):
    from lowrank_tune.report.studies import _best_chart, _learning_charts

    one, two = _best_chart(studies).figure.data
    low, at, high = ABOVE_ONE.place([1.188, 1.2, 1.212])
    assert (one.y[0], one.error_y.array[0], one.error_y.arrayminus[0]) == pytest.approx((at, high - at, at - low))
    assert one.x[0] < 3 < two.x[0], "beside each other"
    (chart,) = _learning_charts(studies)
    assert [(line.name, line.x) for line in chart.figure.data] == [("one-0000", (1, 2)), ("two-0001", (1, 2, 3))]


def test_only_keys_that_differ_are_told(studies):
    assert differences_table(studies).rows == (("search.method", "tpe", "random"), ("target_error", "—", "0.05"))
    assert differences_table({"one-0000": studies["one-0000"]}).caption == "No key differs."
