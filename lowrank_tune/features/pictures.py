"""The picture itself as a way to keep features: as JPEG, as WebP or smaller, and encoded again when they are wanted.

What is kept is the square of image_size pixels a side that the encoder sees, so no way pays for pixels that it never
sees. What comes back runs through the study's own encoder, is rounded as the cache rounds, and is held against X as the
cache has it: an unchanged square would have no error. Of all that only figures are stored.

A smaller picture has fewer tokens. They are brought to the whole grid bilinearly, each token's centre staying where it
is in the picture.

N pictures, H = W pixels, T tokens of the whole grid, t of a smaller one, D dim.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import ray
import torch
from PIL import Image
from pydantic import TypeAdapter
from ray.exceptions import GetTimeoutError, RayTaskError
from torch import Tensor
from torch.nn.functional import interpolate

from lowrank_tune.config.plan import Plan
from lowrank_tune.config.source import TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.commits import UnusableError
from lowrank_tune.features.decoding import decode_image
from lowrank_tune.features.extract import EncodeImages, plan_encoding
from lowrank_tune.features.groups import image_groups
from lowrank_tune.features.images import read_original
from lowrank_tune.features.remote import local_copy
from lowrank_tune.features.shards import START_PATIENCE_S, Node, Notes, Pool, wait_for_room
from lowrank_tune.files import read_json, write_json
from lowrank_tune.lowrank.data import FeatureMatrix, spread
from lowrank_tune.lowrank.metrics import measure_matrix
from lowrank_tune.measured import Pictures, RateRow
from lowrank_tune.records import FeatureSet
from lowrank_tune.runtime import in_worker

if TYPE_CHECKING:
    from lowrank_tune.features.encoder import Encoder

KEPT = "pictures.json"
"""In a study's folder: what was measured once."""
MOST_IMAGES = 16
"""Test images that are measured: each is encoded a dozen times."""
MOST_S = 60.0
"""After so long no further image is begun, where an encoder takes seconds a picture."""


@dataclass(frozen=True)
class Way:
    """How a picture is kept: its side divided by `part`, in one of Pillow's formats at one of its qualities."""

    name: str
    format: str
    quality: int
    part: int = 1

    def keep(self, square_HWC: npt.NDArray[np.uint8]) -> bytes:
        """Make the file of a picture [H, W, 3]."""
        picture, side = Image.fromarray(square_HWC), len(square_HWC) // self.part
        file = io.BytesIO()
        # Huffman tables of its own make a JPEG 5 % smaller; WebP knows no such option.
        picture.resize((side, side)).save(file, self.format, quality=self.quality, optimize=True)
        return file.getvalue()


WAYS = (
    *(Way(f"{name}-q{quality}", name, quality) for name in ("jpeg", "webp") for quality in (50, 75, 85, 90, 95)),
    Way("half-side", "jpeg", 95, part=2),
    Way("quarter-side", "jpeg", 95, part=4),
)


class Reading(NamedTuple):
    """One image in one way."""

    image: int
    method: str
    size: int  # bytes
    error: float  # ‖X − Y‖ / ‖X‖
    cosine: float  # mean over tokens
    seconds: float  # until its features are back: decoding, and its part of encoding several pictures at once


class Readings(NamedTuple):
    """What the encoder's worker found out."""

    found: list[Reading]
    left_out: list[str]  # why, of each image that cannot be measured
    device: str  # of the encoder, for people


