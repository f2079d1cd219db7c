"""The commands. Each one reads its arguments, makes one call and prints what came back.

torch, ray and mlflow are imported inside the commands that need them: `--help`, `validate` and `list` answer at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli import output
from lowrank_tune.cli.features import apply_app, features_app
from lowrank_tune.cli.life import WITH_RAY, life_app
from lowrank_tune.cli.options import (
    Address,
    Again,
    Json,
    NewId,
    Overrides,
    Quiet,
    Rank,
    Results,
    StudyFile,
    StudyId,
    StudyIds,
    parse_channels,
)
from lowrank_tune.cli.output import show
from lowrank_tune.cli.progress import shown_progress
from lowrank_tune.config.loading import load_study
from lowrank_tune.config.render import render_study, study_schema
from lowrank_tune.errors import StudyFileError

app = typer.Typer(
    help="Hyperparameter studies of low-rank decomposition networks, measured against the truncated SVD.",
    epilog="--debug anywhere on the line shows tracebacks and the libraries' own logs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(life_app)
app.add_typer(features_app, name="features")
app.add_typer(apply_app)


@app.command(epilog="Example: lowrank-tune validate studies/quickstart.yaml")
def validate(study: StudyFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a study file; every error comes with its line."""
    try:
        spec = load_study(study, overrides or ())
    except StudyFileError as error:
        if not as_json:
            raise
        show({"valid": False, "problems": error.problems}, as_json)
        raise typer.Exit(error.exit_code) from None
    print(json.dumps({"valid": True, "name": spec.name}) if as_json else f"{study}: a valid study file, {spec.name}")


@app.command(epilog="Example: lowrank-tune plan studies/quickstart.yaml --json")
def plan(study: StudyFile, overrides: Overrides = None, results: Results = None, as_json: Json = False) -> None:
    """Tell what a study will do and need, and what is cached already; starts nothing."""
    from lowrank_tune.cost import preview_study

    show(preview_study(load_study(study, overrides or ()), results), as_json, output.print_plan)


@app.command(epilog="Example: lowrank-tune render studies/quickstart.yaml --set search.method=random")
def render(study: StudyFile, overrides: Overrides = None) -> None:
    """Print a study file with every default filled in."""
    print(render_study(load_study(study, overrides or ())), end="")


@app.command(epilog="Example: lowrank-tune schema > study.schema.json")
def schema() -> None:
    """Print the study file's JSON Schema, for editors."""
    print(json.dumps(study_schema(), indent=2))


@app.command(epilog="Example: lowrank-tune run studies/quickstart.yaml --set training.epochs=5 --results /data/results")
def run(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: Json = False,
    new_id: NewId = "",
) -> None:
    """Run a whole study: features, trials, comparison, report, MLflow."""
    from lowrank_tune.runtime import ray_session

    spec = load_study(study, overrides or ())  # a wrong file is told before anything starts
    with ray_session(address, meanwhile=WITH_RAY):
        from lowrank_tune.study import run_study

        with shown_progress(spec.training.epochs, quiet) as progress:
            result = run_study(
                spec,
                file=study,
                results=results,
                overrides=overrides or (),
                address=address,
                progress=progress,
                study_id=new_id,
            )
    output.show_study(result, as_json)


