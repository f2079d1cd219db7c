"""Histories as trials leave them, whole or not."""

import json
import logging

import pytest

from lowrank_tune.report.text import read_history, series


def test_epochs_come_in_order_with_their_finite_numbers(tmp_path):
    (tmp_path / "history.json").write_text(
        '[{"epoch": 1, "val_mse": NaN, "lr": 0.1}, {"epoch": 2, "val_mse": 0.5, "lr": 0.1, "note": "x", "on": true}]'
    )
    history = read_history(tmp_path)
    assert history == [{"epoch": 1, "lr": 0.1}, {"epoch": 2, "val_mse": 0.5, "lr": 0.1}]
    assert series(history, "val_mse") == ([2], [0.5])


def test_no_history_is_no_curve(tmp_path):
    assert read_history(tmp_path / "absent") == []


@pytest.mark.parametrize("text", ["{", '["epoch"]', "3", json.dumps({"epoch": 1})])
def test_a_damaged_history_is_told_and_skipped(tmp_path, caplog, text):
    (tmp_path / "history.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_history(tmp_path) == []
    assert str(tmp_path) in caplog.text
