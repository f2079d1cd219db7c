"""Which images a record names, and where they lie: the values of a manifest's image column -> places."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from lowrank_tune.errors import InputError, did_you_mean
from lowrank_tune.features.decoding import IMAGE_SUFFIXES
from lowrank_tune.features.embedded import parsed_text

INSIDE = "::"
"""After the file that an image lies inside of, in a place; what follows is for `read_bytes`."""
_NAMES = """
image images imagepath imagepaths imagefile imagefilename imagename img imgs imgpath imgfile imgname filename imgfn
filepath file path paths photo photos picture pictures jpg jpeg png webp imageid imgid messages conversations
conversation prompt imagebytes imgbytes jpgbytes imagebase64 imgbase64 base64
"""
_WELL_KNOWN = {name: place for place, name in enumerate(_NAMES.split())}
"""Names of the column of images, in the order of trust; small letters without `_`, `-`, `.` and blanks."""
_CHAT = ("conversations", "conversation", "messages", "query", "instruction", "texts")
"""Columns of records for training a language model, some of which are of text alone."""
_SPOKEN = ("messages", "conversations", "conversation", "prompt")
"""Columns that name images in the parts of their messages only; a text of one is no path."""
_KEYS = ("path", "image", "image_url", "url", "file_name", "filename", "image_path", "src", "file")
"""Of an object that stands for an image, or for a part of a message."""
_ADDRESS = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+://")
_TAGGED = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_COCO = re.compile(r"(?:COCO_[a-z]+\d+_)?(\d{12})")
"""A file of COCO's, which annotations made of it name by its number alone."""
_TRIED = 1000


def image_column(table: pa.Table, wanted: str | None, file: Path) -> str | None:
    """Return the column of images: the wanted one, or the first of well-known names that has some.

    None for chats of text alone; an InputError where others have no such column.
    """
    names: list[str] = table.column_names
    if wanted is not None:
        if wanted not in names:
            raise InputError(
                f"{file}: has no column {wanted!r}, {_only(names)}{did_you_mean(wanted, names)} (image_column)"
            )
        return wanted
    known = sorted(filter(is_image_name, names), key=lambda name: _WELL_KNOWN.get(_plain(name), len(_WELL_KNOWN)))
    addresses = []
    for name in known:
        images = list(islice(_named_in(table, name), _TRIED))
        if not all(map(is_address, images)):
            return name
        addresses += [name] if images else []
    if addresses:
        return addresses[0]
    if is_chat(names):
        return None
    empty = f"column {known[0]!r} names no image" if known else "no column has a name such as image, path or file_name"
    if any(map(looks_like_image, names)):
        empty = "the first line has to name the columns"
    raise InputError(f"{file}: {empty}; write features.source.image_column, the column of the images: {_only(names)}")


def is_image_name(column: str) -> bool:
    """Whether a column of this name is likely to name images."""
    return _plain(column) in _WELL_KNOWN or _plain(column).endswith(("filename", "filenames"))


def looks_like_image(text: str) -> bool:
    """Whether a text ends as the name of an image does."""
    return os.path.splitext(text)[1].lower() in IMAGE_SUFFIXES


def _plain(column: str) -> str:
    return re.sub(r"[-_. ]", "", column).lower()


def _only(names: list[str]) -> str:
    return f"only {', '.join(map(repr, names))}" if names else "no columns at all"


def _named_in(table: pa.Table, name: str) -> Iterable[str]:
    """The images of a column, read no further than they are asked for."""
    column = table.column(name).drop_null()
    for start in range(0, len(column), _TRIED):
        for value in column.slice(start, _TRIED).to_pylist():
            if not (_plain(name) in _SPOKEN and isinstance(value, str) and value[:1] != "["):
                yield from named_images(value)


