"""Studies as jobs of a Ray cluster: one client of Ray's Job Submission API, with its token and clear refusals."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil

from lowrank_tune.cluster.study_dir import (
    JOB_VARIABLE,
    OVER,
    READY,
    absolute_paths,
    check_id,
    find_study,
    read_status,
    results_path,
    unbegun,
)
from lowrank_tune.config.loading import load_study
from lowrank_tune.config.plan import make_study_id, spec_hash
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError, LowrankTuneError, redact

STUDY_FILE = "study.yaml"
_JOB_FILE = "job"
_PACKAGE = Path(__file__).parents[1]


@contextmanager
def working_directory(job_id: str, study: Path | None = None) -> Iterator[Path]:
    """A folder with the package, and the study file as `study.yaml`; gone afterwards.

    Args:
        job_id: the job that takes it along. It is written into the folder, which makes its content the job's own: Ray
            uploads equal content once, and deletes it with the last job that uses it, even where the next one has just
            been told that it need not upload it.
        study: the file.
    """
    with TemporaryDirectory(prefix="lowrank-tune-") as folder:
        shutil.copytree(_PACKAGE, Path(folder) / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        (Path(folder) / _JOB_FILE).write_text(job_id, encoding="utf-8")
        if study is not None:
            shutil.copyfile(study, Path(folder) / STUDY_FILE)
        yield Path(folder)


STUDY, RESULTS = "lowrank.study_id", "lowrank.results"
"""Keys of a job's metadata."""
STOP_WAIT_S = 60
"""How long Ray leaves a study that it stops to end in order; Ray's own 3 s would kill it while it keeps its trials."""

_CONNECT_TIMEOUT_S = 5.0
_POLL_S = 0.5
_START_TIMEOUT_S = 600.0
_FORGET_AFTER_S = 10.0
_READING = "lowrank-tune-reading-"
_LAUNCH = ("sh", "lowrank_tune/cluster/launch.sh")
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_TOKEN_PLACES = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token"  # noqa: S105  # places, no token


@dataclass(frozen=True, slots=True)
class Job:
    """A job that works, or worked, on a study.

    Attributes:
        job_id: Ray's submission id: the study's id, for what goes on with a study `<study_id>.<hex of the time>`.
        study_id: the study.
        results: the results directory as the cluster's nodes see it.
        status: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`.
        started: seconds since 1970.
        exit_code: the driver's; None while it runs, or where it was killed.
        message: what Ray says of its end.
    """

    job_id: str
    study_id: str
    results: Path
    status: str
    started: float
    exit_code: int | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in _ENDED


