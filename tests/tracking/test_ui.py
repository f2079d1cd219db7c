import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from lowrank_tune.errors import InputError
from lowrank_tune.tracking.ui import serve_ui

SERVE = (
    "import sys; from pathlib import Path; from lowrank_tune.tracking.ui import serve_ui; "
    "sys.exit(serve_ui(Path(sys.argv[1]), port=int(sys.argv[2])))"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_there_must_be_something_to_show(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mlflow.db: no study has been tracked"):
        serve_ui(tmp_path, port=free_port())


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen .*--port"):
            serve_ui(tmp_path, port=port)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_nothing_of_the_server_survives_it(tmp_path: Path, migrated: Path, ending: signal.Signals) -> None:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    port = free_port()
    command = [sys.executable, "-c", SERVE, str(tmp_path), str(port)]
    helpers: list[psutil.Process] = []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # A shell's background job, which a test run may be, ignores SIGINT, and so would its children.
    with subprocess.Popen(command, **quiet, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as ui:
        try:
            wait_for(f"http://127.0.0.1:{port}/health")
            helpers = psutil.Process(ui.pid).children(recursive=True)
            assert len(helpers) > 1
            ui.send_signal(ending)
            assert ui.wait(20) == 0
            _, alive = psutil.wait_procs(helpers, timeout=5)
            assert alive == []
        finally:
            for process in helpers or psutil.Process(ui.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            ui.kill()


def wait_for(url: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(0.2)
