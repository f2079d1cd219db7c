"""A real Ray cluster of two raylets on this machine, with token and job server, as `ray start` makes one."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

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
training: {epochs: 200, patience: 200}
scheduler: {kind: none}
resources: {max_concurrent: 1}
report: {images: [0], channels: 1, confirm_seeds: 0}
"""


@dataclass(frozen=True)
class RayCluster:
    """A running cluster.

    Attributes:
        address: its job server's.
        token: what it asks for.
        home: a folder that both nodes have.
        hidden: a folder that the second node has another of; None where this machine cannot make one.
    """

    address: str
    token: str
    home: Path
    hidden: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """Of a client of this cluster."""
        names = {"RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | names


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


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
            if found["data"]["result"]["total"] >= nodes:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no cluster of {nodes} nodes at {address}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    # Not below pytest's own folders: the path of a socket may have 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    gcs, dashboard, client, *agents = free_ports(5)
    shown = RayCluster(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32), home, home / "hidden")
    assert shown.hidden is not None
    shown.hidden.mkdir()
    before = apart(shown.hidden)
    # Each node has a --temp-dir of its own: two that share one unpack a job's files over each other.
    ports = ["--port", str(gcs), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
    nodes = [
        start_node(
            "--head", *ports, "--dashboard-agent-listen-port", str(agents[0]), "--temp-dir", str(home / "1"),
            before=[], environment=shown.environment,
        )
    ]  # fmt: skip
    try:
        wait_for(shown.address, shown.token, 1)
        nodes.append(
            start_node(
                "--address", f"127.0.0.1:{gcs}", "--dashboard-agent-listen-port", str(agents[1]),
                "--temp-dir", str(home / "2"), before=before, environment=shown.environment,
            )
        )  # fmt: skip
        wait_for(shown.address, shown.token, 2)
        yield RayCluster(shown.address, shown.token, home, shown.hidden if before else None)
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(60)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def client(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """The cluster, with its token in this process's environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
    return cluster
