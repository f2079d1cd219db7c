"""Whether a GPU gives the CPU's numbers. N images, T tokens, D dim, R rank."""

from __future__ import annotations

import copy
import importlib.util
import math
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from gpu_checks.proof import Finding, Size, at_least, relative, same, split, within
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.codebooks import make_codebook
from lowrank_tune.lowrank.data import FeatureMatrix, Resident, Streamed
from lowrank_tune.lowrank.decomposers import Factors
from lowrank_tune.lowrank.decomposers.shared import Shared
from lowrank_tune.lowrank.linalg import departure, eigh, gram, is_loose, mended, principal_axes, stream
from lowrank_tune.lowrank.quantization import pack, restored
from lowrank_tune.lowrank.svd import measure_optimum
from lowrank_tune.lowrank.trainer import Trainer

CLOSE, COUNTED = 1e-3, 1e-2
ORTHONORMAL = 1e-4
FAMILIES = ("direct", "sketch", "refined", "shared")


def tower(size: Size) -> Iterator[Finding]:
    """The vision tower beside the CPU's in float32, and its windows by reshape beside transformers' own forward."""
    pixels_NHWC = size.pixels(2)
    with other_threads():
        expected = size.encoder("float32", "cpu").encode(pixels_NHWC)
    for dtype in ("float32", "bfloat16"):
        encoder = size.encoder(dtype, size.device)
        found = encoder.encode(pixels_NHWC).float()
        cosine = cosine_similarity(found, expected, dim=-1).min().item()
        yield at_least(f"tower in {dtype}, 2 images, against the CPU in float32: least token cosine", cosine, 0.999)
        if dtype == "float32":
            yield within("tower in float32, against the CPU: relative difference", relative(found, expected), CLOSE)
        with torch.inference_mode():
            on_device = torch.from_numpy(pixels_NHWC).to(size.device)
            stock = encoder.forward_as_stock(on_device).float().cpu()
        cosine = cosine_similarity(found, stock, dim=-1).min().item()
        yield at_least(f"windows by reshape in {dtype} against stock SDPA: least token cosine", cosine, 0.999)
        if dtype == "float32":
            yield within("windows by reshape in float32: relative difference", relative(found, stock), CLOSE)


def decomposers(size: Size) -> Iterator[Finding]:
    """A·B, loss and gradients of each family beside the CPU's in float64, where rounding has no say."""
    x_NTD = size.features(4)
    for family in FAMILIES:
        for rank in (size.ranks[0], size.ranks[-1]):
            model = size.model(family, rank, x_NTD)
            sides = []
            for side, x in ((copy.deepcopy(model).double(), x_NTD.double()), (model.to(size.device), x_NTD)):
                x = x.to(next(side.parameters()).device)
                loss = side.loss(x)
                loss.backward()
                a_NTR, b_NRD = side(x)
                slopes = [torch.zeros_like(w) if w.grad is None else w.grad for w in side.parameters()]
                gradient = torch.cat([slope.flatten() for slope in slopes])
                sides.append((a_NTR @ b_NRD, loss, gradient))
            names = ("A·B", "loss", "gradient")
            # What a model of the exact route learns is nothing, on either side.
            apart = [
                relative(found, expected) if expected.any() or found.any() else 0.0
                for expected, found in zip(*sides, strict=True)
            ]
            told = ", ".join(f"{name} {figure:.1g}" for name, figure in zip(names, apart, strict=True))
            worst = within(f"`{family}` at rank {rank}, against the CPU in float64", max(apart), CLOSE)
            yield Finding(worst.what, told, worst.wanted, worst.verdict)


