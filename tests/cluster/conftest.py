"""A real Ray cluster of two raylets on this machine, with token and job server, as `ray start` makes one."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from lowrank_tune.cli import run
from lowrank_tune.tracking.store import local_uri
from tests.tracked_once import assert_tracked_once

Command = Callable[..., tuple[int, str, str]]

STUDY = """\
name: tiny
features:
  source: {samples: 30}
  encoder: {checkpoint: tiny-random, image_size: 112, compute_dtype: float32}
split: {validation: 5, test: 6}
search:
  method: grid
  space:
    rank: [2, 4]
    lr: [1e-3, 1e-2]
    batch_size: 4
    families: {sketch: }
training: {epochs: 100, patience: 100}
scheduler: {kind: none}
resources: {max_concurrent: 1}
report: {images: [0], channels: 1, confirm_seeds: 0}
"""
EPOCHS = 100
# A node that is killed is missed within seconds, not within Ray's half a minute; the head, not within a whole one.
QUICK_TO_NOTICE = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


class Machines:
    """A cluster of two machines, `head` and `worker`: each a raylet that can be killed and started again.

    Attributes:
        address: its job server's.
        token: what it asks for.
        home: a folder that both have.
        hidden: a folder that the worker has another of; None where this machine cannot make one.
    """

    def __init__(self, home: Path) -> None:
        self._gcs, dashboard, client, *agents = free_ports(5)
        self.home, self.address, self.token = home, f"http://127.0.0.1:{dashboard}", secrets.token_hex(32)
        hidden = home / "hidden"
        hidden.mkdir()
        self._apart = apart(hidden)
        self.hidden = hidden if self._apart else None
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        ports = ["--port", str(self._gcs), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
        # Each has a --temp-dir of its own: two that share one unpack a job's files over each other.
        self._arguments = {
            "head": ["--head", *ports, *own_places(agents[0], home / "1")],
            "worker": ["--address", f"127.0.0.1:{self._gcs}", *own_places(agents[1], home / "2")],
        }

    @property
    def environment(self) -> dict[str, str]:
        """Of a client of this cluster."""
        names = {"RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}
        # MLflow leaves the store there that an earlier test named, and the cluster's jobs would use it.
        left_out = {"PYTHONPATH", "MLFLOW_TRACKING_URI"}
        return {name: value for name, value in os.environ.items() if name not in left_out} | names

    def start(self) -> None:
        """Start what does not run, and wait until the cluster has both."""
        for name, arguments in self._arguments.items():
            if name not in self._started:
                before: list[str] = []
                if name == "worker":
                    # The head's job server may still be starting.
                    wait_until(lambda: listens(self._gcs))
                    before = self._apart
                self._started[name] = start_node(
                    *arguments, before=before, environment=self.environment | QUICK_TO_NOTICE
                )
        wait_for(self.address, self.token, len(self._started))

    def processes(self, name: str, title: str) -> list[psutil.Process]:
        """A machine's processes whose command line, where it is long the beginning of it, has this in it."""
        children = psutil.Process(self._started[name].pid).children(recursive=True)
        return [process for process in children if title in command_of(process)]

    def kill(self, name: str) -> None:
        """SIGKILL its raylet, and the head's GCS; `ray start` ends what else it had started."""
        for title in ("/raylet/raylet", "/gcs/gcs_server"):
            for process in self.processes(name, title):
                process.kill()
        self._started.pop(name).wait(60)

    def end(self) -> None:
        """End what there still is."""
        for name in reversed(tuple(self._started)):
            self.kill(name)


def own_places(agent: int, temporary: Path) -> list[str]:
    return ["--dashboard-agent-listen-port", str(agent), "--temp-dir", str(temporary)]


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def apart(hidden: Path) -> list[str]:
    """What starts a command that sees an empty folder of its own in place of this one; nothing where that cannot be."""
    mount = f"mount -t tmpfs none {hidden}"
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        with contextlib.suppress(OSError):
            tried = subprocess.run([*command, "sh", "-c", mount], capture_output=True, check=False)
            if tried.returncode == 0:
                return [*command, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    return []


def start_node(*arguments: str, before: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
    command += ["--object-store-memory", "100000000", "--disable-usage-stats", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for(address: str, token: str, nodes: int) -> None:
    for _ in range(600):
        with contextlib.suppress(requests.RequestException, KeyError):
            headers = {"Authorization": f"Bearer {token}"}
            found = requests.get(f"{address}/api/v0/nodes", headers=headers, timeout=5).json()
            if sum(node["state"] == "ALIVE" for node in found["data"]["result"]["result"]) >= nodes:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no cluster of {nodes} nodes at {address}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Machines]:
    # Not below pytest's own folders: the path of a socket may have 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    machines = Machines(home)
    try:
        yield machines
    finally:
        machines.end()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def client(cluster: Machines, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """The cluster, whole again after what another test did to it, and its token in this process's environment."""
    cluster.start()
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return cluster


@pytest.fixture
def command(client: Machines, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command of lowrank-tune; its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(list(arguments))
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def study_file(cluster: Machines) -> Path:
    path = cluster.home / "tiny.yaml"
    path.write_text(STUDY)
    return path


def status_of(command: Command, study_id: str) -> Any:
    code, out, _ = command("status", study_id, "--json")
    assert code == 0
    return json.loads(out)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(2400):
        if holds():
            return
        time.sleep(0.1)
    raise TimeoutError("it never came to that")


def over(study_dir: Path) -> dict[Path, int]:
    """Of the trials that have ended: their files, and when each was written."""
    ended = [path.parent for path in study_dir.glob("trials/*/outcome.json")]
    return {path: path.stat().st_mtime_ns for folder in ended for path in folder.iterdir()}


def hold_both(client: Machines) -> dict[str, psutil.Process]:
    """Halt the training of a trial on each machine, which has room for one; the actors by their machine."""
    held: dict[str, psutil.Process] = {}

    def all_halted() -> bool:
        for name in ("head", "worker"):
            for actor in client.processes(name, "TrialActor"):
                # It trains once it has mapped the features.
                with contextlib.suppress(psutil.Error):
                    if name not in held and any("/shards/" in place.path for place in actor.memory_maps()):
                        actor.suspend()
                        held[name] = actor
        return len(held) == 2

    wait_until(all_halted)
    return held


def check_finished(study_dir: Path, trials: int, before: dict[Path, int]) -> None:
    """Every trial is over, none of those that were over was touched, and MLflow holds each once."""
    outcomes = [json.loads(path.read_text()) for path in study_dir.glob("trials/*/outcome.json")]
    assert [(outcome["status"], outcome["epochs"]) for outcome in outcomes] == [("finished", EPOCHS)] * trials
    kept = {path: stamp for path, stamp in before.items() if path.name != "loss_curves.png"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_tracked_once(local_uri(study_dir.parent.parent), study_dir)
