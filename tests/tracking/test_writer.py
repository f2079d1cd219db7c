import threading
import time
from pathlib import Path

import pytest
from tracked_study import build_plan, config_of, outcome_of

from lowrank_tune.tracking.mlflow_tracker import (
    Deliver,
    Epoch,
    EpochsEnded,
    Event,
    EventWriter,
    StudyEnded,
    TrialEnded,
    TrialStarted,
    coalesce,
)

EVENTS: list[Event] = [TrialStarted(config_of(n), n) for n in range(4)]


def epoch(trial_id: str, number: int) -> EpochsEnded:
    return EpochsEnded(trial_id, (Epoch(number, {"val_mse": 1.0}, number),))


class Store:
    """Takes events, after failing as often as it is told to."""

    def __init__(self, failures: float = 0, error: type[Exception] = ConnectionError) -> None:
        self.failures = failures
        self.error = error
        self.attempts = 0
        self.taken: list[Event] = []

    def connect(self) -> Deliver:
        return self.deliver

    def deliver(self, event: Event) -> None:
        self.attempts += 1
        if self.failures > 0:
            self.failures -= 1
            raise self.error("http://me:secret@host is away")
        self.taken.append(event)


def writer_on(store: Store, patience_s: float = 0.2) -> EventWriter:
    return EventWriter(
        store.connect, lambda error: isinstance(error, ConnectionError), pause_s=0.01, patience_s=patience_s
    )


def test_events_arrive_in_order() -> None:
    store = Store()
    writer = writer_on(store)
    for event in EVENTS:
        writer.put(event)
    writer.close()
    assert store.taken == EVENTS
    assert writer.problems == ()


def test_a_passing_failure_loses_and_reorders_nothing() -> None:
    store = Store(failures=1)
    writer = writer_on(store, patience_s=5.0)
    for event in EVENTS:
        writer.put(event)
    writer.close()
    assert store.taken == EVENTS
    assert writer.problems == ()


def test_a_failure_for_good_drops_its_event_alone() -> None:
    store = Store(failures=1, error=ValueError)
    writer = writer_on(store)
    for event in EVENTS:
        writer.put(event)
    writer.close()
    assert store.taken == EVENTS[1:]
    assert writer.problems[0] == "1 records could not be delivered"
    assert "secret" not in writer.problems[1]


def test_a_dead_store_is_given_up_at_the_end_and_counted() -> None:
    store = Store(failures=float("inf"))
    writer = writer_on(store)
    for event in EVENTS:
        writer.put(event)
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 3
    assert writer.problems[0] == "4 records could not be delivered"


class Clock:
    """A clock that a writer's rests put forward, so that an hour of them takes an instant."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rests: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.rests.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lowrank_tune.tracking.mlflow_tracker.time", clock)
    return clock


class AwayUntil(Store):
    """Fails until its clock shows a moment."""

    def __init__(self, clock: Clock, moment: float) -> None:
        super().__init__()
        self._clock = clock
        self._moment = moment

    def deliver(self, event: Event) -> None:
        self.failures = float(self._clock.now < self._moment)
        super().deliver(event)


@pytest.mark.parametrize("away_s", [60.0, 3600.0])
def test_a_study_at_work_waits_for_its_store_however_long_that_is_away(
    away_s: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AwayUntil(clock, away_s)
    writer = EventWriter(store.connect, lambda error: isinstance(error, ConnectionError), pause_s=0.01)
    monkeypatch.setattr(writer._closing, "wait", lambda seconds: clock.sleep(seconds) or writer._closing.is_set())
    for event in EVENTS:
        writer.put(event)
    while len(store.taken) < len(EVENTS):
        time.sleep(0.001)
    writer.close()
    assert store.taken == EVENTS
    assert writer.problems == ()
    tries = [rest for rest in clock.rests if rest >= 1]
    assert tries[:6] == [1, 2, 4, 8, 15, 15]
    assert max(tries) == 15


@pytest.mark.parametrize(("away_s", "undelivered"), [(89.0, 0), (91.0, 1)])
def test_a_study_that_is_over_waits_ninety_seconds_for_its_store(away_s: float, undelivered: int, clock: Clock) -> None:
    store = AwayUntil(clock, away_s)
    writer = EventWriter(store.connect, lambda error: isinstance(error, ConnectionError), pause_s=0.01)
    writer._closing.set()
    writer.put(EVENTS[0])
    writer.close()
    assert len(store.taken) == 1 - undelivered
    assert writer.problems[:1] == ((f"{undelivered} records could not be delivered",) if undelivered else ())


def test_reporting_never_waits_for_the_store() -> None:
    release = threading.Event()

    class Slow(Store):
        def deliver(self, event: Event) -> None:
            release.wait()
            super().deliver(event)

    store = Slow()
    writer = writer_on(store)
    started = time.monotonic()
    for event in EVENTS * 100:
        writer.put(event)
    assert time.monotonic() - started < 0.5
    release.set()
    writer.close()
    assert len(store.taken) == 400


def test_a_writer_that_was_told_nothing_connects_to_nothing() -> None:
    store = Store()
    writer = writer_on(store)
    writer.close()
    assert not writer.started
    assert store.attempts == 0


def test_epochs_of_one_trial_travel_together(tmp_path: Path) -> None:
    plan = build_plan(tmp_path)
    first, second = config_of(0), config_of(1)
    ended = TrialEnded(outcome_of(plan, first), 9)
    a1, a2, a3 = (epoch(first.trial_id, number) for number in (1, 2, 3))
    b1 = epoch(second.trial_id, 1)
    joined = coalesce([TrialStarted(first, 0), a1, b1, a2, ended, a3, StudyEnded("FINISHED", 10)])
    assert joined == [
        TrialStarted(first, 0),
        EpochsEnded(first.trial_id, a1.epochs + a2.epochs),
        b1,
        ended,
        a3,
        StudyEnded("FINISHED", 10),
    ]


@pytest.mark.parametrize("events", [[], EVENTS])
def test_nothing_but_epochs_is_joined(events: list[Event]) -> None:
    assert coalesce(events) == events
