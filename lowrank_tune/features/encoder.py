"""The Qwen2.5-VL vision tower on a device: pixels -> features, without ray. N images, H = W pixels, T tokens, D dim."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from lowrank_tune.errors import InputError
from lowrank_tune.features.checkpoint import CheckpointConfig, TowerFiles
from lowrank_tune.features.tiny import quiet_transformers
from lowrank_tune.features.window_attention import (
    SquareTower,
    WindowGrid,
    align_mlp,
    cut_patches,
    is_exact,
    window_grid,
)
from lowrank_tune.lowrank.device import is_out_of_memory

PATCHES_A_BATCH = {"cuda": 32 * 1024, "cpu": 4 * 1024}
"""Where no batch size is given: 32 images of 448 pixels a side fill a GPU, 4 the caches of a CPU."""
LARGEST_BATCH = 64

_MAKE_ROOM = "free the GPU of other programs (nvidia-smi lists them)"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoding:
    """Features on their way from the device, not to be read before `wait`."""

    features_NTD: Tensor  # in the dtype asked for, on the CPU
    largest_N: Tensor  # each image's largest magnitude in the compute dtype, NaN where it has one
    notes: tuple[str, ...]  # what a user should know of how it went
    arrived: torch.cuda.Event | None  # told by the device once it has copied everything; None where it has already

    def wait(self) -> Encoding:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


class Encoder:
    """A vision tower on a device; threads may share it.

    Images whose windows are alike (sides of 448 pixels and other multiples of the window's) go through `SquareTower`,
    others through transformers' own forward. `batch` images are encoded at once, what fills the device where it is
    None, and half as many each time that a GPU's memory does not suffice; another number may bring other matrix
    kernels, and their rounding.

    Raises:
        InputError: the files do not hold exactly the tower's tensors, or the GPU has no room for them.
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
        dtype = getattr(torch, compute_dtype)
        self.model = _load_tower(config, tower, dtype)
        said = config.preprocessor
        try:
            self.model.to(self.device)
            # Of bytes, as transformers' own preprocessor has them: mean and deviation take its rescaling in.
            self._mean_C, self._std_C = (
                torch.tensor(values, device=self.device) * (1.0 / (said.get("rescale_factor") or 1 / 255))
                for values in (said.get("image_mean") or OPENAI_CLIP_MEAN, said.get("image_std") or OPENAI_CLIP_STD)
            )
            if not is_exact(self.device, dtype):
                align_mlp(self.model)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"{config.name}: out of memory on {device} before the first image; {_MAKE_ROOM}, or take a GPU "
                "with more memory"
            ) from error
        self._squares: dict[int, SquareTower | None] = {}
        self._turn = threading.Lock()

    def encode(self, pixels_NHWC: npt.NDArray[np.uint8]) -> Tensor:
        """Encode images [N, H, W, 3] to [N, T, D] on the CPU, in the compute dtype, tokens row by row of the grid.

        Raises:
            InputError: the GPU's memory does not hold a single image.
        """
        return self.start(pixels_NHWC, self.model.dtype).wait().features_NTD

    @torch.inference_mode()
    def start(self, pixels_NHWC: npt.NDArray[np.uint8], dtype: torch.dtype) -> Encoding:
        """Give the device images to `encode`; a GPU works on while the caller does something else.

        Values beyond `dtype`, in which the features come, become infinite: look at `largest_N`.
        """
        on_gpu = self.device.type == "cuda"
        count, size = pixels_NHWC.shape[:2]
        patches = (size // self.model.config.patch_size) ** 2
        fitting = max(1, min(LARGEST_BATCH, PATCHES_A_BATCH[self.device.type] // patches))
        # Pinned memory is what a GPU can copy from and to while the CPU goes on.
        staged = torch.empty(pixels_NHWC.shape, dtype=torch.uint8, pin_memory=on_gpu)
        staged.numpy()[:] = pixels_NHWC
        features_NTD = torch.empty((count, *self.config.shape(size)), dtype=dtype, pin_memory=on_gpu)
        largest_N = torch.empty(count, pin_memory=on_gpu)
        notes: list[str] = []
        with self._turn:
            done = 0
            while done < count:
                batch = slice(done, min(count, done + (self.batch or fitting)))
                if self._fits(staged[batch], features_NTD[batch], largest_N[batch]):
                    done = batch.stop
                else:
                    notes.append(self._halve(batch.stop - done))
            arrived = None
            if on_gpu:  # who waits for a blocking event leaves the CPU to others
                arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                arrived.record()
        return Encoding(features_NTD, largest_N, tuple(notes), arrived)

    def forward(self, pixels_NHWC: Tensor) -> Tensor:
        """One pass: [N, H, W, 3] of uint8 -> [N, T, D] in the compute dtype, both on the device."""
        size = pixels_NHWC.shape[1]
        if size not in self._squares:
            grid = window_grid(self.model.config, size)
            self._squares[size] = SquareTower(self.model, grid) if grid else None
        square = self._squares[size]
        if square is None:
            return self.forward_as_stock(pixels_NHWC)
        return square(self.normalised_patches(pixels_NHWC, square.grid))

    def forward_as_stock(self, pixels_NHWC: Tensor) -> Tensor:
        """The same by transformers' own forward, for images of any size."""
        images, side = len(pixels_NHWC), pixels_NHWC.shape[1] // self.model.config.patch_size
        # transformers' own preprocessor gives the patches as if the image were one window.
        grid = WindowGrid(side, side, self.model.config.spatial_merge_size)
        patches = self.normalised_patches(pixels_NHWC, grid).flatten(0, 1)
        merged: Tensor = self.model(
            patches, grid_thw=torch.tensor([[1, side, side]] * images, device=self.device)
        ).pooler_output
        return merged.view(images, -1, merged.shape[-1])

    def normalised_patches(self, pixels_NHWC: Tensor, grid: WindowGrid) -> Tensor:
        """Patches as transformers' own preprocessor would give them, to the bit, but in the order of the windows."""
        patches_NLP = cut_patches(pixels_NHWC, grid, self.model.config.temporal_patch_size)
        by_channel = patches_NLP.view(*patches_NLP.shape[:2], len(self._mean_C), -1)
        normalised: Tensor = (by_channel - self._mean_C[:, None]).div_(self._std_C[:, None])
        return normalised.flatten(2)

    def _fits(self, pixels_NHWC: Tensor, features_NTD: Tensor, largest_N: Tensor) -> bool:
        """Encode one batch into its place; False where the GPU's memory does not suffice."""
        try:
            features = self.forward(pixels_NHWC.to(self.device, non_blocking=True))
            features_NTD.copy_(features.to(features_NTD.dtype), non_blocking=True)
            largest_N.copy_(features.abs().amax(dim=(1, 2)), non_blocking=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The memory is free only when the exception, which holds every tensor of the pass, is gone.
            return False
        return True

    def _halve(self, tried: int) -> str:
        torch.cuda.empty_cache()
        if tried == 1:
            raise InputError(
                f"{self.config.name}: out of memory on {self.device} with a single image; {_MAKE_ROOM}, or lower "
                "features.encoder.image_size"
            )
        self.batch = tried // 2
        note = f"out of memory with {tried} images at once: going on with {self.batch}; nothing is lost"
        logger.warning(note)
        return note


def check_tower(config: CheckpointConfig, tower: TowerFiles) -> None:
    """Compare names and shapes of the weights with the tower that the configuration describes; none is loaded.

    Raises:
        InputError: they are not the same, or there is no such tower.
    """
    found = tower.shapes()
    try:
        with torch.device("meta"), quiet_transformers():
            model = Qwen2_5_VisionTransformerPretrainedModel(_vision_config(config))
    except Exception as error:  # of any kind, by what the file holds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{config.name}: vision_config in config.json describes no tower ({reason})") from error
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{config.name}: {name} of the vision tower is {found.get(name, 'missing')} in the weights and "
                f"{wanted.get(name, 'unknown')} by config.json; take both from the same model"
            )


def _vision_config(config: CheckpointConfig) -> Qwen2_5_VLVisionConfig:
    # Other keys, a trainer's own or those of every model, have no part in the tower.
    known = Qwen2_5_VLVisionConfig.__annotations__.keys()
    return Qwen2_5_VLVisionConfig(**{key: value for key, value in config.vision.items() if key in known})


def _load_tower(
    config: CheckpointConfig, tower: TowerFiles, dtype: torch.dtype
) -> Qwen2_5_VisionTransformerPretrainedModel:
    check_tower(config, tower)
    tensors = {}
    for path, names in tower.files.items():
        with safe_open(path, framework="pt") as file:
            tensors.update({ours: file.get_tensor(theirs) for theirs, ours in names.items()})
    with quiet_transformers():
        return Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(
            None, config=_vision_config(config), state_dict=tensors, dtype=dtype, attn_implementation="sdpa"
        )
