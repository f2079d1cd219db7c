"""A Ray cluster: its job server, which starts `lowrank-tune` there, and whether its nodes share a results directory.

Ray is imported only where a cluster is talked to: `list` and `status` answer at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lowrank_tune.cluster.study_dir import JOB_VARIABLE, READY, check_id
from lowrank_tune.errors import InputError, LowrankTuneError, redact

_STUDY, _RESULTS = "lowrank.study_id", "lowrank.results"  # keys of a job's metadata
STUDY_FILE = "study.yaml"  # a study file that a job takes along
_PACKAGE = Path(__file__).parents[1]
_LAUNCH = ("sh", "lowrank_tune/cluster/launch.sh")
_DRIVERS = "driver"
_READING = "lowrank-tune-reading-"
_STOP_WAIT_S = 60  # Ray's own 3 s would kill a study while it keeps what its trials have trained
STOP_TIMEOUT_S = 75.0
_START_TIMEOUT_S, _CONNECT_TIMEOUT_S, _PROBE_TIMEOUT_S = 600.0, 5.0, 60.0
_FORGET_AFTER_S, _POLL_S = 10.0, 0.5
_Seen = TypeVar("_Seen")


@dataclass(frozen=True, slots=True)
class Job:
    """A job that works, or worked, on a study."""

    job_id: str  # Ray's submission id: the study's id, for what goes on with a study `<study_id>.<hex of the time>`
    study_id: str
    results: Path  # as the cluster's nodes see it
    status: str  # `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`
    exit_code: int | None  # the driver's; None while it runs, or where it was killed
    message: str  # what Ray says of its end

    @property
    def is_over(self) -> bool:
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}


class Cluster:
    """The job server of a Ray cluster, `http://host:8265`.

    Raises:
        InputError: the address is not one of a job server.
        LowrankTuneError: nothing answers there, or it refuses the token.
    """

    def __init__(self, address: str) -> None:
        self.address = address if "://" in address else f"http://{address}"
        self.shown = redact(self.address)
        self._knock()
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging", "_private.authentication"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they tell each step of an upload
        token, self._token_place = find_token()
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._client = self._ask(JobSubmissionClient, self.address, headers=headers)

    def submit(self, study_id: str, arguments: Sequence[str], results: Path, study: Path | None = None) -> Job:
        """Let the cluster run `lowrank-tune`, `study.yaml` its study file; returns once the driver found all sound.

        The job is `PENDING` where the cluster has no place for it yet. An InputError or LowrankTuneError in the
        driver's own words where it found something wrong.
        """
        known = {job.job_id for job in self.jobs()}
        job_id = study_id if study_id not in known and study else f"{study_id}.{time.time_ns() // 1_000_000:x}"
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), JOB_VARIABLE: job_id, **_tracking_variables()}
        metadata = {_STUDY: study_id, _RESULTS: str(results)}
        self._send(job_id, [*arguments, "--results", str(results)], study, environment, metadata)
        ready, deadline = READY.format(study_id=study_id), time.monotonic() + _START_TIMEOUT_S
        while True:
            job = self.job(job_id)
            printed = self.logs(job_id) if job.status != "PENDING" else ""
            if any(line.endswith(ready) for line in printed.splitlines()) or time.monotonic() > deadline:
                return job
            if job.is_over:
                raise _error(job, printed, f"study {study_id} did not start on {self.shown}: ")
            time.sleep(_POLL_S)

    def read(self, arguments: Sequence[str], results: Path) -> Any:
        """What `lowrank-tune … --json` prints on the cluster; takes seconds."""
        for details in self._ask(self._client.list_jobs):
            # Ray may bring back a job that is deleted as soon as it ends.
            ended = (details.end_time or math.inf) / 1000
            if str(details.submission_id).startswith(_READING) and time.time() - _FORGET_AFTER_S > ended:
                self._ask(self._client.delete_job, details.submission_id)
        job_id = f"{_READING}{uuid.uuid4().hex[:8]}"
        self._send(job_id, [*arguments, "--json", "--results", str(results)])
        job, printed = self.wait_over(job_id), self.logs(job_id)
        if job.status != "SUCCEEDED":
            raise _error(job, printed)
        lines = printed.splitlines()  # first what Ray prints of the entry point
        start = next((at for at, line in enumerate(lines) if line in {"{", "[", "[]"}), len(lines))
        return json.loads("\n".join(lines[start:]))

    def stream(self, arguments: Sequence[str], results: Path) -> Iterator[str]:
        """What `lowrank-tune …` prints on the cluster, piece by piece, until it ends or nobody wants more of it."""
        job_id = f"{_READING}{uuid.uuid4().hex[:8]}"
        self._send(job_id, [*arguments, "--results", str(results)])
        try:
            for piece in self.follow(job_id):
                yield re.sub(r"(?m)^.*Running entrypoint for job.*\n", "", piece)
        finally:
            if not self.job(job_id).is_over:
                self.stop(job_id)

    def jobs(self) -> list[Job]:
        """Every job on a study, oldest first."""
        found = sorted(self._ask(self._client.list_jobs), key=lambda details: details.start_time or 0)
        return [_job(details) for details in found if _STUDY in (details.metadata or {})]

    def job(self, job_id: str) -> Job:
        return _job(self._ask(self._client.get_job_info, job_id))

    def latest(self, name: str) -> Job | None:
        """The last job, if any, of the one study whose id begins with `name`; several studies are an InputError."""
        check_id(name)
        jobs = self.jobs()
        found = {job.study_id for job in jobs if job.study_id.startswith(name)}
        if name not in found and len(found) > 1:
            raise InputError(f"study {name}: several begin so: {', '.join(sorted(found))}")
        wanted = name if name in found else "".join(found)
        return next((job for job in reversed(jobs) if job.study_id == wanted), None)

    def logs(self, job_id: str) -> str:
        return str(self._ask(self._client.get_job_logs, job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        shown, over = 0, False
        while not over:
            over = self.job(job_id).is_over
            printed = self.logs(job_id)
            yield printed[shown:]
            shown = len(printed)
            if not over:
                time.sleep(_POLL_S)

    def stop(self, job_id: str) -> None:
        """End a job by SIGTERM within a minute."""
        self._ask(self._client.stop_job, job_id)
        self.wait_over(job_id, STOP_TIMEOUT_S)

    def wait_over(self, job_id: str, timeout_s: float = math.inf) -> Job:
        return wait_until(lambda: self.job(job_id), lambda job: job.is_over, timeout_s)

    def _send(
        self,
        job_id: str,
        arguments: Sequence[str],
        study: Path | None = None,
        environment: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Submit a folder with the package and, as `study.yaml`, the study file."""
        with TemporaryDirectory(prefix="lowrank-tune-") as folder:
            shutil.copytree(_PACKAGE, Path(folder, _PACKAGE.name), ignore=shutil.ignore_patterns("__pycache__", ".*"))
            # It makes the folder's content the job's own: Ray uploads equal content once, and deletes it with the last
            # job that uses it, even where the next one has just been told that it need not upload it.
            Path(folder, "job").write_text(job_id, encoding="utf-8")
            if study is not None:
                shutil.copyfile(study, Path(folder, STUDY_FILE))
            self._ask(
                self._client.submit_job,
                entrypoint=shlex.join([*_LAUNCH, *arguments]),
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": environment or {}},
                metadata=metadata,
            )

    def _knock(self) -> None:
        """Find out within seconds whether anything listens; Ray's client would wait for minutes."""
        parts = urlsplit(self.address)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InputError(
                f"--address {self.shown}: the job server's address is expected, such as http://127.0.0.1:8265"
            )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> LowrankTuneError:
        return LowrankTuneError(
            f"no Ray job server answers at {self.shown} ({redact(str(error))}); it is part of the head node's "
            "dashboard, port 8265, which needs ray[default]: start it with `ray start --head`, or correct --address"
        )

    def _ask(self, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Call Ray's client; what it refuses, or that nobody answers, is a LowrankTuneError."""
        from ray.exceptions import AuthenticationError

        try:
            return call(*arguments, **settings)
        except AuthenticationError as error:
            lacks = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token hold none"
            place = self._token_place
            said = f"refuses the token from {place}" if place else f"wants a token, and {lacks}"
            raise LowrankTuneError(
                f"Ray at {self.shown} {said}: put there what `ray get-auth-token` prints on the cluster's head node"
            ) from error
        except (ConnectionError, OSError) as error:
            raise self._unreachable(error) from error
        except RuntimeError as error:
            raise LowrankTuneError(f"Ray at {self.shown}: {redact(str(error)).strip()}") from error


def find_token() -> tuple[str, str]:
    """This user's token for Ray clusters and where it is, as Ray itself looks for it; both empty without one."""
    if token := os.environ.get("RAY_AUTH_TOKEN", ""):
        return token.strip(), "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.access(path, os.R_OK):
        token = path.read_text(encoding="utf-8").strip()
        return token, str(path) if token else ""
    if named:
        raise InputError(f"RAY_AUTH_TOKEN_PATH: {path} cannot be read; correct it, or unset it")
    return "", ""


def _tracking_variables() -> dict[str, str]:
    """MLFLOW_TRACKING_URI, refused with a password, which a list of jobs shows, or a path that no job keeps."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redact(uri) != uri:
        raise InputError(
            f"MLFLOW_TRACKING_URI: {redact(uri)} holds credentials, and a job's environment is no secret; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the head node, and give the address alone"
        )
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise InputError(
            f"MLFLOW_TRACKING_URI: {uri} lies in a job's working directory, which goes with the job; give the whole "
            "path, sqlite:////…, or unset it"
        )
    return {"MLFLOW_TRACKING_URI": uri} if uri else {}


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        job_id=str(details.submission_id),
        study_id=metadata.get(_STUDY, ""),
        results=Path(metadata.get(_RESULTS, "")),
        status=str(getattr(details.status, "value", details.status)),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _error(job: Job, printed: str, before: str = "") -> LowrankTuneError:
    """What a driver said at its end: from its error on, else its last line."""
    lines = [
        line.strip() for line in printed.splitlines() if line.strip() and not line.startswith("Running entrypoint")
    ]
    start = next((at for at, line in enumerate(lines) if line.startswith("error: ")), -1)
    said = " ".join(lines[start:]).removeprefix("error: ") or "".join(job.message.splitlines()[-1:])
    kind = InputError if job.exit_code == InputError.exit_code else LowrankTuneError
    return kind(before + (said or "it printed nothing"))


def wait_until(look: Callable[[], _Seen], is_over: Callable[[_Seen], bool], timeout_s: float = math.inf) -> _Seen:
    """Look until it is over, or the time is; the last that was seen."""
    deadline = time.monotonic() + timeout_s
    while not is_over(seen := look()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return seen


def check_shared(results: Path) -> None:
    """Refuse a results directory where a node of the Ray at work and this process do not see what the other writes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    folder, problems = results / f".probe-{uuid.uuid4().hex}", []
    folder.mkdir()
    try:
        Path(folder, _DRIVERS).touch()
        looks = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            look = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_look)
            looks[look.remote(str(folder), node)] = node
        ray.wait(list(looks), num_returns=len(looks), timeout=_PROBE_TIMEOUT_S)
        for task, node in looks.items():
            try:
                finding = ray.get(task, timeout=0) or ("" if Path(folder, node).exists() else "writes to another place")
            except ray.exceptions.GetTimeoutError:
                finding = f"did not answer in {_PROBE_TIMEOUT_S:.0f} s"
            except ray.exceptions.RayError as error:
                finding = f"could not look ({str(error).splitlines()[0]})"
            if finding:
                problems.append(f"node {nodes[node]} {finding}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if problems:
        raise InputError(
            f"results directory {results}: {'; '.join(sorted(problems))}; every node must have it at this path: mount "
            "a shared file system there, or pass --results DIR"
        )


def _look(folder: str, node: str) -> str:
    """On a node: read what the driver wrote, and write a file named like the node; what is wrong, if anything."""
    if not Path(folder, _DRIVERS).exists():
        return "does not see what the driver wrote there"
    try:
        Path(folder, node).touch()
    except OSError as error:
        return f"cannot write to it ({error.strerror})"
    return ""
