"""Where studies stand, whoever runs them: a process on this machine, or a job of a cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lowrank_tune.cluster.directory import check_id, find_study, results_path
from lowrank_tune.cluster.jobs import Cluster, Job
from lowrank_tune.cluster.package import STUDY_FILE, absolute_paths
from lowrank_tune.cluster.status import OVER, read_status, unbegun
from lowrank_tune.errors import InputError, LowrankTuneError
from lowrank_tune.spec.loading import load_study
from lowrank_tune.spec.plan import make_study_id, spec_hash
from lowrank_tune.spec.schema import StudySpec

EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 130}
"""What `wait` ends with."""

_POLL_S = 1.0
_STOP_TIMEOUT_S = 75.0


def submit_study(address: str, study: Path, *, overrides: Sequence[str] = (), results: str | Path | None = None) -> Job:
    """Check a study file, submit it, and wait until its driver found cluster, results and tracking sound.

    Args:
        address: the cluster's job server.
        study: the study file; its relative paths are taken as paths from this working directory.
        overrides: `key.path=value` texts laid over it.
        results: the results directory, at a path that every node has.

    Raises:
        InputError: something in the study file, the data, the results directory or the address must be changed.
        LowrankTuneError: the cluster does not answer, refuses the token, or its driver failed.
    """
    spec = load_study(study, overrides)
    home = results_path(results)
    settings = [word for text in (*overrides, *absolute_paths(spec)) for word in ("--set", text)]
    cluster = Cluster(address)
    study_id = _free_id(cluster, spec, home)
    arguments = ["run", STUDY_FILE, "--id", study_id, "--results", str(home), *settings]
    return cluster.wait_ready(cluster.submit(study_id, arguments, home, study))


def submit_again(
    address: str, command: str, name: str, arguments: Sequence[str], *, results: str | Path | None = None
) -> Job:
    """Let a cluster `resume`, `extend` or `clone` a study.

    Args:
        address: the cluster's job server.
        command: which of the three.
        name: the study's id, or the beginning of it.
        arguments: the command's further arguments.
        results: the results directory; by default that of the study's last job, where the cluster knows it.

    Raises:
        InputError: there is no such study, or it is at work.
        LowrankTuneError: as for `submit_study`.
    """
    cluster = Cluster(address)
    last = cluster.latest(check_id(name))
    home = last.results if last and results is None else results_path(results)
    full = last.study_id if last else _full_id(cluster, home, name)
    if last and not last.is_over and command != "clone":
        raise InputError(f"study {full}: job {last.job_id} works on it; `lowrank-tune stop {full}` ends that")
    about = full
    if command == "clone":
        about = make_study_id(full.rpartition("-")[0], full, datetime.now(UTC))
        arguments = [*arguments, "--id", about]
    command_line = [command, full, "--results", str(home), *arguments]
    return cluster.wait_ready(cluster.submit(about, command_line, home))


def study_status(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Where one study stands: what status.json holds, corrected by what is known of its process or job.

    Args:
        name: its id, or the beginning of it.
        address: the cluster's job server; None for a study whose results directory this machine sees.
        results: the results directory.

    Raises:
        InputError: there is no such study.
        LowrankTuneError: the cluster does not answer.
    """
    check_id(name)
    if address is None:
        return read_status(find_study(results_path(results), name))
    cluster = Cluster(address)
    job = cluster.latest(name)
    home = job.results if job and results is None else results_path(results)
    full = job.study_id if job else name
    return _status_on(cluster, full, home, job)


def list_studies(*, address: str | None = None, results: str | Path | None = None) -> list[dict[str, Any]]:
    """Where every study stands, by its start.

    Args:
        address: a cluster's job server: its studies, and those in their results directories; None for one directory.
        results: the results directory; with an address, by default those that its jobs have.

    Raises:
        LowrankTuneError: the cluster does not answer.
    """
    if address is None:
        return _by_start(_known_in(results_path(results)))
    cluster = Cluster(address)
    latest = {job.study_id: job for job in cluster.jobs()}
    homes = {job.results for job in latest.values()} if results is None else {results_path(results)}
    found: dict[str, dict[str, Any]] = {}
    for home in sorted(homes):
        for status in _known_in(home) if _sees(home) else json.loads(cluster.read(["list", "--json"], home)):
            found[status["study_id"]] = status
    for study_id, job in latest.items():
        if job.results in homes:
            found[study_id] = _corrected(found.get(study_id) or unbegun(study_id), job)
    return _by_start(found.values())


