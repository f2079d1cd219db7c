"""Studies as jobs of a cluster of two nodes: submitted, watched, stopped, resumed, extended; and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_tune.cluster.jobs import Cluster
from tests.cluster.conftest import STUDY, Command, RayCluster, apart, status_of, wait_until


def test_a_study_lives_on_a_cluster(command: Command, client: RayCluster, study_file: Path) -> None:
    results = client.home / "results"
    code, out, _ = command("submit", str(study_file), "--results", str(results), "--json")
    assert code == 0
    study_id = json.loads(out)["study_id"]
    directory = results / "studies" / study_id
    assert status_of(command, study_id)["state"] == "running"

    # Ray's own command knows the job by the study's id, and stops it in order.
    wait_until(lambda: bool(list(directory.glob("trials/*/outcome.json"))))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--address", client.address, study_id]
    subprocess.run(ray, check=True, capture_output=True, env=client.environment)
    stopped = status_of(command, study_id)
    assert stopped["state"] == "stopped"
    assert 1 <= stopped["progress"]["done"] < 4
    assert command("wait", study_id)[0] == 130
    over = {path: path.stat().st_mtime_ns for path in directory.glob("trials/*/outcome.json")}
    assert "go on with: lowrank-tune resume" in command("logs", study_id)[1]

    assert command("resume", study_id)[0] == 0
    assert command("resume", study_id)[0] == 2
    code, out, _ = command("logs", study_id, "-f")
    assert f"training {4 - len(over)} trials" in out
    assert command("wait", study_id)[0] == 0
    finished = status_of(command, study_id)
    assert finished["progress"] | {"best": None} == {
        "trials": 4, "done": 4, "running": 0, "finished": 4, "pruned": 0, "failed": 0,
        "confirmations": 0, "confirmed": 0, "eta_s": None, "best": None,
    }  # fmt: skip
    assert finished["progress"]["best"].keys() == {"2", "4"}
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in over.items())

    assert command("extend", study_id, "--set", "search.space.rank=[2, 4, 8]")[0] == 0
    assert command("wait", study_id)[0] == 0
    extended = status_of(command, study_id)
    assert extended["progress"]["trials"] == extended["progress"]["done"] == 6
    (listed,) = json.loads(command("list", "--json")[1])
    assert listed == extended
    assert "extended 4 → 6 trials" in command("list")[1]
    rows = json.loads((directory / "comparison.json").read_text())
    assert {row["rank"] for row in rows if row["method"] == "sketch"} == {2, 4, 8}
    jobs = [job for job in Cluster(client.address).jobs() if job.study_id == study_id]
    assert [job.job_id.partition(".")[0] for job in jobs] == [study_id] * 3
    assert [job.status for job in jobs] == ["STOPPED", "SUCCEEDED", "SUCCEEDED"]

    _read_where_the_results_are_not_seen(client, study_id, results)


def _read_where_the_results_are_not_seen(client: RayCluster, study_id: str, results: Path) -> None:
    elsewhere = apart(results)
    if not elsewhere:
        return
    look = [*elsewhere, sys.executable, "-m", "lowrank_tune", "status", study_id[:-2], "--json"]
    environment = client.environment | {"RAY_API_SERVER_ADDRESS": client.address}
    done = subprocess.run(look, check=True, capture_output=True, text=True, env=environment)
    status = json.loads(done.stdout)
    assert (status["state"], status["progress"]["done"]) == ("finished", 6)


def test_a_results_directory_that_nodes_do_not_share_is_refused_in_the_drivers_words(
    command: Command, client: RayCluster, study_file: Path
) -> None:
    if client.hidden is None:
        pytest.skip("this machine lets no process have a mount of its own")
    code, _, err = command("submit", str(study_file), "--results", str(client.hidden))
    assert code == 2
    assert f"results directory {client.hidden}: node " in err
    assert "does not see what the driver wrote there" in err
    assert "mount a shared file system there, or pass --results DIR" in err
    assert not list(client.hidden.glob(".probe*"))


def test_a_tracking_server_that_the_cluster_does_not_reach_is_refused(
    command: Command, client: RayCluster, study_file: Path
) -> None:
    code, _, err = command(
        "submit", str(study_file), "--results", str(client.home / "results"), "--set", "tracking.uri=http://127.0.0.1:9"
    )
    assert code == 1
    assert "tracking server http://127.0.0.1:9 does not answer" in err


def test_a_wrong_file_is_refused_before_anything_is_sent(command: Command, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(STUDY.replace("epochs", "epoch"))
    code, _, err = command("submit", str(wrong), "--address", "http://127.0.0.1:1")
    assert code == 2
    assert "wrong.yaml:13" in err


def test_a_missing_and_a_wrong_token_are_told_apart(
    command: Command, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    code, _, err = command("list")
    assert code == 1
    assert "refuses the token from RAY_AUTH_TOKEN" in err
    assert "wrongwrong" not in err
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    code, _, err = command("list")
    assert code == 1
    assert "wants a token, and RAY_AUTH_TOKEN" in err
    assert "ray get-auth-token" in err
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(cluster.token + "\n")
    assert command("list")[0] == 0


def test_a_cluster_that_nobody_started_is_told_at_once(command: Command) -> None:
    code, _, err = command("list", "--address", "http://127.0.0.1:1")
    assert code == 1
    assert "no Ray job server answers at http://127.0.0.1:1" in err


@pytest.mark.parametrize("name", ["../../etc", "tiny/../x", "", "/etc"])
def test_no_name_leads_out_of_the_results_directory(command: Command, name: str) -> None:
    for verb in ("status", "logs", "wait", "stop", "resume", "extend", "clone"):
        code, _, err = command(verb, name)
        assert code == 2
        assert "no study's id" in err
