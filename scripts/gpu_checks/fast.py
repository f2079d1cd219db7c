"""How fast a GPU is at what this package does. N images, T tokens, D dim, R rank."""

from __future__ import annotations

import io
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from gpu_checks.proof import SHARD, Finding, Size, at_least, forget, reason_of, seconds_of, split, wait, within
from gpu_checks.trained import TOGETHER_S, begin, train, train_together
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lowrank_tune.features.encoder import Encoder
from lowrank_tune.lowrank import baselines
from lowrank_tune.lowrank.calibration import Noise, measure_training
from lowrank_tune.lowrank.linalg import gram, stream

TERAFLOP_AN_IMAGE = 1.343
"""What the 3B tower's forward needs for 448x448 pixels."""
GOAL, STRETCH = 220, 370
"""Images/s on an H100 or the like."""
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "A10G": 70,
    "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip
"""bfloat16 without sparsity, as their makers say; the first name that a card's holds."""
QUICKER = 5
"""Times that `refined` should be quicker than the best exact route in batches of 64 or more."""
SPLIT_OF, WITHIN = 64, 0.2


def extraction(size: Size) -> Iterator[Finding]:
    """The forward alone, pixels and features on the device: each way, held against transformers' own."""
    encoder, pixels_NHWC = _on_device(size)
    with torch.inference_mode():
        stock = _rate(size, lambda: encoder.forward_as_stock(pixels_NHWC))
        plain = _rate(size, lambda: encoder.forward(pixels_NHWC))
        yield Finding("forward, transformers' own with SDPA", _told(size, stock))
        yield Finding("forward, windows by reshape", f"{_told(size, plain)}, {plain / stock:.2f} times that")
        if size.device == "cuda" and _peak():
            yield at_least(f"the same, images/s; {STRETCH} would be a triumph", plain, GOAL, goal=True)
        yield from _another(size, "CUDA graph", plain, pixels_NHWC, encoder, lambda: _graphed(encoder, pixels_NHWC))


def compiled(size: Size) -> Iterator[Finding]:
    """The same through torch.compile, which takes a minute or more to compile it."""
    encoder, pixels_NHWC = _on_device(size)
    with torch.inference_mode():
        encoder.forward(pixels_NHWC)  # makes what depends on the images' size
        plain = _rate(size, lambda: encoder.forward(pixels_NHWC))
        forward = torch.compile(encoder.forward, backend=size.compiler)
        yield from _another(size, "torch.compile", plain, pixels_NHWC, encoder, lambda: lambda: forward(pixels_NHWC))


def _another(
    size: Size, name: str, plain: float, pixels_NHWC: Tensor, encoder: Encoder, make: Callable[[], Callable[[], Tensor]]
) -> Iterator[Finding]:
    """One more way of the forward, which may not work: a row, not a failure."""
    try:
        started = time.perf_counter()
        run = make()
        found = run().float()
        wait(size.device)
        ready = time.perf_counter() - started
        cosine = cosine_similarity(found, encoder.forward(pixels_NHWC).float(), dim=-1).min().item()
        rate = _rate(size, run)
        what = (
            f"{_told(size, rate)}, {rate / plain:.2f} times the plain one; ready in {ready:.1f} s; cosine {cosine:.5f}"
        )
        yield Finding(f"forward by {name}", what)
    except TimeoutError:
        raise
    except Exception as error:  # whatever a compiler or a driver raises
        yield Finding(f"forward by {name}", reason_of(error), "", "does not work")


