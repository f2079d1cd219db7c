"""`export` and `apply`: a trained decomposer leaves its study, and is used on other features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.options import Json, Results, StudyName

models_app = typer.Typer()


@models_app.command(epilog="Example: lowrank-tune export quickstart-0d7fdaae --rank 64 my-decomposer")
def export(
    study_id: StudyName,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to: a new or empty folder.", show_default=False)
    ],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", min=1, help="Which one, where the study has several.")
    ] = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Write a finished study's best model of a rank to a folder: config.json, model.safetensors and a model card."""
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.exports.study import export_study

    model = export_study(study_id, directory, rank=rank, results=results)
    facts = {"model": str(model.directory), "fingerprint": model.fingerprint, "family": model.family}
    facts |= {"rank": model.rank, "ranks": list(model.ranks), "shape": [model.tokens, model.dim]}
    facts |= {"trial": model.about["training"]["trial_id"]}
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)
