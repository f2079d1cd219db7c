"""What each image is asked: the question itself, or a manifest's column of questions and one of right answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lowrank_tune.config.fidelity import FidelitySpec, is_question
from lowrank_tune.config.source import ManifestSource, Source
from lowrank_tune.errors import CacheError, InputError, did_you_mean
from lowrank_tune.features.embedded import parsed_text
from lowrank_tune.features.images import RECORD_COLUMNS
from lowrank_tune.features.sources import read_records
from lowrank_tune.records import FeatureSet

_PLACES = re.compile(r"<image>|<\|vision_start\|>|<\|image_pad\|>|<\|vision_end\|>")
"""Where LLaVA's and Qwen's texts have the image: the chat template says where, and has room for one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about one image, and what people answered; no answers where none are known."""

    question: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Questions:
    """The questions of a study's images, by the image's key, in the order of its records."""

    by_image: dict[str, tuple[Asked, ...]]
    blank: int = 0  # records without a question, which are left out


def check_questions(source: Source, asked: FidelitySpec) -> None:
    """Refuse, as an InputError, a column that a source's list lacks, or one that holds no text."""
    if isinstance(source, ManifestSource):
        columns = read_records(source, None, 0).columns
        for key, column in (("questions", asked.questions), ("answers", asked.answers)):
            if column is not None:
                _column(columns, key, column)


def image_questions(features: FeatureSet, asked: FidelitySpec) -> Questions:
    """The questions about each image that has features.

    Raises:
        InputError: the records have no such column, or one without text.
        CacheError: the records cannot be read.
    """
    try:
        table = pyarrow.parquet.read_table(features.records_path)
    except (OSError, pa.ArrowException) as error:
        reason = f"the records' questions cannot be read ({error}); extract again"
        raise CacheError(f"{features.records_path}: {reason}") from error
    own = table.drop_columns(list(RECORD_COLUMNS))
    taken = {f"source_{name}": name for name in RECORD_COLUMNS}
    own = own.rename_columns([taken.get(name, name) for name in own.column_names])
    questions = _column(own, "questions", asked.questions)
    answers = None if asked.answers is None else _column(own, "answers", asked.answers)
    known = {row.key for row in features.rows}
    found: dict[str, dict[str, Asked]] = {}
    blank = 0
    for number, key in enumerate(table["key"].to_pylist()):
        if key not in known:
            continue
        question = asked.questions if questions is None else _question(questions[number].as_py())
        if question is None:
            blank += 1
            continue
        given = () if answers is None else tuple(_answers(answers[number].as_py()))
        # Of records that ask an image the same, the first stands.
        found.setdefault(key, {}).setdefault(question, Asked(question, given))
    return Questions({key: tuple(own.values()) for key, own in found.items()}, blank)


def _column(table: pa.Table, key: str, name: str) -> pa.ChunkedArray | None:
    """A column of the user's own; None of what is the question itself."""
    own = table.column_names
    if name not in own:
        if key == "questions" and is_question(name):
            return None
        only = f"only {', '.join(map(repr, own))}" if own else "no columns at all"
        raise InputError(f"fidelity.{key}: the records have no column {name!r}, {only}{did_you_mean(name, own)}")
    column = table.column(name)
    read = _question if key == "questions" else lambda value: next(iter(_answers(value)), None)
    if not any(read(value) is not None for value in column.to_pylist()):
        raise InputError(f"fidelity.{key}: column {name!r} holds {column.type}, and not one text; name another")
    return column


def _question(value: Any) -> str | None:
    """A text without the places of images."""
    text = _text(value)
    return text and (_PLACES.sub("", text).strip() or None)


def _text(value: Any) -> str | None:
    """A text that says something; what lists and objects are kept as, in a column of several types, is none."""
    return value.strip() or None if isinstance(value, str) and isinstance(parsed_text(value), str) else None


def _answers(value: Any) -> Iterable[str]:
    """A text, a list of texts, or of objects with an `answer` as VQAv2 has them; a CSV's list is a text."""
    value = parsed_text(value) if isinstance(value, str) else value
    match value:
        case str():
            yield from filter(None, [_text(value)])
        case float():  # whole numbers, where others are missing; NaN for those that are
            if math.isfinite(value):
                yield f"{value:.15g}"
        case bool() | int():
            yield str(value)
        case {"answer": answer}:
            yield from _answers(answer)
        case list():
            for each in value:
                yield from _answers(each)
