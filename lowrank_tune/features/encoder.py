"""The Qwen2.5-VL vision tower on a device: pixels -> features. N images, H = W pixels, T tokens, D dim.

Needs torch and transformers, no ray.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import CheckpointConfig, TowerFiles, quiet_transformers
from lowrank_tune.features.window_attention import SquareTower, align_mlp, cut_patches, is_exact, window_grid

PATCHES_A_BATCH = {"cuda": 32 * 1024, "cpu": 4 * 1024}
"""Where no batch size is given: 32 images of 448 pixels a side fill a GPU, 4 the caches of a CPU."""
LARGEST_BATCH = 64

_MAKE_ROOM = "free the GPU of other programs (nvidia-smi lists them)"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """Features that are on their way from the device.

    Attributes:
        features_NTD: [N, T, D] in the dtype asked for, on the CPU; not to be read before `wait`.
        largest_N: [N], each image's largest magnitude in the compute dtype, NaN where it has one; likewise.
        notes: what a user should know of how it went.
        arrived: told by the device once it has copied everything; None where it has already.
    """

    features_NTD: Tensor
    largest_N: Tensor
    notes: tuple[str, ...]
    arrived: torch.cuda.Event | None

    def wait(self) -> Encoding:
        """Return when both tensors are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


class Encoder:
    """A vision tower on a device; threads may share it, and take turns at giving it work.

    Images whose windows are alike (448 pixels a side and any other multiple of the window's) go through `SquareTower`,
    others through transformers' own forward.

    How many images are encoded at once does not show in the features on a CPU. On a GPU another number may bring
    other matrix kernels, and with them differences of the compute dtype's rounding.

    Args:
        config: the checkpoint.
        tower: the files with its tower.
        compute_dtype: `float32` or `bfloat16`.
        device: `cpu`, `cuda`, ...
        batch: images at once; None takes what fills the device. It is halved where the GPU's memory does not suffice.

    Raises:
        InputError: the files do not hold exactly the tensors that the configuration asks for, or the GPU has no room
            for them.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        tower: TowerFiles,
        compute_dtype: str,
        device: str = "cpu",
        batch: int | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.batch = batch
        self.processor = Qwen2VLImageProcessor(**_processor_arguments(config))
        dtype = getattr(torch, compute_dtype)
        self.model = _load_tower(config, tower, dtype)
        try:
            self.model.to(self.device)
            if not is_exact(self.device, dtype):
                align_mlp(self.model)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise InputError(
                f"{config.name}: out of GPU memory on {device} before the first image; {_MAKE_ROOM}, or take a GPU "
                "with more memory"
            ) from error
        self._squares: dict[int, SquareTower | None] = {}
        self._turn = threading.Lock()

    def encode(self, pixels_NHWC: npt.NDArray[np.uint8]) -> Tensor:
        """Encode images of one size.

        Args:
            pixels_NHWC: uint8 [N, H, W, 3], as `decode_image` gives them.

        Returns:
            [N, T, D] in the compute dtype, on the CPU; tokens in row-major order of the image's grid.

        Raises:
            InputError: the GPU's memory does not hold a single image.
        """
        return self.start(pixels_NHWC, self.model.dtype).wait().features_NTD

    @torch.inference_mode()
    def start(self, pixels_NHWC: npt.NDArray[np.uint8], dtype: torch.dtype) -> Encoding:
        """Give images to the device; a GPU works on while the caller does something else.

        Args:
            pixels_NHWC: uint8 [N, H, W, 3].
            dtype: what the features are to be stored in. Values beyond it become infinite: look at `largest_N`.

        Raises:
            InputError: the GPU's memory does not hold a single image.
        """
        on_gpu = self.device.type == "cuda"
        count, size = pixels_NHWC.shape[:2]
        # Pinned memory is what a GPU can copy from and to while the CPU goes on.
        staged = torch.empty(pixels_NHWC.shape, dtype=torch.uint8, pin_memory=on_gpu)
        staged.numpy()[:] = pixels_NHWC
        features_NTD = torch.empty((count, *self.config.shape(size)), dtype=dtype, pin_memory=on_gpu)
        largest_N = torch.empty(count, pin_memory=on_gpu)
        notes: list[str] = []
        with self._turn:
            done = 0
            while done < count:
                batch = slice(done, min(count, done + (self.batch or self._batch(size))))
                if not self._fits(staged[batch], features_NTD[batch], largest_N[batch]):
                    notes.append(self._halve(batch.stop - done))
                    continue
                done = batch.stop
            arrived = _recorded_event() if on_gpu else None
        return Encoding(features_NTD, largest_N, tuple(notes), arrived)

    def forward(self, pixels_NHWC: Tensor) -> Tensor:
        """One pass: [N, H, W, 3] of uint8 -> [N, T, D] in the compute dtype, both on the device."""
        size = pixels_NHWC.shape[1]
        if size not in self._squares:
            grid = window_grid(self.model.config, size)
            self._squares[size] = SquareTower(self.model, grid) if grid else None
        square = self._squares[size]
        return self.forward_as_stock(pixels_NHWC) if square is None else square(self._patches(pixels_NHWC, square))

    def forward_as_stock(self, pixels_NHWC: Tensor) -> Tensor:
        """The same by transformers' own preprocessor and forward, which take images of any size."""
        images = list(pixels_NHWC.permute(0, 3, 1, 2))
        batch = self.processor(images=images, do_resize=False, return_tensors="pt", device=self.device)
        merged: Tensor = self.model(
            batch["pixel_values"], grid_thw=batch["image_grid_thw"].to(self.device)
        ).pooler_output
        return merged.view(len(images), -1, merged.shape[-1])

    def _patches(self, pixels_NHWC: Tensor, square: SquareTower) -> Tensor:
        """Patches as the preprocessor would give them, to the bit, but in the order of the windows."""
        mean, std = (
            torch.tensor(values, device=self.device) * (1.0 / self.processor.rescale_factor)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        patches_NLP = cut_patches(pixels_NHWC, square.grid, self.processor.temporal_patch_size)
        by_channel = patches_NLP.view(*patches_NLP.shape[:2], len(mean), -1)
        normalised: Tensor = (by_channel - mean[:, None]).div_(std[:, None])
        return normalised.flatten(2)

    def _fits(self, pixels_NHWC: Tensor, features_NTD: Tensor, largest_N: Tensor) -> bool:
        """Encode one batch into its place; False where the GPU's memory does not suffice."""
        try:
            features = self.forward(pixels_NHWC.to(self.device, non_blocking=True))
            features_NTD.copy_(features.to(features_NTD.dtype), non_blocking=True)
            largest_N.copy_(features.abs().amax(dim=(1, 2)), non_blocking=True)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            # The memory is free only when the exception, which holds every tensor of the pass, is gone.
            return False
        return True

    def _halve(self, tried: int) -> str:
        torch.cuda.empty_cache()
        if tried == 1:
            raise InputError(
                f"{self.config.name}: out of GPU memory on {self.device} with a single image; {_MAKE_ROOM}, or lower "
                "features.encoder.image_size"
            )
        self.batch = tried // 2
        note = f"out of GPU memory with {tried} images at once: going on with {self.batch}; nothing is lost"
        _logger.warning(note)
        return note

    def _batch(self, size: int) -> int:
        patches: int = (size // self.model.config.patch_size) ** 2
        at_once = PATCHES_A_BATCH.get(self.device.type, PATCHES_A_BATCH["cpu"])
        return max(1, min(LARGEST_BATCH, at_once // patches))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice, for torch's own tensors or for what the driver and its libraries need."""
    told = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def _recorded_event() -> torch.cuda.Event:
    """Told when the device has done all that it was given so far; who waits for it leaves the CPU to others."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


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
    with quiet_transformers():
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
