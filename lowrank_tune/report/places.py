"""The interactive view of test images: what the page's script draws, as JSON.

H x W tokens, K channels. Maps travel as base64 of little-endian float32, row by row.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import plotly.colors
from numpy.typing import NDArray
from PIL import Image

from lowrank_tune.report.charts import script_safe
from lowrank_tune.report.spatial import Map, Reconstruction, SpatialView

_JPEG_QUALITY = 80


def places_json(images: Sequence[Sequence[SpatialView]], note: str = "") -> str:
    """Pack views for the page.

    Args:
        images: of each image its views, one a rank; the same ranks and channels for all.
        note: what must be said about boxes.

    Returns:
        JSON that is safe inside a script element.
    """
    first = images[0][0]
    payload = {
        "grid": list(first.norm_HW.shape),
        "placed": first.placed,
        "channels": list(first.channels),
        "ranks": [view.rank for view in images[0]],
        "note": note,
        "colors": {name: _scale(name) for name in ("Magma", "Viridis")},
        "images": [_image(views) for views in images],
    }
    return script_safe(json.dumps(payload, separators=(",", ":")))


def _image(views: Sequence[SpatialView]) -> dict[str, Any]:
    view = views[0]
    return {
        "image": view.image,
        "photograph": _jpeg(view.photograph.pixels) if view.photograph is not None else None,
        "boxes": [list(box) for box in view.boxes],
        "original": _packed(view.original_KHW),
        "lengths": _packed(view.norm_HW),
        "ranks": {str(each.rank): [_method(method) for method in each.reconstructions] for each in views},
    }


def _method(method: Reconstruction) -> dict[str, Any]:
    return {
        "name": method.method,
        "cosine": method.token_cosine,
        "errors": _packed(method.error_HW),
        "cosines": _packed(method.cosine_HW),
        "maps": _packed(method.maps_KHW),
        "regions": asdict(method.regions) if method.regions else None,
    }


def _packed(values: Map) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _scale(name: str) -> list[list[Any]]:
    colors = getattr(plotly.colors.sequential, name)
    return [[place / (len(colors) - 1), color] for place, color in enumerate(colors)]
