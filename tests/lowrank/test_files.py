from pathlib import Path

import pytest

from lowrank_tune.files import write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "deep" / "file.txt"
    write_whole(target, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(target, fail)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]