def _graphed(encoder: Encoder, pixels_NHWC: Tensor) -> Callable[[], Tensor]:
    """The forward of these pixels as a CUDA graph, recorded after some runs beside the main stream."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            encoder.forward(pixels_NHWC)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features_NTD = encoder.forward(pixels_NHWC)

    def replay() -> Tensor:
        graph.replay()
        return features_NTD

    return replay


def _on_device(size: Size) -> tuple[Encoder, Tensor]:
    encoder = size.encoder("bfloat16" if size.device == "cuda" else "float32", size.device)
    return encoder, torch.from_numpy(size.pixels(size.encoded)).to(size.device)


def _rate(size: Size, run: Callable[[], object]) -> float:
    return size.encoded / seconds_of(run, size.device, 2 * size.seconds)


def _peak() -> float | None:
    name = torch.cuda.get_device_name()
    return next((PEAK_TFLOPS[known] for known in PEAK_TFLOPS if known in name), None)


def _told(size: Size, rate: float) -> str:
    """Images/s, and of the true tower on a GPU the work that it is and the share of the card's peak."""
    if size.device != "cuda":
        return f"{rate:.1f} images/s"
    share = f", {rate * TERAFLOP_AN_IMAGE / peak:.1%} of the peak" if (peak := _peak()) else ""
    return f"{rate:.1f} images/s, {rate * TERAFLOP_AN_IMAGE:.0f} TFLOP/s{share}"


def pipeline(size: Size) -> Iterator[Finding]:
    """JPEG files of random pixels -> features on the disk, as an extraction has it, but without Ray.

    Files are decoded by threads, and shards encoded and written by others, one at a time or three; the copies of one
    then hide behind the forward of another.
    """
    shards = 4 if size.device == "cuda" else 1
    images = SHARD if size.device == "cuda" else 4
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=85)

    def decode(_: int) -> npt.NDArray[np.uint8]:
        with Image.open(io.BytesIO(file.getvalue())) as image:
            return np.asarray(image.convert("RGB").resize((size.image_size, size.image_size)))

    encoder, _ = _on_device(size)
    encoder.encode(size.pixels(images))
    rates = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as decoders:

        def shard(number: int, at: str) -> None:
            pixels_NHWC = np.stack(list(decoders.map(decode, range(images))))
            features_NTD = encoder.start(pixels_NHWC, torch.float16).wait().features_NTD
            save_file({"features": features_NTD}, size.folder / f"shard-{at}-{number}.safetensors")

        for at_once in (1, 3):
            started = time.perf_counter()
            with ThreadPoolExecutor(at_once) as writers:
                list(writers.map(shard, range(shards), [str(at_once)] * shards))
            rates[at_once] = shards * images / (time.perf_counter() - started)
    yield Finding("JPEG → device → disk, a shard at a time", f"{rates[1]:.1f} images/s")
    yield Finding("the same, three shards in hand", f"{rates[3]:.1f} images/s, {rates[3] / rates[1]:.2f} times that")
    yield from _copies(size)


def _copies(size: Size) -> Iterator[Finding]:
    """Whether page-locked memory pays for mini-batches, which go through plain memory now."""
    x_NTD = size.features(8).half()
    for name, host in (("plain", x_NTD), ("page-locked", x_NTD.pin_memory() if size.device == "cuda" else x_NTD)):
        spent = seconds_of(
            lambda host=host: host.to(size.device, copy=True, non_blocking=True), size.device, size.seconds
        )
        yield Finding(f"8 images to the device from {name} memory", f"{x_NTD.nbytes / spent / 1e9:.2f} GB/s")


