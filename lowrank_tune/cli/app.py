"""The commands. Each one reads its arguments, makes one call and prints what came back.

torch, ray and mlflow are imported inside the commands that need them: `--help` and `validate` answer at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowrank_tune.config.loading import load_study
from lowrank_tune.config.render import render_study, study_schema
from lowrank_tune.errors import InputError, StudyFileError
from lowrank_tune.records import FeatureSet

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Lay a value over the file; may be repeated."),
]
Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Where everything is kept; by default LOWRANK_TUNE_RESULTS, else ./results.",
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
NewId = Annotated[str, typer.Option("--id", hidden=True, help="The new study's id, where `submit` has promised one.")]
StudyName = Annotated[
    str, typer.Argument(metavar="ID", help="A study's id, or the beginning of it.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the results.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


studies_app = typer.Typer()

Trials = Annotated[
    int, typer.Option("--trials", min=0, metavar="N", help="How many trials to add; a grid grows with its space.")
]


@studies_app.command(epilog="Example: lowrank-tune submit studies/quickstart.yaml --address http://127.0.0.1:8265")
def submit(
    study: StudyFile,
    address: JobServer = None,
    overrides: Overrides = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Submit a study to a cluster; returns when the cluster, the results directory and MLflow were found sound."""
    from lowrank_tune.cli.output import print_job
    from lowrank_tune.cluster.jobs import submit_study

    if address is None:
        raise InputError("submit: --address is missing, the cluster's job server, such as http://127.0.0.1:8265")
    print_job(submit_study(address, study, overrides=overrides or (), results=results), address, as_json)


