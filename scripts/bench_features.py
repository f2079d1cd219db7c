"""How fast images become features, what reading them costs, and what memory a cache and its making take.

    .venv/bin/python scripts/bench_features.py [--extraction] [--reading] [--memory] [--images 4370]

All three when none is named, some minutes each on two cores. Every number comes from this one run: compare ratios, not
machines. The extraction is told in `bench_features_extraction.py`, which has more options of its own. For the others,
random [256, 2048] float16 features, the reference's size: 4.6 GB a cache, and as much again as `features_N.pt` files,
in a temporary folder (TMPDIR) that is removed. Wanted: random mini-batches at least 5 times as fast as from the .pt
files and at least 0.7 of a plain memory copy; eight readers of a 1 GB cache at most 1.15 times its size in proportional
memory; all images made, sealed, verified and read in at most 2 GB, with the driver's own memory flat in the number of
images.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

# The libraries read these when imported. The first is the package's own default, which must be there before torch is.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import psutil
import torch
from torch import Tensor

from lowrank_tune.features.cache import fingerprint, open_cache, recover, seal
from lowrank_tune.features.commits import SHARD_ROWS, TENSOR, commit_shard, shard_name
from lowrank_tune.lowrank.data import FeatureMatrix

CORES = 2
TOKENS, DIM, BATCH = 256, 2048, 32
IDENTITY = {"kind": "tensors", "forward": 1, "store_dtype": "float16", "tokens": TOKENS, "dim": DIM}
READINGS = (
    (torch.float32, "reused"),
    (torch.float16, "reused"),
    (torch.float32, "fresh"),
    (torch.float16, "fresh"),
)
BATCHES, ROUNDS = 24, 2
READERS, READ_IMAGES = 8, 1024
SAMPLING_S = 0.2


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4370)
    parser.add_argument("--extraction", action="store_true", help="the encoder's forward, and an extraction beside it")
    parser.add_argument("--reading", action="store_true", help="mini-batches, and readers that share one copy")
    parser.add_argument("--memory", action="store_true", help="the peak while a cache is made, verified and read")
    parser.add_argument("--import-directory", nargs=2, metavar=("TENSORS", "RESULTS"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.import_directory:
        _make_verify_read(*map(Path, chosen.import_directory))
        return
    everything = not (chosen.extraction or chosen.reading or chosen.memory)
    if chosen.extraction or everything:
        # In a process of its own: its encoders take one thread each, and its Ray leaves nothing to measure beside.
        subprocess.run([sys.executable, Path(__file__).with_name("bench_features_extraction.py")], check=True)
    if chosen.reading or everything:
        bench_reading(chosen.images)
        bench_sharing(min(READ_IMAGES, chosen.images))
    if chosen.memory or everything:
        bench_memory(chosen.images)


def bench_reading(images: int) -> None:
    """Warm random mini-batches: from the cache, from `.pt` files, and as plain memory copies of the same bytes."""
    with tempfile.TemporaryDirectory(prefix="bench-features-") as name:
        folder = Path(name)
        cache = write_cache(folder / "features", images, also_pt=folder)
        features = open_cache(cache)
        rows = {row.key: row for row in features.rows}
        data = FeatureMatrix(replace(features, rows=tuple(rows[key_of(number)] for number in range(images))))
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(images, generator=generator)[:BATCH].tolist() for _ in range(BATCHES)]
        for indices in chosen:  # warm: in the page cache, and mapped by this process
            data.load(indices)
            _load_pt(folder, indices, torch.float16)
        print(f"\n{images} images, mini-batches of {BATCH} chosen at random, ms a batch (medians)\n")
        print(f"{'threads':<9}{'dtype':<9}{'memory':<8}{'cache':>7}{'.pt files':>11}{'copy':>7}"
              f"{'.pt / cache':>13}{'copy / cache':>14}")  # fmt: skip
        for threads in (1, CORES):  # a trial has one unless the study file gives it more
            torch.set_num_threads(threads)
            for dtype, memory in READINGS:
                _print_reading(data, folder, chosen, dtype, memory)
        print("\nIn reused memory: float32 is what a training on a CPU reads, float16 what one on a GPU does that does "
              "not hold\nall features. In fresh memory, whose pages the system hands out one by one: what a study "
              "reads once.")  # fmt: skip


def _print_reading(data: FeatureMatrix, folder: Path, chosen: list[list[int]], dtype: torch.dtype, memory: str) -> None:
    """A line: all three routes give the same tensor, in fresh memory or in the same memory again."""
    source_NTD = torch.cat([data.load(indices, data.dtype) for indices in chosen])
    kept = torch.empty(BATCH, TOKENS, DIM, dtype=dtype) if memory == "reused" else None

    def cached(place: int) -> Tensor:
        if kept is None or dtype != torch.float32:
            return data.load(chosen[place], dtype, kept)
        return data.lend(chosen[place])

    def copy(place: int) -> Tensor:
        part = source_NTD[place * BATCH : (place + 1) * BATCH]
        return (torch.empty(part.shape, dtype=dtype) if kept is None else kept).copy_(part)

    routes: dict[str, Callable[[int], Tensor]] = {
        "cache": cached,
        "pt": lambda place: _load_pt(folder, chosen[place], dtype),
        "copy": copy,
    }
    for route in routes.values():
        assert torch.equal(route(1), data.load(chosen[1], dtype))
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(ROUNDS):  # in turn, so that other work on the machine hits all alike
        for place in range(BATCHES):
            for name, route in routes.items():
                started = time.perf_counter()
                route(place)
                times[name].append(time.perf_counter() - started)
    cache, pt, plain = (statistics.median(times[name]) * 1e3 for name in ("cache", "pt", "copy"))
    kind = str(dtype).removeprefix("torch.")
    print(f"{torch.get_num_threads():<9}{kind:<9}{memory:<8}{cache:>7.2f}{pt:>11.2f}{plain:>7.2f}"
          f"{pt / cache:>13.1f}{plain / cache:>14.2f}", flush=True)  # fmt: skip


def _load_pt(folder: Path, indices: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a loader of the reference's files does: each file, then a batch of them."""
    files = [folder / "pt" / f"features_{index}.pt" for index in indices]
    return torch.stack([torch.load(file, weights_only=True) for file in files]).to(dtype)


