"""The Qwen2.5-VL vision tower: pixels -> features. N images, H = W pixels, T tokens, D dim.

Needs torch and transformers, no ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.utils import logging as transformers_logging

from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import CheckpointConfig, TowerFiles


class Encoder:
    """A vision tower on a device.

    Args:
        config: the checkpoint.
        tower: the files with its tower.
        compute_dtype: `float32` or `bfloat16`.
        device: `cpu`, `cuda`, ...

    Raises:
        InputError: the files do not hold exactly the tensors that the configuration asks for.
    """

    def __init__(self, config: CheckpointConfig, tower: TowerFiles, compute_dtype: str, device: str = "cpu") -> None:
        self.device = device
        self.processor = Qwen2VLImageProcessor(**_processor_arguments(config))
        self.model = _load_tower(config, tower, getattr(torch, compute_dtype)).to(device)

    @torch.inference_mode()
    def encode(self, pixels_NHWC: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Encode images of one size.

        Args:
            pixels_NHWC: uint8 [N, H, W, 3], as `decode_image` gives them.

        Returns:
            [N, T, D] in the compute dtype, on the CPU; tokens in row-major order of the image's grid.
        """
        images = [torch.tensor(image).permute(2, 0, 1) for image in pixels_NHWC]
        batch = self.processor(images=images, do_resize=False, return_tensors="pt", device=self.device)
        merged: torch.Tensor = self.model(
            batch["pixel_values"], grid_thw=batch["image_grid_thw"].to(self.device)
        ).pooler_output
        return merged.view(len(images), -1, merged.shape[-1]).cpu()


def _processor_arguments(config: CheckpointConfig) -> dict[str, object]:
    """The preprocessor's settings, which must cut the patches that the tower expects."""
    settings = config.preprocessor
    for theirs, ours in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        if settings.get(theirs, config.vision[ours]) != config.vision[ours]:
            raise InputError(
                f"{config.name}: {theirs} is {settings[theirs]} in preprocessor_config.json, but {ours} is "
                f"{config.vision[ours]} in config.json; download the checkpoint again"
            )
    known = ("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size", "temporal_patch_size")
    return {key: settings[key] for key in known if key in settings}


def _load_tower(
    config: CheckpointConfig, tower: TowerFiles, dtype: torch.dtype
) -> Qwen2_5_VisionTransformerPretrainedModel:
    tensors = {}
    for path, names in tower.files.items():
        with safe_open(path, framework="pt") as file:
            tensors.update({ours: file.get_tensor(theirs) for theirs, ours in names.items()})
    with _quiet_transformers():
        model, report = Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(
            None,
            config=Qwen2_5_VLVisionConfig(**config.vision),
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[problem]:
            first = sorted(report[problem], key=str)[0]
            raise InputError(
                f"{config.name}: {len(report[problem])} {problem.replace('_', ' ')} in the vision tower, "
                f"such as {first}; the weights are not those that config.json describes, download the checkpoint again"
            )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report: what the report would say becomes an error."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
