"""The chart and the table of all ways to keep features: rows in; names, marks, axes and texts out."""

from dataclasses import replace

import pytest
from PIL import Image

from lowrank_tune.measured import Compression, PrunedRow, RateRow
from lowrank_tune.report.rates import (
    envelope,
    lines_of,
    out_of_reach,
    rates_figure,
    rates_picture,
    rates_table,
    way_notes,
)
from tests.report.test_tables import FOUND, KIB

ONCE = 3 * 1024 * KIB


def rate(method, dtype, kib, error, **more):
    given = {"rank": 0, "target": "", "n_images": 4, "token_cosine_mean": 0.99, "images_per_second": 50.0}
    figures = {"bytes_per_image": kib * KIB, "relative_error_mean": error, "relative_error_max": 1.2 * error}
    return RateRow(method=method, dtype=dtype, **(given | figures | more))


RATES = (
    *(
        rate("x", dtype + coder, kib * part, error)
        for dtype, kib, error in (("int8", 385, 0.0076), ("int5", 241, 0.064), ("int4", 193, 0.14))
        for coder, part in (("", 1.0), ("+zlib", 0.8), ("+zstd", 0.75))
    ),
    *(
        rate(
            method, "coded", kib, float(target), target=target, rank=rank, shared_bytes=once, trial_id="t" * bool(rank)
        )
        for method, rank, once, sizes in (("shared", 1536, ONCE, (200, 71, 13)), ("x", 0, 0, (260, 104, 44)))
        for target, kib in zip(("0.01", "0.05", "0.14"), sizes, strict=True)
    ),
    rate("svd", "int8", 200, 0.05, rank=90),
    rate("svd", "int5", 110, 0.05, rank=95),
    rate("svd", "int4", 26, 0.13, rank=40),
    *(rate(f"jpeg-q{q}", "jpeg", kib, error) for q, kib, error in ((50, 6, 0.3), (95, 66, 0.071))),
    rate("webp-q75", "webp", 8, 0.28),
    rate("half-side", "jpeg", 18, 0.55),
    rate("quarter-side", "jpeg", 5, 0.78),
)
COMPRESSION = Compression(rates=RATES)
NAMES = [
    "shared, coded", "X, coded", "X, zstd", "X, zlib", "X, plain", "SVD, plain", "JPEG", "WebP", "half side",
    "quarter side",
]  # fmt: skip


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return rates_picture(replace(COMPRESSION, stored=FOUND.stored), 300, tmp_path_factory.mktemp("report") / "plots")


@pytest.fixture(scope="module")
def drawn(picture):
    (chart,) = picture.charts
    return {trace.name: trace for trace in chart.figure.data}


def test_every_way_is_a_line_through_its_settings_by_rising_bytes(drawn):
    assert list(drawn) == ["least error", *NAMES]
    assert drawn["X, zlib"].x == pytest.approx((193 * 0.8, 241 * 0.8, 385 * 0.8))
    assert drawn["X, zlib"].y == pytest.approx((14.0, 6.4, 0.76))
    assert drawn["JPEG"].x == (6, 66) and "quality 50" in drawn["JPEG"].text[0]
    assert drawn["half side"].mode == "markers" and drawn["JPEG"].mode == "lines+markers"
    looks = [
        (trace.line.color, trace.line.dash, trace.marker.symbol[0].removesuffix("-open"))
        for trace in drawn.values()
        if trace.marker.symbol
    ]
    assert len(set(looks)) == len(NAMES), "no two look alike"


def test_a_setting_that_another_of_its_own_beats_is_not_on_the_line(drawn):
    assert drawn["SVD, plain"].x == (26, 110)
    assert "int5<br>50.0 images/s back" in drawn["SVD, plain"].text[1]


def test_the_winner_at_each_size_is_filled_and_on_the_band(picture, drawn):
    assert drawn["shared, coded"].marker.symbol == ("circle",) * 3
    assert drawn["X, coded"].marker.symbol == ("circle-open",) * 3
    assert drawn["X, zstd"].marker.symbol == ("triangle-up-open", "triangle-up-open", "triangle-up")
    assert drawn["JPEG"].marker.symbol == ("diamond", "diamond-open")
    band = drawn["least error"]
    assert (band.x[0], band.y[0], band.x[-1]) == (5, 78, 385)
    assert list(band.y) == sorted(band.y, reverse=True)
    told = "quarter side from 5 KiB on; JPEG from 6 KiB on; shared, coded from 13 KiB on; X, zstd from 277 KiB on"
    assert f"Least error: {told}." in picture.alt


def test_between_two_settings_a_line_holds_what_lies_between():
    """Another way's single setting wins nothing where the better way was not measured at just that size."""
    lines = lines_of(Compression(rates=(*RATES[9:12], rate("jpeg-q95", "jpeg", 199, 0.049))))
    assert [name for name, _ in envelope(lines).winners] == ["shared, coded"]


def test_who_meets_a_target_a_little_closer_at_more_bytes_wins_nothing():
    shared, other = (
        rate(method, "coded", kib, error) for method, kib, error in (("shared", 71, 0.01), ("svd", 92, 0.0099))
    )
    assert [name for name, _ in envelope(lines_of(Compression(rates=(shared, other)))).winners] == ["shared, coded"]
    first = replace(other, bytes_per_image=60 * KIB)
    assert [name for name, _ in envelope(lines_of(Compression(rates=(shared, first)))).winners] == ["SVD, coded"]