@studies_app.command("list", epilog="Example: lowrank-tune list --results /data/results")
def list_all(address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """List studies with their state, times and lineage."""
    from lowrank_tune.cli.output import print_list
    from lowrank_tune.cluster.jobs import list_studies

    statuses = list_studies(address=address, results=results)
    print(json.dumps(statuses, indent=2)) if as_json else print_list(statuses)


@studies_app.command(epilog="Example: lowrank-tune status quickstart-0d1e2f3a --json")
def status(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Show where a study stands: trials, the best ρ of each rank, the time left."""
    from lowrank_tune.cli.output import print_status
    from lowrank_tune.cluster.jobs import study_status

    found = study_status(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_status(found)


@studies_app.command(epilog="Example: lowrank-tune logs quickstart-0d1e2f3a -f --address http://127.0.0.1:8265")
def logs(
    study_id: StudyName,
    address: JobServer = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the study ends.")] = False,
) -> None:
    """Print what a submitted study has printed."""
    from lowrank_tune.cluster.jobs import Cluster
    from lowrank_tune.cluster.study_dir import check_id

    if address is None:
        raise InputError("logs: --address is missing; a study that `run` started prints where it was started")
    cluster = Cluster(address)
    job = cluster.latest(check_id(study_id))
    if job is None:
        raise InputError(f"study {study_id}: {cluster.shown} knows no job of it; see `lowrank-tune list`")
    for piece in cluster.follow(job.job_id) if follow else [cluster.logs(job.job_id)]:
        print(piece, end="", flush=True)


@studies_app.command(epilog="Example: lowrank-tune wait quickstart-0d1e2f3a")
def wait(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Wait until a study is over: exit code 0 finished, 1 failed, 130 stopped."""
    from lowrank_tune.cli.output import print_state
    from lowrank_tune.cluster.jobs import EXIT_CODES, wait_study

    found = wait_study(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_state(found)
    raise typer.Exit(EXIT_CODES[found["state"]])


@studies_app.command(epilog="Example: lowrank-tune stop quickstart-0d1e2f3a")
def stop(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Stop a study: its trials keep what they have trained, and `resume` goes on."""
    from lowrank_tune.cli.output import print_state
    from lowrank_tune.cluster.jobs import stop_study

    found = stop_study(study_id, address=address, results=results)
    print(json.dumps(found, indent=2)) if as_json else print_state(found)


@studies_app.command(epilog="Example: lowrank-tune resume quickstart-0d1e2f3a")
def resume(study_id: StudyName, address: JobServer = None, results: Results = None, as_json: Json = False) -> None:
    """Go on with a study that was stopped or has failed; what is done is not done again."""
    carry("resume", study_id, address, results, as_json)


@studies_app.command(
    epilog="Example: lowrank-tune extend quickstart-0d1e2f3a --trials 20 --set search.space.lr=[1e-4,1e-3]"
)
def extend(
    study_id: StudyName,
    trials: Trials = 0,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Add trials, or a wider space, to a finished study; the searcher knows the old trials, and all are compared."""
    carry("extend", study_id, address, results, as_json, trials=trials, overrides=overrides or ())


@studies_app.command(epilog="Example: lowrank-tune clone quickstart-0d1e2f3a --set training.epochs=40")
def clone(
    study_id: StudyName,
    overrides: Overrides = None,
    address: JobServer = None,
    results: Results = None,
    as_json: Json = False,
    new_id: NewId = "",
) -> None:
    """Run a new study from another one's file; it records its parent and the difference."""
    carry("clone", study_id, address, results, as_json, overrides=overrides or (), new_id=new_id)


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
    from lowrank_tune.cli.output import print_caches
    from lowrank_tune.features.remote import cache_row, list_caches

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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.features.cache import differences
    from lowrank_tune.features.remote import describe_cache, find_cache

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
    from lowrank_tune.features.cache import Folder, verify_cache
    from lowrank_tune.features.remote import find_cache

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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.cli.tables import features_facts
    from lowrank_tune.cluster.study_dir import results_directory
    from lowrank_tune.features.extract import import_tensors

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
    from lowrank_tune.features.remote import cache_row, find_cache, remove_cache

    place = find_cache(results, name)
    row = cache_row(place)
    if not yes:
        typer.confirm(f"Remove {place} ({row['images']} images, {row['bytes'] / 1e9:.2f} GB)?", abort=True, err=True)
    print(f"{row['fingerprint']}: removed, {remove_cache(place) / 1e9:.2f} GB are free again")


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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.export import export_study

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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.cli.progress import shown_progress
    from lowrank_tune.features.decompose import apply_decomposer

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
    from lowrank_tune.lowrank.quantization import factor_bytes

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


StudyRef = Annotated[
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
    from lowrank_tune.past_study import check_rank_compared, comparability, comparison_of, open_study

    studies = list({study.directory: study for study in (open_study(results, name) for name in names)}.values())
    check_rank_compared(studies, rank)
    comparisons = {study.directory.name: comparison_of(study, again=again) for study in studies}
    caveats = comparability(studies)
    if as_json:
        print(json.dumps(comparisons_json(comparisons, rank, caveats), indent=2))
    else:
        print_comparisons(comparisons, rank, caveats)


def visualize(
    name: StudyRef,
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
    from lowrank_tune.past_study import open_study
    from lowrank_tune.past_study import visualize as draw

    chosen = parse_channels(channels)
    files = draw(open_study(results, name), images, rank=rank, channels=chosen)
    print(json.dumps([str(file) for file in files], indent=2)) if as_json else print_files(files)


def report(name: StudyRef, again: Again = False, results: Results = None, as_json: Json = False) -> None:
    """Write a study's report anew and log it to MLflow; a stopped one with the trials that it has."""
    from lowrank_tune.cli.tables import print_files
    from lowrank_tune.past_study import open_study, report_of

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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.cost import preview_study

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
    from lowrank_tune.runtime import ray_session

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
    from lowrank_tune.cli.output import print_facts
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
    from lowrank_tune.cluster.study_dir import results_directory
    from lowrank_tune.tracking.store import first_page, serve_ui

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
    from lowrank_tune.cli.output import print_facts
    from lowrank_tune.study import reconcile_study

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
    from lowrank_tune.cost import diagnose

    checks = diagnose(load_study(Path(study), overrides or ()) if study else None, results)
    print(json.dumps([asdict(check) for check in checks], indent=2)) if as_json else print_checks(checks)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def carry(
    command: str, study_id: str, address: str | None, results: Path | None, as_json: bool, **settings: Any
) -> None:
    """Go on with a study and print what came out; with the address of a job server, let its cluster do so.

    Args:
        command: `resume`, `extend` or `clone`.
        study_id: the study.
        address: `http://host:8265` of a job server; anything else is a Ray to work in.
        results: the results directory.
        as_json: print JSON.
        settings: the command's own, as the library's function has them.
    """
    if address is not None and address.startswith(("http://", "https://")):
        from lowrank_tune.cli.output import print_job
        from lowrank_tune.cluster.jobs import submit_again

        print_job(submit_again(address, command, study_id, _arguments(settings), results=results), address, as_json)
        return
    from lowrank_tune.runtime import ray_session

    with ray_session(address, meanwhile=("torch", "pandas", "matplotlib.figure")):
        from lowrank_tune import study
        from lowrank_tune.cli.progress import shown_progress
        from lowrank_tune.cli.tables import print_result

        carry_on = {"resume": study.resume_study, "extend": study.extend_study, "clone": study.clone_study}[command]
        with shown_progress() as progress:
            result = carry_on(study_id, results=results, address=address, progress=progress, **settings)
    print_result(result, as_json)


def _arguments(settings: dict[str, Any]) -> list[str]:
    trials = ["--trials", str(settings["trials"])] if settings.get("trials") else []
    return trials + [word for text in settings.get("overrides", ()) for word in ("--set", text)]
