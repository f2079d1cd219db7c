"""Which rank to take, and how far the best of it is from the optimum."""

import numpy as np
import pytest

from lowrank_tune.lowrank.svd import Spectrum
from lowrank_tune.report.text import bytes_text, choices, excess_text, rank_sentence, study_cost, verdicts


@pytest.fixture
def compared(row, comparison_of):
    return comparison_of(
        row("svd", 4, 1.0, 0.93), row("sketch", 4, 1.02, 0.92, trial_id="a"), row("direct", 4, 7.0, 0.6, trial_id="b"),
        row("power_1", 4, 1.1, 0.91),
        row("svd", 8, 1.0, 0.97), row("sketch", 8, 1.5, 0.96, trial_id="c"), row("power_1", 8, 1.1, 0.965),
    )  # fmt: skip


def test_the_best_of_each_rank_stands_beside_svd_and_control(compared):
    four, eight = verdicts(compared)
    assert (four.rank, four.trained.trial_id, four.svd.method, four.control.method) == (4, "a", "svd", "power_1")
    assert four.word == "2.0 % above the least possible error; beats every control"
    assert eight.word == "50.0 % above the least possible error; power_1, without training, is nearer"


def test_which_rank_to_take_is_said_in_a_sentence(compared):
    cosines = np.array([0.5, 0.8, 0.89, 0.93, 0.94, 0.95, 0.96, 0.97, 0.985])
    spectrum = Spectrum(np.ones((1, 9)), cosines, np.zeros(9), 1)
    found = choices(compared, spectrum)
    assert [(choice.cosine, choice.svd_rank, choice.row.rank if choice.row else None) for choice in found] == [
        (0.9, 4, 4), (0.95, 6, 8), (0.98, 9, None)
    ]  # fmt: skip
    assert rank_sentence(found) == (
        "To keep a token cosine of 0.95, take rank 8, the lowest of those compared at which a trained model does "
        "(sketch, 0.9600; the SVD itself needs rank 6). No rank compared keeps 0.98, which takes the SVD rank 9."
    )


def test_without_a_trained_model_there_is_no_choice(row, comparison_of):
    comparison = comparison_of(row("svd", 4, 1.0, 0.93), row("power_1", 4, 1.1))
    assert choices(comparison, None) == []
    assert rank_sentence([]) == ""
    assert verdicts(comparison)[0].word == "no trained model"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1.0, "at the least possible error"),
        (1.0042, "0.4 % above the least possible error"),
        (34.0, "34.0 times the least possible error"),
    ],
)
def test_a_ratio_is_said_as_people_say_it(ratio, text):
    assert excess_text(ratio) == text


def test_what_a_study_cost_is_counted(study):
    (study.directory / "status.json").write_text(
        '{"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-01T00:02:05+00:00"}'
    )
    cost = dict(study_cost(study.directory, study.features, study.outcomes, study.outcomes[:1]))
    assert cost["Trials"] == "3: 1 ran its full budget, 1 stopped by ASHA, 1 failed"
    assert cost["Epochs"] == "6 of 15 that no early stop would have taken"
    assert cost["Training time of the trials"] == "6.0 s"
    assert cost["Trained again with fresh seeds"] == "1, 4 epochs, 2.0 s"
    assert cost["Start to end"] == "2 min 05 s"
    assert cost["Feature cache"].startswith("8.72 kB for 9 images")
    assert bytes_text(999) == "999 bytes" and bytes_text(4_600_000_000) == "4.6 GB"
