"""A refused command changes nothing: not a byte of the study, its status, its caches or MLflow's database."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pytest import MonkeyPatch

from lowrank_tune import resume_study, run_study
from lowrank_tune.cli import run
from lowrank_tune.cluster.study_dir import claimed, read_status
from lowrank_tune.config.loading import load_study
from lowrank_tune.config.source import TensorSource
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.tracking.tracker import Tracker
from tests.conftest import Typed
from tests.e2e.conftest import Witness, older, write_tensors

pytestmark = pytest.mark.usefixtures("ray_cluster", "no_report")

STUDY = """\
name: here
features: {source: {tensors: in}}
split: {validation: 2, test: 2}
search: {method: tpe, trials: 2, space: {rank: 2, lr: {loguniform: [1e-3, 1e-2]}, batch_size: 4, families: {sketch: }}}
training: {epochs: 1, patience: 1}
scheduler: {kind: none}
resources: {max_concurrent: 1}
report: {images: [0], channels: 1, confirm_seeds: 0}
"""
SOURCE = "features.source={tensors: %s}"


class Home:
    """A finished study, its tensors beside it, and what lies in its results."""

    def __init__(self, path: Path) -> None:
        self.path, self.results, self.tensors = path, path / "results", path / "in"
        self.first = self.tensors / "features_0.pt"
        write_tensors(self.tensors, 9)
        self.file = path / "here.yaml"
        self.file.write_text(STUDY)
        self.result = run_study(self.file, results=self.results)
        self.study_id, self.directory = self.result.study_id, self.result.directory

    def bytes(self) -> dict[str, str]:
        files = sorted(path for path in self.results.rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, no_report: None) -> Home:
    path, before = tmp_path_factory.mktemp("home"), Path.cwd()
    os.chdir(path)
    try:
        return Home(path)
    finally:
        os.chdir(before)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """The working directory, another than the one that the study was started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["gone", "others", "otherwise", "relative"])
def spoilt(request: pytest.FixtureRequest, home: Home) -> Iterator[str]:
    """The study with its tensors gone, one replaced, or its features or path as an older version left them."""
    began = home.directory / "tune" / "features.json"
    features = began.read_text()
    resolved, first = home.directory / "study.resolved.yaml", home.first.read_bytes()
    text = resolved.read_text()
    if request.param == "gone":
        home.tensors.rename(home.path / "away")
    elif request.param == "others":
        torch.save(torch.ones(8, 16), home.first)
    elif request.param == "otherwise":
        began.write_text(json.dumps(json.loads(features) | {"fingerprint": "0" * 16}))
    else:
        resolved.write_text(text.replace(str(home.tensors), "in"))
    yield request.param
    if request.param == "gone":
        (home.path / "away").rename(home.tensors)
    home.first.write_bytes(first)
    began.write_text(features)
    resolved.write_text(text)


@pytest.fixture
def refused(home: Home, typed: Typed) -> Callable[..., str]:
    """What a command says that is refused; nothing in the results has changed."""

    def call(*arguments: object, code: int = 2) -> str:
        before = home.bytes()
        found, _, err = typed(*arguments, "--results", home.results)
        assert (found, home.bytes()) == (code, before)
        return err

    return call


SAID = {
    "gone": "no such directory or file",
    "others": "the study began with 9 images, and they are not the same any more",
    "otherwise": "it began with the features 0000000000000000, and its file gives",
    "relative": "has a relative path in features.source.tensors: go on with it from the working directory",
}


@pytest.mark.parametrize("command", ["resume", "extend"])
def test_a_finished_study_stays_so_when_its_images_are_not_there(
    home: Home, spoilt: str, elsewhere: Path, command: str, refused: Callable[..., str]
) -> None:
    more = ["--trials", "1"] if command == "extend" else []
    assert SAID[spoilt] in refused(command, home.study_id, *more)
    if spoilt in ("gone", "relative"):
        assert SAID[spoilt] in refused("clone", home.study_id)


def test_an_older_study_goes_on_where_it_was_started_and_does_no_work_again(
    home: Home, monkeypatch: MonkeyPatch
) -> None:
    resolved, witness = home.directory / "study.resolved.yaml", Witness()
    text = resolved.read_text()
    resolved.write_text(older(text).replace(str(home.tensors), "in"))
    monkeypatch.chdir(home.path)
    try:
        again = resume_study(home.study_id, results=home.results, progress=witness)
    finally:
        resolved.write_text(text)
    assert witness.ended == []
    assert again.outcomes == home.result.outcomes


def test_a_clone_from_another_directory_records_its_parent_and_what_mlflow_was_not_told(
    home: Home, elsewhere: Path, monkeypatch: MonkeyPatch, typed: Typed
) -> None:
    assert (home.directory / "study.yaml").read_text() == STUDY
    source = load_study(home.directory / "study.resolved.yaml").features.source
    assert source == TensorSource(tensors=str(home.tensors))
    monkeypatch.setattr(Tracker, "problems", ("1 record could not be delivered",))
    before = set((home.results / "studies").iterdir())
    _, out, _ = typed("clone", home.study_id, "--set", "search.trials=1", "--results", home.results)
    assert out.splitlines()[-1] == "not in MLflow: 1 record could not be delivered"
    (clone,) = set((home.results / "studies").iterdir()) - before
    record = json.loads((clone / "plan.json").read_text())
    assert record["parent"] == home.study_id
    assert record["difference"] == {"search.trials": [2, 1]}
    status = read_status(clone)
    assert (status["parent"], status["untracked"]) == (home.study_id, ["1 record could not be delivered"])
    assert (status["state"], status["progress"]["done"]) == ("finished", 1)


