"""The report's section on what the language model still sees: charts, a table and examples."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import open_picture
from lowrank_tune.measured import Fidelity, FidelityExample, FidelityRow
from lowrank_tune.report.agreement import agreement_pictures, picture_of
from lowrank_tune.report.page import Answer, Example, Section
from lowrank_tune.report.rates import PICTURES
from lowrank_tune.report.tables import Table
from lowrank_tune.report.text import ABSENT, METHOD_NOTES, count, in_order, kib_text

logger = logging.getLogger(__name__)

_LONGEST = 400
"""Letters of a question or an answer that the page shows."""
_PIXELS = 2**26
"""What the picture of an example may have, as `open_picture`."""
_SIDE = 320  # pixels of the longer side on the page
_NAMES = {"x": "X", **{name: label for name, (label, _) in PICTURES.items()}}
_WAYS = {"svd": "svd", "trained": "the best trained"}


def fidelity_section(fidelity: Fidelity, directory: Path) -> Section:
    """Write the charts into the study's `directory` and gather what the page shows."""
    rows = fidelity.rows
    asked = max((row.n_questions for row in rows), default=0)
    images = max((row.n_images for row in rows), default=0)
    kept = dict.fromkeys(picture_of(row.method) or row.method for row in rows)
    return Section(
        "fidelity",
        "What the model still sees",
        agreement_pictures(rows, directory / "plots"),
        lead=f"{count(asked, 'question')} on {count(images, 'test image')}, answered from X, the features as they are "
        "cached, and from every other form of them."
        + (f" The model: {fidelity.model.rstrip('.')}." if fidelity.model else "")
        if rows
        else "",
        points=fidelity.words,
        terms=tuple((_NAMES.get(name, name), METHOD_NOTES.get(name, "trained")) for name in kept),
        examples=tuple(_example(example, directory) for example in fidelity.examples),
        tables=(fidelity_table(rows),) if rows else (),
        notes=fidelity.remarks,
    )


def fidelity_table(rows: Sequence[FidelityRow]) -> Table:
    """All figures of every method, rank and form: first what has no rank, then by rising rank."""
    columns: dict[str, Callable[[FidelityRow], str]] = {
        "rank": lambda row: str(row.rank or "none"),
        "method": lambda row: "X itself" if row.method == "x" else row.method,
        "form": lambda row: row.form or ABSENT,
        "KiB\nan image": lambda row: kib_text(row.bytes_per_image),
        "KL,\nnats": lambda row: _figure(row.kl_mean, row.kl_mean_low, row.kl_mean_high),
        "first token\nflipped, %": lambda row: _percent(
            row.first_token_flips, row.first_token_flips_low, row.first_token_flips_high
        ),
        "answer\nflipped, %": lambda row: _percent(row.answer_flips, row.answer_flips_low, row.answer_flips_high),
        "log-likelihood\nchanged by": lambda row: _figure(
            row.loglik_delta_mean, row.loglik_delta_mean_low, row.loglik_delta_mean_high, signed=True
        ),
    }
    told = [
        "held against the answers from X itself, means over questions, with 95 % intervals over groups of images where "
        "there are two · KL: of the next token, over the positions of X's answer · log-likelihood: of X's answer"
    ]
    if any(row.accuracy is not None for row in rows):
        columns |= {
            "accuracy,\n%": lambda row: _percent(row.accuracy, row.accuracy_low, row.accuracy_high),
            "accuracy\n− X's": lambda row: _percent(
                row.accuracy_minus_x, row.accuracy_minus_x_low, row.accuracy_minus_x_high, signed=True
            ),
        }
        told.append("accuracy: as TextVQA defines it, and its difference to X's on the same questions")
    if any(row.anls is not None for row in rows):
        columns["ANLS,\n%"] = lambda row: _percent(row.anls, row.anls_low, row.anls_high)
        told.append("ANLS: average normalised Levenshtein similarity")
    if any(row.accuracy_hard is not None for row in rows):
        columns["on hard\nones, %"] = lambda row: _percent(
            row.accuracy_hard, row.accuracy_hard_low, row.accuracy_hard_high
        )
        hard = count(max(row.n_hard for row in rows), "question")
        told.append(f"hard ones: {hard} that X answers and the half-side image does not")
    place = {
        name: number for number, name in enumerate(["x", *in_order({row.method for row in rows} - {"x"}), *PICTURES])
    }
    return Table.of(
        "What the model still sees",
        sorted(rows, key=lambda row: (row.rank, place[picture_of(row.method) or row.method], -row.bytes_per_image)),
        columns,
        f"{told[0][0].upper()}{told[0][1:]}" + "".join(f" · {each}" for each in told[1:]),
        texts=("method", "form"),
        terminal=("rank", "method", "form", "KiB\nan image", "answer\nflipped, %"),
        grouped=True,
    )


def _percent(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """A share in percent, one decimal, with its interval: `3.1 (0.4 to 5.8)`; a signed one is a difference."""
    if value is None or not math.isfinite(value):
        return ABSENT
    text = f"{100 * value:+z.1f}" if signed and value else f"{100 * value:z.1f}"
    if low is None or high is None:
        return text
    ends = (low, high) if signed else (max(low, 0.0), min(high, 1.0))
    return f"{text} ({100 * ends[0]:z.1f} to {100 * ends[1]:z.1f})"


def _figure(value: float, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """A figure in three digits, with its interval in two; a signed one may be below 0."""
    if not math.isfinite(value):
        return ABSENT
    text = f"{value:+.3g}" if signed and value else f"{value:z.3g}"
    return text if low is None or high is None else f"{text} ({low if signed else max(low, 0.0):z.2g} to {high:z.2g})"


def _example(example: FidelityExample, directory: Path) -> Example:
    ways = [way for way in (*_WAYS, *sorted(example.answers.keys() - _WAYS.keys())) if example.answers.get(way)]
    names = [_WAYS.get(way, way) for way in ways]
    kept = [
        f"with {name} " + (f"from rank {rank} on" if rank else "not even at the highest")
        for name, rank in zip(names, map(example.stays_from.get, ways), strict=True)
    ]
    ranks = sorted({rank for way in ways for rank in example.answers[way]})
    return Example(
        picture=_embedded(directory / example.picture) if example.picture else "",
        question=_shown(example.question),
        answer=_shown(example.answer),
        stays=f"X's answer stays: {', '.join(kept)}.",
        head=tuple(names),
        rows=tuple(
            (str(rank), tuple(_answer(example.answers[way].get(rank), example.answer) for way in ways))
            for rank in ranks
        ),
    )


def _answer(text: str | None, whole: str) -> Answer:
    """An answer beside the one from X, `whole`; None where none was asked for."""
    if text is None:
        return Answer(ABSENT)
    return Answer("the same") if text == whole else Answer(_shown(text), differs=True)


def _shown(text: str) -> str:
    """What people or models wrote, as far as a page has room for it; never empty."""
    whole = text.encode("utf-8", "replace").decode("utf-8").strip()  # half a surrogate pair cannot be written
    if not whole:
        return "(nothing)"
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST].rstrip()}…"


def _embedded(path: Path) -> str:
    """A small JPEG of a picture as a data URI; empty where there is none to be read."""
    try:
        picture, jpeg = open_picture(path.read_bytes(), _PIXELS), io.BytesIO()
    except (OSError, UnusableError) as error:
        logger.warning("%s: %s; the report's example goes without its picture", path, error)
        return ""
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(jpeg, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")
