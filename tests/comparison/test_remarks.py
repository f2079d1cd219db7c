"""What the remarks say, and when they are silent."""

from dataclasses import replace

import pytest

from lowrank_tune.comparison.remarks import about_data, about_rivals, about_trials
from tests.comparison.small_study import make_row


def row(method, ratio, speed, rank=4, trial_id=""):
    return make_row(method, rank, ratio, images_per_second=speed, trial_id=trial_id)


@pytest.mark.parametrize(
    ("fields", "images", "said"),
    [
        ({"weights": "random"}, 80, "random weights: these figures show the pipeline, not the science"),
        ({"weights": "unknown"}, 80, "unknown weights: what made these features is not recorded, so compare within"),
        ({"quarantined": 3}, 80, "3 of the source's records had no usable image and are not in any figure"),
        ({}, 1, "one test image only"),
        ({}, 9, "only 9 test images"),
        ({}, 10, None),
    ],
)
def test_what_the_features_are_worth(make_study, fields, images, said):
    remarks = about_data(make_study(**fields).features, images)
    assert [remark.startswith(said) for remark in remarks] == ([True] if said else [])


def test_a_control_that_wins_is_called_out_with_both_figures():
    rows = [row("svd", 1.0, 10), row("randomized_svd", 1.01, 90), row("power_1", 1.1, 400),
            row("random_sketch", 2.0, 900), row("direct", 1.3, 80, trial_id="r004-direct-0000")]  # fmt: skip
    assert about_rivals(rows) == [
        "at rank 4 randomized_svd, without training, beats direct: ρ 1.01 against 1.3, 90 against 80 images/s; "
        "so does power_1"
    ]


@pytest.mark.parametrize(
    ("rival", "verb"),
    [
        (row("power_1", 1.3, 80), "matches"),
        (row("svd", 1.3, 80), "matches"),
        (row("power_1", 1.3, 81), "beats"),
        (row("power_1", 1.29, 80), "beats"),
        (row("power_1", 1.3 * (1 + 1e-7), 80), "matches"),
        (row("power_1", 1.3 * (1 - 1e-7), 80), "matches"),
        (row("power_1", 1.1, 79), ""),
        (row("power_1", 1.31, 900), ""),
        (row("power_1", 1.30001, 900), ""),
        (row("power_1", 1.0, 900, rank=8), ""),
        (row("svd_rows", 1.0, 900), ""),
    ],
)
def test_a_rival_is_as_near_in_no_more_time_at_the_rank_and_rounding_makes_no_winner(rival, verb):
    remarks = about_rivals([rival, row("direct", 1.3, 80, trial_id="r004-direct-0000")])
    assert len(remarks) == bool(verb)
    assert all(f"{rival.method}, without training, {verb} direct" in remark for remark in remarks)


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