def measure_pictures(
    plan: Plan, features: FeatureSet, test: Sequence[int], on_note: Notes = lambda text: None
) -> Pictures:
    """Measure what the pictures of some test images take, and what their features lose, in each of `WAYS`.

    One worker of the caller's Ray encodes them, on what the extraction gives an encoder. What was measured before is
    read from the study's folder, which is all that is done without a Ray. Whatever breaks costs a study these figures
    alone, and is told in the remarks.

    Args:
        plan: the study's.
        features: its features.
        test: the images of its test split, which `Pictures.images` counts from 0.
        on_note: called with a sentence where pictures are to be encoded, which takes a while.
    """
    spec, kept = plan.spec, plan.study_dir / KEPT
    if isinstance(spec.features.source, TensorSource):
        said = "the picture itself is not among the ways to keep features: of ready tensors the images are not known"
        return Pictures(remarks=(said,))
    groups = image_groups(features, spec.split.group_by)
    places = spread([groups[image] for image in test], MOST_IMAGES, spec.seed)
    of = features.digest([test[place] for place in places])
    try:
        if known := _read_kept(kept, of):
            return known
        if not ray.is_initialized():
            raise InputError(f"not measured yet; `lowrank-tune resume {plan.study_id}` does, where the images are")
        job = plan_encoding(spec.features, plan.features_root)
        if Path(job.directory).name != features.fingerprint:
            raise InputError(f"{job.encoder} is not what it was when it made these features")
        on_note(f"encoding {len(places)} test images again, from files of fewer bytes")
        # Of the features the worker needs these rows alone.
        chosen = replace(features, rows=tuple(features.rows[test[place]] for place in places))
        pictures = _fold(_on_ray(job, chosen), job, places, len(test))
        if pictures.rows:
            write_json(kept, {"of": of, "pictures": asdict(pictures)})
        return pictures
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return Pictures(remarks=(f"the picture itself is left out of the ways to keep features: {reason}",))


def fitting(job: EncodeImages) -> list[Way]:
    """The ways whose pictures whole tokens fill."""
    token = job.config.vision["patch_size"] * job.config.vision["spatial_merge_size"]
    return [way for way in WAYS if job.spec.encoder.image_size % (way.part * token) == 0]


def read_images(job: EncodeImages, pool: Pool, features: FeatureSet, most_s: float = MOST_S) -> Readings:
    """In a worker: measure all the images of `features`, as many as are begun in so many seconds, but one.

    Raises:
        InputError: the encoder does not start, or its GPU does not hold a picture.
        CacheError: the features cannot be read.
    """
    torch.set_num_threads(pool.threads)
    encoder, data, ways = job.load_encoder(pool), FeatureMatrix(local_copy(features)), fitting(job)
    on_cpu = f"{pool.threads} CPU thread{'s' * (pool.threads > 1)}"
    device = torch.cuda.get_device_name(encoder.device) if pool.gpus else on_cpu
    found, left_out, began = list[Reading](), list[str](), time.monotonic()
    for image, row in enumerate(features.rows):
        if image and time.monotonic() - began > most_s:
            break
        try:
            file = read_original(features, row.key)
            square_HWC = decode_image(file, job.spec.encoder.image_size, job.spec.max_pixels)
            own = list(read_image(encoder, image, square_HWC, data.load([image])[0], ways, data.dtype))
            if not all(math.isfinite(reading.error) for reading in own):
                raise UnusableError(f"image {row.key[:16]}: of zeros alone, or not finite when it is encoded again")
            found += own
        except (OSError, UnusableError) as error:
            left_out.append(str(error))
    return Readings(found, left_out, device)


def read_image(
    encoder: Encoder,
    image: int,
    square_HWC: npt.NDArray[np.uint8],
    x_TD: Tensor,
    ways: Sequence[Way],
    dtype: torch.dtype,
) -> Iterator[Reading]:
    """Measure an image [H, W, 3] with features [T, D] in each way."""
    norm = torch.linalg.vector_norm(x_TD.double())
    for name, size, y_TD, seconds in bring_back(encoder, square_HWC, len(x_TD), ways, dtype):
        figures = measure_matrix(x_TD[None], y_TD[None])
        error, cosine = (figures.residual_N.sqrt() / norm).item(), figures.token_cosine_N.item()
        yield Reading(image, name, size, error, cosine, seconds)


def bring_back(
    encoder: Encoder, square_HWC: npt.NDArray[np.uint8], tokens: int, ways: Sequence[Way], dtype: torch.dtype
) -> Iterator[tuple[str, int, Tensor, float]]:
    """Keep an image [H, W, 3] in each way and encode it again.

    Yields its name, the file's bytes, the features [T, D] in the cache's dtype and the seconds until they are back.
    """
    for _, alike in itertools.groupby(ways, key=lambda way: way.part):
        files = {way.name: way.keep(square_HWC) for way in alike}
        pixels, seconds = list[npt.NDArray[np.uint8]](), list[float]()
        for data in files.values():
            started = time.perf_counter()
            pixels.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        encoded = encoder.start(np.stack(pixels), dtype).wait()
        y_NTD = on_whole_grid(encoded.features_NTD.float(), tokens)
        each = (time.perf_counter() - started) / len(files)
        for (name, data), y_TD, decoding in zip(files.items(), y_NTD, seconds, strict=True):
            yield name, len(data), y_TD, decoding + each


