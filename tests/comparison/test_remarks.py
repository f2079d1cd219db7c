"""What the remarks say, and when they are silent."""

import math
from dataclasses import replace

import pytest

from lowrank_tune.comparison.choice import choose, judge, winners
from lowrank_tune.comparison.remarks import about_data, about_rivals, about_training, about_trials
from tests.comparison.small_study import make_row


def row(method, ratio, speed, rank=4, trial_id="", **fields):
    return make_row(method, rank, ratio, images_per_second=speed, trial_id=trial_id, **fields)


def paired_by(rows, half=0.01):
    """Intervals of log ρ that are as wide everywhere."""
    log = {(each.method, each.rank): math.log(each.residual_ratio) for each in rows}

    def paired(kind, other):
        difference = log[kind] - log[other]
        return difference, difference - half, difference + half

    return paired


@pytest.mark.parametrize(
    ("fields", "images", "groups", "said"),
    [
        ({"weights": "random"}, 80, 80, "random weights: these figures show the pipeline, not the science"),
        (
            {"weights": "unknown"},
            80,
            80,
            "unknown weights: what made these features is not recorded, so compare within",
        ),
        ({"quarantined": 3}, 80, 80, "3 of the source's records had no usable image and are not in any figure"),
        ({}, 1, 1, "one test image only"),
        ({}, 9, 9, "only 9 test images"),
        ({}, 10, 10, None),
        ({}, 80, 1, "all 80 test images belong to one group: no interval can be given"),
        ({}, 80, 4, "the 80 test images come from only 4 groups: intervals are wide"),
    ],
)
def test_what_the_features_and_the_test_images_are_worth(make_study, fields, images, groups, said):
    remarks = about_data(make_study(**fields).features, images, groups)
    assert [remark.startswith(said) for remark in remarks] == ([True] if said else [])


def test_a_control_that_wins_is_called_out_with_both_figures():
    rows = [row("svd", 1.0, 10), row("randomized_svd", 1.01, 90), row("power_1", 1.1, 400),
            row("random_sketch", 2.0, 900), row("direct", 1.3, 80, trial_id="r004-direct-0000")]  # fmt: skip
    assert about_rivals(judge(rows, paired_by(rows))) == [
        "at rank 4 randomized_svd, without training, beats direct: ρ 1.010 against 1.300, 90 against 80 images/s; "
        "so does power_1"
    ]


@pytest.mark.parametrize(
    ("rival", "verb"),
    [
        (row("power_1", 1.3, 80), "is level with"),
        (row("svd", 1.3, 80), "is level with"),
        (row("power_1", 1.3, 87), "is level with"),  # 10 % of the time and more would be a difference
        (row("power_1", 1.3, 89), "beats"),
        (row("power_1", 1.28, 80), "beats"),
        (row("power_1", 1.28, 73), "beats"),
        (row("power_1", 1.29, 80), "is level with"),  # the interval holds 0
        (row("power_1", 1.1, 72), ""),
        (row("power_1", 1.32, 900), ""),
        (row("power_1", 1.0, 900, rank=8), ""),
        (row("svd_rows", 1.0, 900), ""),
    ],
)
def test_only_clear_differences_of_error_and_time_decide(rival, verb):
    rows = [rival, row("direct", 1.3, 80, trial_id="r004-direct-0000")]
    remarks = about_rivals(judge(rows, paired_by(rows)))
    assert len(remarks) == bool(verb)
    assert all(f"{rival.method}, without training, {verb} direct" in remark for remark in remarks)


def test_without_an_interval_nothing_beats_anything_and_what_is_fitted_is_called_so():
    rows = [row("pca_basis", 1.1, 900), row("direct", 1.3, 80, trial_id="r004-direct-0000")]
    assert about_rivals(judge(rows, paired_by(rows, math.nan))) == []
    assert "pca_basis, fitted but not trained, beats direct" in about_rivals(judge(rows, paired_by(rows)))[0]
    # Too few images to tell: what is far off and quick neither beats nor is level.
    rows = [row("pca_basis", 1.4, 900), row("power_1", 1.31, 80), row("direct", 1.3, 80, trial_id="r004-direct-0000")]
    assert "power_1, without training, is level with direct" in about_rivals(judge(rows, paired_by(rows, 0.3)))[0]


def test_what_training_adds_is_told_where_it_is_nothing_or_less():
    def gained(rank, low, high):
        gain = {"training_gain": (low + high) / 2, "training_gain_low": low, "training_gain_high": high}
        return row("refined", 1.01, 80, rank, "t", **gain)

    assert about_training([gained(4, 0.1, 0.3), gained(8, -0.001, 0.003), gained(16, -1e-16, -2e-16)]) == [
        "training adds nothing measurable to refined here, at rank 8 (0.10 % off ρ, -0.10 to 0.30), "
        "rank 16 (0.00 % off ρ, 0.00 to 0.00)"
    ]
    assert about_training([gained(4, -0.04, -0.02)]) == [
        "at rank 4 training made refined worse: its ρ rose by 3.00 % (2.00 to 4.00)"
    ]


def test_trials_that_ended_badly_are_counted_with_reasons(make_study):
    study = make_study()
    for reason in ("loss is nan in epoch 2", "out of memory", "loss is nan in epoch 2", "x", "y"):
        study.add_trial("direct", 2, status="failed", stopped_by="error", reason=reason)
    study.add_trial("sketch", 2, status="pruned", stopped_by="asha")
    assert about_trials(study.outcomes, [row("sketch", 1.1, 1, rank=2)]) == [
        "5 of 6 trials failed: loss is nan in epoch 2 (2x); out of memory; x; and others",
        "1 of 6 trials was stopped early by the scheduler",
        "rank 2 has no direct model: its 5 trials left none that can be used",
    ]
    study.outcomes = [replace(study.outcomes[-1], status="finished", stopped_by="patience")]
    assert about_trials(study.outcomes, [row("sketch", 1.1, 1, rank=2)]) == [], "without trouble, silent"


def test_a_rank_without_a_trial_that_holds_what_is_required_has_no_best_and_the_report_says_so(make_study):
    study = make_study()
    for rank, family, ratio, worst in ((2, "sketch", 1.1, 1.6), (2, "direct", 1.3, 1.4), (4, "sketch", 1.2, 1.7)):
        figures = {"val_residual_ratio": ratio, "val_residual_ratio_worst": worst}
        study.add_trial(family, rank, best=figures)
    require = {"val_residual_ratio_worst": 1.5}
    outcomes = [replace(each, config=replace(each.config, require=require)) for each in study.outcomes]
    assert [each.config.family for each in winners(outcomes, "val_residual_ratio")] == ["direct"]
    rows = [row(each.config.family, 1.1, 1, rank=each.config.rank, trial_id=each.config.trial_id) for each in outcomes]
    assert [each.chosen for each in choose(rows, outcomes, "val_residual_ratio")] == [0, 1, 0]
    assert about_trials(outcomes, rows) == [
        "no trial of rank 4 holds what search.require asks for, so none is its best: the nearest, r004-sketch-0002, "
        "has val_residual_ratio_worst 1.7 where 1.5 is the most"
    ]
