"""Bytes against error in the report: pictures, tables and words, from records."""

import io
import json
from dataclasses import replace

import pytest

from lowrank_tune.records import Compression, PrunedRow, QuantisedRow, StoredRow
from lowrank_tune.report.charts import _figure, _fixed, _pruned, compression_section
from lowrank_tune.report.report import write_report

KIB = 1024
WHOLE = StoredRow("x", 0, "float16", 4, 128 * KIB, 0.0, 0.0, 1.0)
STORED = (
    WHOLE,
    StoredRow("x", 0, "int8", 4, 65 * KIB, 0.0073, 0.0084, 0.99997),
    StoredRow("x", 0, "int4", 4, 33 * KIB, 0.132, 0.149, 0.9915),
    *(
        StoredRow(method, rank, dtype, 4, int(rank * size * KIB), error / rank, 1.5 * error / rank, 0.98, trial)
        for method, trial, more in (("svd", "", 1.0), ("sketch", "r-sketch", 1.1))
        for rank in (2, 4)
        for dtype, size, error in (("float16", 1.0, 0.5 * more), ("int8", 0.51, 0.51 * more))
    ),
)
PRUNED = (
    PrunedRow("svd", 12, "float16", "0.2", 4, 4, 5.2, 9, 30 * KIB, 0.19, 0.2),
    PrunedRow("svd", 12, "int8", "0.2", 4, 4, 5.3, 9, 15.5 * KIB, 0.19, 0.2),
    PrunedRow("svd", 12, "int8", "int8", 4, 3),
    PrunedRow("svd", 12, "float16", "int8", 4, 4, 11.0, 12, 90 * KIB, 0.007, 0.008),
    PrunedRow("sketch", 4, "float16", "0.2", 4, 2, trial_id="r-sketch"),
    PrunedRow("sketch", 4, "int8", "0.5", 4, 4, 2.0, 3, 5 * KIB, 0.45, 0.5, "r-sketch"),
)
MODELS = (
    QuantisedRow("sketch", 4, "r-sketch", 64 * KIB, 17 * KIB, 0.173, 0.174),
    QuantisedRow("refined", 4, "r-refined", 75 * KIB, 75 * KIB, 0.145, 0.145),
)
FOUND = Compression(STORED, PRUNED, MODELS, ("int8 of X takes <65> KiB: not beaten by any factors.",))


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_the_left_picture_has_the_best_trained_factors_of_each_rank_beside_x_itself():
    figure = _figure((_fixed(STORED), _pruned(FOUND)), WHOLE)
    figure.savefig(io.BytesIO(), format="png")
    left, _ = figure.axes
    drawn = lines(left)
    assert list(drawn) == [
        "svd, float16", "float16", "svd, int8", "int8", "X itself", "X in float16"
    ]  # fmt: skip
    assert list(drawn["int8"].get_xdata()) == pytest.approx([1.02, 2.04], rel=1e-2)
    assert list(drawn["int8"].get_ydata()) == pytest.approx([28.05, 14.025])
    assert list(drawn["X itself"].get_xdata()) == [33, 65]
    assert list(drawn["X itself"].get_ydata()) == pytest.approx([13.2, 0.73])
    assert list(drawn["X in float16"].get_xdata()) == [128, 128]
    assert [text.get_text() for text in left.texts] == ["rank 2", "rank 4", "int4", "int8"]
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (left.get_xlabel(), left.get_ylabel()) == ("KiB an image", "relative error, %")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["float16", "int8", "X itself", "X in float16"]


def test_the_right_picture_has_what_meets_a_target_and_nothing_that_does_not():
    right = _figure((_fixed(STORED), _pruned(FOUND)), WHOLE).axes[1]
    drawn = lines(right)
    assert list(drawn) == ["float16", "int8", "sketch, int8", "X itself", "X in float16"]
    assert list(drawn["float16"].get_xdata()) == [30, 90]
    assert list(drawn["int8"].get_xdata()) == [15.5]
    assert list(drawn["sketch, int8"].get_xdata()) == [5]


def test_without_a_trained_model_the_svds_factors_stand_alone():
    stored = [row for row in STORED if not row.trial_id]
    assert [line.name for line in _fixed(stored)] == ["float16", "int8", "X itself"]


def test_exact_features_have_a_place_on_the_axis(tmp_path):
    stored = tuple(replace(row, relative_error_mean=0.0) for row in STORED)
    section = compression_section(replace(FOUND, stored=stored), tmp_path)
    assert section.pictures[0].path.stat().st_size > 10_000


def test_the_tables_say_what_an_error_takes(tmp_path):
    section = compression_section(FOUND, tmp_path)
    targets, stored, models = section.tables
    assert targets.head[1:] == ("X itself, KiB", "the SVD's factors, KiB", "sketch factors, KiB")
    assert targets.rows == (
        ("20 %", "33.0, int4", "15.5, int8, 5 components", "—"),
        ("as int8 of X: 0.73 %", "65.0, int8", "90.0, float16, 11 components", "—"),
        ("50 %", "33.0, int4", "—", "5.0, int8, 2 components"),
    )
    assert stored.rows[1] == ("X itself", "int8", "65.0", "50.8%", "0.73 %", "0.84 %", "0.999970")
    assert [row[:2] for row in stored.rows[3:]] == [
        ("sketch, rank 2", "float16"),
        ("sketch, rank 2", "int8"),
        ("sketch, rank 4", "float16"),
        ("sketch, rank 4", "int8"),
    ]
    assert models.rows == (
        ("sketch, rank 4", "64.0", "17.0", "17.3 %", "17.4 %"),
        ("refined, rank 4", "75.0", "no learned matrix", "14.5 %", "14.5 %"),
    )


def test_the_interactive_charts_hold_the_same_points_and_a_legend_that_says_each_thing_once(tmp_path):
    left, right = compression_section(FOUND, tmp_path).pictures[0].charts
    traces = json.loads(left.figure)["data"]
    assert [trace["name"] for trace in traces if trace.get("showlegend", True)] == [
        "the SVD's", "float16", "int8", "X itself", "X in float16"
    ]  # fmt: skip
    assert next(trace for trace in traces if trace["name"] == "X itself")["x"] == [33, 65]
    axis = json.loads(right.figure)["layout"]["xaxis"]
    assert axis["type"] == "log" and "50" in axis["ticktext"]


def test_the_report_has_the_section_where_there_is_something_to_show(study):
    study.comparison = replace(study.comparison, compression=FOUND)
    files = write_report(study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory)
    html = files.html.read_text(encoding="utf-8")
    assert "compression.png" in [path.name for path in files.plots]
    assert '<section id="compression"' in html and 'href="#compression"' in html
    assert "int8 of X takes &lt;65&gt; KiB: not beaten by any factors." in html


def test_a_study_compared_before_there_was_any_has_no_section(study):
    files = write_report(study.plan, study.features, study.split, study.outcomes, study.comparison, study.directory)
    assert 'id="compression"' not in files.html.read_text(encoding="utf-8")