def named_images(value: Any) -> list[str]:
    """List what a value names: a path or address, each of a list, or of a chat's messages with images for parts."""
    match value:
        case str():
            return _named_by_text(value)
        case list():
            return [image for item in value for image in named_images(item)]
        case dict() if is_message(value):
            content = value.get("content") or value.get("value")
            if isinstance(content, str):
                return _TAGGED.findall(content)
            return named_images(
                [part for part in content if isinstance(part, dict)] if isinstance(content, list) else content
            )
        case {"bytes": str(data)} | {"source": {"type": "base64", "data": str(data)}}:
            return [data]  # the file that it was kept in
        case dict() if value.get("type") and "image" not in str(value["type"]):
            return []
        case dict():
            return next((images for key in _KEYS if (images := named_images(value.get(key)))), [])
        case int() if not isinstance(value, bool):
            return [str(value)]
        case float() if math.isfinite(value) and value == int(value):
            return [str(int(value))]  # a column of numbers where one is missing
    return []


def is_message(value: Any) -> bool:
    """Whether a value is one of a chat's messages."""
    is_said = isinstance(value, dict) and ("content" in value or "value" in value)
    return is_said and bool(value.get("role") or value.get("from"))


def _named_by_text(text: str) -> list[str]:
    value = parsed_text(text)
    return named_images(value) if not isinstance(value, str) else [text] if text.strip() else []


def is_chat(record_columns: Collection[str]) -> bool:
    """Whether records are chats, which may have no image."""
    return any(name in record_columns for name in _CHAT)


def also_of_chats(record_columns: Collection[str]) -> list[str]:
    """Columns in which a chat may name its images where another chat of the same table has them elsewhere."""
    return [name for name in ("image", "images", *_SPOKEN[:2]) if name in record_columns and is_chat(record_columns)]


def refuse_addresses(images: Iterable[str], column: str, file: Path) -> None:
    """Refuse, as an InputError, images that lie on another machine."""
    addresses = list(filter(is_address, images))
    if addresses:
        raise InputError(
            f"{file}: column {column!r}: {len(addresses)} of its images are addresses, the first {addresses[0][:200]}; "
            "download them first, then name the files: in features.source.image_column, or by features.source.root"
        )


def is_address(text: str) -> bool:
    """Whether a text names what lies on another machine."""
    return _ADDRESS.match(text) is not None


def local_path(text: str) -> str:
    """Return a path as it is: of `file://`, of one that begins with `~`, or of one as people write it."""
    if text.startswith("file:"):
        return unquote(re.sub(r"^file:(//(localhost)?(?=/))?", "", text))
    return os.path.expanduser(text) if text.startswith("~") else text


class Finder:
    """Finds the files that images are named by; a directory is listed once."""

    def __init__(self, tables: Iterable[Path]) -> None:
        self._tables = set(map(str, tables))
        self._listed: dict[str, dict[str, list[str]]] = {}

    def place(self, image: str, folder: str) -> str:
        """Return where an image lies that a record of a table in a folder names, be it there or not.

        Raises:
            InputError: several files have the name, which has no suffix.
        """
        if INSIDE in image and image.split(INSIDE)[0] in self._tables:
            return image
        image = local_path(image)
        path = os.path.join(folder, image)
        if ("\\" in image or image != image.strip()) and not os.path.lexists(path):
            path = os.path.join(folder, image.strip().replace("\\", "/"))
        if not path.isascii() and not os.path.lexists(path):  # a Mac writes ü as two characters
            others = (unicodedata.normalize(form, path) for form in ("NFC", "NFD"))
            path = next(filter(os.path.lexists, others), path)
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES or os.path.isfile(path):
            return path
        directory, name = os.path.split(path)
        stems = self._stems(directory)
        fitting = stems.get(name) or stems.get(f"{name}{INSIDE}") or [path]
        if len(fitting) > 1:
            raise InputError(
                f"{path}: {len(fitting)} files have this name, {', '.join(sorted(map(os.path.basename, fitting)))}; "
                "name each with its suffix"
            )
        return fitting[0]

    def _stems(self, directory: str) -> dict[str, list[str]]:
        if directory not in self._listed:
            stems: dict[str, list[str]] = {}
            try:
                names = os.listdir(directory)
            except (OSError, ValueError):  # a path with a NUL is a ValueError
                names = []
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in IMAGE_SUFFIXES:
                    stems.setdefault(stem, []).append(os.path.join(directory, name))
                    if number := _COCO.fullmatch(stem):
                        for written in {number[1], str(int(number[1]))}:
                            stems.setdefault(f"{written}{INSIDE}", []).append(os.path.join(directory, name))
            self._listed[directory] = stems
        return self._listed[directory]
