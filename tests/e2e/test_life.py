"""A study's life in one results directory: killed, resumed, extended and cloned, with real kills and real studies."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lowrank_tune import clone_study, extend_study, resume_study, run_study
from lowrank_tune.cli import run
from lowrank_tune.cluster.study_dir import claimed, read_plan, read_status
from lowrank_tune.errors import InputError
from lowrank_tune.study import StudyResult, reconcile_study
from tests.e2e.conftest import STUDY, Witness
from tests.tracked_once import assert_tracked_once

pytestmark = pytest.mark.usefixtures("ray_cluster")

SEARCH = """\
search:
  method: tpe
  trials: 5
  space:
    rank: [2, 4]
    lr: {loguniform: [1e-4, 1e-2]}
    batch_size: 4
    families: {direct: , sketch: }
training: {epochs: 200, patience: 200}
scheduler: {kind: asha, grace_epochs: 40, reduction_factor: 2}
resources: {max_concurrent: 1}
report: {images: [0], channels: 1, confirm_seeds: 0}
"""


def figures(result: StudyResult) -> list[Any]:
    return [(o.config, o.status, o.epochs, o.best) for o in (*result.outcomes, *result.confirmations)]


def points(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(directory / "tune" / "optuna.journal")))
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("life")
    (home / "small.yaml").write_text(STUDY.partition("search:")[0] + SEARCH)
    return home


def driver(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowrank_tune", *arguments]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for_trials(results: Path, over: int) -> Path:
    """Wait until so many trials are over and one at work has kept a checkpoint; returns the study's folder."""
    trials = results / "studies"
    for _ in range(1800):
        if len(list(trials.glob("*/trials/*/outcome.json"))) >= over:
            at_work = [path.parent for path in trials.glob("*/trials/*/checkpoint.safetensors")]
            if any(not (path / "outcome.json").exists() for path in at_work):
                break
        time.sleep(0.1)
    (directory,) = trials.iterdir()
    return directory


@pytest.fixture(scope="module")
def killed(home: Path) -> tuple[Path, dict[str, Any]]:
    """A study whose driver was killed while a trial was trained, and its status then."""
    with driver("run", str(home / "small.yaml"), "--results", str(home / "results")) as process:
        directory = wait_for_trials(home / "results", 1)
        process.send_signal(signal.SIGKILL)
    return directory, read_status(directory)


@pytest.fixture(scope="module")
def stopped(killed: tuple[Path, dict[str, Any]], home: Path) -> tuple[Path, dict[str, Any], list[int]]:
    """The same study, gone on with and stopped; its status then, and how `resume`, `wait` and a second `stop` ended."""
    directory, where = killed[0], ["--results", str(home / "results")]
    with driver("resume", killed[0].name, *where) as process:
        wait_for_trials(home / "results", killed[1]["progress"]["done"] + 1)
        codes = [run(["stop", directory.name, *where])]
    codes += [process.returncode, run(["wait", directory.name, *where]), run(["stop", directory.name, *where])]
    return directory, read_status(directory), codes


@pytest.fixture(scope="module")
def resumed(stopped: Any, home: Path) -> tuple[StudyResult, dict[Path, int], Witness]:
    """The same study to its end: its result, what was over before with its times, and what was seen."""
    outcomes = stopped[0].glob("trials/*/outcome.json")
    over = {path: path.stat().st_mtime_ns for done in outcomes for path in done.parent.iterdir()}
    witness = Witness()
    return resume_study(stopped[0].name[:-1], results=home / "results", progress=witness), over, witness


def test_a_killed_driver_leaves_a_failed_study_that_says_how_to_go_on(killed: Any) -> None:
    directory, status = killed
    assert status["state"] == "failed"
    assert f"lowrank-tune resume {directory.name}" in status["reason"]
    assert status["progress"]["done"] >= 1
    assert status["progress"]["running"] == 0


def test_stop_ends_a_study_of_another_process_and_keeps_what_it_trained(stopped: Any) -> None:
    directory, status, codes = stopped
    assert codes == [0, 130, 130, 2]
    assert (status["state"], status["progress"]["running"]) == ("stopped", 0)
    assert all(best["residual_ratio"] >= 1 for best in status["progress"]["best"].values())
    assert any(not (path.parent / "outcome.json").exists() for path in directory.glob("trials/*/checkpoint.*"))


def test_a_resumed_study_trains_what_is_left_and_gives_what_it_would_have(resumed: Any, home: Path) -> None:
    result, over, witness = resumed
    assert len(result.outcomes) == 5
    kept = {path for path in over if path.name != "loss_curves.png"}
    assert all(path.stat().st_mtime_ns == over[path] for path in kept)
    assert not {path.parent.name for path in kept} & set(witness.ended)
    # The trial at work did not begin again: fewer epochs were told than it and the later ones have.
    here = [outcome for outcome in result.outcomes if outcome.config.trial_id in witness.ended]
    assert len(witness.ratios) < sum(outcome.epochs for outcome in here)
    whole = run_study(home / "small.yaml", results=home / "results")
    assert figures(result) == figures(whole)
    assert read_status(result.directory)["state"] == "finished"


