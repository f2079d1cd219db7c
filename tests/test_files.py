import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowrank_tune.errors import InputError
from lowrank_tune.files import read_json, results_place, write_json, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "file.txt"
    write_whole(target, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(target, fail)
    assert target.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone" / "file.txt", lambda path: path.write_text("new"))
    assert list(tmp_path.iterdir()) == [target]


@dataclass(frozen=True)
class Point:
    x: float
    y: tuple[int, ...]


def test_json_holds_records_and_no_nan(tmp_path: Path):
    path = tmp_path / "points.json"
    write_json(path, {"points": [Point(0.5, (1, 2))]})
    assert read_json(path) == {"points": [{"x": 0.5, "y": [1, 2]}]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, Point(float("nan"), ()))
    assert json.loads(path.read_text()) == read_json(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_home_that_nobody_has_is_a_name_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert results_place("~nobody-of-this-name/results") == f"{tmp_path}/~nobody-of-this-name/results"


def test_a_results_directory_whose_name_is_not_utf_8_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InputError, match=r"results directory .*/caf\\xe9: its name is not UTF-8, .*--results"):
        results_place(tmp_path / os.fsdecode(b"caf\xe9"))
    assert results_place(tmp_path / "café\n") == f"{tmp_path}/café\n"
