"""Studies submitted to a Ray cluster, or in a results directory: submitted, gone on with, watched and stopped."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lowrank_tune.cluster.jobs import STOP_TIMEOUT_S, STUDY_FILE, Cluster, Job, wait_until
from lowrank_tune.cluster.study_dir import (
    OVER,
    check_id,
    find_study,
    read_status,
    results_path,
    study_folders,
    unbegun,
)
from lowrank_tune.config.loading import load_study
from lowrank_tune.config.paths import anchors
from lowrank_tune.config.plan import make_study_id, spec_hash
from lowrank_tune.errors import InputError, LowrankTuneError


def submit_study(address: str, study: Path, *, overrides: Sequence[str] = (), results: str | Path | None = None) -> Job:
    """Check a study file, submit it, and wait until its driver found cluster, results and tracking sound.

    Relative paths in the file are from this working directory; the results directory is a path that every node has.

    Raises:
        InputError: something in the study file, the data, the results directory or the address must be changed.
        LowrankTuneError: the cluster does not answer, refuses the token, or its driver failed.
    """
    spec = load_study(study, overrides)
    home = results_path(results)
    cluster = Cluster(address)
    taken = {job.study_id for job in cluster.jobs()}
    while True:
        # Its microsecond tells apart what is submitted at once.
        study_id = make_study_id(spec.name, spec_hash(spec), datetime.now(UTC))
        if study_id not in taken and not (home / "studies" / study_id).exists():
            break
    changes = _set([*overrides, *anchors(spec)])  # a job starts in a folder of its own
    return cluster.submit(study_id, ["run", STUDY_FILE, "--id", study_id, *changes], home, study)


def submit_again(
    address: str,
    command: str,
    name: str,
    *,
    trials: int = 0,
    overrides: Sequence[str] = (),
    results: str | Path | None = None,
) -> Job:
    """Let a cluster `resume`, `extend` or `clone` a study, by default in the results directory of its last job.

    Raises:
        InputError: there is no such study, it is at work, or something must be changed.
        LowrankTuneError: the cluster does not answer, refuses the token, or its driver failed.
    """
    cluster = Cluster(address)
    last, home = _last_job(cluster, name, results)
    full = last.study_id if last else _status(cluster, name, home, None)["study_id"]
    if last and not last.is_over and command != "clone":
        raise InputError(f"study {full}: job {last.job_id} works on it; `lowrank-tune stop {full}` ends that")
    arguments = [command, full, *(["--trials", str(trials)] if trials else []), *_set(overrides)]
    about = full
    if command == "clone":
        about = make_study_id(full.rpartition("-")[0], full, datetime.now(UTC))
        arguments += ["--id", about]
    return cluster.submit(about, arguments, home)


def study_status(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Where one study stands: what status.json holds, corrected by what is known of its process or job."""
    check_id(name)
    if address is None:
        return read_status(find_study(results_path(results), name))
    cluster = Cluster(address)
    job, home = _last_job(cluster, name, results)
    return _status(cluster, job.study_id if job else name, home, job)


def list_studies(*, address: str | None = None, results: str | Path | None = None) -> list[dict[str, Any]]:
    """Where every study stands, by its start: those of one results directory, or of a cluster's jobs."""
    cluster = Cluster(address) if address is not None else None
    latest = {job.study_id: job for job in cluster.jobs()} if cluster else {}
    homes = {job.results for job in latest.values()} if cluster and results is None else {results_path(results)}
    found: dict[str, dict[str, Any]] = {}
    for home in sorted(homes):
        if cluster is None or _sees(home):
            known = [read_status(directory) for directory in study_folders(home)]
        else:
            known = cluster.read(["list"], home)
        found |= {status["study_id"]: status for status in known}
    for study_id, job in latest.items():
        if job.results in homes:
            found[study_id] = _corrected(found.get(study_id) or unbegun(study_id), job)
    return sorted(
        found.values(), key=lambda status: (status["started"] is None, status["started"] or "", status["study_id"])
    )


