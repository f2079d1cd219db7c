"""`export` and `apply`: a trained decomposer leaves its study, and is used on other features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowrank_tune.cli.features import Place
from lowrank_tune.cli.options import Address, Json, Quiet, Results, StudyName
from lowrank_tune.records import FeatureSet

models_app = typer.Typer()


@models_app.command(epilog="Example: lowrank-tune export quickstart-0d7fdaae --rank 64 my-decomposer")
def export(
    study_id: StudyName,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Where to: a new or empty folder.", show_default=False)
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
    facts: dict[str, Any] = {"model": str(model.directory), "fingerprint": model.fingerprint, "family": model.family}
    facts |= {"rank": model.rank, "ranks": list(model.ranks), "shape": [model.tokens, model.dim]}
    facts |= {"trial": model.about["training"]["trial_id"]}
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


@models_app.command(epilog="Example: lowrank-tune apply my-decomposer feature_cache_real/ factors --dtype int8")
def apply(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `export` wrote.", show_default=False)],
    features: Annotated[
        str,
        typer.Argument(
            metavar="FEATURES",
            help="A cache's name, the beginning of it, its path or address; or a directory of features_N.pt.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the factors go.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", min=1, help="Another rank that the model was trained for.")
    ] = None,
    store_dtype: Annotated[
        Literal["float32", "float16", "int8", "int5", "int4"],
        typer.Option("--dtype", help="How the factors are kept; the int ones with a scale a row."),
    ] = "float16",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes GPUs where Ray has any.")
    ] = "auto",
    max_quarantined: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of unusable images above which this fails.")
    ] = 0.05,
    results: Place = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decompose every image of a cache or a directory of tensors; one that was cut short is continued."""
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.factors.apply import apply_decomposer

    with shown_progress(quiet=quiet, doing="decomposing") as progress:
        found = apply_decomposer(
            model,
            features,
            out,
            rank=rank,
            store_dtype=store_dtype,
            device=device,
            max_quarantined=max_quarantined,
            results=results,
            address=address,
            on_progress=progress.images,
            on_note=progress.stage,
        )
    facts = factors_facts(found)
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


def factors_facts(factors: FeatureSet) -> dict[str, Any]:
    """What an application left."""
    from lowrank_tune.lowrank.stored_factors import factor_bytes

    return {
        "factors": factors.directory,
        "fingerprint": factors.fingerprint,
        "images": len(factors.rows),
        "quarantined": factors.quarantined,
        "shape": [factors.tokens, factors.dim],
        "rank": factors.rank,
        "dtype": factors.dtype,
        "bytes_per_image": factor_bytes(factors.tokens, factors.dim, factors.rank, factors.dtype),
    }
