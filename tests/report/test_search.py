"""How a search went, from its journal and its trials."""

from dataclasses import replace

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lowrank_tune.report.search import LEAST_FOR_IMPORTANCE, search_section, search_sentences
from tests.comparison.small_study import make_outcome


def journal_of(path, complete, pruned=0):
    storage = JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name="s")
    spaces = {"rank": CategoricalDistribution((2, 4)), "lr": FloatDistribution(1e-4, 1e-1, log=True)}
    for number in range(complete + pruned):
        params = {"rank": (2, 4)[number % 2], "lr": 10 ** -(1 + number % 3)}
        state = optuna.trial.TrialState.COMPLETE if number < complete else optuna.trial.TrialState.PRUNED
        value = 1.0 + params["rank"] if number < complete else None
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value, state=state))
    return path


def trials(number):
    return [make_outcome("sketch", (2, 4)[place % 2], place) for place in range(number)]


def charts(section):
    return [chart.name for picture in section.pictures for chart in picture.charts]


def test_optuna_draws_the_search_from_its_journal(tmp_path):
    section = search_section(
        journal_of(tmp_path / "optuna.journal", LEAST_FOR_IMPORTANCE, pruned=3), ["val_residual_ratio"], trials(10), [3]
    )
    assert charts(section) == ["timeline", "coordinates", "importance"]
    (importances,) = section.tables
    assert importances.rows[0][0] == "rank" and float(importances.rows[0][1]) > 0.5
    assert "10 complete, 3 pruned" in section.notes[0]


def test_optuna_draws_each_of_two_objectives(tmp_path):
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "two.journal")))
    study = optuna.create_study(storage=storage, study_name="s", directions=["minimize", "minimize"])
    spaces = {"shared.token_transform": CategoricalDistribution(("dct", "learned"))}
    for number in range(LEAST_FOR_IMPORTANCE):
        params, values = {"shared.token_transform": ("dct", "learned")[number % 2]}, [1e3 + number, 0.1 + number % 2]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, values=values))
    study.add_trial(
        optuna.trial.create_trial(params=params, distributions=spaces, state=optuna.trial.TrialState.PRUNED)
    )
    outcomes = [replace(trial, best={"val_bytes": 1e3, "val_error": 0.1}) for trial in trials(2)]
    section = search_section(tmp_path / "two.journal", ["val_bytes", "val_error"], outcomes, [])
    names = [
        f"{chart}-{objective}" for chart in ("coordinates", "importance") for objective in ("val_bytes", "val_error")
    ]
    assert charts(section) == ["timeline", *names]
    assert [table.label for table in section.tables] == [
        "Hyperparameter importances: val_bytes", "Hyperparameter importances: val_error"
    ]  # fmt: skip


def test_what_cannot_be_drawn_is_said_in_words(tmp_path):
    few = search_section(journal_of(tmp_path / "few", 4, pruned=9), ["val_residual_ratio"], trials(4), [])
    assert charts(few) == ["timeline", "coordinates"]
    assert f"needs {LEAST_FOR_IMPORTANCE} complete trials at least, not 4" in few.notes[-1]
    none = search_section(journal_of(tmp_path / "none", 0, pruned=2), ["val_residual_ratio"], trials(1), [])
    assert charts(none) == ["timeline"] and "need 2 trials" in none.notes[0]
    absent = search_section(tmp_path / "absent", ["val_residual_ratio"], trials(2), [])
    assert charts(absent) == ["coordinates"] and "No search journal" in absent.notes[0]
    (tmp_path / "torn").write_text('{"op_code": 0, "worker')
    assert charts(search_section(tmp_path / "torn", ["val_mse"], [], [])) == []


def test_what_the_search_was_worth_beside_the_defaults_is_said_of_each_rank():
    def trial(number, rank, ratio, origin=""):
        outcome = make_outcome("sketch", rank, number, best={"val_residual_ratio": ratio} if ratio else {})
        return replace(outcome, config=replace(outcome.config, origin=origin))

    outcomes = [
        trial(0, 8, 1.31, "defaults"), trial(2, 8, 1.25), trial(4, 8, 1.22), trial(6, 8, 1.22),
        trial(8, 8, None),
        trial(1, 16, 1.1, "defaults"), trial(3, 16, 1.2), trial(5, 4, 1.5),
    ]  # fmt: skip
    assert search_sentences(outcomes, "val_residual_ratio", {"stopped_for": "trials", "stopped_why": ""}) == [
        "Rank 4, val_residual_ratio: the search gave 1.500 (r004-sketch-0005); after 1 of 1 trial nothing better came.",
        "Rank 8, val_residual_ratio: the defaults gave 1.310 (sketch), the search gave 1.220 (r008-sketch-0004); "
        "after 3 of 5 trials nothing better came.",
        "Rank 16, val_residual_ratio: the defaults gave 1.100 (sketch), and the search nothing better in 2 trials.",
        "The search ended as it had had all its trials.",
    ]
    why = "the search ended after 4 of 9 trials: every configuration of its space has been tried"
    assert search_sentences([], "val_mse", {"stopped_for": "space", "stopped_why": why})[-1] == f"T{why[1:]}."