def bench_sharing(images: int) -> None:
    """Proportional memory of readers of one cache, beside what the same processes have before they open it."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-features-") as name:
        cache = write_cache(Path(name) / "features", images)
        size = sum(path.stat().st_size for path in (cache / "shards").iterdir())
        ends = [context.Pipe() for _ in range(READERS)]
        readers = [context.Process(target=_reader, args=(cache, theirs)) for _, theirs in ends]
        for reader in readers:
            reader.start()
        pids = [reader.pid or 0 for reader in readers]
        _all_at(ends)
        before = _proportional(pids)
        _all_at(ends)
        after = _proportional(pids)
        for ours, _ in ends:
            ours.send(None)
        for reader in readers:
            reader.join()
    print(f"\n{READERS} processes, each reading all {images} images of one cache of {size / 1e9:.2f} GB, PSS in GB\n")
    print(f"{'before opening it':<34}{before / 1e9:>8.2f}")
    print(f"{'having read it, all still mapped':<34}{after / 1e9:>8.2f}")
    print(f"{'what reading added / the cache':<34}{(after - before) / size:>8.3f}")


def _all_at(ends: Sequence[tuple[Connection, Connection]]) -> None:
    """Let every reader go on to its next stop, and wait until all are there."""
    for ours, _ in ends:
        ours.send(None)
    for ours, _ in ends:
        ours.recv()


def _reader(cache: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    out = torch.empty(BATCH, TOKENS, DIM, dtype=torch.float16).zero_()
    pipe.recv()
    pipe.send(None)
    pipe.recv()
    data = FeatureMatrix(open_cache(cache))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(os.getpid())).tolist()
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        data.load(indices, out=out[: len(indices)])
    pipe.send(None)
    pipe.recv()


def bench_memory(images: int) -> None:
    """Peak memory of an import of `.pt` files by Ray Data, its verification and a reading of all, in processes anew."""
    print(f"\n[{TOKENS}, {DIM}] float16, {CORES} CPUs: imported, sealed, verified in full, read once; MB\n")
    print(f"{'images':>8}{'cache':>8}{'seconds':>9}{'peak, all processes':>21}{'peak, the driver':>18}")
    for count in sorted({min(500, images), images}):
        with tempfile.TemporaryDirectory(prefix="bench-features-") as name:
            folder = Path(name)
            write_pt(folder, count)
            started = time.perf_counter()
            command = [sys.executable, __file__, "--import-directory", str(folder / "pt"), str(folder / "results")]
            with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as driver:
                peak = _watch(driver)
            if driver.returncode:
                raise SystemExit("the import failed")
            seconds = time.perf_counter() - started
            size = sum(path.stat().st_size for path in folder.glob("results/features/*/shards/*"))
        print(f"{count:>8}{size / 1e6:>8.0f}{seconds:>9.0f}{peak['all'] / 1e6:>21.0f}{peak['driver'] / 1e6:>18.0f}")


def _make_verify_read(tensors: Path, results: Path) -> None:
    """The driver of `bench_memory`, by the library's own functions."""
    import ray

    from lowrank_tune.config.schema import FeaturesSpec
    from lowrank_tune.features.cache import verify_cache
    from lowrank_tune.features.extract import extract_features

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, configure_logging=False,
             object_store_memory=100_000_000)  # fmt: skip
    spec = FeaturesSpec.model_validate({"source": {"tensors": str(tensors)}})
    features = extract_features(spec, results / "features", seed=0)
    ray.shutdown()
    if problems := verify_cache(features.directory, full=True):
        raise SystemExit(problems[0])
    data = FeatureMatrix(features)
    out_NTD = torch.empty(BATCH, TOKENS, DIM)
    for start in range(0, len(data), BATCH):
        indices = range(start, min(start + BATCH, len(data)))
        if not data.load(indices, out=out_NTD[: len(indices)]).isfinite().all():
            raise SystemExit("what was read is not what was written")


