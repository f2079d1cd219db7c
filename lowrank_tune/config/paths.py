"""A study file's relative paths, made absolute to go on with from any working directory."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from lowrank_tune.config.loading import parse_study
from lowrank_tune.config.render import render_study
from lowrank_tune.config.schema import StudySpec
from lowrank_tune.config.source import NamedTensors, TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.files import is_uri, quoted_in_sqlite

_SQLITE = "sqlite:///"


def absolute_paths(spec: StudySpec) -> dict[str, str | list[str]]:
    """A study file's relative paths, by key, made absolute; a list where one of its entries is relative."""
    source: Any = spec.features.source
    named = {f"features.source.{key}": getattr(source, key, None) for key in ("images", "manifest", "root", "tensors")}
    if isinstance(source, TensorSource) and isinstance(source.tensors, NamedTensors):
        named = {"features.source.tensors.path": source.tensors.path}
    if not isinstance(source, TensorSource) and os.path.isdir(os.path.expanduser(spec.features.encoder.checkpoint)):
        named["features.encoder.checkpoint"] = spec.features.encoder.checkpoint
    uri = spec.tracking.uri or ""
    if uri.startswith(_SQLITE):
        named["tracking.uri"] = uri.removeprefix(_SQLITE)
    made: dict[str, str | list[str]] = {}
    for key, value in named.items():
        entries = [] if value is None else [value] if isinstance(value, str) else list(value)
        absolute = [_absolute(entry) for entry in entries]
        if absolute != entries:
            made[key] = absolute[0] if isinstance(value, str) else absolute
    if "tracking.uri" in made:
        # Its own part is quoted already, where it needs it.
        made["tracking.uri"] = f"{_SQLITE}{quoted_in_sqlite(Path.cwd())}/{named['tracking.uri']}"
    return made


def _absolute(path: str) -> str:
    """A path or glob from here; one from the home directory, and an address, stay as they are."""
    if is_uri(path) or os.path.isabs(os.path.expanduser(path)):
        return path
    # A working directory's own brackets are no part of a glob.
    magic, here = glob.has_magic(path) and not os.path.exists(path), os.getcwd()
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", here):
        raise InputError(
            f"working directory {here}: its name is not UTF-8, or has control characters, so that no study file can "
            "hold a path from it; start from another"
        )
    return os.path.join(glob.escape(here) if magic else here, path)


def anchored(spec: StudySpec) -> StudySpec:
    """The same study with absolute paths, to go on with from any working directory."""
    overrides = anchors(spec)
    return parse_study(render_study(spec), spec.name, overrides) if overrides else spec


def anchors(spec: StudySpec) -> list[str]:
    """Overrides, `key=value`, that make a study file's relative paths absolute."""
    # YAML knows Python's escapes, but takes the two that JSON makes of a character beyond U+FFFF for two halves.
    return [
        f"{key}={json.dumps(path, ensure_ascii=False).encode('ascii', 'backslashreplace').decode()}"
        for key, path in absolute_paths(spec).items()
    ]
