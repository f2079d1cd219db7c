"""The vision tower's forward for square images of one size: the numbers of transformers' own, in far fewer steps.

transformers cuts the tokens into windows in a Python loop, in every layer. Where windows tile equal squares exactly, a
window is a reshape and attention one call a layer; what depends on the size alone is computed once.

N images, L patches of an image in window order, T tokens (L / merge²), C channels of the tower, H heads of E channels,
D dim of a feature, P values of a patch.
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
    """How a square image falls into windows: patches a side of the image, of a window, and of a token."""

    side: int
    window: int
    merge: int


def window_grid(config: Any, image_size: int) -> WindowGrid | None:
    """The grid of an image of so many pixels a side, or None where its windows are not all alike."""
    side, merge = image_size // config.patch_size, config.spatial_merge_size
    # Whole tokens to a window, as the tower counts them; an image smaller than a window is one.
    window = config.window_size // config.patch_size // merge * merge
    return None if side % window and side > window else WindowGrid(side, min(side, window), merge)


class SquareTower:
    """The forward of a loaded tower for square images of one size.

    On the CPU in float32 the features are transformers' own to the bit. Elsewhere three steps are replaced by equals up
    to rounding: the patches' convolution, the norms, and MLPs that `align_mlp` has padded.
    """

    def __init__(self, model: Qwen2_5_VisionTransformerPretrainedModel, grid: WindowGrid) -> None:
        self.model, self.grid = model, grid
        weight = model.patch_embed.proj.weight
        self.exact = is_exact(weight.device, weight.dtype)
        across, tokens, merge = grid.side // grid.window, grid.window // grid.merge, grid.merge
        row_GG = torch.arange(grid.side)[:, None].expand(grid.side, grid.side)
        row_L, column_L = (
            place_GG.reshape(2 * (across, tokens, merge)).permute(0, 3, 1, 4, 2, 5).flatten()
            for place_GG in (row_GG, row_GG.T)
        )
        numbers_T = (row_L // merge * across * tokens + column_L // merge)[:: merge**2]
        self.rows_T = numbers_T.argsort().to(weight.device)
        # Cosine and sine of the rotary embedding: float32 [L, 1, 1, E / 2], the other half of E being the same.
        rotary, places_L21 = model.rotary_pos_emb, torch.stack([row_L, column_L], dim=1)[..., None].to(weight.device)
        angles_LE = (places_L21.float() * rotary.inv_freq.to(weight.device, torch.float)).flatten(1)[:, None, None]
        self.cos_LE, self.sin_LE = (turn * rotary.attention_scaling for turn in (angles_LE.cos(), angles_LE.sin()))

    def __call__(self, patches_NLP: Tensor) -> Tensor:
        """Normalised patches, as `cut_patches` orders them, to features [N, T, D], tokens row by row of the grid."""
        embed, merger = self.model.patch_embed, self.model.merger
        patches = patches_NLP.to(embed.proj.weight.dtype)
        embedded = embed(patches) if self.exact else F.linear(patches, embed.proj.weight.flatten(1))
        hidden_NLC = embedded.view(*patches.shape[:2], -1)
        for number, block in enumerate(self.model.blocks):
            full = number in self.model.config.fullatt_block_indexes
            windows = 1 if full else (self.grid.side // self.grid.window) ** 2
            hidden_NLC = hidden_NLC + self._attend(block.attn, self._norm(block.norm1, hidden_NLC), windows)
            hidden_NLC = hidden_NLC + block.mlp(self._norm(block.norm2, hidden_NLC))
        merged: Tensor = merger.mlp(self._norm(merger.ln_q, hidden_NLC).view(-1, merger.hidden_size))
        return merged.view(len(patches_NLP), -1, merged.shape[-1])[:, self.rows_T]

    def _norm(self, norm: Any, hidden_NLC: Tensor) -> Tensor:
        if not self.exact:
            return F.rms_norm(hidden_NLC, norm.weight.shape, norm.weight, norm.variance_epsilon)
        normed: Tensor = norm(hidden_NLC)
        return normed

    def _attend(self, attention: Any, hidden_NLC: Tensor, windows: int) -> Tensor:
        images, length, channels = hidden_NLC.shape
        qkv_NL3HE = attention.qkv(hidden_NLC).view(images, length, 3, attention.num_heads, -1)
        query_key_NL2HE = _rotate(qkv_NL3HE[:, :, :2], self.cos_LE, self.sin_LE)
        query, key, value = (
            x_NLHE.reshape(images * windows, length // windows, *x_NLHE.shape[2:]).transpose(1, 2)
            for x_NLHE in (*query_key_NL2HE.unbind(2), qkv_NL3HE[:, :, 2])
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        projected: Tensor = attention.proj(mixed.transpose(1, 2).reshape(images, length, channels))
        return projected


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether every step is one that transformers takes."""
    return device.type == "cpu" and dtype == torch.float32


def cut_patches(pixels_NHWC: Tensor, grid: WindowGrid, temporal: int) -> Tensor:
    """Cut images into patches [N, L, P] in the order of their windows; a patch is `temporal` equal frames.

    P is as the tower's convolution sees a patch: channel, frame, row, column.
    """
    images, tokens = len(pixels_NHWC), grid.window // grid.merge
    across, patch = grid.side // grid.window, pixels_NHWC.shape[1] // grid.side
    pieces = pixels_NHWC.view(images, *2 * (across, tokens, grid.merge, patch), -1)
    # Windows, then the window's tokens, then the token's patches, then the patch.
    pieces = pieces.permute(0, 1, 5, 2, 6, 3, 7, 9, 4, 8).unsqueeze(8)
    return pieces.expand(*pieces.shape[:8], temporal, -1, -1).reshape(images, grid.side**2, -1)


@torch.no_grad()
def align_mlp(model: Qwen2_5_VisionTransformerPretrainedModel) -> None:
    """Widen the MLPs with zeros, so that a GPU multiplies their matrices at full speed."""
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