def routes(size: Size) -> Iterator[Finding]:
    """Each way to decompose, µs an image, by rank and batch; the exact ones serve every rank at once."""
    for images in size.batches:
        # Without the first one, which a direction rules.
        x_NTD = size.features(1 + min(images, SHARD))[1:]
        x_NTD = x_NTD.repeat(math.ceil(images / SHARD), 1, 1)[:images].to(size.device)
        exact = {
            "gram_eigh": lambda x=x_NTD: baselines.gram_eigh(x, size.ranks[-1], stream(0, "control")),
            "torch.linalg.eigh of XXᵀ": lambda x=x_NTD: torch.linalg.eigh(gram(x)),
            "torch.linalg.svd": lambda x=x_NTD: torch.linalg.svd(x, full_matrices=False),
        }
        spent: dict[str, float] = {}
        with torch.inference_mode():
            for name, run in exact.items():
                spent[name] = seconds_of(run, size.device, size.seconds / 4)
            told = ", ".join(f"{name} {seconds / images * 1e6:.0f}" for name, seconds in spent.items())
            yield Finding(f"exact, batches of {images}: µs an image", told)
            best = min(spent.values())
            for rank in size.ranks:
                spent = {}
                for family in ("refined", "shared"):
                    model = size.model(family, rank, x_NTD[:8].cpu()).to(size.device)
                    spent[family] = seconds_of(lambda m=model, x=x_NTD: m(x), size.device, size.seconds / 4)
                spent["randomized_svd"] = seconds_of(
                    lambda r=rank, x=x_NTD: baselines.randomized_svd(x, r, stream(0, "control")),
                    size.device,
                    size.seconds / 4,
                )
                told = ", ".join(f"{name} {seconds / images * 1e6:.0f}" for name, seconds in spent.items())
                quicker = f"refined {best / spent['refined']:.2f} times as quick as the best exact route"
                goal = at_least("", best / spent["refined"], QUICKER, goal=True) if images >= SHARD else Finding("", "")
                what = f"rank {rank}, batches of {images}: µs an image"
                yield Finding(what, f"{told}; {quicker}", goal.wanted, goal.verdict)


def memory(size: Size) -> Iterator[Finding]:
    """What a training allocates, against what `plan` says of it from a few steps with noise."""
    features, parts = size.stored(SPLIT_OF), split(SPLIT_OF)
    for family in ("direct", "refined", "shared"):
        config = size.trial(family, size.ranks[len(size.ranks) // 2], epochs=2)
        noise = Noise(size.tokens, size.dim, SPLIT_OF, features.dtype)
        forget()
        _, estimate = measure_training(config, noise, parts, size.device)
        forget()
        told = f"`{family}` at rank {config.rank}: `plan` says {estimate / 2**20:.1f} MiB a trial"
        if size.device != "cuda":
            yield Finding(told, "torch counts a GPU's memory alone", "", "left out")
            continue
        torch.cuda.reset_peak_memory_stats()
        train(config, features, parts, size.device)
        held = torch.cuda.max_memory_allocated()  # what cuBLAS works in among it, there as here
        apart = within("", abs(estimate - held) / held, WITHIN)
        yield Finding(told, f"{held / 2**20:.1f} MiB", f"within {WITHIN:.0%}", apart.verdict)


def trials(size: Size) -> Iterator[Finding]:
    """Small trainings at once on one card, each in a process of its own, as Ray Tune has them."""
    features, parts, config = size.stored(SPLIT_OF), split(SPLIT_OF), size.trial("sketch", size.ranks[0], epochs=5)
    train(config, features, parts, size.device)  # its files are read, once
    forget()
    spawn = multiprocessing.get_context("spawn")
    for at_once in size.trials:
        free = torch.cuda.mem_get_info()[0] if size.device == "cuda" else 0
        barrier = spawn.Barrier(at_once)
        with spawn.Pool(at_once, begin, (barrier,)) as pool:
            work = [(config, features, parts, size.device)] * at_once
            # A process that dies takes its answer with it.
            pool.starmap_async(train_together, work, chunksize=1).get(TOGETHER_S)  # warms up
            told = pool.starmap_async(train_together, work, chunksize=1).get(TOGETHER_S)
        spent = max(end for _, end, _ in told) - min(start for start, _, _ in told)
        rate = f"{at_once / spent * 3600:,.0f} trials/hour"
        if size.device == "cuda":
            each = (free - min(left for *_, left in told)) / at_once / 2**20
            rate += f", {each:.0f} MiB of the card each, its context and all"
        yield Finding(f"`sketch` of {config.epochs} epochs of {len(parts.train)} images, {at_once} at once", rate)


CHECKS: tuple[tuple[str, float, Callable[[Size], Iterator[Finding]]], ...] = (
    ("extraction", 45, extraction),
    ("decompositions", 90, routes),
    ("memory", 15, memory),
    ("trials at once", 75, trials),
    ("decode → device → disk", 30, pipeline),
    ("torch.compile", 100, compiled),
)
"""Each with the seconds that it may take on a GPU's machine; what takes longest for least comes last."""