def test_the_axes_are_logarithmic_and_read_in_kib_and_percent(picture):
    layout = picture.charts[0].figure.layout
    assert (layout.xaxis.type, layout.yaxis.type) == ("log", "log")
    assert {"5", "10", "20", "500"} <= set(layout.xaxis.ticktext) and {"1 %", "50 %"} <= set(layout.yaxis.ticktext)
    assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("KiB an image", "relative error")


def test_the_picture_for_paper_shows_the_same(picture, drawn):
    with Image.open(picture.path) as image:
        assert image.width >= 1000
    axes = rates_figure(lines_of(COMPRESSION)).axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == list(drawn)
    for name, line in lines.items():
        assert (list(line.get_xdata()), list(line.get_ydata())) == (list(drawn[name].x), list(drawn[name].y))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "20 %" in [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()]
    texts = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert sorted(texts) == sorted(drawn)


def test_the_caption_says_how_to_read_it_and_what_no_image_pays(picture):
    assert "plain: 8, 5 or 4 bits a number" in picture.caption
    assert "zlib and zstd: plain ones packed." in picture.caption
    assert "X in float16 takes 128 KiB." in picture.caption
    assert picture.caption.endswith("bytes: at most 3 MiB, 10.2 KiB an image over the 300 of this data set.")


def test_factors_of_one_image_stand_beside_the_rates_unless_those_have_them():
    pruned = (
        PrunedRow("svd", 12, "int8", "0.05", 4, 4, 9.0, 9, 9 * KIB, 0.05, 0.05),
        PrunedRow("refined", 12, "int8", "0.05", 4, 4, 9.4, 9, 9 * KIB, 0.05, 0.05, "t"),
        PrunedRow("refined", 12, "int8", "0.01", 4, 3, trial_id="t"),
    )
    lines = {line.name: line for line in lines_of(Compression(pruned=pruned, rates=RATES))}
    assert list(lines) == ["shared, coded", "refined, plain", *NAMES[1:]]
    assert [(row.rank, row.bytes_per_image) for row in lines["refined, plain"].rows] == [(12, 9 * KIB)]
    assert len(lines["SVD, plain"].rows) == 2
    # As when the coders broke, and the pictures alone were measured.
    alone = lines_of(Compression(stored=FOUND.stored, pruned=pruned, rates=RATES[-1:]))
    assert [line.name for line in alone] == ["refined, plain", "X, plain", "SVD, plain", "quarter side"]
    assert [row.dtype for row in alone[1].rows] == ["int4", "int8"]


def test_the_table_has_each_ways_nearest_setting_fewest_bytes_first():
    table = rates_table(lines_of(COMPRESSION), 300)
    assert table.head == (
        "error", "kept as", "KiB\nan image", "relative\nerror", "setting", "shared,\nKiB", "its share\nan image",
        "images/s\nback",
    )  # fmt: skip
    one, five, fourteen = table.groups
    assert [row[1] for row in one] == ["shared, coded", "X, coded", "X, zstd", "X, zlib", "X, plain"]
    assert one[0] == ("1 %", "shared, coded", "200.0", "1 %", "rank 1536", "3,072.0", "10.2", "50.0")
    assert one[2][2:] == ("288.8", "0.76 %", "int8", "—", "—", "50.0")
    assert [row[1] for row in five][:2] == ["shared, coded", "X, coded"]
    assert five[2][:5] == ("5 %", "SVD, plain", "110.0", "5 %", "int5")
    assert five[3][:5] == ("5 %", "X, zstd", "180.8", "6.4 %", "int5")
    assert [row[1] for row in fourteen][:3] == ["shared, coded", "SVD, plain", "X, coded"]
    # Twice the error is no stand-in, but half of it is: it keeps what was asked.
    assert ("JPEG", "66.0", "7.1 %") in [row[1:4] for row in fourteen]
    sizes = [[float(row[2]) for row in group] for group in table.groups]
    assert sizes == [sorted(group) for group in sizes]


def test_what_no_setting_reaches_is_said_and_not_in_the_table():
    said = out_of_reach(lines_of(COMPRESSION))
    assert said[0].startswith("No setting measured comes near 1 %: SVD, plain (5 % at the least), JPEG (7.1 % at")
    assert "half side (55 % at the least)" in said[2] and "JPEG" not in said[2]


def test_nothing_shared_takes_no_columns_and_an_exact_way_has_a_place():
    exact = (rate("x", "int8", 100, 0.0), rate("x", "int4", 50, 0.1, images_per_second=None))
    lines = lines_of(Compression(rates=exact))
    assert rates_table(lines, 4).head[-2:] == ("setting", "images/s\nback")
    assert [row[-1] for row in rates_table(lines, 4).rows] == ["50.0", "50.0", "—"]
    (line,) = [line for line in rates_figure(lines).axes[0].lines if line.get_label() == "X, plain"]
    assert list(line.get_ydata()) == pytest.approx([10, 1e-3])


@pytest.mark.parametrize(("kib", "error"), [(385, 0.0076), (30, 0.3), (1, 0.01), (0.03, 0.97)])
def test_a_single_point_has_ticks_about_it(kib, error):
    axes = rates_figure(lines_of(Compression(rates=(rate("x", "int8", kib, error),)))).axes[0]
    for ticks, (low, high) in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
        assert any(low <= tick <= high for tick in ticks)


def test_what_the_lines_are_is_said_of_those_that_are_there():
    assert [name for name, _ in way_notes(lines_of(COMPRESSION))] == [
        "shared", "X", "SVD", "JPEG", "WebP", "half side", "quarter side"
    ]  # fmt: skip
