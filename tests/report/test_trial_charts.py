"""What the charts of trials show, read from their figures: every point tells whose it is."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from lowrank_tune.records import TrialOutcome
from lowrank_tune.report.style import ABOVE_ONE
from lowrank_tune.report.trial_charts import coordinates_chart, learning_charts, timeline_chart
from tests.comparison.small_study import make_outcome
from tests.report.conftest import FAILED, history
from tests.report.test_charts import traces

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def test_learning_charts_tell_where_and_why_each_trial_stopped_and_what_its_repetitions_gave():
    trials = [
        (make_outcome("sketch", 2, 0, epochs=5), history(5)),
        (make_outcome("sketch", 8, 1, stopped_by="asha", epochs=2), history(2)),
        (make_outcome("sketch", 8, 4, epochs=1), history(1)),
        (make_outcome("direct", 8, 2, stopped_by="error", epochs=3, reason="loss is <nan>"), history(3)),
        (make_outcome("refined", 8, 3), []),
    ]
    config = replace(trials[0][0].config, confirms=trials[0][0].config.trial_id)
    direct, sketch = learning_charts(trials, [(replace(trials[0][0], config=config), history(3, start=4.0))])
    assert [chart.title for chart in (direct, sketch)] == ["direct", "sketch"]
    assert "r008-sketch-0001 stopped by ASHA at epoch 2" in sketch.alt
    whole, end, again, pruned, ends = sketch.figure.data[:5]
    assert [trace.line.dash for trace in (whole, again, pruned)] == [None, "dot", None]
    assert again.y[:-1] == pytest.approx(ABOVE_ONE.place([5.0, 3.0, 1 + 4 / 3]), abs=1e-4)
    assert (again.customdata, end.customdata) == ((0, 0, 0, None), (0, None)), "a repetition is its trial's"
    assert (pruned.x, pruned.customdata) == ((1, 2, None, 1, None), (1, 1, None, 4, None))
    assert (ends.x, ends.marker.symbol) == ((2, None, 1, None), ("triangle-down", "circle", "circle", "circle"))
    assert pruned.text[1] == "ρ 2.000"
    assert {"ran its full budget", "stopped by ASHA"} <= traces(sketch).keys() and "failed" in traces(direct)


def test_a_study_in_bytes_is_drawn_in_them():
    trials = []
    for number, sizes in enumerate(([3e5, 2e5], [2e5, 1e5])):
        outcome = make_outcome("shared", 8, number, epochs=2)
        config = replace(outcome.config, target_error=0.05)
        rows = [row | {"val_bytes_at_error": size} for row, size in zip(history(2), sizes, strict=True)]
        trials.append((replace(outcome, config=config), rows))
    (chart,) = learning_charts(trials)
    assert chart.figure.data[0].y[:2] == pytest.approx([3e5 / 1024, 2e5 / 1024], rel=1e-4)
    assert chart.figure.data[0].text[1] == "195.3 KiB"
    assert chart.figure.layout.yaxis.title.text == "validation KiB an image (at the target error)"
    assert chart.alt.startswith("Validation KiB an image of 2 trials of shared")


def test_trials_without_a_ratio_are_drawn_by_their_squared_error():
    rows = [{key: value for key, value in row.items() if key != "val_residual_ratio"} for row in history(2)]
    (chart,) = learning_charts([(make_outcome("shared", 8, 0), rows), (make_outcome("shared", 4, 1), history(2))])
    lines = [trace for trace in chart.figure.data if trace.mode == "lines"]
    assert [trace.y for trace in lines] == [(1.0, 0.5, None)] * 2
    assert chart.figure.layout.yaxis.title.text == "validation MSE"


def test_the_timeline_tells_when_a_trial_ran_how_far_it_came_and_where_asha_stopped_it():
    outcomes = [
        make_outcome("sketch", 2, 0, epochs=9),
        make_outcome("sketch", 2, 1, stopped_by="asha", epochs=3),
        make_outcome("sketch", 2, 2),
    ]
    moments = {
        0: (BEGAN, BEGAN + timedelta(minutes=8)),
        1: (BEGAN + timedelta(minutes=2), BEGAN + timedelta(minutes=4)),
    }
    chart = timeline_chart(outcomes, moments, [1, 3])
    lines, ends = chart.figure.data[:2]
    assert (lines.x, lines.y) == ((0, 8, None, 2, 4, None), (0, 9, None, 0, 3, None))
    assert (ends.customdata, ends.marker.symbol[2]) == ((0, None, 1, None), "triangle-down")
    assert [annotation.text for annotation in chart.figure.layout.annotations] == ["rung 1", "rung 3"]
    assert "When each of 2 trials ran" in chart.alt and "over 8 minutes; ASHA stopped 1" in chart.alt
    assert lines.text[4] == "2 to 4 minutes, 3 epochs"
    assert timeline_chart(outcomes, {}, []) is None


def searched(number: int, family: str, ratio: float, **params: float | str) -> TrialOutcome:
    outcome = make_outcome(family, 2, number, best={"val_residual_ratio": ratio})
    return replace(outcome, config=replace(outcome.config, family_params=params, lr=10.0 ** -(1 + number)))


def test_parallel_coordinates_hold_trials_of_every_family_with_a_gap_where_one_lacks_a_setting():
    outcomes = [
        searched(0, "sketch", 1.5),
        searched(1, "shared", 1.1, token_transform="dct"),
        searched(2, "shared", 1.2, token_transform="learned"),
        replace(make_outcome("direct", 2, 3), **FAILED),
    ]
    chart = coordinates_chart(outcomes, "val_residual_ratio", "coordinates")
    assert chart.figure.layout.xaxis.ticktext == ("residual_ratio", "family", "lr", "token_transform")
    points = {trace.customdata[0]: trace for trace in chart.figure.data}
    assert points.keys() == {0, 1, 2}
    assert points[0].x == (0, 1, 2, None), "sketch has no token transform"
    assert points[1].y == pytest.approx((0, 0, 0.5, 0, None)), "words in their order, lr by its logarithm"
    assert points[2].text[3] == "token_transform learned"
    assert "3 trials that ran to their own end" in chart.alt
    assert coordinates_chart(outcomes[:1], "val_residual_ratio", "coordinates") is None
