"""A study's end is told to an address on the web, where somebody waits for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from lowrank_tune.cluster.study_dir import read_status
from lowrank_tune.config.plan import Plan
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.errors import InputError

VARIABLE = "LOWRANK_TUNE_NOTIFY"
"""The environment variable for an address that is a secret, as those of chats are; it goes before the study file's."""
_TIMEOUT_S, _TIMES = 5.0, 3


def notify_address(spec: StudySpec) -> str:
    """Where a study's end is told, empty for nowhere; an InputError where that is no address."""
    address = os.environ.get(VARIABLE, "").strip() or spec.notify or ""
    if address and (urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname):
        raise InputError(f"{VARIABLE}: https://HOST/… or http://HOST/… is expected; correct it, or unset it")
    return address


@contextmanager
def notified(plan: Plan, say: Callable[[str], None]) -> Iterator[None]:
    """Tell how the block has left a study: finished, failed or stopped; that it cannot be told costs the study nothing.

    A driver that is killed tells nobody.
    """
    try:
        yield
    finally:
        if address := notify_address(plan.spec):
            try:
                fault = _post(address, _message(plan))
            except Exception as error:  # whatever it is, the study's own end is what counts
                fault = type(error).__name__
            if fault:
                # Of the address only the host is shown: what follows it may be a secret.
                say(f"notify: {urlsplit(address).hostname} was not told ({fault})")


def _message(plan: Plan) -> dict[str, Any]:
    status = read_status(plan.study_dir, ours=True)
    told = {name: status[name] for name in ("study_id", "state", "reason", "started", "ended")}
    counts = {name: status["progress"][name] for name in ("trials", "done", "finished", "pruned", "failed", "best")}
    reason = f" ({status['reason']})" if status["reason"] else ""
    # By this name chats take what they show.
    text = f"{plan.study_id}: {status['state']}{reason}, {counts['done']} of {counts['trials']} trials"
    return {"text": text, "name": plan.spec.name, **told, **counts}


def _post(address: str, message: dict[str, Any]) -> str:
    """Send a message; why it was refused, if so."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    again = Retry(_TIMES - 1, backoff_factor=0.5, status_forcelist=(502, 503, 504), allowed_methods=None)
    with requests.Session() as session, _unheard("urllib3.connectionpool", "urllib3.util.retry"):
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        # A request that is sent on elsewhere would arrive as another one, without its content.
        answer = session.post(address, json=message, timeout=_TIMEOUT_S, allow_redirects=False)
    return "" if answer.ok and not answer.is_redirect else f"it answers {answer.status_code}"


@contextmanager
def _unheard(*names: str) -> Iterator[None]:
    """Keep loggers quiet: these tell whole addresses."""
    loggers = {logger: logger.disabled for logger in map(logging.getLogger, names)}
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, before in loggers.items():
            logger.disabled = before
