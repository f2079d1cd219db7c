"""Studies as jobs of a cluster of two nodes: submitted, watched, stopped, resumed, extended; and refused."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowrank_tune.cluster.jobs import Cluster
from lowrank_tune.cluster.studies import submit_study
from lowrank_tune.errors import LowrankTuneError
from tests.cluster.conftest import (
    STUDY,
    Command,
    Machines,
    apart,
    check_finished,
    hold_both,
    over,
    status_of,
    wait_until,
)


def submit_at_once(client: Machines, study_file: Path, *settings: tuple[Path, str]) -> list[str]:
    """Submit a study a setting, each in its results directory; their ids, or what they were refused with."""

    def submit(setting: tuple[Path, str]) -> str:
        try:
            return submit_study(client.address, study_file, results=setting[0], overrides=[setting[1]]).study_id
        except LowrankTuneError as error:
            return f"{error.exit_code} {error}"

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(submit, settings))


def test_two_studies_share_a_cluster_and_one_is_stopped_resumed_and_extended(
    command: Command, client: Machines, study_file: Path
) -> None:
    results = client.home / "results"
    study_id, other = submit_at_once(
        client, study_file, (results, "search.space.rank=[2, 4]"), (results, "search.space.rank=3")
    )
    directory, others = results / "studies" / study_id, results / "studies" / other
    assert status_of(command, study_id)["state"] == "running"
    for actor in hold_both(client).values():
        actor.resume()

    wait_until(lambda: bool(over(directory)))
    assert command("stop", study_id)[0] == 0
    stopped, before = status_of(command, study_id), over(directory)
    assert stopped["state"] == "stopped"
    assert 1 <= stopped["progress"]["done"] < 4
    assert command("wait", study_id)[0] == 130
    assert "go on with: lowrank-tune resume" in command("logs", study_id)[1]
    assert command("wait", other)[0] == 0
    check_finished(others, 2, {})
    rows = json.loads((others / "comparison.json").read_text())
    assert {row["rank"] for row in rows} == {3}

    assert command("resume", study_id)[0] == 0
    assert command("resume", study_id)[0] == 2
    code, out, _ = command("logs", study_id, "-f")
    assert f"training {4 - stopped['progress']['done']} trials" in out
    assert command("wait", study_id)[0] == 0
    finished = status_of(command, study_id)
    assert finished["progress"] | {"best": None} == {
        "trials": 4, "done": 4, "running": 0, "finished": 4, "pruned": 0, "failed": 0,
        "confirmations": 0, "confirmed": 0, "eta_s": None, "best": None,
    }  # fmt: skip
    assert finished["progress"]["best"].keys() == {"2", "4"}

    assert command("extend", study_id, "--set", "search.space.rank=[2, 4, 8]")[0] == 0
    assert command("wait", study_id)[0] == 0
    check_finished(directory, 6, before)
    rates = json.loads((directory / "compression.json").read_text())["rates"]
    assert {"jpeg-q75", "webp-q75"} < {row["method"] for row in rates}, "the pictures were encoded on the cluster"
    extended = status_of(command, study_id)
    assert extended["progress"]["trials"] == extended["progress"]["done"] == 6
    assert extended in json.loads(command("list", "--json")[1])
    assert "extended 4 → 6 trials" in command("list")[1]
    rows = json.loads((directory / "comparison.json").read_text())
    assert {row["rank"] for row in rows if row["method"] == "sketch"} == {2, 4, 8}
    jobs = [job for job in Cluster(client.address).jobs() if job.study_id == study_id]
    assert [job.job_id.partition(".")[0] for job in jobs] == [study_id] * 3
    assert [job.status for job in jobs] == ["STOPPED", "SUCCEEDED", "SUCCEEDED"]
    if elsewhere := apart(results):  # where the results are not seen, the cluster is asked
        look = [*elsewhere, sys.executable, "-m", "lowrank_tune", "status", study_id, "--json"]
        environment = client.environment | {"RAY_API_SERVER_ADDRESS": client.address}
        done = subprocess.run(look, check=True, capture_output=True, text=True, env=environment)
        status = json.loads(done.stdout)
        assert (status["state"], status["progress"]["done"]) == ("finished", 6)
        watch = [*look[: look.index("status")], "watch", study_id]
        watched = subprocess.run(watch, check=True, capture_output=True, text=True, env=environment)
        assert watched.stdout.splitlines()[-1] == f"{study_id}: finished"
        assert watched.stdout.count("ran its full budget") == 6
    assert f"{study_id}: finished" in command("watch", study_id)[1]


def test_what_the_driver_finds_wrong_is_refused_in_its_words(client: Machines, study_file: Path) -> None:
    shared = client.home / "refused"
    hidden, server = submit_at_once(
        client,
        study_file,
        (client.hidden or shared, "seed=1"),
        (shared, "tracking.uri=http://127.0.0.1:9"),
    )
    assert server.startswith("1 ")
    assert "tracking server http://127.0.0.1:9 does not answer" in server
    if client.hidden is None:
        pytest.skip("this machine lets no process have a mount of its own")
    assert hidden.startswith("2 ")
    assert f"results directory {client.hidden}: node " in hidden
    assert "does not see what the driver wrote there" in hidden
    assert "mount a shared file system there, or pass --results DIR" in hidden
    assert not list(client.hidden.glob(".probe*"))


@pytest.mark.parametrize(
    ("study", "code", "said"),
    [
        (STUDY.replace("epochs", "epoch"), 2, "tiny.yaml:13"),  # before anything is sent
        (STUDY, 1, "no Ray job server answers at http://127.0.0.1:1"),
    ],
)
def test_a_wrong_file_and_a_cluster_that_nobody_started_are_told_at_once(
    command: Command, tmp_path: Path, study: str, code: int, said: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(study)
    ended, _, err = command("submit", str(tmp_path / "tiny.yaml"), "--address", "http://127.0.0.1:1")
    assert (ended, said in err) == (code, True)


def test_a_missing_and_a_wrong_token_are_told_apart(
    command: Command, cluster: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    code, _, err = command("list")
    assert (code, "refuses the token from RAY_AUTH_TOKEN" in err, "wrongwrong" in err) == (1, True, False)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    code, _, err = command("list")
    assert (code, "wants a token, and RAY_AUTH_TOKEN" in err, "ray get-auth-token" in err) == (1, True, True)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(cluster.token + "\n")
    assert command("list")[0] == 0
