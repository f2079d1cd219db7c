"""The section on what the language model still sees: rows in; lines, marks, texts and examples out."""

import base64
import io
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from lowrank_tune.measured import Fidelity, FidelityExample, FidelityRow
from lowrank_tune.report.agreement import agreement_figure, agreement_pictures, lines_of
from lowrank_tune.report.fidelity import fidelity_section, fidelity_table

KIB = 1024


def seen(method, rank, form, kib, flips, *, half=0.04, right=0.95, **more):
    """Figures with intervals of `half` to both sides; none of them without one."""
    ends = {}
    if half is not None:
        ends |= {"answer_flips_low": flips - half, "answer_flips_high": flips + half}
        ends |= {"kl_mean_low": flips / 2, "kl_mean_high": 2 * flips}
    if right is not None:
        ends |= {"accuracy": right - flips, "accuracy_minus_x": -flips, "n_hard": 3, "accuracy_hard": 0.25}
    figures = {"kl_mean": flips, "first_token_flips": flips / 2, "answer_flips": flips, "loglik_delta_mean": -flips}
    given = {"n_questions": 64, "n_images": 60, "bytes_per_image": kib * KIB}
    return FidelityRow(method=method, rank=rank, form=form, **(given | figures | ends | more))


ROWS = (
    seen("x", 0, "float16", 1024, 0.0, half=0.0),
    seen("x", 0, "int8", 514, 0.02),
    seen("x", 0, "coded 0.05", 104, 0.03),
    *(
        seen(method, rank, "factors", 4.5 * rank, flips)
        for method, all_flips in (("sketch", (0.5, 0.03)), ("svd", (0.4, 0.02)), ("random_sketch", (0.9, 0.25)))
        for rank, flips in zip((16, 64), all_flips, strict=True)
    ),
    seen("svd", 64, "float16", 288, 0.02),
    seen("svd", 64, "int8", 145, 0.03),
    seen("jpeg-q75", 0, "jpeg", 24, 0.12),
    seen("jpeg-q50", 0, "jpeg", 14, 0.2),
    seen("half-side", 0, "jpeg", 18, 0.03),
)
BRAND = FidelityExample(
    "key",
    "fidelity/0.jpg",
    "What <b>brand</b> is it?",
    "dakota <i>",
    {
        "svd": {16: "★ none ★", 64: "dakota <i>"},
        "trained": {16: "", 64: "dakota <i>", 96: "dakota <i>"},
    },
    {"svd": 64, "trained": None},
)
WORDS = ("From rank 64 (288 KiB) on, 95 % of the answers stay; svd needs <64>.",)
FOUND = Fidelity(ROWS, (BRAND,), "a tiny model, random weights", WORDS, ("60 groups of images.",))
NAMES = ["svd", "sketch", "random_sketch", "svd, int8", "X, plain", "X, coded", "JPEG", "half side"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return agreement_pictures(ROWS, tmp_path_factory.mktemp("fidelity") / "plots")


def traces(picture):
    return {trace.name: trace for trace in picture.charts[0].figure.data}


def test_every_way_is_a_line_by_rising_bytes_and_no_two_look_alike(pictures):
    drawn = traces(pictures[0])
    assert list(drawn) == NAMES
    assert drawn["JPEG"].x == (14, 24) and drawn["JPEG"].y == pytest.approx((80, 88))
    assert drawn["X, plain"].x == (514, 1024) and drawn["X, plain"].y[1] == 100
    looks = {(trace.line.color, trace.line.dash, trace.marker.symbol) for trace in drawn.values()}
    assert len(looks) == len(NAMES)
    hollow = {name for name, trace in drawn.items() if trace.marker.symbol.endswith("-open")}
    assert hollow == set(NAMES[3:])


def test_against_rank_stand_factors_alone_with_the_halved_picture_as_a_level(pictures):
    drawn = traces(pictures[1])
    assert list(drawn) == ["svd", "sketch", "random_sketch", "half side"]
    assert set(drawn["half side"].y) == {97} and drawn["half side"].mode == "lines"
    assert drawn["sketch"].text[0].startswith("<b>sketch</b>, rank 16<br>72 KiB an image<br>50.0 % (46.0 to 54.0) of")


@pytest.mark.parametrize("place", [0, 1])
def test_what_shares_a_place_stands_side_by_side_about_it(pictures, place):
    drawn = traces(pictures[place])
    first = [drawn[name].x[0] for name in NAMES[:3]]
    assert first == sorted(set(first))
    middle = (72, 16)[place]
    assert first[1] == pytest.approx(middle) and first[0] == pytest.approx(middle, rel=0.05)


def test_intervals_end_where_there_are_no_more_answers(pictures):
    whiskers = traces(pictures[0])["svd"].error_y
    assert whiskers.array == pytest.approx((4, 2)) and whiskers.arrayminus == pytest.approx((4, 4))
    bare = [replace(row, answer_flips_low=None, answer_flips_high=None) for row in ROWS]
    for rows, drawn in ((ROWS, len(NAMES)), (bare, 0)):
        assert len(agreement_figure(lines_of(rows), "bytes").axes[0].collections) == drawn


def test_the_pictures_for_paper_show_the_same(pictures):
    assert [picture.path.name for picture in pictures] == ["fidelity_bytes.png", "fidelity_rank.png"]
    for picture, against in zip(pictures, ("bytes", "rank"), strict=True):
        with Image.open(picture.path) as image:
            assert image.width >= 1000
        figure = agreement_figure(lines_of(ROWS), against)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(traces(picture))
        axes = figure.axes[0]
        assert axes.get_xscale() == "log"
        assert "100 %" in [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()]
        for name, trace in list(traces(picture).items())[:3]:
            (line,) = [each[0] for each in axes.containers if each.get_label() == name]
            assert (list(line.get_xdata()), list(line.get_ydata())) == (list(trace.x), list(trace.y))


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        (ROWS[:1], ["fidelity_bytes.png"]),
        ([seen("svd", 64, "float16", 288, 0.02)], ["fidelity_bytes.png"]),
        ([row for row in ROWS if row.rank in (0, 64)], ["fidelity_bytes.png", "fidelity_rank.png"]),
        ([seen("svd", 64, "int8", 145, 1.0, half=None)], ["fidelity_bytes.png"]),
        ([seen("svd", 64, "factors", 0, 0.1)], []),
    ],
)
def test_few_rows_have_ticks_about_them_and_no_empty_chart(rows, drawn, tmp_path):
    assert [picture.path.name for picture in agreement_pictures(rows, tmp_path / "plots")] == drawn
    for name in drawn:
        axes = agreement_figure(lines_of(rows), "rank" if "rank" in name else "bytes").axes[0]
        for ticks, (low, high) in ((axes.get_xticks(), axes.get_xlim()), (axes.get_yticks(), axes.get_ylim())):
            assert any(low <= tick <= high for tick in ticks)


