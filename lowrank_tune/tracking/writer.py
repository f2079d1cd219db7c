"""One thread that delivers events in order, so that nobody who reports one ever waits or fails."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable

from lowrank_tune.errors import redact
from lowrank_tune.tracking.events import Event, coalesce

logger = logging.getLogger(__name__)

_REASON_LENGTH = 300

Deliver = Callable[[Event], None]


class EventWriter:
    """Delivers events one after another on a thread of its own.

    A delivery that fails for a passing reason is tried again, and the events behind it wait; one that fails for good is
    dropped and counted. At `close`, what still fails after `patience_s` is given up.

    Args:
        connect: makes the function that delivers an event; called on the thread, with the first event.
        is_passing: whether an error may go away by itself.
        pause_s: rest between deliveries, in which events gather to be sent together.
        patience_s: how long a closing writer keeps trying a store that does not answer.
    """

    def __init__(
        self,
        connect: Callable[[], Deliver],
        is_passing: Callable[[Exception], bool],
        *,
        pause_s: float = 0.5,
        patience_s: float = 90.0,
    ) -> None:
        self._connect = connect
        self._is_passing = is_passing
        self._pause_s = pause_s
        self._patience_s = patience_s
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._deliver: Deliver | None = None
        self._thread: threading.Thread | None = None
        self._given_up = False
        self._undelivered = 0
        self._reasons: list[str] = []

    @property
    def started(self) -> bool:
        """Whether any event was ever reported."""
        return self._thread is not None

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be delivered and why, for people; empty when all went well."""
        if not self._undelivered:
            return ()
        return (f"{self._undelivered} records could not be delivered", *self._reasons)

    def put(self, event: Event) -> None:
        """Report an event; returns at once."""
        self._queue.put(event)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-writer", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Deliver what is left, or give it up, and end the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            for event in coalesce(self._gather()):
                self._deliver_patiently(event)
            if self._closing.wait(self._pause_s) and self._queue.empty():
                return

    def _gather(self) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._queue.get(timeout=self._pause_s))
            while True:
                events.append(self._queue.get_nowait())
        except queue.Empty:
            return events

    def _deliver_patiently(self, event: Event) -> None:
        wait, deadline = 1.0, math.inf
        while not self._given_up:
            try:
                self._deliver = self._deliver or self._connect()
                self._deliver(event)
                return
            except Exception as error:
                failure = error
            if not self._may_pass(failure):
                self._drop(failure)
                return
            logger.debug("tracking delayed: %s", redact(str(failure)))
            if self._closing.is_set():
                deadline = min(deadline, time.monotonic() + self._patience_s)
                self._given_up = time.monotonic() >= deadline
                if self._given_up:
                    self._drop(failure)
                    return
                time.sleep(min(wait, max(0.0, deadline - time.monotonic())))
            else:
                self._closing.wait(wait)
            wait = min(2 * wait, 15.0)
        self._undelivered += 1

    def _may_pass(self, failure: Exception) -> bool:
        try:
            return self._is_passing(failure)
        except Exception:
            logger.debug("cannot tell whether a failure may pass", exc_info=True)
            return False

    def _drop(self, error: Exception) -> None:
        self._undelivered += 1
        reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])[:_REASON_LENGTH]
        if reason not in self._reasons and len(self._reasons) < 10:
            self._reasons.append(reason)
            logger.debug("tracking failed: %s", reason)
