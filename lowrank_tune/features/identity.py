"""Which features are the same features: the fingerprint of a cache.

It covers everything that can change a value and nothing else: no path, no name, no number of actors.
"""

from __future__ import annotations

from lowrank_tune.caches.identity import Identity
from lowrank_tune.features.checkpoint import CheckpointConfig
from lowrank_tune.spec.features import FeaturesSpec

FORWARD_VERSION = 2
"""Counts up with every change of the forward or decoding code that can change a value.

2: bfloat16, and float32 on a GPU, take steps that round otherwise than transformers' own; 16-bit images are scaled.
"""

IMPORT_VERSION = 1
"""Likewise for ready tensors, which no forward touches."""

_VISION_DEFAULTS = {
    "depth": None,
    "fullatt_block_indexes": None,
    "hidden_act": "silu",
    "hidden_size": None,
    "intermediate_size": None,
    "num_heads": None,
    "out_hidden_size": None,
    "patch_size": None,
    "rope_parameters": None,
    "spatial_merge_size": None,
    "temporal_patch_size": 2,
    "window_size": None,
}
_PREPROCESSOR_KEYS = ("image_mean", "image_std", "rescale_factor")


def image_identity(spec: FeaturesSpec, config: CheckpointConfig, weights_digest: str) -> Identity:
    """What the features of an image depend on, beside its bytes."""
    tokens, dim = config.shape(spec.encoder.image_size)
    return {
        "kind": "images",
        "forward": FORWARD_VERSION,
        "weights": weights_digest,
        "vision": {key: config.vision.get(key, default) for key, default in _VISION_DEFAULTS.items()},
        "preprocessing": {key: config.preprocessor.get(key) for key in _PREPROCESSOR_KEYS},
        "image_size": spec.encoder.image_size,
        "compute_dtype": spec.encoder.compute_dtype,
        "store_dtype": spec.store_dtype,
        "tokens": tokens,
        "dim": dim,
    }


def tensor_identity(spec: FeaturesSpec, tokens: int, dim: int) -> Identity:
    """What imported tensors depend on, beside the bytes of their files."""
    return {
        "kind": "tensors",
        "forward": IMPORT_VERSION,
        "store_dtype": spec.store_dtype,
        "tokens": tokens,
        "dim": dim,
    }
