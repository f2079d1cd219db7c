"""The vision tower's forward for square images of one size: the numbers of transformers' own, in far fewer steps.

transformers takes images of any sizes at once, so it cuts the tokens into windows in a Python loop, in every layer.
Where all images are equal squares that windows tile exactly, a window is a reshape and attention one call a layer. Such
an image comes in already in the order of its windows; what depends on the size alone is computed once.

Shapes: N images, L patches of an image in window order, T tokens (L / merge²), C channels of the tower, H heads of E
channels, D dim of a feature, P values of a patch.

Needs torch and transformers, no ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

ALIGNMENT = 64
"""What a GPU's matrix units like a width to be a multiple of; the published 3420 is not even one of 8."""


@dataclass(frozen=True)
class WindowGrid:
    """How one square image falls into windows.

    Attributes:
        side: patches a side of the image.
        window: patches a side of a window; `side` where the image is smaller than one.
        merge: patches a side of a token.
    """

    side: int
    window: int
    merge: int

    @property
    def windows(self) -> int:
        """How many windows the image has."""
        return (self.side // self.window) ** 2


def window_grid(config: Any, image_size: int) -> WindowGrid | None:
    """The grid of an image, or None where its windows are not all alike.

    Args:
        config: the tower's.
        image_size: pixels a side, a whole number of tokens.
    """
    side = image_size // config.patch_size
    # Whole tokens to a window, as the tower counts them.
    window = config.window_size // config.patch_size // config.spatial_merge_size * config.spatial_merge_size
    if side % window and side > window:
        return None
    return WindowGrid(side, min(side, window), config.spatial_merge_size)


class SquareTower:
    """The forward of a loaded tower for square images of one size.

    On the CPU in float32 every step is one that transformers takes too, and the features are the same bits. Elsewhere
    three steps are replaced by equals up to rounding: the patches' convolution by a matrix product, the norms by
    torch's fused one, and `align_mlp` may have padded the MLPs.

    Args:
        model: the tower, on its device and in its dtype.
        grid: of the images.
    """

    def __init__(self, model: Qwen2_5_VisionTransformerPretrainedModel, grid: WindowGrid) -> None:
        self.model = model
        self.grid = grid
        weight = model.patch_embed.proj.weight
        self.exact = is_exact(weight.device, weight.dtype)
        self.full_attention = frozenset(model.config.fullatt_block_indexes)
        self.cos_LE, self.sin_LE = self._rotations(weight.device)
        self.rows_T = _token_order(grid).argsort().to(weight.device)

    def __call__(self, patches_NLP: Tensor) -> Tensor:
        """Features of images.

        Args:
            patches_NLP: [N, L, P], normalised, as `cut_patches` orders them.

        Returns:
            [N, T, D] in the tower's dtype; tokens in row-major order of the image's grid.
        """
        hidden_NLC = self._embed(patches_NLP)
        for number, block in enumerate(self.model.blocks):
            windows = 1 if number in self.full_attention else self.grid.windows
            hidden_NLC = hidden_NLC + self._attend(block.attn, self._norm(block.norm1, hidden_NLC), windows)
            hidden_NLC = hidden_NLC + block.mlp(self._norm(block.norm2, hidden_NLC))
        merger = self.model.merger
        merged: Tensor = merger.mlp(self._norm(merger.ln_q, hidden_NLC).view(-1, merger.hidden_size))
        return merged.view(len(patches_NLP), -1, merged.shape[-1])[:, self.rows_T]

    def _embed(self, patches_NLP: Tensor) -> Tensor:
        embed = self.model.patch_embed
        patches = patches_NLP.to(embed.proj.weight.dtype)
        embedded = embed(patches) if self.exact else F.linear(patches, embed.proj.weight.flatten(1))
        return embedded.view(*patches.shape[:2], -1)

    def _norm(self, norm: Any, hidden_NLC: Tensor) -> Tensor:
        if self.exact:
            normed: Tensor = norm(hidden_NLC)
            return normed
        return F.rms_norm(hidden_NLC, norm.weight.shape, norm.weight, norm.variance_epsilon)

    def _attend(self, attention: Any, hidden_NLC: Tensor, windows: int) -> Tensor:
        images, length, channels = hidden_NLC.shape
        qkv_NL3HE = attention.qkv(hidden_NLC).view(images, length, 3, attention.num_heads, -1)
        turned_NL2HE = _rotate(qkv_NL3HE[:, :, :2], self.cos_LE, self.sin_LE)

        def by_window(x_NLHE: Tensor) -> Tensor:
            return x_NLHE.reshape(images * windows, length // windows, *x_NLHE.shape[2:]).transpose(1, 2)

        query, key = by_window(turned_NL2HE[:, :, 0]), by_window(turned_NL2HE[:, :, 1])
        mixed = F.scaled_dot_product_attention(query, key, by_window(qkv_NL3HE[:, :, 2]), scale=attention.scaling)
        projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(images, length, channels))
        return projected

    def _rotations(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary embedding: float32 [L, 1, 1, E / 2], the other half of E being the same."""
        side = self.grid.side
        rows = torch.arange(side)[:, None].expand(side, side)
        places_L2 = torch.stack([_by_token(place, self.grid).flatten() for place in (rows, rows.T)], dim=1)
        order = _token_order(self.grid)
        places_L2 = places_L2.view(len(order), -1, 2)[order].view(-1, 2).to(device)
        rotary = self.model.rotary_pos_emb
        angles_LE = (places_L2[..., None].float() * rotary.inv_freq.to(device, torch.float)).flatten(1)[:, None, None]
        return angles_LE.cos() * rotary.attention_scaling, angles_LE.sin() * rotary.attention_scaling


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the forward takes no step that transformers does not take, rather than the quicker equal ones."""
    return device.type == "cpu" and dtype == torch.float32


def cut_patches(pixels_NHWC: Tensor, grid: WindowGrid, temporal: int) -> Tensor:
    """Cut images into patches, in the order of the windows that they fall into.

    Args:
        pixels_NHWC: [N, H, W, 3].
        grid: of the images.
        temporal: frames a patch has; a still image is that many equal ones.

    Returns:
        [N, L, P], P as the tower's convolution sees a patch: channel, frame, row, column.
    """
    images, tokens = len(pixels_NHWC), grid.window // grid.merge
    across, patch = grid.side // grid.window, pixels_NHWC.shape[1] // grid.side
    pieces = pixels_NHWC.view(images, *2 * (across, tokens, grid.merge, patch), -1)
    # Windows, then the window's tokens, then the token's patches, then the patch.
    pieces = pieces.permute(0, 1, 5, 2, 6, 3, 7, 9, 4, 8).unsqueeze(8)
    return pieces.expand(*pieces.shape[:8], temporal, -1, -1).reshape(images, grid.side**2, -1)


@torch.no_grad()
def align_mlp(model: Qwen2_5_VisionTransformerPretrainedModel) -> None:
    """Widen the MLPs with zeros, so that a GPU multiplies their matrices at full speed; they compute what they did."""
    for block in model.blocks:
        mlp = block.mlp
        missing = -mlp.gate_proj.out_features % ALIGNMENT
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(F.pad(linear.weight, (0, 0, 0, missing)), requires_grad=False)
            linear.bias = torch.nn.Parameter(F.pad(linear.bias, (0, missing)), requires_grad=False)
            linear.out_features += missing
        down = mlp.down_proj
        down.weight = torch.nn.Parameter(F.pad(down.weight, (0, missing)), requires_grad=False)
        down.in_features += missing


def _rotate(x_NL2HE: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    """Turn each pair of channels (e, e + E / 2) by its angle, in float32."""
    first, second = x_NL2HE.chunk(2, dim=-1)
    turned_NL2HE = torch.empty(x_NL2HE.shape, dtype=x_NL2HE.dtype, device=x_NL2HE.device)
    into_first, into_second = turned_NL2HE.chunk(2, dim=-1)
    torch.sub(first * cos_LE, second * sin_LE, out=into_first)
    torch.add(second * cos_LE, first * sin_LE, out=into_second)
    return turned_NL2HE


def _by_token(x_GG: Tensor, grid: WindowGrid) -> Tensor:
    """[side, side] -> [T, merge²], as the tower lists patches."""
    across = grid.side // grid.merge
    return x_GG.reshape(across, grid.merge, across, grid.merge).transpose(1, 2).reshape(across**2, -1)


def _token_order(grid: WindowGrid) -> Tensor:
    """The row-major numbers of an image's tokens, [T], in the order of the windows."""
    across, tokens = grid.side // grid.window, grid.window // grid.merge
    numbers = torch.arange((across * tokens) ** 2).view(across, tokens, across, tokens)
    return numbers.transpose(1, 2).flatten()
