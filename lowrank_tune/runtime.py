"""The Ray that a study works in; nothing else is imported, so that Ray can start meanwhile."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import joblib
import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError

from lowrank_tune.errors import InputError, LowrankTuneError, is_utf8

Result = TypeVar("Result")

_KNOCK_TIMEOUT_S, _READY_TIMEOUT_S = 5.0, 20.0
_CLIENT_PORT = 10001  # of a ray:// address without one
_LONGEST_PLACE = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10")
"""What a Unix socket's name leaves to the folder that Ray makes its sockets in."""
_OWN_VARIABLES = {
    f"RAY_{name}" for name in ("ADDRESS", "TMPDIR", "AUTH_MODE", "AUTH_TOKEN", "USAGE_STATS_ENABLED", "CLIENT_MODE")
}
_OBJECT_STORE = 200_000_000
"""Bytes of a store that has no room in shared memory."""
_LEAST_MEMORY = 3 << 29
"""Bytes below which Ray's own watch over memory ends every worker, again and again."""
_FEW_ADDRESSES = 1 << 36
_LIMITS = (
    ("v", resource.RLIMIT_AS, _FEW_ADDRESSES),
    ("n", resource.RLIMIT_NOFILE, 1024),
    ("u", resource.RLIMIT_NPROC, 1024),
)
"""By flag of `ulimit`, the limits of a process, and what Ray certainly gets along with."""

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(address: str | None = None, meanwhile: Sequence[str] = ()) -> Iterator[None]:
    """A Ray to work in: the caller's, if there is one; else the cluster at `address` or RAY_ADDRESS, else a local one.

    Args:
        address: `ray://host:port`, `host:port`, `auto`, or `local` for a local one whatever RAY_ADDRESS says.
        meanwhile: modules, none of Ray's, to import on a thread while Ray starts on this one, for its processes end
            with the thread that started them.

    Raises:
        InputError: the address is none, or Ray finds no place for its files here.
        LowrankTuneError: the cluster does not answer, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    with ThreadPoolExecutor(1) as beside:
        imports = beside.submit(lambda: [importlib.import_module(name) for name in meanwhile])
        _start(address)
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


def _start(given: str | None) -> None:
    if not is_utf8(os.getcwd()):
        raise InputError(
            f"working directory {os.getcwd()}: its name is not UTF-8, and Ray does not start in it; start from another"
        )
    name, address = ("--address", given) if given else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS", ""))
    named, address = f"{name} {address}", address.strip()
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    # Importing Ray sets this level; left alone, starting Ray is told as a warning.
    logging.getLogger("ray").setLevel(logging.getLogger().level)
    remedy = f"correct {name}, or write `local` there for a Ray of this process's own"
    if address in ("", "local"):
        named, remedy = "on this machine", ""
        settings = _local_settings()
    else:
        settings = {"address": _answering(address, named, remedy)}
        _carry_token()
    try:
        ray.init(**settings, **quiet)
    except AuthenticationError as error:
        raise LowrankTuneError(
            f"Ray {named} wants a token, and there is none here or another one: put the head node's, which "
            "`ray get-auth-token` prints there, into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except Exception as error:  # Ray raises any kind, the plain one too
        said = " ".join(str(error).split()) or type(error).__name__
        raise LowrankTuneError(f"Ray {named} did not start or answer: {said}; {remedy or _suspects()}") from error


def _local_settings() -> dict[str, Any]:
    """How a Ray of one's own starts on this machine, whatever its TMPDIR, HOME, /dev/shm and CPUs are."""
    from ray._common.utils import get_system_memory
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    if (memory := get_system_memory()) < _LEAST_MEMORY:
        raise LowrankTuneError(
            f"this machine or container has {memory / 2**30:.1f} GiB of memory, and Ray with a worker takes more than "
            f"{_LEAST_MEMORY / 2**30:.1f}: give it 2 GiB, or more"
        )
    # Children find the place by the same variable.
    os.environ["RAY_TMPDIR"] = place = _place()
    if os.environ.get("PYTHONOPTIMIZE", "0") > "1":
        os.environ["PYTHONOPTIMIZE"] = "1"  # Ray's agent dies without docstrings
    token = AuthenticationTokenLoader.instance()
    found = False
    with suppress(AuthenticationError):  # RAY_AUTH_TOKEN_PATH leads nowhere
        found = token.has_token(ignore_auth_mode=True)
    if not found:
        # Left alone, Ray writes one below HOME, which may be missing or not ours.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        token.reset_cache()
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    if resource.RLIM_INFINITY != addresses < _FEW_ADDRESSES:
        said = "`ulimit -v` is %.0f GiB, and Ray's processes, which end without a word above it, may need more: lift it"
        logger.warning(said, addresses / 2**30)
    # Of itself Ray takes half a CPU of a container for none, and does not see what a scheduler binds a process to.
    settings = {"address": "local", "include_dashboard": False, "num_cpus": joblib.cpu_count()}
    if sys.platform == "linux" and (free := _free_shared_memory()) < _OBJECT_STORE:
        # Else Ray takes a third of the memory in a file on that disk. No features travel in it.
        said = "/dev/shm has %.0f MB: Ray's object store, %.0f MB, lies in %s"
        logger.warning(said, free / 1e6, _OBJECT_STORE / 1e6, place)
        settings |= {"_plasma_directory": place, "object_store_memory": _OBJECT_STORE}
    return settings


