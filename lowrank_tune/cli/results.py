"""`compare`, `visualize` and `report`: a study that has finished, or was stopped, is looked at again."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lowrank_tune.cli.options import Json, Results
from lowrank_tune.errors import InputError

StudyName = Annotated[
    str, typer.Argument(metavar="ID", help="A study's id, or the beginning of it.", show_default=False)
]
StudyNames = Annotated[
    list[str], typer.Argument(metavar="ID [ID…]", help="Studies' ids, or their beginnings.", show_default=False)
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", min=1, help="Only this rank.")]
Again = Annotated[bool, typer.Option("--again", help="Measure anew, even though there are figures on file.")]


def add_commands(app: typer.Typer) -> None:
    """Give the program its commands on past studies."""
    app.command(epilog="Example: lowrank-tune compare quickstart-0d7fdaae --rank 64")(compare)
    app.command(
        epilog="Example: lowrank-tune visualize quickstart-0d7fdaae --image 3 --rank 64 --channels 0,5,17 · a number "
        "alone counts the first channels, `17,` is channel 17"
    )(visualize)
    app.command(epilog="Example: lowrank-tune report quickstart-0d7fdaae")(report)


def compare(
    names: StudyNames, rank: Rank = None, again: Again = False, results: Results = None, as_json: Json = False
) -> None:
    """Show every method's figures of a study, or of several side by side; a stopped one with the trials that it has."""
    from lowrank_tune.cli.tables import comparisons_json, print_comparisons
    from lowrank_tune.finished import check_ranks_compared, comparability, comparison_of, open_study

    studies = list({study.directory: study for study in (open_study(results, name) for name in names)}.values())
    comparisons = {study.directory.name: comparison_of(study, again=again) for study in studies}
    check_ranks_compared(comparisons, rank)
    caveats = comparability(studies)
    if as_json:
        print(json.dumps(comparisons_json(comparisons, rank, caveats), indent=2))
    else:
        print_comparisons(comparisons, rank, caveats)


def visualize(
    name: StudyName,
    images: Annotated[
        list[int], typer.Option("--image", metavar="N", min=0, help="Which test image, from 0; may be repeated.")
    ],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", min=1, help="By default the best trained model's.")
    ] = None,
    channels: Annotated[
        str, typer.Option("--channels", metavar="K", help="How many of the first ones, or which: 8, or 0,5,17.")
    ] = "8",
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Draw where on an image the SVD and the best network lose what: PNG files, and a page with choosers."""
    from lowrank_tune.cli.tables import print_files
    from lowrank_tune.finished import open_study
    from lowrank_tune.finished import visualize as draw

    chosen = parse_channels(channels)
    files = draw(open_study(results, name), images, rank=rank, channels=chosen)
    print(json.dumps([str(file) for file in files], indent=2)) if as_json else print_files(files)


def report(name: StudyName, again: Again = False, results: Results = None, as_json: Json = False) -> None:
    """Write a study's report anew and log it to MLflow; a stopped one with the trials that it has."""
    from lowrank_tune.cli.tables import print_files
    from lowrank_tune.finished import open_study, report_of

    files, untracked = report_of(open_study(results, name), again=again)
    if as_json:
        print(json.dumps({"report": str(files.html), "plots": [str(plot) for plot in files.plots],
                          "untracked": untracked}, indent=2))  # fmt: skip
    else:
        print_files((files.html, *files.plots), untracked)


def parse_channels(text: str) -> list[int] | int:
    """Read `--channels`: a count, or numbers between commas.

    Raises:
        InputError: it is neither.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if (
        not parts
        or not all(part.isascii() and part.isdecimal() for part in parts)
        or parts == ["0"]
        and "," not in text
    ):
        raise InputError(f"--channels {text}: give a count, such as 8, or numbers between commas, such as 0,5,17")
    numbers = [int(part) for part in parts]
    return list(dict.fromkeys(numbers)) if "," in text else numbers[0]
