import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_tune.errors import LowrankTuneError
from lowrank_tune.runtime import ray_session


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What Ray is started with, in place of starting it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **settings: calls.append(settings))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append({}))
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    return calls


def test_what_fails_beside_rays_start_is_told_as_itself(started: list[dict[str, Any]]) -> None:
    with (
        pytest.raises(ModuleNotFoundError, match="lowrank_tune.nothing"),
        ray_session(meanwhile=["lowrank_tune.nothing"]),
    ):
        pass
    assert started[-1] == {}


@pytest.mark.parametrize(
    ("address", "said", "code"),
    [
        ("http://127.0.0.1:8265", "is a job server's address, which `submit` takes", 2),
        ("nonsense", "neither ray://host:port nor host:port", 2),
        ("127.0.0.1:99999", "Port out of range", 2),
        ("ray://", "is no address of a Ray", 2),
        ("anyscale://somewhere:1", "is no address of a Ray", 2),
        (f"{'x' * 80}:1", "is no address of a Ray", 2),
        ("[::1:1", "is no address of a Ray", 2),
        ("127.0.0.1:1", "does not answer", 1),
        ("ray://127.0.0.1:1", "does not answer", 1),
        ("auto", "auto (127.0.0.1:1) does not answer", 1),
    ],
)
def test_an_address_left_from_another_day_is_told_with_the_remedy(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, said: str, code: int
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(LowrankTuneError) as caught, ray_session():
        pass
    assert (caught.value.exit_code, started) == (code, [])
    assert str(caught.value).endswith("correct RAY_ADDRESS, or write `local` there for a Ray of this process's own")
    assert said in str(caught.value)


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_no_address_is_a_ray_of_ones_own(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with ray_session():
        assert started[0]["address"] == "local"


def test_another_server_is_told_from_a_ray(started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_tune.runtime._READY_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LowrankTuneError, match=f"{address}: something that is no Ray"), ray_session(address):
            pass
    assert started == []


def test_a_container_too_small_for_ray_is_told_before_it_starts(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: 1 << 30)
    with pytest.raises(LowrankTuneError, match=r"has 1\.0 GiB of memory, and Ray .* 1\.5"), ray_session():
        pass
    assert started == []


def test_a_store_without_room_in_shared_memory_is_small_and_lies_beside_rays_files(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=64 << 20))
    with ray_session():
        assert started[0]["_plasma_directory"] == "/tmp"
    assert caplog.messages == ["/dev/shm has 67 MB: Ray's object store, 200 MB, lies in /tmp"]


def test_a_limit_on_addresses_is_told_for_ray_ends_by_it_without_a_word(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (8 << 30, 8 << 30))
    with ray_session():
        pass
    assert caplog.messages[0].startswith("`ulimit -v` is 8 GiB")


def test_what_ray_says_is_one_line_with_what_may_be_to_blame(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: Any) -> None:
        raise Exception("no\nRay")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", "{")
    said = "Ray on this machine did not start or answer: no Ray; .*unset RAY_OVERRIDE_RESOURCES"
    with pytest.raises(LowrankTuneError, match=said), ray_session():
        pass


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("x" * 60, "too long for Ray's sockets"),
        ("missing", "no such directory"),
        ("file", "no such directory"),
        ("é", "only paths in ASCII"),
    ],
)
@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_where_ray_cannot_make_its_sockets_another_place_is_chosen_and_told(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    place: str,
    said: str,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # pytest's own are too long
        (Path(short) / "file").touch()
        if place not in ("missing", "file"):
            (Path(short) / place).mkdir()
        monkeypatch.setenv(name, f"{short}/{place}")
        with ray_session():
            assert os.environ["RAY_TMPDIR"] == "/tmp"
    (sentence,) = caplog.messages
    assert sentence.startswith(f"{name} {short}/{place}: ")
    assert said in sentence
    assert sentence.endswith("Ray's files lie in /tmp/ray")


def test_ray_starts_where_home_is_no_folder_and_takes_the_cpus_that_this_process_is_bound_to(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    code = (
        "import os, ray; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lowrank_tune.runtime import ray_session\n"
        "with ray_session():\n    print(ray.cluster_resources()['CPU'])"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


def printed_by(code: str, without: set[str], **environment: str) -> str:
    """What a process prints in this environment."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_user_with_a_number_and_nothing_else_has_a_home_and_a_name() -> None:
    code = (
        "import pwd, getpass, pathlib\n"
        "def nobody(number): raise KeyError(number)\n"
        "pwd.getpwuid = nobody\n"
        "import lowrank_tune\n"
        "print(pathlib.Path.home(), getpass.getuser())"
    )
    assert printed_by(code, {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME"}) == f"/ {os.getuid()}"


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_asked_for_this_machines_own_servers(name: str) -> None:
    code = (
        "import lowrank_tune, urllib.request\n"
        "print(*(bool(urllib.request.proxy_bypass(host)) for host in ('127.0.0.1:5000', 'localhost', 'own', 'far')))"
    )
    proxies = {"no_proxy", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"}
    said = printed_by(code, proxies, NO_PROXY="own", **{name: "http://127.0.0.1:9"})
    assert said == "True True True False"


def test_a_working_directory_that_ray_cannot_name_is_told(tmp_path):
    here = tmp_path / os.fsdecode(b"caf\xe9")
    here.mkdir()
    # In a process of its own: in this one Ray may be there already.
    start = "from lowrank_tune.runtime import ray_session; ray_session('local').__enter__()"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=here, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert re.search(r"InputError: .*/caf\\xe9: its name is not UTF-8, and Ray .*; start from another", done.stderr)
