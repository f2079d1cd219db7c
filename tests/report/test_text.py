"""Numbers, sentences, and which rank to take."""

from dataclasses import replace

import pytest

from lowrank_tune.notes import add_note
from lowrank_tune.records import FeatureSet
from lowrank_tune.report.text import (
    at_rank,
    choices,
    cosine_text,
    difference_text,
    duration_text,
    rank_sentence,
    rank_summaries,
    rate_text,
    ratio_text,
    seed_texts,
    study_cost,
)
from tests.comparison.small_study import make_row
from tests.report.conftest import make_comparison


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cosine_text(0.98931), "0.9893"),
        (cosine_text(0.999987), "0.999987"),
        (cosine_text(1.0), "1.0000"),
        (cosine_text(0.99999999), "1.0000"),
        (cosine_text(float("nan")), "—"),
        (ratio_text(1.0304), "1.030"),
        (ratio_text(12.345), "12.3"),
        (ratio_text(12345.6), "12,346"),
        (ratio_text(1.2e7), "1.2e+07"),
        (ratio_text(float("inf")), "—"),
        (rate_text(12345.0), "12,300"),
        (rate_text(32.0), "32.0"),
        (rate_text(0.0512), "0.051"),
        (rate_text(0.0), "—"),
        (duration_text(0.42), "0.4 s"),
        (duration_text(59.6), "1 min 00 s"),
        (duration_text(7505), "2 h 05 min"),
    ],
)
def test_figures_read_well(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((None, None, None), "—"),
        ((-1e-6, None, None), "0.0000"),
        ((-0.25, None, None), "-0.2500"),
        ((0.0012, -0.0001, 0.0025), "+0.0012 ± 0.0013"),
    ],
)
def test_a_difference_has_its_sign_and_its_interval(fields, expected):
    names = ("token_cosine_minus_svd", "token_cosine_minus_svd_low", "token_cosine_minus_svd_high")
    assert difference_text(make_row("sketch", 4, **dict(zip(names, fields, strict=True)))) == expected


def test_one_seed_has_no_spread_and_a_far_ratio_few_digits():
    one = make_row("direct", 4, seeds=1, residual_ratio_seed_mean=34.56, token_cosine_seed_mean=0.8)
    assert seed_texts(one) == ("34.6", "0.8000")
    two = replace(one, seeds=2, residual_ratio_seed_sd=2.345, token_cosine_seed_sd=0.01)
    assert seed_texts(two) == ("34.6 ± 2.3", "0.8000 ± 0.0100")
    assert seed_texts(make_row("svd", 4)) == ("—", "—")


@pytest.fixture
def compared():
    return make_comparison(
        make_row("svd", 4, 1.0), make_row("sketch", 4, 1.02, 0.92, trial_id="a"), make_row("power_1", 4, 1.1, 0.91),
        make_row("svd", 8, 1.0), make_row("sketch", 8, 1.5, 0.96, trial_id="c"), make_row("power_1", 8, 1.1, 0.965),
        remarks=("At rank 8 power_1 wins", "random weights"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "fields", "words"),
    [
        (1.0, {"n_groups": 4}, "at the least possible error; no control beats it"),
        (1.02, {"n_groups": 1}, "2.0 % above the least possible error"),
        (1.5, {"beaten_by": "power_1, random_sketch"}, "50.0 % above the least possible error; beaten by power_1"),
        (1.1, {"level_with": "power_1"}, "10.0 % above the least possible error; level with power_1"),
        (34.0, {"beaten_by": "power_1", "level_with": "svd"}, "34.0 times the least possible error; beaten by power_1"),
    ],
)
def test_a_verdict_is_said_as_people_say_it(ratio, fields, words):
    rows = (
        make_row("sketch", 4, ratio, **fields),
        make_row("direct", 4, 1.0, chosen=0),
        make_row("power_1", 4, 1.1),
        make_row("gram_eigh", 4, 1.0, images_per_second=60.0),  # nearer, but it takes longer
        make_row("power_1", 8, 1.0),
    )
    summary, without = rank_summaries(make_comparison(*rows))
    assert (summary.rank, summary.trained, summary.control, summary.text) == (4, rows[0], rows[2], words)
    assert without.text == "no trained model"


def test_which_rank_to_take_follows_the_validation_images(compared):
    known = {"a": 0.985, "c": 0.991}
    rows = tuple(replace(row, val_token_cosine=known.get(row.trial_id)) for row in compared.rows)
    found = choices(replace(compared, rows=rows), {0.98: 9, 0.99: 12}.get)
    assert [(choice.cosine, choice.row.trial_id if choice.row else None) for choice in found] == [
        (0.98, "a"), (0.99, "c"), (0.995, None)
    ]  # fmt: skip
    assert rank_sentence(found) == (
        "To keep a token cosine of 0.99, take rank 8, the lowest of those compared whose model does on the validation "
        "images (sketch, 0.9600 on the test images; the SVD itself needs rank 12). No rank compared keeps 0.995."
    )


def test_without_a_trained_model_there_is_no_choice():
    comparison = make_comparison(make_row("svd", 4, 1.0, 0.93), make_row("power_1", 4, 1.1))
    assert choices(comparison, lambda cosine: None) == []
    assert rank_sentence([]) == ""


def test_one_rank_of_a_comparison_has_its_rows_and_the_remarks_on_it(compared):
    said = "training adds nothing to sketch at rank 2 (0.00 % off ρ), rank 4 (0.00 % off ρ)"
    four = at_rank(replace(compared, remarks=(*compared.remarks, said)), 4)
    assert {row.rank for row in four.rows} == {4}
    assert four.remarks == ("random weights", said)
    assert at_rank(compared, None) is compared


def test_what_people_wrote_down_stands_in_the_report(tmp_path):
    add_note(tmp_path, "lens cap was on")
    features = FeatureSet(str(tmp_path), "0123", "tiny-random", "random", "float16", 4, 8, (), "")
    (note,) = [text for name, text in study_cost(tmp_path, features, [], []) if name == "Note"]
    assert note.endswith(": lens cap was on")
