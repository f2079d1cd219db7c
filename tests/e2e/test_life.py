"""A study's life: its driver killed, resumed, stopped, resumed and extended, by real signals to real processes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from lowrank_tune import extend_study, resume_study, run_study
from lowrank_tune.cli import run
from lowrank_tune.cluster.study_dir import read_plan, read_status
from lowrank_tune.past_study import comparison_of, open_study
from lowrank_tune.report.text import STOPPED
from lowrank_tune.study import StudyResult
from lowrank_tune.tracking.store import local_uri
from lowrank_tune.upkeep import reconcile_study
from tests.conftest import Typed
from tests.e2e.conftest import Witness, write_tensors
from tests.tracked_once import assert_tracked_once

pytestmark = pytest.mark.usefixtures("ray_cluster", "no_report")

STUDY = """\
name: small
features: {{source: {{tensors: {tensors}}}}}
split: {{validation: 4, test: 4}}
search:
  method: tpe
  trials: 5
  space:
    rank: [2, 4]
    lr: {{loguniform: [1e-4, 1e-2]}}
    batch_size: 4
    families: {{direct: , sketch: }}
training: {{epochs: 4, patience: 4}}
scheduler: {{kind: asha, grace_epochs: 3, reduction_factor: 2}}
resources: {{max_concurrent: 1}}
report: {{images: [0], channels: 1, confirm_seeds: 0}}
notify: {notify}
"""


def figures(result: StudyResult) -> list[Any]:
    return [(o.config, o.status, o.epochs, o.best) for o in (*result.outcomes, *result.confirmations)]


@pytest.fixture(scope="module")
def chat() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A web hook's address, and what it was told."""
    told: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/hook", told
        server.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chat: tuple[str, Any]) -> Path:
    home = tmp_path_factory.mktemp("life")
    write_tensors(home / "in", 20)
    (home / "small.yaml").write_text(STUDY.format(tensors=home / "in", notify=chat[0]))
    (home / "results").mkdir()
    # MLflow makes its database in seconds; a kill among them is tests/tracking's.
    MlflowClient(local_uri(home / "results")).search_experiments()
    return home


@pytest.fixture(scope="module")
def halted(home: Path, ray_cluster: None) -> Callable[..., Any]:
    """A driver that has halted in the middle of a trial, and the study's folder."""

    @contextmanager
    def drive(command: str, study: str, trial: int) -> Iterator[tuple[subprocess.Popen[str], Path]]:
        reached = home / f"reached-{trial}"
        address = ray.get_runtime_context().gcs_address
        arguments = [command, study, home / "results", trial, reached, address]
        words = [sys.executable, "-m", "tests.e2e.gated_driver", *map(str, arguments)]
        root = Path(__file__).parents[2]
        with subprocess.Popen(words, cwd=root, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            while not reached.exists():
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.05)
            (directory,) = (home / "results" / "studies").iterdir()
            yield process, directory

    return drive


@pytest.fixture(scope="module")
def watched() -> dict[str, Any]:
    """How a watch of the killed study ended, and what it printed."""
    return {}


