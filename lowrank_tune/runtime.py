"""The Ray that a study works in; nothing else is imported, so that Ray can start meanwhile."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from lowrank_tune.errors import LowrankTuneError

_KNOCK_TIMEOUT_S = 5.0


@contextmanager
def ray_session(address: str | None = None, meanwhile: Sequence[str] = ()) -> Iterator[None]:
    """A Ray to work in: the caller's, if there is one; else the cluster at `address` or RAY_ADDRESS, else a local one.

    Args:
        address: `ray://host:port` or `host:port`.
        meanwhile: modules, none of Ray's, to import on a thread while Ray starts on this one, for its processes end
            with the thread that started them.

    Raises:
        LowrankTuneError: the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    with ThreadPoolExecutor(1) as beside:
        imports = beside.submit(lambda: [importlib.import_module(name) for name in meanwhile])
        _start(address or os.environ.get("RAY_ADDRESS"))
    try:
        imports.result()
        with _terminated_like_interrupted():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does; Ray's own handler would abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Tune catches Ctrl-C by a handler of its own, and ends in order. SIGINT itself may be blocked: Ray's workers block
    # it, and so do their children, which a submitted study is.
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _start(address: str | None) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    # Importing Ray sets this level; left alone, starting Ray is told as a warning.
    logging.getLogger("ray").setLevel(logging.getLogger().level)
    try:
        if address:
            _knock(address)
            _carry_token()
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
    except AuthenticationError as error:
        raise LowrankTuneError(
            f"Ray {address} wants a token, and there is none here or another one: put the head node's, which "
            "`ray get-auth-token` prints there, into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except (OSError, RuntimeError) as error:
        place = address or "on this machine"
        raise LowrankTuneError(f"Ray {place} did not start or answer: {error}") from error


def _carry_token() -> None:
    """Show the cluster this user's token; Ray 2.60 does so only for clusters that it finds itself."""
    with suppress(ImportError):
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _knock(address: str) -> None:
    """Find out in seconds whether anything listens at `host:port`, where Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S).close()
