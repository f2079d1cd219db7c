"""What a worker does when files or the cache's place fail it; no Ray is started."""

import hashlib
import threading

import pytest
import torch
from cachekit import IDENTITY
from filelock import FileLock

from lowrank_tune.features.decoding import decode_shard
from lowrank_tune.features.jobs import Extraction, ShardPlan, ShardResult
from lowrank_tune.features.pipeline import _only_process
from lowrank_tune.features.workers import import_shard


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "features_0.pt"
    torch.save(torch.ones(IDENTITY["tokens"], IDENTITY["dim"]), path)
    return ShardPlan("s.safetensors", (hashlib.sha256(path.read_bytes()).hexdigest(),), (str(path),))


def extraction(directory):
    return Extraction(str(directory), IDENTITY, "imported tensors", "unknown", None)


def imported(plan, directory):
    return ShardResult.load(import_shard({"plan": plan.dump()}, extraction(directory))["result"])


@pytest.mark.parametrize("change", ["content", "absence"])
def test_a_file_that_changed_since_it_was_hashed_fails_its_shard_and_is_not_quarantined(plan, tmp_path, change):
    file = tmp_path / "features_0.pt"
    file.write_bytes(b"other") if change == "content" else file.unlink()
    decoded = ShardResult.load(decode_shard({"plan": plan.dump()}, 56)["result"])
    for result in (imported(plan, tmp_path), decoded):
        assert str(file) in result.failure
        assert (result.fault, result.quarantined) == ("input", ())


def test_a_cache_that_cannot_be_written_fails_the_shard_and_is_named(plan, tmp_path):
    result = imported(plan, tmp_path / "gone")
    assert "gone: shard s.safetensors cannot be written" in result.failure
    assert result.fault == "cache"


def test_a_second_process_waits_for_the_first_and_says_so(tmp_path):
    directory = tmp_path / "0123456789abcdef"
    entered = threading.Event()
    notes = []

    def enter():
        with _only_process(directory, notes.append):
            entered.set()

    with FileLock(tmp_path / f".{directory.name}.lock"):
        other = threading.Thread(target=enter)
        other.start()
        assert not entered.wait(0.3)
    other.join(20)
    assert entered.is_set()
    assert notes == [f"another process is extracting into {directory}: waiting for it"]
