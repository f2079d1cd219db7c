"""Folders and globs of images."""

from __future__ import annotations

import glob
from pathlib import Path

import pyarrow as pa

from lowrank_tune.config.schema import ImageSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.images import SourceRecords

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def find_images(source: ImageSource) -> SourceRecords:
    """Find the images of a directory, subfolders included, or of a glob; an InputError where there are none."""
    pattern = source.images
    place, paths = Path(pattern).expanduser().absolute(), []
    if place.is_dir():
        paths = [path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        problem = f"{place}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, in subfolders too)"
    elif glob.has_magic(pattern):
        paths = [path for name in glob.glob(str(place), recursive=True) if (path := Path(name)).is_file()]
        problem = f"{pattern}: matches no file from {Path.cwd()}"
    elif place.exists():
        problem = f"{place}: is a file; give a directory, a glob, or `manifest: {pattern}` for a table of records"
    else:
        problem = f"{place}: no such directory"
    if not paths:
        raise InputError(f"{problem}; correct features.source.images")
    return SourceRecords(tuple(map(str, sorted(paths))), pa.table({}))
