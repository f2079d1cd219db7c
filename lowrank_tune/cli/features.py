"""`lowrank-tune features`: the feature caches by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowrank_tune.cli.options import Json, Results

features_app = typer.Typer(help="List, show and verify feature caches.", no_args_is_help=True)

CacheName = Annotated[
    str, typer.Argument(metavar="FINGERPRINT", help="A cache's name, or the beginning of it.", show_default=False)
]


@features_app.command("ls", epilog="Example: lowrank-tune features ls --results /data/results")
def list_caches(results: Results = None, as_json: Json = False) -> None:
    """List the caches in the results directory."""
    from lowrank_tune.cli.tables import print_caches
    from lowrank_tune.inspection import describe_caches

    caches = describe_caches(results)
    print(json.dumps(caches, indent=2)) if as_json else print_caches(caches)


@features_app.command(epilog="Example: lowrank-tune features show 3f9c")
def show(name: CacheName, results: Results = None, as_json: Json = False) -> None:
    """Show what one cache holds and what made it."""
    from lowrank_tune.cli.tables import print_facts
    from lowrank_tune.inspection import describe_cache, find_cache

    facts = describe_cache(find_cache(results, name))
    print(json.dumps(facts, indent=2)) if as_json else print_facts(facts)


@features_app.command(epilog="Example: lowrank-tune features verify 3f9c --full")
def verify(
    name: CacheName,
    results: Results = None,
    full: Annotated[bool, typer.Option("--full", help="Read every row and compare its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Check a cache against its manifest; exit 1 and name every difference when it is damaged."""
    from lowrank_tune.features.cache import verify_cache
    from lowrank_tune.inspection import find_cache

    directory: Path = find_cache(results, name)
    problems = verify_cache(directory, full=full)
    if as_json:
        print(json.dumps({"fingerprint": directory.name, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(problem)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        found = "every row matches its checksum" if full else "sealed, and every shard has its size"
        print(f"{directory.name}: {found}")
