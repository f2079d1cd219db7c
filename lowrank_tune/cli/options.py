"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.errors import InputError

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)]
StudyId = Annotated[str, typer.Argument(metavar="ID", help="A study's id, or the beginning of it.", show_default=False)]
StudyIds = Annotated[
    list[str], typer.Argument(metavar="ID [ID…]", help="Studies' ids, or their beginnings.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Lay a value over the file; may be repeated."),
]
Results = Annotated[
    str | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Where everything is kept; by default LOWRANK_TUNE_RESULTS, else ./results. "
        "Feature caches may lie at an address, too, such as s3://bucket/results.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="A Ray cluster, ray://host:10001 or host:6379; by default RAY_ADDRESS, else a Ray of its own.",
    ),
]
JobServer = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        envvar="RAY_API_SERVER_ADDRESS",
        help="A cluster's job server, http://host:8265; without it, the studies in the results directory.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", min=1, help="Only this one of a study's ranks.")]
Again = Annotated[bool, typer.Option("--again", help="Measure anew, even though there are figures on file.")]
MaxQuarantined = Annotated[
    float, typer.Option(min=0, max=1, help="The fraction of unusable images above which this fails.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the results.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
NewId = Annotated[str, typer.Option("--id", hidden=True, help="The new study's id, where `submit` has promised one.")]


def parse_channels(text: str) -> list[int] | int:
    """Read `--channels`: a count, or numbers between commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    numbers = [int(part) for part in parts if part.isascii() and part.isdecimal()]
    if not parts or len(numbers) < len(parts) or "," not in text and numbers == [0]:
        raise InputError(f"--channels {text}: give a count, such as 8, or numbers between commas, such as 0,5,17")
    return list(dict.fromkeys(numbers)) if "," in text else numbers[0]
