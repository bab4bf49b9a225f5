"""Numbers in E4M3 (1 sign, 4 exponent, 3 mantissa bits) with a scale for every tile, DeepSeek-V3 §3.3.2.

    value = data · scale,      scale = max|tile| / 448,      448 the largest number of E4M3

A tile is 128 numbers along the dimension over which a product sums, for activations and gradients, and 128 × 128 numbers of a
weight. Scales are taken from the numbers at hand, never from an earlier step. What does not fill its last tile is as if padded by
zeros. Rounding to E4M3 is to the nearest, an error of at most 1/16 of a number, until a number is below 2⁻⁶ of its scale (the
subnormals), where it is at most 2⁻¹⁰ of the scale.

**Powers of two.** A tile's scale may be rounded up to one. That costs nothing in precision, since numbers are floating, at most a
factor of two in range, and makes quantising again, along the other dimension, exact: mantissas stay what they are. So everything
that is kept in rows and needed in columns has such scales.

These functions are the definition, in plain PyTorch; kernels must give the same bits.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fp8 import TILE

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
TINY = 2.0**-100  # of a tile's largest magnitude: below, a scale would leave fp32's normal numbers


class Quantized(NamedTuple):
    """A tensor in E4M3. Its last dimension is the one over which a product sums."""

    data: Tensor  # [..., M, K] float8_e4m3fn, contiguous
    scale: Tensor  # fp32: [..., M, ⌈K/128⌉] of rows and columns, [..., ⌈M/128⌉, ⌈K/128⌉] of blocks


def quantize_rows(x: Tensor, power_of_two: bool = False) -> Quantized:
    """Tiles of 1 × 128: x [..., K] → data [..., K], scale [..., ⌈K/128⌉]."""
    tiles = _padded(x.float(), 1).unflatten(-1, (-1, TILE))  # [..., ⌈K/128⌉, 128]
    scale = scale_of(tiles.abs().amax(-1), power_of_two)
    data = (tiles / scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]
    return Quantized(data.to(E4M3).contiguous(), scale)


def quantize_columns(x: Tensor, counts: Tensor | None = None, power_of_two: bool = False) -> Quantized:
    """Tiles of 128 × 1, transposed, so that a product can sum over the rows of x.

    Args:
        x: [M, K].
        counts: [E] rows of each group, summing to M. No tile holds rows of two groups: each begins a tile of its own.
        power_of_two: round scales up to powers of two.

    Returns:
        data [K, P], scale [K, P/128]; P as of `padded_rows`, with zeros between the groups and behind them.
    """
    return quantize_rows(_spread(x.float(), counts).T, power_of_two)


def requantize_columns(rows: Quantized, counts: Tensor | None = None) -> Quantized:
    """`quantize_columns`, with powers of two, of what `quantize_rows` made with powers of two.

    Exact but for numbers so far below the largest of their new tile that they become subnormal.
    """
    return quantize_columns(dequantize(rows), counts, power_of_two=True)


def quantize_blocks(weight: Tensor) -> Quantized:
    """Tiles of 128 × 128: weight [..., N, K] → data [..., N, K], scale [..., ⌈N/128⌉, ⌈K/128⌉]."""
    n, k = weight.shape[-2:]
    tiles = _padded(weight.float(), 2).unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # [..., n, 128, k, 128]
    scale = scale_of(tiles.abs().amax((-1, -3)), power_of_two=False)
    data = (tiles / scale.unsqueeze(-1).unsqueeze(-3)).flatten(-2).flatten(-3, -2)[..., :n, :k]
    return Quantized(data.to(E4M3).contiguous(), scale)


def transpose_blocks(weight: Quantized) -> Quantized:
    """The transposed matrix, exactly: a square tile stays one."""
    return Quantized(weight.data.mT.contiguous(), weight.scale.mT.contiguous())


def dequantize(x: Quantized) -> Tensor:
    """data · scale in fp32, of rows, columns or blocks, which the sizes of scales tell apart."""
    values = _padded(_to_float(x.data), 1).unflatten(-1, (-1, TILE))  # [..., M, ⌈K/128⌉, 128]
    scale = x.scale
    if scale.shape[-2] != x.data.shape[-2]:
        scale = scale.repeat_interleave(TILE, -2)[..., : x.data.shape[-2], :]
    return values.mul_(scale.unsqueeze(-1)).flatten(-2)[..., : x.data.shape[-1]]


def scale_of(largest: Tensor, power_of_two: bool) -> Tensor:
    """The scale of tiles from their largest magnitudes, fp32; NaN and infinity stay."""
    scale = largest.clamp_min(TINY) / LARGEST
    if power_of_two:  # round the exponent up wherever there is a mantissa
        bits = scale.view(torch.int32)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        scale = torch.where(scale.isfinite(), rounded, scale)
    return scale


def padded_rows(rows: int, groups: int | None = None) -> int:
    """P: room for the rows of every group in whole tiles, whatever their sizes; known without asking the device for these."""
    return -(-rows // TILE) * TILE if groups is None else (rows // TILE + groups) * TILE


def padded_ends(counts: Tensor) -> Tensor:
    """Where each group ends in the padded order of `quantize_columns`. [E] → [E] int64."""
    return ((counts + TILE - 1) // TILE * TILE).cumsum(0)


def _spread(x: Tensor, counts: Tensor | None) -> Tensor:
    """x [M, K] with zeros behind each group, [P, K]."""
    padded = x.new_zeros(padded_rows(len(x), None if counts is None else len(counts)), x.shape[1])
    if counts is None:
        padded[: len(x)] = x
        return padded
    shift = (
        padded_ends(counts) - (counts + TILE - 1) // TILE * TILE - (counts.cumsum(0) - counts)
    )  # of each group's rows
    place = torch.arange(len(x), device=x.device) + shift.repeat_interleave(counts, output_size=len(x))
    return padded.index_copy_(0, place, x)


def _padded(x: Tensor, dims: int) -> Tensor:
    """Zeros up to whole tiles in the last dimensions."""
    missing = [(-size) % TILE for size in reversed(x.shape[-dims:])]
    return F.pad(x, [p for size in missing for p in (0, size)]) if any(missing) else x


def _to_float(data: Tensor) -> Tensor:
    """E4M3 to fp32; on a CPU by a table, which takes a third of PyTorch's time for it."""
    if data.device.type != "cpu":
        return data.float()
    bits = data.view(torch.uint8).flatten().to(torch.int32)
    return _values().index_select(0, bits).view(data.shape)


@cache
def _values() -> Tensor:
    """The 256 numbers of E4M3."""
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float()