def _free_shared_memory() -> int:
    """Bytes that this user can have in /dev/shm."""
    try:
        return shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    except OSError:
        return 0


def _suspects() -> str:
    """What of this environment may keep a Ray of one's own from starting, and where its logs are."""
    found = [f"unset {name}" for name in os.environ if name.startswith("RAY_") and name not in _OWN_VARIABLES]
    found += [
        f"lift `ulimit -{flag}`, which is {now}"
        for flag, kind, enough in _LIMITS
        if (now := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY and now < enough
    ]
    load, cpus = os.getloadavg()[0], joblib.cpu_count()
    if load > 4 * cpus:
        found.append(f"try again when less is at work here (a load of {load:.0f} on {cpus} CPUs)")
    return "; ".join((*found, f"its logs are in {os.environ['RAY_TMPDIR']}/ray/session_latest/logs"))


def _place() -> str:
    """The folder for Ray's sockets and logs: the one that the environment names, else another that can hold them."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    places = [os.environ[name]] if name else []
    places += ["/tmp", f"/tmp/ray-{os.getuid()}", "/var/tmp", "/dev/shm"]
    unfit: dict[str, str] = {}
    for place in places:
        if reason := _unfit(place):
            unfit[place] = reason
            continue
        if unfit:
            first, reason = next(iter(unfit.items()))
            logger.warning("%s: %s; Ray's files lie in %s/ray", f"{name} {first}".strip(), reason, place)
        return place
    reasons = "; ".join(f"{place}: {reason}" for place, reason in unfit.items())
    raise InputError(f"Ray finds no folder for its files ({reasons}); set RAY_TMPDIR to a short path that can be used")


def _unfit(place: str) -> str:
    """Why Ray cannot make its sockets below a folder; empty where it can."""
    if len(os.fsencode(place)) > _LONGEST_PLACE:
        return f"too long for Ray's sockets, by {len(os.fsencode(place)) - _LONGEST_PLACE} bytes"
    if not place.isascii():
        return "Ray takes only paths in ASCII"
    folder = Path(place, "ray") if Path(place, "ray").exists() else Path(place)
    if not os.path.isabs(place) or not folder.is_dir():
        return "no such directory"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"this user cannot write to {folder}"


def _carry_token() -> None:
    """Show the cluster this user's token; Ray 2.60 does so only for clusters that it finds itself."""
    with suppress(ImportError):
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _answering(address: str, named: str, remedy: str) -> str:
    """The address for Ray of a cluster at whose port something listens, found out in seconds instead of minutes."""
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{named} is a job server's address, which `submit` takes; a Ray to work in is ray://host:10001 or "
            f"host:6379: {remedy}"
        )
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    if address == "auto":
        address = find_bootstrap_address(None) or next(iter(find_gcs_addresses()), "")
        if not address:
            raise LowrankTuneError(f"{named}: no Ray is at work on this machine; {remedy}")
        named = f"{named} ({address})"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme not in ("", "ray") or not parts.hostname or not (parts.port or parts.scheme):
            raise ValueError("neither ray://host:port nor host:port")
        host, port = parts.hostname, parts.port or _CLIENT_PORT
        socket.create_connection((host, port), timeout=_KNOCK_TIMEOUT_S).close()
    except ValueError as error:
        raise InputError(f"{named} is no address of a Ray ({error}); {remedy}") from error
    except OSError as error:
        raise LowrankTuneError(f"Ray {named} does not answer ({error}); start it, {remedy}") from error
    if not _speaks_grpc(host, port):
        raise LowrankTuneError(f"{named}: something that is no Ray listens there; {remedy}")
    return address


def _speaks_grpc(host: str, port: int) -> bool:
    try:
        import grpc
        from ray._common.network_utils import build_address
        from ray._private.grpc_utils import init_grpc_channel
    except ImportError:  # Ray's core does without it
        return True
    try:
        with init_grpc_channel(build_address(host, port)) as channel:
            grpc.channel_ready_future(channel).result(timeout=_READY_TIMEOUT_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def in_worker(
    function: Callable[..., Result], *arguments: Any, cpus: float, gpus: float, patience_s: float | None = None
) -> Result:
    """Call a function once, in a worker of the caller's Ray, which is let go of where the caller is stopped.

    Raises:
        GetTimeoutError: it took longer than `patience_s`.
        RayError: the worker failed; a RayTaskError's `cause` is what the function raised.
    """
    # One that Ray ends for want of memory would be started again and again.
    worker = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(function)
    task = worker.remote(*arguments)
    try:
        result: Result = ray.get(task, timeout=patience_s)
        return result
    except BaseException as error:
        # Only where it is not over: Ray 2.60 ends this very process when a task is cancelled as it completes.
        if not isinstance(error, RayError) or isinstance(error, GetTimeoutError):
            ray.cancel(task, force=True)
        raise
