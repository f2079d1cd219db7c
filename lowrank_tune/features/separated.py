"""CSV and its relatives, as people and Excel write them -> records as a table."""

from __future__ import annotations

import csv
import io
import re
from contextlib import suppress
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from lowrank_tune.features.named import is_image_name

_LARGEST_BLOCK = 2**31 - 2
_LONGEST_HEADER, _ROWS_TRIED = 100_000, 50
_DECIMAL = r"^(-?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[nN]a[nN]|-?inf)$"


def read_separated(text: str, tabs: bool, image_column: str | None) -> pa.Table:
    """Read CSV, whatever separates its values; a ValueError that names the line where it cannot be read."""
    if not text.strip():
        raise ValueError("the file is empty")
    told = re.match(r"sep=(.)\r?\n", text)  # as Excel tells it
    text = text[told.end() if told else 0 :]
    begun = {each: _begun(text, each) for each in ([told[1]] if told else "\t,;|" if tabs else ",;\t|")}
    # A name or a caption may hold another separator, but then not in every row.
    separator = max(
        begun, key=lambda each: (len({*map(len, begun[each])}) == 1 < len(begun[each][0]), len(begun[each][0]))
    )
    header = begun[separator][0]
    table, ragged = _rows(text, separator, header, '"')
    if separator == "\t" and '"' in text and len(header) > 1:
        lines = [line.count("\t") for line in re.split("\r\n|\r|\n", text) if line]
        # Where each line is a record, a quote that joins some is one of a caption's.
        if set(lines) == {len(header) - 1} and len(table) < len(lines) - 1:
            return _typed(_rows(text, separator, header, False)[0], image_column)
    if ragged:
        raise ValueError(
            _ragged(text, separator) or f"row {ragged[0].number} has not {len(header)} values, as the header has"
        )
    last = table.slice(max(len(table) - 1, 0)).to_pylist()
    if text.count('"') % 2 and any("\n" in value for row in last for value in row.values() if isinstance(value, str)):
        raise ValueError("the last record has a quote that is never closed")
    return _typed(table, image_column)


def _rows(
    text: str, separator: str, header: list[str], quote: str | bool
) -> tuple[pa.Table, list[pyarrow.csv.InvalidRow]]:
    """The records as texts, and those left out for having not as many values as the header."""
    ragged: list[pyarrow.csv.InvalidRow] = []

    def note(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    data = text.encode()
    table = pyarrow.csv.read_csv(
        pa.BufferReader(data),
        # As one block, which a long value never leaves, and in one thread, which counts lines.
        pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, _LARGEST_BLOCK)),
        pyarrow.csv.ParseOptions(
            delimiter=separator, quote_char=quote, newlines_in_values=True, invalid_row_handler=note
        ),
        # As text, or what is named 0001 would become the number 1.
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    return table, ragged


def _typed(table: pa.Table, image_column: str | None) -> pa.Table:
    """Numbers where a column has them, but for that of the images."""
    names = [name.strip() for name in table.column_names]
    columns = [
        _numbers(column)
        if pa.types.is_string(column.type) and name != image_column and not is_image_name(name)
        else column
        for name, column in zip(names, table.columns, strict=True)
    ]
    return pa.table(columns, names=names)


def _begun(text: str, separator: str) -> list[list[str]]:
    """The header and the first records, as a separator cuts them."""
    rows: list[list[str]] = []
    lines = io.StringIO(text[:_LONGEST_HEADER].lstrip("\r\n"), newline="")
    with suppress(csv.Error):
        rows += filter(None, islice(csv.reader(lines, delimiter=separator), _ROWS_TRIED))
    return (rows[:-1] if len(text) > _LONGEST_HEADER and len(rows) > 1 else rows) or [[]]


def _ragged(text: str, separator: str) -> str | None:
    """Tell of the first record that has not as many values as the header, and its line, which pyarrow does not know."""
    rows = csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=separator)
    blank = len(text) - len(text.lstrip("\r\n"))
    line = text.count("\n", 0, blank)
    expected, begun = 0, 0
    try:
        for row in rows:
            expected = expected or len(row)
            if row and len(row) != expected:
                return f"line {line + begun + 1} has {len(row)} values, the header has {expected}"
            begun = rows.line_num
    except csv.Error:  # a value of more than 128 KiB
        pass
    return None


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return numbers where each text is one, and is written as that is; else the texts."""
    if column.null_count == len(column):
        return column
    try:
        numbers = column.cast(pa.int64())
        if numbers.cast(pa.string()) == column:
            return numbers
    except pa.ArrowInvalid:
        pass
    if pc.all(pc.match_substring_regex(column, _DECIMAL)).as_py():
        return column.cast(pa.float64())
    return column