def training(size: Size) -> Iterator[Finding]:
    """An epoch of each family, its figures and the bytes that it counts, beside the CPU's."""
    data, parts = FeatureMatrix(size.stored(16)), split(16)
    optimum = measure_optimum([data.load(parts.validation)])
    runs = [(family, size.ranks[0], {}) for family in FAMILIES]
    runs.append(("refined", size.ranks[0], {"nested_ranks": (size.ranks[0] // 2, size.ranks[0])}))
    for family, rank, changes in runs:
        config = size.trial(family, rank, target_error=0.2, **changes)
        with other_threads():
            expected = Trainer(config, data, parts, optimum, "cpu").step()
        found = Trainer(config, data, parts, optimum, size.device).step()
        names = [name for name in expected if name.startswith(("train_", "val_"))]
        told = f"an epoch of `{family}` at rank {rank}{', nested' if changes else ''}"
        # Of few images' whole bytes a single number that is rounded the other way shows.
        for kind, most in (("figures", CLOSE), ("bytes", COUNTED)):
            apart = {
                name: abs(found[name] - expected[name]) / abs(expected[name])
                for name in names
                if ("bytes" in name) == (kind == "bytes")
            }
            worst = max(apart, key=lambda name: apart[name] if math.isfinite(apart[name]) else math.inf)
            yield within(f"{told}: {kind}, the furthest of {len(apart)} being {worst}", apart[worst], most)
    images = [5, 0, 15, 5]
    ways = {"held whole": Resident(data, size.device), "streamed": Streamed(data, size.device)}
    yield same("batches of features", ((name, way.load(images), data.load(images)) for name, way in ways.items()))


def controls(size: Size) -> Iterator[Finding]:
    """What needs no training, beside the CPU's in float64."""
    x_NTD = size.features(4)
    axes_DR = principal_axes([x_NTD], size.ranks[-1], stream(0, "axes"))
    for name, decompose in _controls(axes_DR).items():
        apart = []
        for rank in (size.ranks[0], size.ranks[-1]):
            products = []
            for x in (x_NTD.double(), x_NTD.to(size.device)):
                a_NTR, b_NRD = decompose(x, rank)
                products.append(a_NTR @ b_NRD)
            apart.append(relative(products[1], products[0]))
        yield within(f"`{name}` at ranks {size.ranks[0]} and {size.ranks[-1]}: A·B", max(apart), CLOSE)
    on_device = principal_axes([x_NTD.to(size.device)], size.ranks[-1], stream(0, "axes")).cpu()
    yield within("`principal_axes`: the subspace", relative(on_device @ on_device.mT, axes_DR @ axes_DR.mT), CLOSE)


def stored_forms(size: Size) -> Iterator[Finding]:
    """What is kept in few bits, to the bit."""
    x_NTD = size.features(4)
    x_NTD[1] *= 1e3
    there = x_NTD.to(size.device)
    for dtype in ("float16", "int8", "int5", "int4"):
        parts, expected = pack(there, dtype), pack(x_NTD, dtype)
        pairs = [(name, parts[name], expected[name]) for name in expected]
        yield same(
            f"numbers packed as {dtype}", iter([*pairs, ("restored", restored(there, dtype), restored(x_NTD, dtype))])
        )
    model = size.model("shared", size.ranks[-1], x_NTD)
    assert isinstance(model, Shared)
    books = [make_codebook(side) for side in (model, copy.deepcopy(model).to(size.device))]
    files = [size.folder / "cpu.safetensors", size.folder / "device.safetensors"]
    for book, file in zip(books, files, strict=True):
        book.save(file)
    contents = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
    yield same("the codebook of `shared`", iter([("file", contents[1], contents[0])]))
    counts = [torch.tensor([book.count(x_TD, target_error=0.5)[0] for x_TD in x_NTD]) for book in books]
    yield same("coded bytes, as counted", iter([("bytes", counts[1], counts[0])]))
    if importlib.util.find_spec("constriction") is None:
        yield Finding("coded streams", "constriction, the coder, is not installed here", "equal bits", "left out")
        return
    streams = [[book.encode(x_TD, target_error=0.5) for x_TD in x_NTD] for book in books]
    pairs = zip(streams[1], streams[0], strict=True)
    back = ((str(n), books[1].decode(found), books[0].decode(expected)) for n, (found, expected) in enumerate(pairs))
    yield same("coded streams, read back", back)


def orthonormality(size: Size) -> Iterator[Finding]:
    """Every basis; the device's own eigensolver; and faults put into its eigenvectors, as a broken one leaves them."""
    x_NTD = size.features(8)
    there = x_NTD.to(size.device)
    far: dict[str, float] = {}
    for rank in size.ranks:
        for family in ("sketch", "refined", "shared"):
            model = size.model(family, rank, x_NTD).to(size.device)
            with torch.inference_mode():
                basis = model(there).b_NRD.mT if family == "shared" else model(there).a_NTR
            far[f"{family} at rank {rank}"] = departure(basis).max().item()
        axes_DR = principal_axes([there], rank, stream(0, "axes"))
        for name, decompose in _controls(axes_DR).items():
            if name != "svd_rows":  # its A is none
                far[f"{name} at rank {rank}"] = departure(decompose(there, rank).a_NTR).max().item()
    worst = max(far, key=lambda name: far[name] if math.isfinite(far[name]) else math.inf)
    yield within(f"‖QᵀQ − I‖ of {len(far)} bases of 8 images, the worst: {worst}", far[worst], ORTHONORMAL)

    symmetric = torch.cat([gram(size.features(50).to(size.device)) for _ in range(4)])
    symmetric = symmetric * torch.logspace(-6, 6, 200, device=size.device)[:, None, None]
    values, vectors = torch.linalg.eigh(symmetric)
    yield Finding(
        "eigenvectors by the device's own solver that are not orthonormal", f"{is_loose(vectors).sum().item()} of 200"
    )
    _, vectors = eigh(symmetric)
    yield within("the worst of 200 once those are mended", departure(vectors).max().item(), ORTHONORMAL)
    found = is_loose(_spoilt(vectors))
    yield at_least("faults put into 200 of them: found", found.sum().item(), 200)
    yield within("found in the sound ones", is_loose(vectors).sum().item(), 0)
    again = mended(symmetric, values, _spoilt(vectors))[1]
    yield within("the worst of the faulty ones once mended", departure(again).max().item(), ORTHONORMAL)


def out_of_memory(size: Size) -> Iterator[Finding]:
    """Too little memory, really: the batch is halved, and what comes is what that batch gives at its own."""
    dtype, images = ("bfloat16", 64) if size.device == "cuda" else ("float32", 256)
    pixels_NHWC = size.pixels(images)
    encoder = size.encoder(dtype, size.device, batch=images)
    with too_little_memory(size, lambda: encoder.encode(pixels_NHWC)):
        found = encoder.start(pixels_NHWC, encoder.model.dtype).wait()
    halvings = Finding(
        "out of memory in the tower: batches tried and then taken", "; ".join(found.notes), "≥ 1 halving"
    )
    yield Finding(halvings.what, halvings.measured, halvings.wanted, "holds" if found.notes else "FAILS")
    assert encoder.batch is not None
    plain = size.encoder(dtype, size.device, batch=encoder.batch).encode(pixels_NHWC)
    yield same(
        f"features by {encoder.batch} at a time, as with enough memory", iter([("features", found.features_NTD, plain)])
    )


@contextmanager
def too_little_memory(size: Size, fill: Callable[[], object]) -> Iterator[None]:
    """Leave a process three fifths of what `fill` takes on a GPU beyond what it has there already."""
    if size.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fill()
        more = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        most = torch.cuda.memory_reserved() + 0.6 * more
        torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    # Where its memory is not counted: less than the pixels of all its images take as float32 patches.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 64 * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _controls(axes_DR: Tensor) -> Mapping[str, Callable[[Tensor, int], Factors]]:
    def drawn(decompose: Callable[..., Factors]) -> Callable[[Tensor, int], Factors]:
        return lambda x_NTD, rank: decompose(x_NTD, rank, stream(0, "control"))

    metric_DD = torch.linspace(0.5, 2, len(axes_DR), dtype=torch.float64).diag()
    return {
        "random_sketch": drawn(baselines.random_sketch),
        "pca_basis": lambda x_NTD, rank: baselines.pca_basis(x_NTD, rank, axes_DR),
        "power_1": drawn(baselines.power_1),
        "randomized_svd": drawn(baselines.randomized_svd),
        "gram_eigh": drawn(baselines.gram_eigh),
        "svd": baselines.svd,
        "svd_rows": baselines.svd_rows,
        "svd_weighted": lambda x_NTD, rank: baselines.svd_weighted(x_NTD, rank, metric_DD),
    }


def _spoilt(vectors_NKK: Tensor) -> Tensor:
    """One fault each of five kinds, barely large enough to matter."""
    broken = vectors_NKK.clone()
    broken[0::5, :, 1] += 2e-4 * broken[0::5, :, 2]  # two that lean on each other
    broken[1::5, :, 1] *= 1 + 2e-4
    broken[2::5, :, 1] = broken[2::5, :, 2]
    broken[3::5, 1] = 0
    broken[4::5, 1, 1] = torch.nan
    return broken


@contextmanager
def other_threads() -> Iterator[None]:
    """What a CPU is held against where there is no GPU: itself with two threads in place of one."""
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


CHECKS: tuple[tuple[str, float, Callable[[Size], Iterator[Finding]]], ...] = (
    ("the tower", 90, tower),
    ("decomposers", 15, decomposers),
    ("training", 30, training),
    ("controls", 15, controls),
    ("stored forms", 10, stored_forms),
    ("orthonormality", 30, orthonormality),
    ("out of memory", 20, out_of_memory),
)
"""Each with the seconds that it may take on a GPU's machine."""
