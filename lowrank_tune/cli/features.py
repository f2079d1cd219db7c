"""`lowrank-tune features`: the feature caches by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowrank_tune.cli.options import Address, Json

features_app = typer.Typer(help="List, show, verify, import and remove feature caches.", no_args_is_help=True)

CacheName = Annotated[
    str,
    typer.Argument(
        metavar="FINGERPRINT", help="A cache's name, the beginning of it, or its path or address.", show_default=False
    ),
]
Place = Annotated[
    str | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Where the caches are, a path or an address such as s3://bucket/results; "
        "by default LOWRANK_TUNE_RESULTS, else ./results.",
    ),
]


@features_app.command("ls", epilog="Example: lowrank-tune features ls --results /data/results")
def list_caches(results: Place = None, as_json: Json = False) -> None:
    """List the caches in the results directory."""
    from lowrank_tune.caches.catalog import cache_row, list_caches
    from lowrank_tune.cli.listing import print_caches

    caches = [cache_row(place) for place in list_caches(results)]
    print(json.dumps(caches, indent=2)) if as_json else print_caches(caches)


@features_app.command(epilog="Example: lowrank-tune features show 3f9c --against a01b")
def show(
    name: CacheName,
    results: Place = None,
    against: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Another cache: tell in which fields it differs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what one cache holds and what made it."""
    from lowrank_tune.caches.catalog import describe_cache, find_cache
    from lowrank_tune.caches.identity import differences
    from lowrank_tune.cli.listing import print_facts

    facts = describe_cache(find_cache(results, name))
    if against:
        other = describe_cache(find_cache(results, against))
        facts["differences"] = differences(facts["identity"], other["identity"])
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


@features_app.command(epilog="Example: lowrank-tune features verify 3f9c --full")
def verify(
    name: CacheName,
    results: Place = None,
    full: Annotated[bool, typer.Option("--full", help="Read every row and compare its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Check a cache against its manifest; exit 1 and name every difference when it is damaged."""
    from lowrank_tune.caches.catalog import find_cache
    from lowrank_tune.caches.places import Folder
    from lowrank_tune.caches.sealed import verify_cache

    place = find_cache(results, name)
    fingerprint = Folder.at(place).last
    problems = verify_cache(place, full=full)
    if as_json:
        print(json.dumps({"fingerprint": fingerprint, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(problem)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        found = "every row matches its checksum" if full else "sealed, and every shard has its size"
        print(f"{fingerprint}: {found}")


@features_app.command("import", epilog="Example: lowrank-tune features import feature_cache_real --store-dtype float16")
def import_directory(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Has features_N.pt, one tensor [tokens, dim] each.")],
    results: Place = None,
    store_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="What the cache stores.")
    ] = "float16",
    max_quarantined: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of broken files above which the import fails.")
    ] = 0.05,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Take ready features_N.pt into the cache, each one checked; an import that was cut short is continued."""
    from lowrank_tune.cli.listing import print_facts
    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.cli.tables import features_facts
    from lowrank_tune.cluster.directory import results_directory
    from lowrank_tune.features.pipeline import import_tensors

    with shown_progress() as progress:
        features = import_tensors(
            directory,
            results_directory(results) / "features",
            store_dtype=store_dtype,
            max_quarantined=max_quarantined,
            on_progress=progress.images,
            on_note=progress.stage,
            address=address,
        )
    facts = {"fingerprint": features.fingerprint, **features_facts(features)}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print_facts(facts)
    source = json.dumps(str(directory.absolute()))
    dtype = "" if store_dtype == "float16" else f", store_dtype: {store_dtype}"
    print(f"In a study file, this is    features: {{source: {{tensors: {source}}}{dtype}}}")


@features_app.command("rm", epilog="Example: lowrank-tune features rm 3f9c --yes")
def remove(
    name: CacheName,
    results: Place = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove one cache; not while an extraction writes into it, and nothing beside it."""
    from lowrank_tune.caches.catalog import cache_row, find_cache, remove_cache

    place = find_cache(results, name)
    row = cache_row(place)
    if not yes:
        typer.confirm(f"Remove {place} ({row['images']} images, {row['bytes'] / 1e9:.2f} GB)?", abort=True, err=True)
    print(f"{row['fingerprint']}: removed, {remove_cache(place) / 1e9:.2f} GB are free again")
