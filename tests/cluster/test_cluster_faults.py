"""What a cluster does to a study at work: a node, the job's supervisor and the head die, and two studies meet.

Each test ends with the same questions: is every trial over, was none trained twice, does MLflow hold each once.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lowrank_tune.cluster.jobs import submit_study
from lowrank_tune.tracking.store import local_uri
from tests.cluster.conftest import STUDY, Command, RayCluster, status_of, wait_until
from tests.tracked_once import assert_tracked_once

Submit = Callable[..., Path]
# Long enough to be met in the middle; where two trainings must meet, the file's own 200 epochs are.
SHORT = ("--set", "training.epochs=100", "--set", "training.patience=100")


@pytest.fixture
def submit(command: Command, client: RayCluster) -> Submit:
    """Submits the small study; its folder."""
    study_file = client.home / "tiny.yaml"
    study_file.write_text(STUDY)

    def call(*settings: str) -> Path:
        where = ["--results", str(client.home / "results")]
        code, out, err = command("submit", str(study_file), *where, "--json", *settings)
        assert code == 0, err
        return client.home / "results" / "studies" / str(json.loads(out)["study_id"])

    return call


def over(study_dir: Path) -> dict[Path, int]:
    """Of the trials that have ended: their files, and when each was written."""
    ended = [path.parent for path in study_dir.glob("trials/*/outcome.json")]
    return {path: path.stat().st_mtime_ns for folder in ended for path in folder.iterdir()}


def at_work(study_dir: Path) -> set[str]:
    """The trials that have kept a checkpoint and have not ended."""
    begun = [path.parent for path in study_dir.glob("trials/*/checkpoint.safetensors")]
    return {folder.name for folder in begun if not (folder / "outcome.json").exists()}


def in_the_middle(study_dir: Path) -> dict[Path, int]:
    """Wait until a trial is over and another at work; what there is of those that are over."""
    wait_until(lambda: bool(over(study_dir)) and bool(at_work(study_dir)))
    return over(study_dir)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def check_finished(study_dir: Path, before: dict[Path, int], epochs: int = 200) -> str:
    """Check that all trials are over and those that were over are as they were; the id of the study's MLflow run."""
    outcomes = [json.loads(path.read_text()) for path in study_dir.glob("trials/*/outcome.json")]
    assert [(outcome["status"], outcome["epochs"]) for outcome in outcomes] == [("finished", epochs)] * 4
    kept = {path: stamp for path, stamp in before.items() if path.name != "loss_curves.png"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    return assert_tracked_once(local_uri(study_dir.parent.parent), study_dir)


def test_the_trials_of_a_node_that_dies_go_on_elsewhere(command: Command, client: RayCluster, submit: Submit) -> None:
    study_dir = submit("--set", "resources.max_concurrent=2")
    # The cluster has one CPU a node, so that one of two trials is on the worker.
    wait_until(lambda: len(at_work(study_dir)) == 2)
    lost, before = client.machines.processes("worker", "TrialActor"), over(study_dir)
    assert len(lost) == 1
    client.machines.kill("worker")
    assert command("wait", study_dir.name)[0] == 0
    assert gone(lost[0])
    assert status_of(command, study_dir.name)["progress"]["finished"] == 4
    check_finished(study_dir, before)
    client.machines.start("worker")


def test_a_study_whose_supervisor_dies_fails_says_so_and_goes_on(
    command: Command, client: RayCluster, submit: Submit
) -> None:
    study_dir = submit(*SHORT)
    before = in_the_middle(study_dir)
    driver = psutil.Process(status_of(command, study_dir.name)["pid"])
    (supervisor,) = client.machines.processes("head", "JobSupervisor")
    supervisor.kill()
    assert command("wait", study_dir.name)[0] == 1
    # Ray ends a driver that nobody supervises any more: two would work on one study after `resume`.
    wait_until(lambda: gone(driver))
    failed = status_of(command, study_dir.name)
    assert (failed["state"], failed["progress"]["running"]) == ("failed", 0)
    assert f"lowrank-tune resume {study_dir.name}" in failed["reason"]
    assert failed["progress"]["done"] < 4  # as of its last write, at most a second before
    code, _, err = command("resume", study_dir.name)
    assert code == 0, err
    assert command("wait", study_dir.name)[0] == 0
    check_finished(study_dir, before, epochs=100)


def test_a_study_goes_on_after_its_head_was_lost_and_started_again(
    command: Command, client: RayCluster, submit: Submit
) -> None:
    study_dir = submit(*SHORT)
    before = in_the_middle(study_dir)
    driver = psutil.Process(status_of(command, study_dir.name)["pid"])
    client.machines.kill("head")
    wait_until(lambda: gone(driver))
    # Without the job server, the results directory itself tells.
    results = ["--results", str(study_dir.parent.parent)]
    code, _, err = command("status", study_dir.name, *results)
    assert (code, "no Ray job server answers" in err) == (1, True)
    client.machines.kill("worker")
    client.machines.start("head")
    client.machines.start("worker")
    failed = json.loads(command("status", study_dir.name, "--json", *results)[1])
    assert failed["state"] == "failed"
    assert f"lowrank-tune resume {study_dir.name}" in failed["reason"]
    # A new head knows no job of it, so it must be told where the results are.
    code, _, err = command("resume", study_dir.name)
    assert code == 2
    assert "--results" in err
    assert command("resume", study_dir.name, *results)[0] == 0
    assert command("wait", study_dir.name)[0] == 0
    check_finished(study_dir, before, epochs=100)


def test_two_studies_at_once_share_a_cluster(command: Command, client: RayCluster, submit: Submit) -> None:
    study_file, results = client.home / "tiny.yaml", client.home / "results"
    with ThreadPoolExecutor(2) as pool:
        jobs = list(
            pool.map(
                lambda rank: submit_study(
                    client.address, study_file, overrides=[f"search.space.rank={rank}"], results=results
                ),
                ([2, 4], [3, 6]),
            )
        )
    folders = [results / "studies" / job.study_id for job in jobs]
    assert len(set(folders)) == 2
    wait_until(lambda: all(at_work(folder) for folder in folders))
    assert [command("wait", folder.name)[0] for folder in folders] == [0, 0]
    parents = {check_finished(folder, {}) for folder in folders}
    assert len(parents) == 2
    for folder, ranks in zip(folders, ({2, 4}, {3, 6}), strict=True):
        configs = [json.loads(path.read_text()) for path in folder.glob("trials/*/config.json")]
        assert sorted(config["rank"] for config in configs) == sorted([*ranks, *ranks])
        rows = json.loads((folder / "comparison.json").read_text())
        assert {row["rank"] for row in rows if row["method"] == "sketch"} == ranks
