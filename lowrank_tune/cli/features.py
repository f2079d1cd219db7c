"""The commands on feature caches, `features …` and `apply`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowrank_tune.cli.options import Address, Json, MaxQuarantined, Quiet, Results
from lowrank_tune.cli.output import factors_facts, features_facts, print_facts, print_rows, show
from lowrank_tune.cli.progress import shown_progress

features_app = typer.Typer(help="List, show, verify, import and remove feature caches.", no_args_is_help=True)
apply_app = typer.Typer()

CacheName = Annotated[
    str,
    typer.Argument(
        metavar="FINGERPRINT", help="A cache's name, the beginning of it, or its path or address.", show_default=False
    ),
]

StoreDtype = Annotated[
    Literal["float32", "float16", "int8", "int5", "int4"] | None,
    typer.Option("--dtype", help="How factors are kept, float16 when not given; the int ones with a scale a row."),
]
Coded = Annotated[
    bool, typer.Option("--coded", help="Keep few bytes an image, of a shared model: with --target-error or --bytes.")
]
TargetError = Annotated[
    float | None, typer.Option(metavar="E", help="With --coded: ‖X − Y‖ / ‖X‖ of each image at most, such as 0.05.")
]
MaxBytes = Annotated[
    int | None,
    typer.Option("--bytes", metavar="N", help="With --coded: bytes of each image's stream at most, such as 4096."),
]


@features_app.command("ls", epilog="Example: lowrank-tune features ls --results /data/results")
def list_caches(results: Results = None, as_json: Json = False) -> None:
    """List the caches in the results directory."""
    from lowrank_tune.features import remote

    caches = [remote.cache_row(place) for place in remote.list_caches(results)]
    if caches or as_json:
        show(caches, as_json, print_rows)
    else:
        print("no feature caches here yet; `lowrank-tune extract STUDY.yaml` makes one")


@features_app.command("show", epilog="Example: lowrank-tune features show 3f9c --against a01b")
def show_cache(
    name: CacheName,
    results: Results = None,
    against: Annotated[
        str | None, typer.Option(metavar="FINGERPRINT", help="Another cache: tell in which fields it differs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what one cache holds and what made it."""
    from lowrank_tune.features.cache import differences
    from lowrank_tune.features.remote import describe_cache, find_cache

    facts = describe_cache(find_cache(results, name))
    if against:
        other = describe_cache(find_cache(results, against))
        facts["differences"] = differences(facts["identity"], other["identity"])
    show(facts, as_json)


@features_app.command(epilog="Example: lowrank-tune features verify 3f9c --full")
def verify(
    name: CacheName,
    results: Results = None,
    full: Annotated[bool, typer.Option("--full", help="Read every row and compare its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Check a cache against its manifest; exit 1 and name every difference when it is damaged."""
    from lowrank_tune.features.cache import verify_cache
    from lowrank_tune.features.places import Place
    from lowrank_tune.features.remote import find_cache

    place = find_cache(results, name)
    fingerprint, problems = Place(place).last, verify_cache(place, full=full)
    found = "every row matches its checksum" if full else "sealed, and every shard has its size"
    lines = problems or [f"{fingerprint}: {found}"]
    show({"fingerprint": fingerprint, "problems": problems}, as_json, lambda _: print(*lines, sep="\n"))
    if problems:
        raise typer.Exit(1)


@features_app.command("import", epilog="Example: lowrank-tune features import feature_cache_real --store-dtype float16")
def import_directory(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Has .pt, .pth, .bin, .npy, .npz or .safetensors files; or a file, or a glob."
        ),
    ],
    results: Results = None,
    store_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], typer.Option(help="What the cache stores.")
    ] = "float16",
    max_quarantined: MaxQuarantined = 0.05,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Take ready features into the cache, each one checked; an import that was cut short is continued."""
    from lowrank_tune.cluster.study_dir import results_directory
    from lowrank_tune.config.schema import FeaturesSpec
    from lowrank_tune.config.source import TensorSource
    from lowrank_tune.features.extract import extract_features

    source = TensorSource(tensors=directory)
    spec = FeaturesSpec(source=source, store_dtype=store_dtype, max_quarantined=max_quarantined)
    with shown_progress() as progress:
        features = extract_features(
            spec,
            results_directory(results) / "features",
            seed=0,
            on_progress=progress.images,
            on_note=progress.stage,
            address=address,
        )
    show({"fingerprint": features.fingerprint, **features_facts(features)}, as_json)
    if not as_json:
        place = json.dumps(os.path.abspath(os.path.expanduser(directory)))
        dtype = "" if store_dtype == "float16" else f", store_dtype: {store_dtype}"
        print(f"In a study file, this is    features: {{source: {{tensors: {place}}}{dtype}}}")


@features_app.command("rm", epilog="Example: lowrank-tune features rm 3f9c --yes")
def remove(
    name: CacheName,
    results: Results = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove one cache; not while an extraction writes into it, and nothing beside it."""
    from lowrank_tune.features.remote import cache_row, find_cache, remove_cache

    place = find_cache(results, name)
    row = cache_row(place)
    if not yes:
        typer.confirm(f"Remove {place} ({row['images']} images, {row['bytes'] / 1e9:.2f} GB)?", abort=True, err=True)
    print(f"{row['fingerprint']}: removed, {remove_cache(place) / 1e9:.2f} GB are free again")


@apply_app.command(epilog="Example: lowrank-tune apply my-decomposer feature_cache_real/ factors --dtype int8")
def apply(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `export` wrote.", show_default=False)],
    features: Annotated[
        str,
        typer.Argument(
            metavar="FEATURES",
            help="A cache's name, the beginning of it, its path or address; or tensors: a directory, a file, a glob.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the factors go.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", min=1, help="Another rank that the model was trained for.")
    ] = None,
    store_dtype: StoreDtype = None,
    coded: Coded = False,
    target_error: TargetError = None,
    max_bytes: MaxBytes = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute; auto takes GPUs where Ray has any.")
    ] = "auto",
    max_quarantined: MaxQuarantined = 0.05,
    results: Results = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decompose every image of a cache or a directory of tensors; one that was cut short is continued."""
    from lowrank_tune.features.decompose import apply_decomposer

    with shown_progress(quiet=quiet, doing="decomposing") as progress:
        factors = apply_decomposer(
            model,
            features,
            out,
            rank=rank,
            store_dtype=store_dtype,
            coded=coded,
            target_error=target_error,
            max_bytes=max_bytes,
            device=device,
            max_quarantined=max_quarantined,
            results=results,
            address=address,
            on_progress=progress.images,
            on_note=progress.stage,
        )
    show(factors_facts(factors), as_json, print_facts)
