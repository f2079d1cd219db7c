"""Timing: one thread, bounded, and tidy afterwards."""

import time

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lowrank_tune.comparison.methods import images_per_second


def test_the_rate_is_images_over_a_runs_seconds_and_quick_methods_are_run_several_times(monkeypatch):
    calls = []

    def decompose(x_NTD):
        calls.append(len(x_NTD))
        time.sleep(0.05)  # others' turn on the machine
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    routes = {("slow", 1): decompose, ("quick", 1): lambda x_NTD: calls.append("quick")}
    rates = images_per_second(routes, torch.zeros(8, 2, 2))
    assert 8 / 0.05 < rates["slow", 1] <= 8 / 0.02 < rates["quick", 1]
    assert [call for call in calls if call == 8] == [8, 8]  # warmed, then timed
    calls.clear()
    monkeypatch.setattr("lowrank_tune.comparison.methods.SECONDS", 10.0)
    images_per_second(routes, torch.zeros(8, 2, 2))
    assert calls == [8, "quick"] * 10  # in turns


def test_torch_and_numpy_have_one_thread_only_while_it_runs_even_when_it_raises():
    seen = []

    def decompose(x_NTD):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        seen.append(torch.get_num_threads())
        raise RuntimeError("no")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"), pytest.raises(RuntimeError, match="no"):
            images_per_second({("broken", 1): decompose}, torch.zeros(1, 2, 2))
        assert len(seen) >= 2 and set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
