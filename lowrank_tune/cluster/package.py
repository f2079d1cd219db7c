"""What a job takes along: this package and the study file, so that a cluster without either runs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowrank_tune.spec.features import TensorSource
from lowrank_tune.spec.schema import StudySpec

STUDY_FILE = "study.yaml"
_JOB_FILE = "job"
_PACKAGE = Path(__file__).parents[1]


@contextmanager
def working_directory(job_id: str, study: Path | None = None) -> Iterator[Path]:
    """A folder with the package, and the study file as `study.yaml`; gone afterwards.

    Args:
        job_id: the job that takes it along. It is written into the folder, which makes its content the job's own: Ray
            uploads equal content once, and deletes it with the last job that uses it, even where the next one has just
            been told that it need not upload it.
        study: the file.
    """
    with TemporaryDirectory(prefix="lowrank-tune-") as folder:
        shutil.copytree(_PACKAGE, Path(folder) / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        (Path(folder) / _JOB_FILE).write_text(job_id, encoding="utf-8")
        if study is not None:
            shutil.copyfile(study, Path(folder) / STUDY_FILE)
        yield Path(folder)


def absolute_paths(spec: StudySpec) -> list[str]:
    """The `key.path=value` texts that make a study's relative paths absolute: a job starts in a folder of its own."""
    source: Any = spec.features.source
    given = {key: getattr(source, key, None) for key in ("images", "manifest", "root", "tensors")}
    found = {f"features.source.{key}": value for key, value in given.items() if value}
    if not isinstance(source, TensorSource) and Path(spec.features.encoder.checkpoint).is_dir():
        found["features.encoder.checkpoint"] = spec.features.encoder.checkpoint
    paths = {key: Path(value).expanduser() for key, value in found.items()}
    return [f"{key}={_quoted(Path.cwd() / path)}" for key, path in paths.items() if not path.is_absolute()]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