def test_finished_work_is_not_done_again(resumed: Any, home: Path) -> None:
    result, witness = resumed[0], Witness()
    again = resume_study(result.study_id, results=home / "results", progress=witness)
    assert witness.ended == []
    assert figures(again) == figures(result)


def test_mlflow_has_one_run_a_trial_and_every_epoch_once_through_a_kill_and_a_stop(resumed: Any, home: Path) -> None:
    result = resumed[0]
    assert_tracked_once(f"sqlite:///{home / 'results' / 'mlflow.db'}", result.directory)
    repairs = reconcile_study(result.study_id, home / "results")
    assert not any(value for name, value in repairs.items() if name != "study_id")


@pytest.fixture(scope="module")
def extended(resumed: Any, home: Path) -> tuple[StudyResult, StudyResult, Witness]:
    witness, before = Witness(), resumed[0]
    wider = ["search.space.rank=[2, 4, 8]", "search.space.lr={loguniform: [1e-5, 1e-2]}"]
    keywords: dict[str, Any] = {"trials": 3, "overrides": wider, "results": home / "results"}
    return before, extend_study(before.study_id, progress=witness, **keywords), witness


def test_an_extension_adds_trials_to_those_that_there_are(extended: Any) -> None:
    before, after, witness = extended
    assert after.study_id == before.study_id
    assert after.outcomes[:5] == before.outcomes
    assert [outcome.config.number for outcome in after.outcomes] == list(range(8))
    assert {o.config.trial_id for o in after.outcomes[5:]} <= set(witness.ended)
    assert not {o.config.trial_id for o in before.outcomes} & set(witness.ended)
    rows = json.loads((after.directory / "comparison.json").read_text())
    assert {row["rank"] for row in rows} == {outcome.config.rank for outcome in after.outcomes}


def test_the_searcher_knows_the_old_trials_in_the_new_space(extended: Any) -> None:
    _, after, _ = extended
    trials = points(after.directory)
    assert len(trials) == 8
    ranges = {str(trial.distributions["rank"]) for trial in trials}
    assert ranges == {"CategoricalDistribution(choices=(2, 4, 8))"}
    for trial, outcome in zip(trials, after.outcomes, strict=True):
        assert trial.params["lr"] == outcome.config.lr
        assert len(trial.intermediate_values) == outcome.epochs


def test_an_extension_is_on_record(extended: Any, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, after, _ = extended
    record = json.loads((after.directory / "plan.json").read_text())
    (extension,) = record["extensions"]
    assert (extension["trials_before"], extension["trials"]) == (5, 8)
    assert extension["overrides"][0] == "search.space.rank=[2, 4, 8]"
    assert read_plan(after.directory).n_trials == 8
    capsys.readouterr()
    assert run(["list", "--results", str(home / "results")]) == 0
    assert "extended 5 → 8 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"overrides": ["training.epochs=90"], "trials": 1}, r"training: an extension keeps it.*clone"),
        ({}, "nothing to add to its 8 trials; give --trials"),
        ({"overrides": ["search.space.rank=99"], "trials": 1}, "rank"),
    ],
)
def test_an_extension_that_cannot_be_leaves_all_as_it_was(
    extended: Any, home: Path, settings: dict[str, Any], told: str
) -> None:
    directory = extended[1].directory
    files = {path: path.read_bytes() for path in (directory / "plan.json", directory / "study.resolved.yaml")}
    with pytest.raises(InputError, match=told):
        extend_study(directory.name, results=home / "results", **settings)
    assert {path: path.read_bytes() for path in files} == files
    assert read_status(directory)["state"] == "finished"


def test_a_clone_records_its_parent_and_the_difference(extended: Any, home: Path) -> None:
    parent = extended[1]
    few = ["search.trials=1", "training.epochs=2", "scheduler.kind=none"]
    clone = clone_study(parent.study_id, overrides=few, results=home / "results")
    record = json.loads((clone.directory / "plan.json").read_text())
    assert record["parent"] == read_status(clone.directory)["parent"] == parent.study_id
    assert record["difference"]["training.epochs"] == [200, 2]
    assert record["difference"]["search.trials"] == [8, 1]
    assert set(record["difference"]) == {"search.trials", "training.epochs", "scheduler.kind"}
    assert len(clone.outcomes) == 1


def test_two_processes_never_work_on_one_study(extended: Any, home: Path) -> None:
    directory = extended[1].directory
    with claimed(directory), pytest.raises(InputError, match=r"process .* works on it; `lowrank-tune stop"):
        resume_study(directory.name, results=home / "results")


def test_other_images_than_it_began_with_are_refused(extended: Any, home: Path) -> None:
    directory = extended[1].directory
    began_with = directory / "tune" / "features.json"
    text = began_with.read_text()
    began_with.write_text(text.replace(json.loads(text)["rows"][0]["key"], "0" * 64))
    with pytest.raises(InputError, match="began with 30 images, and they are not the same any more"):
        resume_study(directory.name, results=home / "results")
    began_with.write_text(text)
    assert read_status(directory)["state"] == "failed"
