"""Folders and globs of images."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

import pyarrow as pa

from lowrank_tune.config.schema import ImageSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.images import SourceRecords

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def find_images(source: ImageSource) -> SourceRecords:
    """Find the images of a directory, subfolders included, or of a glob; an InputError where there are none."""
    pattern = source.images
    place, paths, left_out = Path(pattern).expanduser().absolute(), [], Counter[str]()
    if place.is_dir():
        found = [path for path in place.rglob("*") if path.is_file()]
        paths = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
        left_out.update(path.suffix.lower() for path in found if path.suffix.lower() not in IMAGE_SUFFIXES)
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
    kinds = ", ".join(f"{number} {suffix or 'without a suffix'}" for suffix, number in left_out.most_common())
    return SourceRecords(tuple(map(str, sorted(paths))), pa.table({}), (f"left out: {kinds}",) if kinds else ())