class Cluster:
    """The job server of a Ray cluster.

    Args:
        address: `http://host:8265`.

    Raises:
        InputError: the address is not one of a job server.
        LowrankTuneError: nothing answers there, or it refuses the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address if "://" in address else f"http://{address}"
        self.shown = redact(self.address)
        _knock(self.address, self.shown)
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging", "_private.authentication"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they tell each step of an upload
        self._token = find_token()
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        with self._refusals_told():
            self._client = JobSubmissionClient(self.address, headers=headers)

    def submit(self, study_id: str, arguments: Sequence[str], results: Path, study: Path | None = None) -> Job:
        """Let the cluster run `lowrank-tune` with these arguments.

        Args:
            study_id: the study that it works on.
            arguments: the command line; `study.yaml` is the study file.
            results: the results directory, absolute.
            study: the study file to take along.
        """
        known = {job.job_id for job in self.jobs()}
        job_id = study_id if study_id not in known and study else f"{study_id}.{time.time_ns() // 1_000_000:x}"
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), JOB_VARIABLE: job_id, **_tracking_variables()}
        with working_directory(job_id, study) as folder, self._refusals_told():
            self._client.submit_job(
                entrypoint=shlex.join([*_LAUNCH, *arguments]),
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": environment},
                metadata={STUDY: study_id, RESULTS: str(results)},
            )
        return self.job(job_id)

    def jobs(self) -> list[Job]:
        """Every job that works or worked on a study, oldest first."""
        with self._refusals_told():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if STUDY in (details.metadata or {})]
        return sorted(jobs, key=lambda job: job.started)

    def job(self, job_id: str) -> Job:
        """One job as it stands now."""
        with self._refusals_told():
            return _job(self._client.get_job_info(job_id))

    def latest(self, name: str) -> Job | None:
        """The last job of the one study whose id is, or begins with, `name`; None where no job is of such a study.

        Raises:
            InputError: several studies' ids begin so.
        """
        jobs = self.jobs()
        found = {job.study_id for job in jobs if job.study_id.startswith(name)}
        if name not in found and len(found) > 1:
            raise InputError(f"study {name}: several begin so: {', '.join(sorted(found))}")
        wanted = name if name in found else "".join(found)
        return next((job for job in reversed(jobs) if job.study_id == wanted), None)

    def logs(self, job_id: str) -> str:
        """All that a job has printed."""
        with self._refusals_told():
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job prints, piece by piece, until it ends."""
        pieces = self._client.tail_job_logs(job_id)
        loop = asyncio.new_event_loop()
        try:
            while True:
                with self._refusals_told():
                    yield loop.run_until_complete(anext(pieces))
        except StopAsyncIteration:
            return
        finally:
            loop.run_until_complete(pieces.aclose())
            loop.close()

    def stop(self, job_id: str) -> None:
        """Ask a job to end; it gets SIGTERM, and a minute."""
        with self._refusals_told():
            self._client.stop_job(job_id)

    def wait_over(self, job_id: str, timeout_s: float | None = None) -> Job:
        """Wait until a job has ended, or until the time is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (job := self.job(job_id)).is_over and (deadline is None or time.monotonic() < deadline):
            time.sleep(_POLL_S)
        return job

    def wait_ready(self, job: Job) -> Job:
        """Wait until a job's driver has found the cluster, the results directory and the tracking server sound.

        Returns:
            The job; still `PENDING` where the cluster has no place for it yet.

        Raises:
            InputError: it found something that the user must change; told in the driver's words.
            LowrankTuneError: it ended for another reason; likewise.
        """
        ready, deadline = READY.format(study_id=job.study_id), time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            job = self.job(job.job_id)
            printed = self.logs(job.job_id) if job.status != "PENDING" else ""
            if any(line.endswith(ready) for line in printed.splitlines()):
                return job
            if job.is_over:
                error = InputError if job.exit_code == InputError.exit_code else LowrankTuneError
                raise error(f"study {job.study_id} did not start on {self.shown}: {_reason(printed, job)}")
            time.sleep(_POLL_S)
        return job

    def read(self, arguments: Sequence[str], results: Path) -> str:
        """What `lowrank-tune` prints on the cluster, for what this machine does not see; takes seconds.

        Args:
            arguments: a command that prints JSON.
            results: the results directory on the cluster.

        Raises:
            LowrankTuneError: it failed there; told in its words.
        """
        job_id = f"{_READING}{uuid.uuid4().hex[:8]}"
        self._forget_readings()
        with working_directory(job_id) as folder, self._refusals_told():
            self._client.submit_job(
                entrypoint=shlex.join([*_LAUNCH, *arguments, "--results", str(results)]),
                submission_id=job_id,
                runtime_env={"working_dir": str(folder)},
            )
        job = self.wait_over(job_id)
        printed = self.logs(job_id)
        if job.status != "SUCCEEDED":
            error = InputError if job.exit_code == InputError.exit_code else LowrankTuneError
            raise error(_reason(printed, job))
        # Before it stands what Ray prints of the entry point.
        lines = printed.splitlines()
        start = next((at for at, line in enumerate(lines) if line in {"{", "[", "[]"}), len(lines))
        return "\n".join(lines[start:])

    def _forget_readings(self) -> None:
        """Take earlier readings from the list of jobs; Ray may bring back one that is deleted as soon as it ends."""
        before = (time.time() - _FORGET_AFTER_S) * 1000
        with self._refusals_told():
            for details in self._client.list_jobs():
                if str(details.submission_id).startswith(_READING) and before > (details.end_time or math.inf):
                    self._client.delete_job(details.submission_id)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            if self._token is None:
                raise LowrankTuneError(
                    f"Ray at {self.shown} wants a token, and {_TOKEN_PLACES} hold none: put there what "
                    "`ray get-auth-token` prints on the cluster's head node"
                ) from error
            raise LowrankTuneError(
                f"Ray at {self.shown} refuses the token from {token_place()}: put there what `ray get-auth-token` "
                "prints on the cluster's head node"
            ) from error
        except (ConnectionError, OSError) as error:
            raise LowrankTuneError(_unreachable(self.shown, str(error))) from error
        except RuntimeError as error:
            raise LowrankTuneError(f"Ray at {self.shown}: {redact(str(error)).strip()}") from error


def find_token() -> str | None:
    """This user's token for Ray clusters, from the places where Ray itself looks, in its order; None without one."""
    place = token_place()
    if place is None:
        return None
    text = os.environ["RAY_AUTH_TOKEN"] if place == "RAY_AUTH_TOKEN" else Path(place).read_text(encoding="utf-8")
    return text.strip() or None


