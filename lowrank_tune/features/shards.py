"""Shards of a cache made on Ray: one actor and one driver for images, ready tensors and decomposers alike."""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank_tune.errors import CacheError, InputError, LowrankTuneError
from lowrank_tune.features.cache import Contents, read_sealed, recover, seal
from lowrank_tune.features.commits import SHARD_ROWS, Identity, commit_shard, shard_name
from lowrank_tune.features.remote import only_writer

if TYPE_CHECKING:
    import numpy.typing as npt
    import ray.data
    from torch import Tensor

DECODE_CPUS = 0.5
"""What a decoding task reserves: it waits for storage about as long as it computes."""
LEAST_CPUS = 0.4
"""What a worker reserves where there is no whole CPU for it.

Not as much as a decoding task, or Ray Data would fuse the two stages; and with it as many workers as the cluster has
CPUs leave room for a decoding task on some machine, however they are placed.
"""
SHRINK_AFTER_S = 20.0
"""How long to wait for the whole of what would be had without other work: what ended just now is still giving it back.
"""
START_PATIENCE_S = 600
"""How long workers may take to start; what they need was free a moment ago, and a tower on a slow mount takes time."""
_LOOK_EVERY_S = 0.2

Progress = Callable[[int, int], None]
Notes = Callable[[str], None]
Row = Mapping[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be made: its file name, the sha256 of each image and, unless in a cache, where each lies."""

    shard: str
    keys: tuple[str, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """A shard's rows: `tensors` by name in the order of the cache's layout, and why each other image has none."""

    keys: Sequence[str]
    tensors: Mapping[str, Tensor | Sequence[Tensor]]
    quarantined: Sequence[tuple[str, str]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard that was planned for so many images; `error` says why it was not committed."""

    images: int
    quarantined: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    error: LowrankTuneError | None = None


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster has, or has free."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        """From what Ray tells of it."""
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


@dataclass(frozen=True)
class Pool:
    """The workers of a job.

    Attributes:
        least: how many there must be.
        most: how many there may be.
        cpus: CPUs that each reserves.
        gpus: GPUs that each has.
        threads: torch threads of each.
        calls: shards that each has in hand at once.
        decoding: whether decoding tasks run beside them.
    """

    least: int
    most: int
    cpus: float = 1
    gpus: float = 0
    threads: int = 1
    calls: int = 1
    decoding: bool = False

    def fits(self, workers: int, cpus: float, free: Node) -> bool:
        """Whether so many workers of so many CPUs each have room."""
        needed = workers * cpus + (DECODE_CPUS if self.decoding else 0)
        return needed <= free.cpus + 1e-4 and workers * self.gpus <= free.gpus + 1e-4


@dataclass(frozen=True)
class ShardJob:
    """What makes the shards of one cache; it travels to the workers, so it holds paths and numbers.

    Attributes:
        directory: the cache.
        identity: what the features depend on; gives tokens, dim and dtype.
        encoder: what makes the features, for people.
        weights: `random`, `pretrained` or `unknown`.
    """

    work: ClassVar[str] = "the extraction"
    worker: ClassVar[str] = "encoder"
    directory: str
    identity: Identity
    encoder: str
    weights: str

    def pool(self, shards: int, nodes: Sequence[Node]) -> Pool:
        """The workers for so many shards on these machines; an InputError where they lack what was asked for."""
        return Pool(1, max(1, min(shards, sum(int(node.cpus) for node in nodes))))

    def prepare(self, shards: ray.data.Dataset) -> ray.data.Dataset:
        """What comes before the workers."""
        return shards

    def holds(self, reason: str) -> bool:
        """Whether what an image was quarantined for still keeps it out."""
        return True

    def open(self, pool: Pool) -> Callable[[ShardPlan, Row], Made]:
        """In a worker: what makes one shard of a plan and what `prepare` gave."""
        raise NotImplementedError


class ShardWorker:
    """An actor of the pool: it makes, writes and commits one shard a call."""

    def __init__(self, job: ShardJob, pool: Pool) -> None:
        import torch

        torch.set_num_threads(pool.threads)
        self.job = job
        self.problem: LowrankTuneError | None = None
        try:
            self.make = job.open(pool)
        except LowrankTuneError as error:
            self.problem = error
        except Exception as error:
            # Ray would start an actor that fails here again and again; its first result brings the message home.
            self.problem = InputError(f"the {job.worker} did not start: {error!r}")

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[bytes]]:
        """Take one row of `prepare`, whose `plan` is a pickled ShardPlan; the answer's `result` is a ShardResult."""
        row = {name: column[0] for name, column in batch.items()}
        plan: ShardPlan = pickle.loads(row["plan"])
        result = ShardResult(len(plan.keys))
        try:
            if self.problem:
                raise self.problem
            made = self.make(plan, row)
            commit_shard(Path(self.job.directory), plan.shard, made.keys, made.tensors, made.quarantined)
            result = replace(result, quarantined=tuple(made.quarantined), notes=made.notes)
        except LowrankTuneError as error:
            result = replace(result, error=error)
        except OSError as error:
            reason = f"shard {plan.shard} cannot be written ({error}); make room and run again"
            result = replace(result, error=CacheError(f"{self.job.directory}: {reason}"))
        return {"result": [pickle.dumps(result)]}


def fill(
    job: ShardJob,
    images: Mapping[str, str | None],
    check: Callable[[Mapping[str, str]], None],
    *,
    doing: str,
    progress: Progress | None,
    note: Notes | None,
    address: str | None,
    claim: Callable[[Notes], None] = lambda note: None,
    accept: Callable[[Contents], None] = lambda contents: None,
) -> Contents:
    """Make sure that a cache holds these images and is sealed; where nothing is missing, Ray is not loaded.

    A run that is killed at any moment is continued by the next one, to the same bytes.

    Args:
        job: what makes the shards.
        images: key -> where it lies, in order; None where that is a cache.
        check: called with key -> reason of all that are quarantined; raises where they are too many.
        doing: for whoever has to wait.
        progress: called with the number of images dealt with and their total.
        note: called with a sentence: what is waited for.
        address: the Ray to start or to join where the caller has none; as for `ray_session`.
        claim: called before anything is written, while holding the cache's lock.
        accept: called with what is there already; raises where that is another source's.

    Raises:
        InputError: a shard failed by what the user gave, or the cluster lacks what the job needs.
        CacheError: or by the files of a cache.
        LowrankTuneError: or Ray did.
    """
    directory, total = Path(job.directory), len(images)
    progress, note = progress or (lambda done, total: None), note or logger.warning
    contents = read_sealed(directory, job.identity)
    contents = contents and contents.standing(job.holds)
    check(contents.quarantined if contents else {})
    if contents is not None and not contents.missing(images):
        accept(contents)
        progress(total, total)
        return contents
    directory.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(directory, lambda: note(f"another process is {doing} into {directory}: waiting for it")):
        claim(note)
        contents = recover(directory, job.identity).standing(job.holds)
        accept(contents)
        missing, reasons = contents.missing(images), dict(contents.quarantined)
        check(reasons)
        done = total - len(missing)
        progress(done, total)
        if missing:
            with contextlib.closing(_made(job, plan_shards(missing, images), address, note)) as results:
                for result in results:
                    reasons |= dict(result.quarantined)
                    check(reasons)
                    done += result.images
                    progress(done, total)
        return seal(directory, job.identity, job.encoder, job.weights)


def plan_shards(missing: Sequence[str], images: Mapping[str, str | None]) -> list[ShardPlan]:
    """Which shards hold the keys that are missing."""
    plans = []
    for first in range(0, len(missing), SHARD_ROWS):
        keys = tuple(missing[first : first + SHARD_ROWS])
        plans.append(ShardPlan(shard_name(keys), keys, tuple(image for key in keys if (image := images[key]))))
    return plans


def _made(
    job: ShardJob, plans: Sequence[ShardPlan], address: str | None, note: Notes
) -> Generator[ShardResult, None, None]:
    """What Ray's workers made, in whatever order, until one fails; what was committed before it stays."""
    import ray
    import ray.data
    from ray.exceptions import RayError

    from lowrank_tune.runtime import ray_session

    with ray_session(address):
        nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        pool = wait_for_room(job.pool(len(plans), nodes), nodes, note)
        logger.info("%s: %d shards with %s", job.directory, len(plans), pool)
        rows = [{"plan": pickle.dumps(plan)} for plan in plans]
        try:
            shards = job.prepare(ray.data.from_items(rows, override_num_blocks=len(rows)))
            for data in on_actors(shards, ShardWorker, {"job": job, "pool": pool}, pool):
                result: ShardResult = pickle.loads(data)
                for text in result.notes:
                    logger.warning(text)
                if result.error:
                    raise result.error
                yield result
        except RayError as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise LowrankTuneError(
                f"{job.work} into {job.directory} stopped ({reason}); what is committed stays, run again"
            ) from error


def on_actors(items: ray.data.Dataset, worker: type, made_of: dict[str, Any], pool: Pool) -> Iterator[bytes]:
    """What a pool of actors, each `worker(**made_of)`, answers as `result`, one item a call, in whatever order."""
    import ray.data

    with _quiet_ray_data():
        results = items.map_batches(
            worker,
            fn_constructor_kwargs=made_of,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.least,
                max_size=pool.most,
                max_concurrent_calls_per_actor=pool.calls,
                max_tasks_in_flight_per_actor=2 * pool.calls,
                enable_true_multi_threading=pool.calls > 1,
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
        # Without prefetching, a result is told when it is there and not when the next one is.
        for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
            yield from batch["result"]


def wait_for_room(pool: Pool, nodes: Sequence[Node], note: Notes, shrink_after_s: float = SHRINK_AFTER_S) -> Pool:
    """Wait until other work leaves a pool its room: all of it, or after a while the least of it, with fewer CPUs each.

    Args:
        pool: what would be had without other work.
        nodes: the cluster's machines.
        note: told, once, what is waited for.
        shrink_after_s: how long to wait for the whole pool.

    Raises:
        InputError: the cluster has no room for the least of it even where nothing else is at work.
    """
    import ray

    need = _need(pool, nodes)
    whole = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    if not pool.fits(pool.least, min(pool.cpus, LEAST_CPUS), whole):
        raise InputError(f"{need}; start it with more")
    began, told = time.monotonic(), False
    while True:
        free = Node.of(ray.available_resources())
        if pool.fits(pool.most, pool.cpus, free):
            return replace(pool, least=pool.most)
        if time.monotonic() - began > shrink_after_s:
            for cpus in shares(pool.cpus):
                if pool.fits(pool.least, cpus, free):
                    logger.warning("other work holds some of the Ray cluster; going on with %g CPUs a worker", cpus)
                    return replace(pool, cpus=cpus, threads=max(1, int(cpus)))
            if not told:
                less = "; a lower features.actors would need less" if pool.least > 1 else ""
                note(f"waiting for other work to end: {need}, of which {shown([free])} are free{less}")
                told = True
        time.sleep(_LOOK_EVERY_S)


def shares(most: float) -> Iterator[float]:
    """CPUs that a worker may reserve, falling."""
    yield from range(int(most), 0, -1)
    yield LEAST_CPUS


def shown(nodes: Sequence[Node]) -> str:
    """What machines have, together."""
    return f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"


def _need(pool: Pool, nodes: Sequence[Node]) -> str:
    gpus = f"{pool.least * pool.gpus:g} GPUs and " if pool.gpus else ""
    cpus = pool.least * LEAST_CPUS + (DECODE_CPUS if pool.decoding else 0)
    return (
        f"the work needs at least {gpus}{cpus:g} CPUs for {pool.least} workers"
        f"{' and a decoding task' if pool.decoding else ''}; the Ray cluster has {shown(nodes)}"
    )


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans and statistics on the terminal, Ray's own log files keep them; and no endless waiting."""
    import ray.data

    context = ray.data.DataContext.get_current()
    quiet = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "enable_auto_log_stats": False,
        "wait_for_min_actors_s": START_PATIENCE_S,
    }
    with contextlib.ExitStack() as restored:
        for name, value in quiet.items():
            restored.callback(setattr, context, name, getattr(context, name))
            setattr(context, name, value)
        for handler in logging.getLogger("ray.data").handlers:
            if isinstance(handler, logging.StreamHandler):
                restored.callback(handler.setLevel, handler.level)
                handler.setLevel(logging.ERROR)
        yield
