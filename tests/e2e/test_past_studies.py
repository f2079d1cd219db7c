"""A finished study, and one that was stopped, looked at again: from a program and from the command line."""

import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lowrank_tune.cli.options import parse_channels
from lowrank_tune.errors import InputError
from lowrank_tune.past_study import comparability, comparison_of, open_study
from tests.conftest import Typed
from tests.e2e.conftest import Ran, older

pytestmark = pytest.mark.usefixtures("ray_cluster")


def copied(ran: Ran, results: Path) -> Path:
    shutil.copytree(ran.result.directory, results / "studies" / ran.result.study_id)
    shutil.copytree(ran.result.features.directory, results / "features" / ran.result.features.fingerprint)
    return results


@pytest.fixture
def moved(ran: Ran, tmp_path: Path) -> Path:
    """The results in another place, as a copy from a cluster's storage would be, and of an older version."""
    results = copied(ran, tmp_path / "elsewhere")
    resolved = results / "studies" / ran.result.study_id / "study.resolved.yaml"
    resolved.write_text(older(resolved.read_text()))
    return results


@pytest.fixture(scope="module")
def stopped(ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped in the middle: no comparison, half of the trials, one of them cut off after an epoch."""
    moved = copied(ran, tmp_path_factory.mktemp("stopped") / "results")
    directory = moved / "studies" / ran.result.study_id
    for name in ("comparison.json", "per_image.parquet", "pareto.json", "compression.json", "report.html"):
        (directory / name).unlink()
    (directory / "status.json").write_text(json.dumps({"state": "stopped", "started": "2026-01-01T00:00:00+00:00"}))
    for folder in (directory / "trials").iterdir():
        # A group's trials alternate: of each rank every other one stays.
        if int(folder.name.split("-")[2]) % 4 in (1, 2) or folder.name[-3:-1] == "-s":
            shutil.rmtree(folder)
    cut = next(outcome for outcome in ran.result.outcomes if outcome.config.number == 4)
    history = directory / "trials" / cut.config.trial_id / "history.json"
    history.write_text(json.dumps(json.loads(history.read_text())[:1]))
    (history.parent / "outcome.json").unlink(missing_ok=True)
    return moved


def test_a_folder_tells_the_outcomes_that_the_study_had(ran: Ran) -> None:
    past = open_study(ran.results, ran.result.study_id)
    assert past.state == "finished"
    assert past.split == ran.result.split
    assert past.features == ran.result.features
    repeated = sorted(ran.result.confirmations, key=lambda outcome: (outcome.config.number, outcome.config.trial_id))
    for found, had in zip((*past.outcomes, *past.confirmations), (*ran.result.outcomes, *repeated), strict=True):
        assert found.best == pytest.approx(had.best)
        assert found.seconds == pytest.approx(had.seconds)
        assert replace(found, best=had.best, seconds=had.seconds, directory=had.directory) == had


def test_compare_shows_what_is_on_file_wherever_it_lies(moved: Path, ran: Ran, typed: Typed) -> None:
    code, out, _ = typed("compare", ran.result.study_id[:8], "--rank", 4, "--results", moved, "--json")
    told = json.loads(out)
    assert code == 0
    rows = [asdict(row) for row in ran.result.comparison.rows if row.rank == 4]
    assert told["studies"][ran.result.study_id]["comparison"] == rows
    assert told["caveats"] == []
    code, _, err = typed("compare", ran.result.study_id, "--rank", 3, "--results", moved)
    assert code == 2 and "compared were 2, 4" in err
    page = moved.parent / "compare.html"
    code, _, err = typed("compare", ran.result.study_id, "--rank", 4, "--results", moved, "--html", page)
    assert code == 0 and f"Page: {page}" in err
    assert "Studies side by side" in page.read_text(encoding="utf-8")
    code, _, err = typed("compare", ran.result.study_id, "--results", moved, "--html", moved / "nowhere" / "page.html")
    assert code == 2 and "name a file in a folder that is there" in err


def test_features_are_found_beside_a_study_that_was_moved(moved: Path, ran: Ran) -> None:
    shutil.move(ran.result.features.directory, f"{ran.result.features.directory}.away")
    try:
        past = open_study(moved, ran.result.study_id)
        assert Path(past.features.directory) == moved / "features" / ran.result.features.fingerprint
        assert Path(past.features.records_path).is_file()
    finally:
        shutil.move(f"{ran.result.features.directory}.away", ran.result.features.directory)


def test_a_stopped_study_is_compared_with_the_trials_that_it_has(stopped: Path, ran: Ran) -> None:
    past = open_study(stopped, ran.result.study_id)
    assert [outcome.config.number for outcome in past.outcomes] == [0, 3, 4, 7]
    assert past.confirmations == ()
    cut = past.outcomes[2]
    assert (cut.stopped_by, cut.status, cut.epochs) == ("interruption", "pruned", 1)
    comparison = comparison_of(past)
    assert "is stopped: these figures are of the 4 of 8 trials" in comparison.remarks[0]
    trained = {row.trial_id for row in comparison.rows if row.trial_id}
    assert trained <= {outcome.config.trial_id for outcome in past.outcomes}
    assert (past.directory / "comparison.json").is_file()
    had = {(row.method, row.rank): row.residual_ratio_mean for row in ran.result.comparison.rows}
    pictures = {row for row in ran.result.comparison.compression.rates if row.dtype in ("jpeg", "webp")}
    assert pictures and pictures <= set(comparison.compression.rates), "kept from when the study ran"
    controls = [row for row in comparison.rows if not row.trial_id]
    assert [row.residual_ratio_mean for row in controls] == pytest.approx([had[r.method, r.rank] for r in controls])


def test_visualize_and_report_write_their_files(stopped: Path, ran: Ran, typed: Typed) -> None:
    name, directory = ran.result.study_id, stopped / "studies" / ran.result.study_id
    command = ("visualize", name, "--image", 1, "--rank", 2, "--channels", "7,3", "--results", stopped)
    files = [Path(file) for file in json.loads(typed(*command, "--json")[1])]
    assert [file.name for file in files] == ["spatial-001-r002.png", "spatial.html"]
    assert all(file.is_file() for file in files)
    assert typed("report", name, "--results", stopped)[1].splitlines()[0] == str(directory / "report.html")
    assert "the study is stopped" in (directory / "report.html").read_text(encoding="utf-8")
    assert (stopped / "mlflow.db").is_file()


def test_a_report_is_written_without_a_tracking_server(
    moved: Path, ran: Ran, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = moved / "studies" / ran.result.study_id / "report.html"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("lowrank_tune.report.report.write_report", lambda *_: (page,))
    code, _, err = typed("report", ran.result.study_id, "--results", moved)
    assert code == 0 and "not in MLflow: tracking server http://127.0.0.1:9 does not answer" in err


def test_what_cannot_be_written_to_is_compared_and_otherwise_refused_in_words(
    moved: Path, ran: Ran, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Root may write anywhere, so the refusal is put where the pages are written.
    monkeypatch.setattr("lowrank_tune.report.curves.write_whole", refuse)
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    where = (ran.result.study_id, "--results", moved)
    assert typed("compare", *where)[0] == 0
    code, _, err = typed("visualize", *where, "--image", 0)
    assert code == 2 and "cannot write into" in err


def test_studies_side_by_side_say_what_keeps_them_apart(stopped: Path, ran: Ran) -> None:
    past, whole = open_study(stopped, ran.result.study_id), open_study(ran.results, ran.result.study_id)
    assert comparability([past, whole]) == []
    fewer = replace(past, split=replace(past.split, test=past.split.test[:4]))
    (said,) = comparability([whole, fewer])
    assert "they share 4 of" in said
    other = replace(past, features=replace(past.features, fingerprint="f" * 16))
    assert "features differ" in comparability([whole, other])[0]


def test_a_study_that_is_not_there_or_never_trained_is_an_input_error(moved: Path, ran: Ran) -> None:
    with pytest.raises(InputError, match=r"study nope: not in .*; studies: small-"):
        open_study(moved, "nope")
    shutil.rmtree(moved / "studies" / ran.result.study_id / "tune")
    with pytest.raises(InputError, match="it never began to train"):
        open_study(moved, ran.result.study_id)


@pytest.mark.parametrize(("text", "channels"), [("8", 8), ("0,5, 17", [0, 5, 17]), ("17,", [17]), ("0,", [0])])
def test_channels_are_a_count_or_numbers(text: str, channels: list[int] | int) -> None:
    assert parse_channels(text) == channels


@pytest.mark.parametrize("text", ["x", "", "0", "-1", "²"])
def test_other_channels_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--channels"):
        parse_channels(text)
