"""Studies as jobs of a Ray cluster: one client of Ray's Job Submission API, with its token and clear refusals."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shlex
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowrank_tune.cluster.package import working_directory
from lowrank_tune.cluster.status import JOB_VARIABLE, READY
from lowrank_tune.errors import InputError, LowrankTuneError, redact

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