def test_the_table_has_what_is_without_rank_first_and_then_the_ranks():
    table = fidelity_table(ROWS)
    assert [(group[0][0], [row[1:3] for row in group]) for group in table.groups] == [
        (
            "none",
            [("X itself", "float16"), ("X itself", "int8"), ("X itself", "coded 0.05"), ("jpeg-q75", "jpeg"),
             ("jpeg-q50", "jpeg"), ("half-side", "jpeg")],
        ),
        ("16", [("svd", "factors"), ("sketch", "factors"), ("random_sketch", "factors")]),
        (
            "64",
            [("svd", "factors"), ("svd", "float16"), ("svd", "int8"), ("sketch", "factors"),
             ("random_sketch", "factors")],
        ),
    ]  # fmt: skip
    whole, int8 = table.rows[:2]
    assert whole[3:] == ("1,024.0", "0 (0 to 0)", "0.0", "0.0 (0.0 to 0.0)", "0", "95.0", "0.0", "25.0")
    assert int8[3:] == ("514.0", "0.02 (0.01 to 0.04)", "1.0", "2.0 (0.0 to 6.0)", "-0.02", "93.0", "-2.0", "25.0")
    assert "hard ones: 3 questions that X answers and the half-side image does not" in table.caption


def test_where_no_answers_are_known_their_columns_are_left_out():
    bare = fidelity_table([seen("svd", rank, "factors", 9, 0.1, half=None, right=None) for rank in range(1, 201)])
    assert len(bare.rows) == 200 and bare.head[-1] == "log-likelihood\nchanged by"
    assert bare.rows[0] == ("1", "svd", "factors", "9.0", "0.1", "5.0", "10.0", "-0.1")
    assert "accuracy" not in bare.caption
    console = Console(file=io.StringIO(), width=80)
    console.print(fidelity_table(ROWS))
    assert "…" not in console.file.getvalue()


def test_an_example_tells_where_the_answer_stays_and_marks_where_it_differs(tmp_path):
    (tmp_path / "fidelity").mkdir()
    Image.new("RGB", (640, 320), "red").save(tmp_path / "fidelity" / "0.jpg")
    (shown,) = fidelity_section(FOUND, tmp_path).examples
    assert shown.head == ("svd", "the best trained")
    assert shown.stays == "X's answer stays: with svd from rank 64 on, with the best trained not even at the highest."
    cells = [(rank, [(answer.text, answer.differs) for answer in answers]) for rank, answers in shown.rows]
    assert cells == [
        ("16", [("★ none ★", True), ("(nothing)", True)]),
        ("64", [("the same", False), ("the same", False)]),
        ("96", [("—", False), ("the same", False)]),
    ]
    jpeg = base64.b64decode(shown.picture.removeprefix("data:image/jpeg;base64,"), validate=True)
    assert Image.open(io.BytesIO(jpeg)).size == (320, 160)


@pytest.mark.parametrize("data", [None, b"<svg onload=alert(1)>"])
def test_a_picture_that_cannot_be_read_is_told_and_left_out(tmp_path, data, caplog):
    if data is not None:
        (tmp_path / "fidelity").mkdir()
        (tmp_path / "fidelity" / "0.jpg").write_bytes(data)
    (shown,) = fidelity_section(FOUND, tmp_path).examples
    assert shown.picture == "" and "the report's example goes without its picture" in caplog.text


def test_long_and_odd_texts_are_cut_and_can_be_written(tmp_path):
    odd = replace(BRAND, question="why? " * 500, answer="\ud800 مرحبا 🎉", answers={}, stays_from={})
    (shown,) = fidelity_section(replace(FOUND, examples=(odd,)), tmp_path).examples
    assert len(shown.question) <= 401 and shown.question.endswith("why?…")
    assert shown.answer == "? مرحبا 🎉"
    assert shown.rows == () and shown.head == ()