@pytest.mark.parametrize("command", ["resume", "extend", "reconcile"])
def test_two_processes_never_work_on_one_study(home: Home, command: str, refused: Callable[..., str]) -> None:
    with claimed(home.directory):
        assert "works on it; `lowrank-tune stop" in refused(command, home.study_id)


SHARED = ("--set", "search.space.families={shared: }")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "FILE", "--set", SOURCE % "nowhere"], "nowhere: no such directory"),
        (["run", "FILE", "--set", "search.space.rank=9"], "search.space.rank: 9 is above min(tokens, dim)"),
        (["run", "FILE", *SHARED, "--set", "search.space.rank=9"], "objective: ρ has no meaning at rank 9"),
        (["run", "FILE", *SHARED], "token_transform: dct needs a square grid of tokens, and 8 are none"),
        (["clone", "ID", "--set", "objective=val_bytes_at_error"], "target_error: an objective in bytes needs"),
        (["extend", "ID", "--trials", "1", "--set", "objective=val_mse"], "objective: an extension keeps it"),
        (["run", "FILE", "--set", "split={validation: 2, test: 7}"], "leave none of 9 to train"),
        (["run", "FILE", "--set", "split.test=0.25", "--set", "report.images=[2]"], "report.images: there is no image"),
        (["run", "FILE", "--set", "resources.cpus_per_trial=64"], "resources.cpus_per_trial"),
        (["run", "FILE", "--id", "ID"], "is there already"),
        (["trial", "FILE", "--set", SOURCE % "nowhere"], "nowhere: no such directory"),
        (["extract", "FILE", "--set", SOURCE % "nowhere"], "nowhere: no such directory"),
        (["clone", "ID", "--set", "search.space.rank=9"], "search.space.rank: 9"),
        (["extend", "ID", "--trials", "1", "--set", "search.space.rank=9"], "search.space.rank: 9"),
        (["extend", "ID", "--trials", "1", "--set", "training.epochs=9"], "training: an extension keeps it"),
        (["extend", "ID", "--trials", "1", "--set", "resources.cpus_per_trial=64"], "resources.cpus_per_trial"),
        (["extend", "ID"], "nothing to add to its"),
        (["compare", "ID", "--rank", "3", "--again"], "rank 3: compared were 2"),
        (["visualize", "ID", "--image", "2"], "images: there is no image 2"),
        (["visualize", "ID", "--image", "0", "--rank", "9"], "these features have ranks 1 to 8"),
        (["visualize", "ID", "--image", "0", "--channels", "16,"], "these features have channels 0 to 15"),
        (["export", "ID", "OUT", "--rank", "3"], "rank 3 has no trained model"),
        (["fidelity", "ID"], "its file has no fidelity section, so say what to ask: --questions"),
        (["fidelity", "ID", "--questions", "What is it?"], "it needs images and a checkpoint, and of ready tensors"),
        (["report", "nope"], "study nope: not in"),
        (["reconcile", "nope"], "study nope: not in"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_what_is_refused_changes_nothing(
    home: Home, monkeypatch: MonkeyPatch, refused: Callable[..., str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(home.path)
    names = {"ID": home.study_id, "FILE": home.file, "OUT": home.path / "out"}
    assert said in refused(*(names.get(word, word) for word in arguments))
    assert not (home.path / "out").exists()


@pytest.mark.parametrize("command", ["run", "resume", "extend", "clone", "reconcile"])
def test_a_tracking_server_that_is_away_is_told_before_anything_is_touched(
    home: Home, monkeypatch: MonkeyPatch, refused: Callable[..., str], command: str
) -> None:
    monkeypatch.chdir(home.path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    more = ["--trials", "1"] if command == "extend" else []
    arguments = [command, home.file if command == "run" else home.study_id, *more]
    assert "http://127.0.0.1:9 does not answer" in refused(*arguments, code=1)


@pytest.mark.parametrize("command", ["run", "resume", "extend", "clone", "reconcile"])
def test_a_deleted_experiment_is_told_before_anything_is_touched(
    home: Home, monkeypatch: MonkeyPatch, refused: Callable[..., str], command: str
) -> None:
    monkeypatch.chdir(home.path)
    client = MlflowClient(local_uri(home.results))
    client.delete_experiment("1")
    more = ["--trials", "1"] if command == "extend" else []
    try:
        said = refused(command, home.file if command == "run" else home.study_id, *more)
    finally:
        client.restore_experiment("1")
    assert "experiment here was deleted" in said
    assert "mlflow experiments restore --experiment-id 1" in said


def test_a_wrong_study_makes_no_results_directory(home: Home, elsewhere: Path) -> None:
    for command in ("run", "trial", "extract"):
        assert run([command, str(home.file), "--results", str(elsewhere / "new")]) == 2
    for command in ("resume", "extend", "clone", "reconcile", "report"):
        assert run([command, "nope", "--results", str(elsewhere / "new")]) == 2
    assert not (elsewhere / "new").exists()
