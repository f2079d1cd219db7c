"""Studies to compare."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowrank_tune.measured import Comparison
from tests.comparison.small_study import Study, build_study


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowrank_tune.comparison.methods.SECONDS", 0.005)
        yield


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    return lambda *args, **fields: build_study(tmp_path, *args, **fields)


def with_trials(study: Study) -> Study:
    """Two families at ranks 2 and 6."""
    for rank in (2, 6):
        study.add_trial("sketch", rank)
        study.add_trial("direct", rank)
    return study


@pytest.fixture
def study(make_study: Callable[..., Study]) -> Study:
    return with_trials(make_study())


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Comparison]:
    """The same study with three repetitions of one trial and one of another, compared once; to be looked at only."""
    study = with_trials(build_study(tmp_path_factory.mktemp("compared")))
    for trial, seeds in (("r006-direct-0003", (11, 12, 13)), ("r002-sketch-0000", (11,))):
        for seed in seeds:
            study.repeat(trial, seed)
    return study, study.compare()