def on_whole_grid(features_NtD: Tensor, tokens: int) -> Tensor:
    """Bring a square grid of t tokens to one of T, [N, T, D], bilinearly with the grids' outer edges on each other."""
    side, small = math.isqrt(tokens), math.isqrt(features_NtD.shape[1])
    if small == side:
        return features_NtD
    grid_NDhw = features_NtD.mT.reshape(*features_NtD.mT.shape[:2], small, small)
    return interpolate(grid_NDhw, (side, side), mode="bilinear", align_corners=False).flatten(2).mT


def _on_ray(job: EncodeImages, features: FeatureSet) -> Readings:
    """Have one worker `read_images`, with what an encoder of the extraction gets."""
    nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    pool = job.pool(len({row.shard for row in features.rows}), nodes)

    def give_up(need: str) -> None:
        raise InputError(f"{need}; `lowrank-tune resume` measures it when there is room")

    pool = wait_for_room(replace(pool, least=1, most=1, decoding=False), nodes, give_up)
    try:
        patience_s = START_PATIENCE_S + MOST_S
        return in_worker(read_images, job, pool, features, cpus=pool.cpus, gpus=pool.gpus, patience_s=patience_s)
    except GetTimeoutError as error:
        raise InputError(f"the encoder did not answer in {START_PATIENCE_S + MOST_S:g} s") from error


def _fold(readings: Readings, job: EncodeImages, places: Sequence[int], tested: int) -> Pictures:
    """A row a way: means over the images, whose places in the test split are given; and what is to be said of it."""
    size, ways = job.spec.encoder.image_size, fitting(job)
    remarks = [
        f"{way.name} is left out: whole tokens do not fill {size}/{way.part} pixels a side"
        for way in WAYS
        if way not in ways
    ]
    if readings.left_out:
        others = f"; and {len(readings.left_out) - 1} more" if len(readings.left_out) > 1 else ""
        remarks.append(f"the picture itself is not measured of {readings.left_out[0]}{others}")
    table = pd.DataFrame(readings.found, columns=Reading._fields)
    if table.empty:
        return Pictures(remarks=tuple(remarks))
    table = table.assign(image=[places[image] for image in table["image"]]).sort_values("image", kind="stable")
    images = tuple(table["image"].unique().tolist())
    rows, sizes, errors = list[RateRow](), dict[str, tuple[int, ...]](), dict[str, tuple[float, ...]]()
    for way in ways:
        own = table[table["method"] == way.name]
        sizes[way.name], errors[way.name] = tuple(own["size"].tolist()), tuple(own["error"].tolist())
        rows.append(
            RateRow(
                method=way.name,
                rank=0,
                dtype=way.format,
                target="",
                n_images=len(own),
                bytes_per_image=float(own["size"].mean()),
                relative_error_mean=float(own["error"].mean()),
                relative_error_max=float(own["error"].max()),
                token_cosine_mean=float(own["cosine"].mean()),
                images_per_second=float(1 / own["seconds"].median()),
            )
        )
    said = (
        f"the picture itself is measured on {len(images)} of {tested} test images: the square of {size} pixels a side "
        f"that the encoder sees, as JPEG or WebP, encoded again by {job.encoder} on {readings.device}"
    )
    if any(way.part > 1 for way in ways):
        said += "; of a smaller side it is a JPEG of quality 95, its tokens brought to the whole grid bilinearly"
    if late := len(places) - len(images) - len(readings.left_out):
        said += f"; {late} more images would have taken longer than {MOST_S:g} s"
    return Pictures(images, tuple(rows), sizes, errors, (said, *remarks))


def _read_kept(path: Path, of: str) -> Pictures | None:
    """What was measured of these images; None where nothing was, or a machine was lost while it was written."""
    try:
        kept = read_json(path)
        return TypeAdapter(Pictures).validate_python(kept["pictures"]) if kept["of"] == of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