def wait_study(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Wait until a study is over, whichever way.

    Args:
        name: as for `study_status`.
        address: as for `study_status`.
        results: as for `study_status`.
    """
    if address is not None:
        cluster = Cluster(address)
        job = cluster.latest(check_id(name))
        if job is not None:
            cluster.wait_over(job.job_id)
    return _wait(lambda: study_status(name, address=address, results=results), None)


def stop_study(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Ask a study to stop, and wait until it has: its trials keep what they have trained.

    Args:
        name: as for `study_status`.
        address: as for `study_status`.
        results: as for `study_status`.

    Raises:
        InputError: it is over already, or another machine's process works on it.
        LowrankTuneError: it did not stop in time.
    """
    status = study_status(name, address=address, results=results)
    if status["state"] in OVER:
        raise InputError(f"study {status['study_id']}: it is {status['state']} already")
    if address is None:
        _terminate(status)
    else:
        cluster = Cluster(address)
        job = cluster.latest(status["study_id"])
        if job is None:
            raise InputError(f"study {name}: no job of {cluster.shown} works on it; stop it where it was started")
        cluster.stop(job.job_id)
        cluster.wait_over(job.job_id, _STOP_TIMEOUT_S)
    status = _wait(lambda: study_status(status["study_id"], address=address, results=results), _STOP_TIMEOUT_S)
    if status["state"] not in OVER:
        raise LowrankTuneError(f"study {status['study_id']}: still {status['state']} after {_STOP_TIMEOUT_S:.0f} s")
    return status


def _free_id(cluster: Cluster, spec: StudySpec, home: Path) -> str:
    taken = {job.study_id for job in cluster.jobs()}
    while True:
        # Its microsecond tells apart what is submitted at once.
        study_id = make_study_id(spec.name, spec_hash(spec), datetime.now(UTC))
        if study_id not in taken and not (home / "studies" / study_id).exists():
            return study_id


def _status_on(cluster: Cluster, full: str, home: Path, job: Job | None) -> dict[str, Any]:
    directory = home / "studies" / full
    if (directory / "status.json").exists():
        status = read_status(directory)
    elif job is not None and (_sees(home) or job.status == "PENDING"):
        status = unbegun(full)
    else:
        status = json.loads(cluster.read(["status", full, "--json"], home))
    return _corrected(status, job) if job else status


def _corrected(status: dict[str, Any], job: Job) -> dict[str, Any]:
    """A study's own word, and what its last job adds: before the driver has begun, and after it was killed."""
    if not job.is_over:
        begun = status["job"] == job.job_id
        return status if begun else {**status, "state": "pending", "ended": None, "reason": "", "job": job.job_id}
    if status["state"] in {"pending", "running"}:
        last = job.message.splitlines()[-1] if job.message else f"job {job.job_id} is {job.status}"
        progress = {**status["progress"], "running": 0, "eta_s": None} if status.get("progress") else {}
        reason = f"{last}; go on with `lowrank-tune resume {status['study_id']}`"
        state = "stopped" if job.status == "STOPPED" else "failed"
        return {**status, "state": state, "reason": reason, "progress": progress}
    return status


def _full_id(cluster: Cluster, home: Path, name: str) -> str:
    if _sees(home):
        return find_study(home, name).name
    return str(json.loads(cluster.read(["status", name, "--json"], home))["study_id"])


def _sees(home: Path) -> bool:
    return (home / "studies").is_dir()


def _known_in(home: Path) -> list[dict[str, Any]]:
    return [read_status(path.parent) for path in (home / "studies").glob("*/plan.json")]


def _by_start(statuses: Any) -> list[dict[str, Any]]:
    return sorted(statuses, key=lambda status: (status["started"] is None, status["started"] or "", status["study_id"]))


def _wait(look: Callable[[], dict[str, Any]], timeout_s: float | None) -> dict[str, Any]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while (status := look())["state"] not in OVER and (deadline is None or time.monotonic() < deadline):
        time.sleep(_POLL_S)
    return status


def _terminate(status: dict[str, Any]) -> None:
    """Send SIGTERM to a study's own process on this machine."""
    study_id, host = status["study_id"], status.get("host")
    if host != socket.gethostname():
        raise InputError(f"study {study_id}: it runs on {host}; stop it there, or pass --address")
    try:
        if psutil.Process(status["pid"]).create_time() == status["pid_started"]:
            os.kill(status["pid"], signal.SIGTERM)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
