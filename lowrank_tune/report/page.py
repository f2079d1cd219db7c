"""What the report's pages are made of, and how they are rendered."""

from __future__ import annotations

import base64
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from lowrank_tune.report.tables import Table


@dataclass(frozen=True, slots=True)
class Chart:
    """An interactive chart of the page."""

    name: str  # unique in the page
    title: str  # stands above it, and wraps on a phone
    figure: Figure
    alt: str  # what it shows, for those who cannot see it
    height: int = 420  # pixels
    wide: bool = False  # whether a phone scrolls it sideways rather than shrink it


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the report: a PNG, or charts that only a script draws."""

    caption: str  # how to read it
    charts: tuple[Chart, ...] = ()
    path: Path | None = None
    title: str = ""
    alt: str = ""  # what it shows, for those who cannot see it
    wide: bool = True  # whether a phone scrolls it sideways rather than shrink it
    replaced: bool = False  # whether something else of the section stands in its place where scripts run


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a language model."""

    text: str
    differs: bool = False  # whether it is another one than from X


@dataclass(frozen=True, slots=True)
class Example:
    """A question on a picture, and what is answered in some ways at each rank."""

    picture: str  # a data URI; empty where it is not at hand
    question: str
    answer: str  # from X
    stays: str  # from which rank on
    head: tuple[str, ...]  # the ways
    rows: tuple[tuple[str, tuple[Answer, ...]], ...]  # a rank, and each way's answer


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the report with what stands below it; `id` is its anchor."""

    id: str
    title: str
    pictures: tuple[Picture, ...] = ()
    lead: str = ""
    points: tuple[str, ...] = ()  # sentences below it, a list
    terms: tuple[tuple[str, str], ...] = ()  # names in the pictures, and what they mean
    examples: tuple[Example, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    spatial: str = ""  # the interactive view of test images, from `spatial_json`
    rank: int = 0  # that it shows first
    folded: tuple[Section, ...] = ()  # what a first reading leaves out

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its pictures."""
        return tuple(picture.path for picture in self.pictures if picture.path is not None)


def render_page(template: str, **shown: Any) -> str:
    """HTML text with every picture, every chart and the script that draws them inside it."""
    loader = PackageLoader("lowrank_tune.report")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.filters["embedded"] = _embedded
    pages.filters["packed"] = _packed
    return pages.get_template(template).render(plotly_script=get_plotlyjs(), **shown)


def _embedded(path: Path) -> str:
    """A PNG with the same pixels in half its bytes."""
    webp = io.BytesIO()
    Image.open(path).save(webp, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode('ascii')}"


def _packed(text: str) -> str:
    """Text as the page's script unpacks it: plotly alone is 4.8 MB, and 2 MB so."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def script_safe(text: str) -> str:
    """JSON that cannot end the script element that holds it."""
    return text.replace("<", "\\u003c")