def token_place() -> str | None:
    """Where the token is found: `RAY_AUTH_TOKEN`, or a file's path.

    Raises:
        InputError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.access(path, os.R_OK):
        return str(path)
    if named:
        raise InputError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read; correct it, or unset it")
    return None


def _tracking_variables() -> dict[str, str]:
    """MLFLOW_TRACKING_URI, where this machine sets it; never a password, which anyone could read in the list of jobs.

    Raises:
        InputError: the address holds one.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redact(uri) != uri:
        raise InputError(
            f"MLFLOW_TRACKING_URI: {redact(uri)} holds credentials, and a job's environment is no secret; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the head node, and give the address alone"
        )
    return {"MLFLOW_TRACKING_URI": uri} if uri else {}


def _knock(address: str, shown: str) -> None:
    """Find out within seconds whether anything listens; Ray's client would wait for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise InputError(f"--address {shown}: the job server's address is expected, such as http://127.0.0.1:8265")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise LowrankTuneError(_unreachable(shown, str(error))) from None


def _unreachable(shown: str, why: str) -> str:
    return (
        f"no Ray job server answers at {shown} ({redact(why)}); it is part of the head node's dashboard, port 8265, "
        "which needs ray[default]: start it with `ray start --head`, or correct --address"
    )


def _job(details: Any) -> Job:
    metadata: Mapping[str, str] = details.metadata or {}
    return Job(
        job_id=str(details.submission_id),
        study_id=metadata.get(STUDY, ""),
        results=Path(metadata.get(RESULTS, "")),
        status=str(getattr(details.status, "value", details.status)),
        started=(details.start_time or 0) / 1000,
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _reason(printed: str, job: Job | None) -> str:
    """What a driver said at its end: from its error on, else its last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    start = next((at for at, line in enumerate(lines) if line.startswith("error: ")), None)
    if start is not None:
        return " ".join(lines[start:]).removeprefix("error: ")
    said = [line for line in lines if not line.startswith("Running entrypoint")]
    fallback = job.message.splitlines()[-1] if job and job.message else "it printed nothing"
    return said[-1] if said else fallback


EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 130}
"""What `wait` ends with."""

_JOB_POLL_S = 1.0
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
    # A job starts in a folder of its own.
    absolute = [f"{key}={json.dumps(path)}" for key, path in absolute_paths(spec).items()]
    settings = [word for text in (*overrides, *absolute) for word in ("--set", text)]
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


def study_logs(name: str, *, address: str | None, follow: bool = False) -> Iterator[str]:
    """What a submitted study has printed, piece by piece, and goes on to print until its job ends."""
    check_id(name)
    if address is None:
        raise InputError("logs: --address is missing; a study that `run` started prints where it was started")
    cluster = Cluster(address)
    job = cluster.latest(name)
    if job is None:
        raise InputError(f"study {name}: {cluster.shown} knows no job of it; see `lowrank-tune list`")
    return cluster.follow(job.job_id) if follow else iter([cluster.logs(job.job_id)])


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
        time.sleep(_JOB_POLL_S)
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
