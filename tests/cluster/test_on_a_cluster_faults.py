"""What a cluster does to a study at work: the job's supervisor, the head and a node die, one after the other.

In the end every trial is over, none was trained twice, and MLflow holds each once.
"""

import json
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from lowrank_tune.tracking.store import local_uri
from tests.cluster.conftest import Command, Machines, check_finished, hold_both, over, status_of, wait_until

WIDER = ["--set", "search.space.rank=[2, 3, 4, 8]", "--set", "resources.max_concurrent=2"]
TRIALS = 8


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("name", ["../../etc", "tiny/../x", "", "/etc"])
def test_no_name_leads_out_of_the_results_directory(command: Command, name: str) -> None:
    for verb in ("status", "logs", "wait", "stop", "resume", "extend", "clone"):
        code, _, err = command(verb, name)
        assert code == 2
        assert "no study's id" in err


def test_a_study_outlives_its_supervisor_the_head_and_a_node(
    command: Command, client: Machines, study_file: Path
) -> None:
    home = client.home / "results"
    results = ["--results", str(home)]
    home.mkdir(exist_ok=True)
    # MLflow makes its database in seconds; a kill among them is tests/tracking's.
    MlflowClient(local_uri(home)).search_experiments()
    code, out, err = command("submit", str(study_file), *results, "--json", *WIDER)
    assert code == 0, err
    study_id = json.loads(out)["study_id"]
    study_dir = home / "studies" / study_id

    # A study whose supervisor dies fails, and says how to go on.
    wait_until(lambda: bool(over(study_dir)))
    driver = psutil.Process(status_of(command, study_id)["pid"])
    (supervisor,) = client.processes("head", "JobSupervisor")
    supervisor.kill()
    assert command("wait", study_id)[0] == 1
    # Ray ends a driver that nobody supervises any more: two would work on one study after `resume`.
    wait_until(lambda: gone(driver))
    failed, before = status_of(command, study_id), over(study_dir)
    assert (failed["state"], failed["progress"]["running"]) == ("failed", 0)
    assert f"lowrank-tune resume {study_id}" in failed["reason"]
    assert failed["progress"]["done"] < TRIALS
    code, _, err = command("resume", study_id)
    assert code == 0, err

    # So does one whose head is lost: without the job server, the results directory itself tells.
    driver = psutil.Process(status_of(command, study_id)["pid"])
    client.kill("head")
    wait_until(lambda: gone(driver))
    code, _, err = command("status", study_id, *results)
    assert (code, "no Ray job server answers" in err) == (1, True)
    client.kill("worker")
    client.start()
    failed = json.loads(command("status", study_id, "--json", *results)[1])
    assert failed["state"] == "failed"
    assert f"lowrank-tune resume {study_id}" in failed["reason"]
    # A new head knows no job of it, so it must be told where the results are; its job server takes a moment.
    wait_until(lambda: command("list")[0] == 0)
    code, _, err = command("resume", study_id)
    assert (code, "--results" in err) == (2, True), err
    before |= over(study_dir)
    code, _, err = command("resume", study_id, *results)
    assert code == 0, err

    # The trial of a node that dies goes on elsewhere.
    held = hold_both(client)
    driver = psutil.Process(status_of(command, study_id)["pid"])
    before |= over(study_dir)
    client.kill("worker")
    for actor in held.values():
        if not gone(actor):
            actor.resume()
    assert command("wait", study_id)[0] == 0
    assert gone(held["worker"])
    assert status_of(command, study_id)["pid"] == driver.pid
    check_finished(study_dir, TRIALS, before)