@pytest.fixture(scope="module")
def killed(home: Path, halted: Callable[..., Any], watched: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A study whose driver was killed while its second trial was trained, and its status then."""
    with halted("run", str(home / "small.yaml"), 1) as (process, directory):
        with watching(directory, stdout=subprocess.PIPE, text=True) as watcher:
            seen = [next(line for line in watcher.stdout if " trains " in line)]
            process.send_signal(signal.SIGKILL)
            watched["lines"] = [*seen, *watcher.stdout]
        watched["code"] = watcher.returncode
    return directory, read_status(directory)


def watching(directory: Path, **keywords: Any) -> subprocess.Popen[Any]:
    """`watch`, as another process."""
    words = [sys.executable, "-m", "lowrank_tune", "watch", directory.name[:-1], "--results", directory.parents[1]]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2], **keywords)


@pytest.fixture(scope="module")
def stopped(killed: Any, home: Path, halted: Callable[..., Any]) -> tuple[Path, dict[str, Any], list[int], str]:
    """The same study, gone on with and stopped: its status, how `stop`, the driver and `wait` ended, what was said."""
    where = ["--results", str(home / "results")]
    with halted("resume", killed[0].name, 3) as (process, directory):
        codes = [run(["stop", directory.name, *where])]
        said = process.stderr.read()
    codes += [process.returncode, run(["wait", directory.name, *where]), run(["stop", directory.name, *where])]
    return directory, read_status(directory), codes, said


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
    assert (status["progress"]["done"], status["progress"]["running"]) == (1, 0)


def test_a_watch_ends_with_the_study_and_its_exit_code(killed: Any, watched: dict[str, Any]) -> None:
    directory, _ = killed
    assert watched["code"] == 1
    assert re.search(r"r00[24]-\w+-0001  rank [24]  \w+  trains  epoch \d/4", watched["lines"][0])
    assert watched["lines"][-1].startswith(f"{directory.name}: failed (its driver died")


def test_stop_ends_a_study_of_another_process_and_keeps_what_it_trained(stopped: Any, home: Path) -> None:
    directory, status, codes, said = stopped
    assert codes == [0, 130, 130, 2]
    assert f"go on with: lowrank-tune resume {directory.name} --results {home / 'results'}" in said
    assert (status["state"], status["progress"]["done"], status["progress"]["running"]) == ("stopped", 3, 0)
    assert all(best["residual_ratio"] >= 1 for best in status["progress"]["best"].values())
    assert any(not (path.parent / "outcome.json").exists() for path in directory.glob("trials/*/checkpoint.*"))


def test_a_resumed_study_trains_what_is_left_and_gives_what_it_would_have(resumed: Any, home: Path) -> None:
    result, over, witness = resumed
    assert len(result.outcomes) == 5
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in over.items())
    assert not {path.parent.name for path in over} & set(witness.ended)
    # The trial at work did not begin again: fewer epochs were told than it and the later ones have.
    here = [outcome for outcome in result.outcomes if outcome.config.trial_id in witness.ended]
    assert len(witness.ratios) < sum(outcome.epochs for outcome in here)
    whole = run_study(home / "small.yaml", results=home / "results")
    assert figures(result) == figures(whole)
    assert read_status(result.directory)["state"] == "finished"


def test_a_terminal_shows_a_table_and_a_pipe_lines(resumed: Any, typed: Typed) -> None:
    result = resumed[0]
    code, out, _ = typed("watch", result.study_id, "--results", result.directory.parents[1])
    assert code == 0
    for outcome in result.outcomes:
        told = f"  {outcome.config.trial_id}  rank {outcome.config.rank}  {outcome.config.family}  "
        assert told + f"{STOPPED[outcome.stopped_by]}  epoch {outcome.epochs}/4  ρ " in out
    ours, theirs = pty.openpty()
    with watching(result.directory, stdout=theirs, env={**os.environ, "COLUMNS": "100", "LINES": "40"}) as watcher:
        watcher.wait(60)
    os.close(theirs)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", os.read(ours, 100_000).decode())
    os.close(ours)
    assert re.search(r"trial +rank +family +state +epoch +best", shown)
    best = min(result.outcomes, key=lambda outcome: outcome.best["val_residual_ratio"])
    assert shown.index(best.config.trial_id) == min(shown.index(each.config.trial_id) for each in result.outcomes)


def test_mlflow_has_one_run_a_trial_and_every_epoch_once_through_a_kill_and_a_stop(resumed: Any, home: Path) -> None:
    result = resumed[0]
    assert_tracked_once(local_uri(home / "results"), result.directory)
    repairs = reconcile_study(result.study_id, home / "results")
    assert not any(value for name, value in repairs.items() if name != "study_id")


@pytest.fixture(scope="module")
def extended(resumed: Any, home: Path) -> tuple[StudyResult, StudyResult, Witness]:
    witness, before = Witness(), resumed[0]
    wider = ["search.space.rank=[2, 4, 8]", "search.space.lr={loguniform: [1e-5, 1e-2]}", "keep.best=1"]
    keywords: dict[str, Any] = {"trials": 3, "overrides": wider, "results": home / "results"}
    return before, extend_study(before.study_id, progress=witness, **keywords), witness


def test_an_extension_adds_trials_to_those_that_there_are(extended: Any) -> None:
    before, after, witness = extended
    assert after.study_id == before.study_id
    assert after.outcomes[:5] == before.outcomes
    assert [outcome.config.number for outcome in after.outcomes] == list(range(8))
    assert {o.config.trial_id for o in after.outcomes[5:]} == set(witness.ended)
    rows = json.loads((after.directory / "comparison.json").read_text())
    assert {row["rank"] for row in rows} == {outcome.config.rank for outcome in after.outcomes}


def test_the_searcher_knows_the_old_trials_in_the_new_space(extended: Any) -> None:
    _, after, _ = extended
    storage = JournalStorage(JournalFileBackend(str(after.directory / "tune" / "optuna.journal")))
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).trials
    assert len(trials) == 8
    ranges = {str(trial.distributions["rank"]) for trial in trials}
    assert ranges == {"CategoricalDistribution(choices=(2, 4, 8))"}
    for trial, outcome in zip(trials, after.outcomes, strict=True):
        assert trial.params["lr"] == outcome.config.lr
        assert len(trial.intermediate_values) == outcome.epochs


def test_an_extension_is_on_record(extended: Any, home: Path, typed: Typed) -> None:
    _, after, _ = extended
    (extension,) = json.loads((after.directory / "plan.json").read_text())["extensions"]
    assert (extension["trials_before"], extension["trials"]) == (5, 8)
    assert extension["overrides"][0] == "search.space.rank=[2, 4, 8]"
    assert read_plan(after.directory).n_trials == 8
    assert "extended 5 → 8 trials" in typed("list", "--results", home / "results")[1]


def test_keep_leaves_weights_to_the_best_and_to_what_was_compared_and_all_can_be_done_again(
    extended: Any, home: Path
) -> None:
    _, after, _ = extended
    compared = {row.trial_id for row in after.comparison.rows} - {""}
    kept = {path.parent.name for path in after.directory.glob("trials/*/best_model.safetensors")}
    assert kept == compared < {outcome.config.trial_id for outcome in after.outcomes}
    for outcome in after.outcomes:
        assert {path.name for path in Path(outcome.directory).glob("*.json")} == {
            *("config.json", "history.json", "outcome.json")
        }
    again = comparison_of(open_study(home / "results", after.study_id), again=True)
    figures = [[(row.method, row.rank, row.trial_id) for row in rows] for rows in (again.rows, after.comparison.rows)]
    assert figures[0] == figures[1]


def test_whoever_waits_is_told_of_a_stop_and_of_every_end(extended: Any, killed: Any, chat: tuple[str, Any]) -> None:
    _, after, _ = extended
    told = [message for message in chat[1] if message["study_id"] == after.study_id]
    # A driver that is killed tells nobody.
    assert [(message["state"], message["done"], message["trials"]) for message in told] == [
        *(("stopped", 3, 5), ("finished", 5, 5), ("finished", 8, 8))
    ]
    assert told[-1]["text"] == f"{after.study_id}: finished, 8 of 8 trials"
    assert set(told[-1]["best"]) == {"2", "4", "8"}
