"""The commands. Each one reads its arguments, makes one call and prints what came back.

torch, ray and mlflow are imported inside the commands that need them: `--help` and `validate` answer at once.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lowrank_tune.cli.features import features_app
from lowrank_tune.cli.models import models_app
from lowrank_tune.cli.options import Address, Json, NewId, Overrides, Quiet, Results, StudyFile
from lowrank_tune.cli.results import add_commands
from lowrank_tune.cli.studies import studies_app
from lowrank_tune.errors import StudyFileError
from lowrank_tune.spec.loading import load_study
from lowrank_tune.spec.rendering import render_study, study_schema

app = typer.Typer(
    help="Hyperparameter studies of low-rank decomposition networks, measured against the truncated SVD.",
    epilog="--debug anywhere on the line shows tracebacks and the libraries' own logs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(features_app, name="features")
app.add_typer(studies_app)
app.add_typer(models_app)
add_commands(app)


@app.command(epilog="Example: lowrank-tune validate studies/quickstart.yaml")
def validate(study: StudyFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a study file; every error comes with its line."""
    try:
        spec = load_study(study, overrides or ())
    except StudyFileError as error:
        if not as_json:
            raise
        print(json.dumps({"valid": False, "problems": error.problems}, indent=2))
        raise typer.Exit(error.exit_code) from None
    print(json.dumps({"valid": True, "name": spec.name}) if as_json else f"{study}: a valid study file, {spec.name}")


@app.command(epilog="Example: lowrank-tune plan studies/quickstart.yaml --json")
def plan(study: StudyFile, overrides: Overrides = None, results: Results = None, as_json: Json = False) -> None:
    """Tell what a study will do and need, and what is cached already; starts nothing."""
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.inspection import preview_study

    facts = preview_study(load_study(study, overrides or ()), results)
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


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
    from lowrank_tune.session import ray_session

    spec = load_study(study, overrides or ())  # a wrong file is told before anything starts
    with ray_session(address, meanwhile=("torch", "pandas", "matplotlib.figure")):
        from lowrank_tune.cli.progress import shown_progress
        from lowrank_tune.cli.tables import print_result
        from lowrank_tune.study import run_study

        with shown_progress(spec.training.epochs, quiet) as progress:
            result = run_study(
                study,
                results=results,
                overrides=overrides or (),
                address=address,
                progress=progress,
                study_id=new_id,
            )
    print_result(result, as_json)


@app.command(epilog="Example: lowrank-tune trial studies/quickstart.yaml --set search.space.rank=64")
def trial(
    study: StudyFile,
    overrides: Overrides = None,
    results: Results = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train one trial, the first point of the space, in this very process: breakpoints work."""
    from dataclasses import asdict

    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.cli.tables import print_trial
    from lowrank_tune.study import run_trial

    with shown_progress(load_study(study, overrides or ()).training.epochs, quiet) as progress:
        outcome = run_trial(study, results=results, overrides=overrides or (), progress=progress)
    print(json.dumps(asdict(outcome), indent=2)) if as_json else print_trial(outcome)
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
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.cli.tables import features_facts
    from lowrank_tune.study import extract_study

    with shown_progress(quiet=quiet) as progress:
        features = extract_study(study, results=results, overrides=overrides or (), address=address, progress=progress)
    facts = features_facts(features)
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


@app.command(epilog="Example: lowrank-tune ui --port 5000")
def ui(
    results: Results = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 5000,
) -> None:
    """Open the MLflow UI on this results directory; Ctrl-C ends it."""
    from lowrank_tune.cluster.directory import results_directory
    from lowrank_tune.tracking.ui import first_page, serve_ui

    home = results_directory(results)
    typer.echo(f"Open {first_page(home, host=host, port=port)}", err=True)
    raise typer.Exit(serve_ui(home, host=host, port=port))


@app.command(epilog="Example: lowrank-tune reconcile rank-sweep-0a1b2c3d")
def reconcile(
    study_id: Annotated[str, typer.Argument(metavar="ID", help="A study, or how its id begins.", show_default=False)],
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Repair what MLflow holds of a study, from the study's own files; once more changes nothing."""
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.life import reconcile_study

    facts = reconcile_study(study_id, results)
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


@app.command(epilog="Example: lowrank-tune doctor studies/quickstart.yaml")
def doctor(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY.yaml]", help="A study file to check as well.")] = None,
    overrides: Overrides = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Check the installation, the GPU, the encoder, the data and the cache, and print the shapes."""
    from dataclasses import asdict
    from pathlib import Path

    from lowrank_tune.cli.tables import print_checks
    from lowrank_tune.inspection import diagnose

    checks = diagnose(load_study(Path(study), overrides or ()) if study else None, results)
    print(json.dumps([asdict(check) for check in checks], indent=2)) if as_json else print_checks(checks)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