@app.command(epilog="Example: lowrank-tune trial studies/quickstart.yaml --set search.space.rank=64")
def trial(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one trial, the first point of the space, in this very process: breakpoints work."""
    spec = load_study(study, overrides or ())
    from lowrank_tune.study import run_trial

    with shown_progress(spec.training.epochs, quiet) as progress:
        outcome = run_trial(spec, file=study, results=results, overrides=overrides or (), progress=progress)
    show(outcome, as_json, output.print_trial)
    if outcome.status == "failed":
        raise typer.Exit(1)


@app.command(epilog="Example: lowrank-tune extract studies/quickstart.yaml")
def extract(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Extract and cache a study's features, and train nothing."""
    spec = load_study(study, overrides or ())
    from lowrank_tune.study import extract_study

    with shown_progress(quiet=quiet) as progress:
        features = extract_study(spec, results=results, address=address, progress=progress)
    show(output.features_facts(features), as_json)


@app.command(epilog="Example: lowrank-tune doctor studies/quickstart.yaml")
def doctor(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY.yaml]", help="A study file to check as well.")] = None,
    overrides: Overrides = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Check the installation, the GPU, the encoder, the data and the cache, and print the shapes."""
    from lowrank_tune.cost import diagnose

    checks = diagnose(load_study(study, overrides or ()) if study else None, results)
    show(checks, as_json, output.print_checks)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command(epilog="Example: lowrank-tune ui --port 5000")
def ui(
    results: Results = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
) -> None:
    """Open the MLflow UI on this results directory, on a view for comparing trials; Ctrl-C ends it."""
    from lowrank_tune.cluster.study_dir import results_directory
    from lowrank_tune.tracking.ui import CHARTS, first_page, serve_ui

    home = results_directory(results)
    page = first_page(home, host=host, port=port)
    typer.echo(f"Open {page}\nIts charts: {page}{CHARTS}", err=True)
    raise typer.Exit(serve_ui(home, host=host, port=port))


@app.command(epilog="Example: lowrank-tune compare quickstart-0d7fdaae rank-sweep-0d8a11c2 --html compare.html")
def compare(
    study_ids: StudyIds,
    rank: Rank = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Also write a page: the best by rank with intervals, learning curves, where the study files differ.",
        ),
    ] = None,
    again: Again = False,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Show every method's figures of a study, or of several side by side; a stopped one with the trials that it has."""
    from lowrank_tune.past_study import (
        check_rank_compared,
        comparability,
        comparison_of,
        open_study,
        write_side_by_side,
    )

    studies = list({study.directory: study for study in (open_study(results, name) for name in study_ids)}.values())
    check_rank_compared(studies, rank)
    comparisons = {study.directory.name: comparison_of(study, again=again) for study in studies}
    output.show_comparisons(comparisons, rank, comparability(studies), as_json)
    if html:
        page = write_side_by_side(studies, comparisons, html, rank)
        typer.echo(f"Page: {page}", err=True)


@app.command(
    epilog="Example: lowrank-tune visualize quickstart-0d7fdaae --image 3 --rank 64 --channels 0,5,17 · a number "
    "alone counts the first channels, `17,` is channel 17"
)
def visualize(
    study_id: StudyId,
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
    chosen = parse_channels(channels)
    from lowrank_tune import past_study

    study = past_study.open_study(results, study_id)
    show(past_study.visualize(study, images, rank=rank, channels=chosen), as_json, _print_files)


@app.command(epilog="Example: lowrank-tune report quickstart-0d7fdaae")
def report(study_id: StudyId, again: Again = False, results: Results = None, as_json: Json = False) -> None:
    """Write a study's report anew and log it to MLflow; a stopped one with the trials that it has."""
    from lowrank_tune.past_study import open_study, report_of

    study = open_study(results, study_id)
    with shown_progress(quiet=as_json) as progress:
        files, untracked = report_of(study, again=again, progress=progress.stage)
    if as_json:
        show({"report": files[-1], "plots": files[:-1], "untracked": untracked}, as_json)
    else:
        _print_files(files)
        if untracked:
            typer.echo(f"not in MLflow: {untracked}", err=True)


@app.command(
    epilog="Example: lowrank-tune fidelity quickstart-0d7fdaae --questions 'What is in the picture?' --images 128"
)
def fidelity(
    study_id: StudyId,
    questions: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A column of the records, or the question itself; by default the study's."),
    ] = None,
    answers: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of right answers; by default the study's.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Test images; more than before, and only those are asked.")
    ] = None,
    results: Results = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Tell what the language model still sees with each method, rank and form: asks only what was not asked before."""
    from lowrank_tune.past_study import fidelity_of, open_study

    study = open_study(results, study_id)
    with shown_progress(quiet=as_json) as progress:
        found, untracked = fidelity_of(
            study, questions=questions, answers=answers, images=images, address=address, progress=progress
        )
    output.show_fidelity(found, untracked, as_json)


def _print_files(files: Sequence[Path]) -> None:
    # The page to open comes first.
    print(*sorted(files, key=lambda file: file.suffix != ".html"), sep="\n")


@app.command(epilog="Example: lowrank-tune export quickstart-0d7fdaae --rank 64 my-decomposer")
def export(
    study_id: StudyId,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where to: a new or empty folder.", show_default=False)
    ],
    rank: Rank = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Write a finished study's best model of a rank to a folder: config.json, model.safetensors and a model card."""
    from lowrank_tune.export import export_study

    model = export_study(study_id, directory, rank=rank, results=results)
    facts = {"model": model.directory, "fingerprint": model.fingerprint, "family": model.family, "rank": model.rank}
    facts |= {"ranks": list(model.ranks), "shape": [model.tokens, model.dim]}
    show(facts | {"trial": model.training["trial_id"]}, as_json)
