"""Sample images: seeded crops of the photographs that ship inside scikit-image and scikit-learn.

The crops are written once as PNG files below the cache, so that they can be looked at and have ordinary paths.
Crop `i` of a seed is the same whatever the number of crops asked for.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowrank_tune.errors import InputError
from lowrank_tune.features.durable import write_durably

# By path, never through skimage.data: that would download what is not shipped.
_PHOTOGRAPHS = {
    "skimage": (
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/cell.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/moon.png",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
        "data/page.png",
        "data/retina.jpg",
        "data/rocket.jpg",
        "data/text.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
_SMALLEST_SIDE = 160
_LARGEST_SIDE = 480
_LEAST_CONTRAST = 6.0
"""Standard deviation of the grey values, of 255: leaves out the black corners round the retina."""

_NAME = re.compile(r"^(\d{4})-([a-z_]+)-x(\d+)-y(\d+)-s(\d+)\.png$")


def write_samples(count: int, seed: int, parent: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Make sure that the first `count` crops of a seed lie below `parent`.

    Args:
        count: how many.
        seed: which crops.
        parent: gets a folder `seed-<seed>`.

    Returns:
        Each crop's file and its origin: `photograph`, `left`, `top`, `size` in pixels.

    Raises:
        InputError: the packages that ship the photographs are not installed.
        OSError: the folder cannot be written.
    """
    directory = parent / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    found = _written(directory)
    if any(number not in found for number in range(count)):
        for number, (name, crop) in zip(range(count), _crops(seed), strict=False):
            if number not in found:
                buffer = io.BytesIO()
                crop.save(buffer, "PNG", compress_level=1)
                write_durably(directory / f"{number:04d}-{name}.png", buffer.getvalue())
        found = _written(directory)
    return [found[number] for number in range(count)]


def _written(directory: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    found = {}
    for path in directory.iterdir():
        if match := _NAME.match(path.name):
            number, photograph, left, top, size = match.groups()
            origin = {"photograph": photograph, "left": int(left), "top": int(top), "size": int(size)}
            found[int(number)] = (path, origin)
    return found


def _crops(seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Endless distinct crops, each with a name that tells where it was cut; the photographs take turns."""
    photographs = [(path.stem, _load(path)) for path in _photograph_paths()]
    generator = np.random.default_rng(seed)
    seen = set()
    while True:
        for stem, image in photographs:
            while True:
                side = int(generator.integers(_SMALLEST_SIDE, min(_LARGEST_SIDE, *image.size) + 1))
                left = int(generator.integers(0, image.width - side + 1))
                top = int(generator.integers(0, image.height - side + 1))
                name = f"{stem}-x{left}-y{top}-s{side}"
                crop = image.crop((left, top, left + side, top + side))
                if name not in seen and np.asarray(crop.convert("L")).std() >= _LEAST_CONTRAST:
                    break
            seen.add(name)
            yield name, crop


def _photograph_paths() -> list[Path]:
    paths = []
    for package, files in _PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"features.source.samples needs the photographs in {_DISTRIBUTIONS[package]}: "
                f"pip install {_DISTRIBUTIONS[package]}, or name your own images"
            )
        root = Path(spec.submodule_search_locations[0])
        for file in files:
            if not (root / file).is_file():
                raise InputError(
                    f"{root / file}: this version of {_DISTRIBUTIONS[package]} does not ship it; install another"
                )
            paths.append(root / file)
    return paths


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image
