"""Two processes that train together have the numbers of one: real processes, exchanging over Gloo."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from team_member import CASES, train

from lowrank_tune.lowrank.distributed import ALONE, World

SIZE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, power_law, write_shards) -> Path:
    directory = tmp_path_factory.mktemp("team")
    write_shards(directory, power_law(28, 12, 20)).write(directory / "features.json")
    return directory


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    """What each of two workers has found."""
    script = Path(__file__).with_name("team_member.py")
    commands = [[sys.executable, str(script), str(folder), str(rank), str(SIZE)] for rank in range(SIZE)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * SIZE, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_have_the_numbers_of_one(found, folder, name):
    alone = train(name, folder, ALONE)
    together = found[0][name]
    assert together["stopped_by"] == alone["stopped_by"]
    assert len(together["rows"]) == len(alone["rows"])
    for row, expected in zip(together["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_every_worker_has_the_same_weights_and_judges_alike(found, name):
    assert found[1][name] == found[0][name]


def test_what_the_first_worker_has_read_all_have(found):
    assert [worker["of the first"] for worker in found] == [{"rank": 0}] * SIZE


def test_a_worker_that_is_gone_is_told_as_a_lost_connection(found):
    assert found[0]["lost"].startswith("worker 1 of 2 has lost the others: ")


@pytest.mark.parametrize(("count", "size"), [(10, 3), (1, 4), (0, 2), (8, 1)])
def test_shares_are_all_there_is_and_differ_by_one_at_most(count, size):
    things = list(range(count))
    shares = [list(World(rank, size).share(count)) for rank in range(size)]
    assert sum(shares, []) == things
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