def study_logs(name: str, *, address: str | None, follow: bool = False) -> Iterator[str]:
    """What a submitted study prints, piece by piece, until its job ends."""
    check_id(name)
    if address is None:
        raise InputError("logs: --address is missing; a study that `run` started prints where it was started")
    cluster = Cluster(address)
    job = cluster.latest(name)
    if job is None:
        raise InputError(f"study {name}: {cluster.shown} knows no job of it; see `lowrank-tune list`")
    return cluster.follow(job.job_id) if follow else iter([cluster.logs(job.job_id)])


def visible_folder(name: str, *, address: str | None = None, results: str | Path | None = None) -> Path | None:
    """Where this machine sees a study's files; None where only its cluster does. A job that waits is waited for."""
    if address is None:
        return find_study(results_path(results), name)
    cluster = Cluster(address)
    job, home = _last_job(cluster, name, results)
    if job:
        wait_until(lambda: cluster.job(job.job_id), lambda seen: seen.status != "PENDING")
    return (home / "studies" / job.study_id if job else find_study(home, name)) if _sees(home) else None


def stream_study(name: str, *, address: str, results: str | Path | None = None) -> Iterator[str]:
    """What `watch` prints of a study on its cluster, piece by piece, until the study is over."""
    cluster = Cluster(address)
    job, home = _last_job(cluster, name, results)
    return cluster.stream(["watch", job.study_id if job else name], home)


def wait_study(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Wait until a study is over, whichever way; its status then."""
    if address is not None:
        cluster = Cluster(address)
        if job := cluster.latest(name):
            cluster.wait_over(job.job_id)
    return wait_until(lambda: study_status(name, address=address, results=results), lambda seen: seen["state"] in OVER)


def stop_study(name: str, *, address: str | None = None, results: str | Path | None = None) -> dict[str, Any]:
    """Ask a study to stop, and wait until it has: its trials keep what they have trained.

    Raises:
        InputError: there is no such study, it is over already, or another machine's process works on it.
        LowrankTuneError: it did not stop in time, or the cluster does not answer.
    """
    status = study_status(name, address=address, results=results)
    study_id = status["study_id"]
    if status["state"] in OVER:
        raise InputError(f"study {study_id}: it is {status['state']} already")
    if address is None:
        _terminate(status)
    else:
        cluster = Cluster(address)
        job = cluster.latest(study_id)
        if job is None:
            raise InputError(f"study {name}: no job of {cluster.shown} works on it; stop it where it was started")
        cluster.stop(job.job_id)
    status = wait_until(
        lambda: study_status(study_id, address=address, results=results),
        lambda seen: seen["state"] in OVER,
        STOP_TIMEOUT_S,
    )
    if status["state"] not in OVER:
        raise LowrankTuneError(f"study {study_id}: still {status['state']} after {STOP_TIMEOUT_S:.0f} s")
    return status


def _set(overrides: Iterable[str]) -> list[str]:
    return [word for text in overrides for word in ("--set", text)]


def _last_job(cluster: Cluster, name: str, results: str | Path | None) -> tuple[Job | None, Path]:
    job = cluster.latest(name)
    return job, job.results if job and results is None else results_path(results)


def _status(cluster: Cluster, name: str, home: Path, job: Job | None) -> dict[str, Any]:
    """A study's own word, corrected by its last job."""
    if (home / "studies" / name / "status.json").exists() or (job is None and _sees(home)):
        status = read_status(find_study(home, name))
    elif job is not None and (_sees(home) or job.status == "PENDING"):
        status = unbegun(name)
    else:
        status = cluster.read(["status", name], home)
    return _corrected(status, job) if job else status


def _corrected(status: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a study's last job adds: before the driver has begun, and after it was killed."""
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


def _sees(home: Path) -> bool:
    return (home / "studies").is_dir()


def _terminate(status: dict[str, Any]) -> None:
    if status.get("host") != socket.gethostname():
        raise InputError(
            f"study {status['study_id']}: it runs on {status.get('host')}; stop it there, or pass --address"
        )
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        if psutil.Process(status["pid"]).create_time() == status["pid_started"]:
            os.kill(status["pid"], signal.SIGTERM)
