"""What is told of a study's end, and that it costs the study nothing where it cannot be told."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lowrank_tune.cluster.notify import notified
from lowrank_tune.cluster.study_dir import Status, create_study
from lowrank_tune.config.loading import parse_study
from lowrank_tune.config.plan import Plan, make_plan
from lowrank_tune.errors import InputError, StudyFileError
from tests.cluster.conftest import STUDY


@contextmanager
def answering(code: int) -> Iterator[tuple[str, list[str]]]:
    """A server's address with a secret in it, and the contents that it was sent."""
    sent: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(code)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/services/5ecret", sent
        server.shutdown()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    plan = make_plan(parse_study(STUDY, "tiny.yaml"), tmp_path, datetime(2026, 3, 1, tzinfo=UTC))
    create_study(plan, STUDY)
    return plan


def test_a_failure_is_told_without_a_secret(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with answering(200) as (address, sent):
        monkeypatch.setenv("LOWRANK_TUNE_NOTIFY", address)
        with pytest.raises(ValueError), notified(plan, said.append), Status(plan.study_dir, 4):
            raise ValueError("https://me:5ecret@host/data is gone")
    (content,) = sent
    assert '"state": "failed"' in content
    assert "https://host/data is gone" in content
    assert "5ecret" not in content
    assert said == []


@pytest.mark.parametrize(("code", "why"), [(404, "it answers 404"), (302, "it answers 302")])
def test_a_server_that_refuses_costs_a_study_nothing(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, code: int, why: str
) -> None:
    said: list[str] = []
    with answering(code) as (address, sent):
        monkeypatch.setenv("LOWRANK_TUNE_NOTIFY", address)
        with notified(plan, said.append), Status(plan.study_dir, 4):
            pass
    assert said == [f"notify: 127.0.0.1 was not told ({why})"]
    assert len(sent) == 1


def test_no_server_costs_a_study_nothing_and_no_log_has_the_secret(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    caplog.set_level("DEBUG")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("LOWRANK_TUNE_NOTIFY", f"http://127.0.0.1:{nobody.getsockname()[1]}/services/5ecret")
        with notified(plan, said.append), Status(plan.study_dir, 4):
            pass
    assert said == ["notify: 127.0.0.1 was not told (ConnectionError)"]
    assert "5ecret" not in caplog.text


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("https://me:5ecret@host/hook", "give the whole address in the environment variable LOWRANK_TUNE_NOTIFY"),
        ("https://host/hook?token=5ecret", "give the whole address in the environment variable LOWRANK_TUNE_NOTIFY"),
        ("file:///tmp/hook", "an address on the web is expected"),
    ],
)
def test_a_study_file_takes_no_secret_and_no_other_address(address: str, why: str) -> None:
    with pytest.raises(StudyFileError) as refused:
        parse_study(f"{STUDY}notify: '{address}'\n", "tiny.yaml")
    assert why in str(refused.value)
    assert "5ecret" not in str(refused.value)


def test_an_address_in_the_environment_that_is_none_is_refused_before_a_study_begins(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_tune.cluster.notify import notify_address

    monkeypatch.setenv("LOWRANK_TUNE_NOTIFY", "chat.example/5ecret")
    with pytest.raises(InputError, match="LOWRANK_TUNE_NOTIFY: https://HOST") as refused:
        notify_address(plan.spec)
    assert "5ecret" not in str(refused.value)