def _watch(driver: subprocess.Popen[bytes]) -> dict[str, int]:
    """The most memory that a process, and it with all its children, had: their own, and their part of what is shared.

    The cache's own pages, which are mapped while it is read, are the system's and are not counted.
    """
    peak = {"all": 0, "driver": 0}
    while driver.poll() is None:
        try:
            own = _own_bytes(driver.pid)
            children = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
            peak["driver"] = max(peak["driver"], own)
            peak["all"] = max(peak["all"], own + sum(_own_bytes(child) for child in children))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(SAMPLING_S)
    return peak


def _own_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process in proportion; files' pages are left out."""
    try:
        fields = _rollup(pid)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return fields["Pss_Anon"] + fields["Pss_Shmem"]


def _proportional(pids: Sequence[int]) -> int:
    return sum(_rollup(pid)["Pss"] for pid in pids)


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def write_cache(root: Path, images: int, also_pt: Path | None = None) -> Path:
    """A sealed cache of random features, and the same ones as `pt/features_N.pt`."""
    directory = root / fingerprint(IDENTITY)
    recover(directory, IDENTITY)
    for start in range(0, images, SHARD_ROWS):
        numbers = range(start, min(start + SHARD_ROWS, images))
        keys = [key_of(number) for number in numbers]
        features_NTD = _random(start, len(keys))
        commit_shard(directory, shard_name(keys), keys, {TENSOR: features_NTD}, [])
        if also_pt:
            _write_pt(also_pt, numbers, features_NTD)
    seal(directory, IDENTITY, "random numbers", "unknown")
    return directory


def key_of(number: int) -> str:
    """The key of a made-up image."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def write_pt(folder: Path, images: int) -> None:
    """`pt/features_N.pt`, random."""
    for start in range(0, images, SHARD_ROWS):
        numbers = range(start, min(start + SHARD_ROWS, images))
        _write_pt(folder, numbers, _random(start, len(numbers)))


def _write_pt(folder: Path, numbers: Sequence[int], features_NTD: Tensor) -> None:
    (folder / "pt").mkdir(exist_ok=True)
    for number, features_TD in zip(numbers, features_NTD, strict=True):
        torch.save(features_TD.clone(), folder / "pt" / f"features_{number}.pt")


def _random(seed: int, count: int) -> Tensor:
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).half()


if __name__ == "__main__":
    main()
