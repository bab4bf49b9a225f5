# mypy: disallow-untyped-defs=False
"""Quantisation in Triton, to the bits of `model.ops.fp8.quantize`.

A program takes a tile of at most 128 × 128 numbers into registers and writes everything that is made of it, so that each tensor is
read once and each result written once; what bounds it is memory. Tiles side by side belong to neighbouring programs. Rows, and the
sizes of groups, change from step to step: no kernel is compiled for a number of them, and the host is not asked for the latter.

**The largest magnitude** is taken of bits as integers, which order like the magnitudes and put NaN above infinity; a maximum of
floats would drop NaN.

**Division.** One division of fp32 is some fourteen instructions and a branch, too many for every number at the speed of memory.
But a tile divides by one number: with y = RN(1/b), rounded once, q = RN(a·y) and RN(q − (q·b − a)·y) are three instructions
(Markstein 1990). Before the last rounding that is within 3·2⁻²⁵ units in the last place of a/b. It gives the same bits for all a in
bf16 or fp16 and b such a number by 448, which were counted out, and for all of 8·10⁷ random pairs of fp32. It takes residuals that
do not underflow, b > 2⁻⁹³; below, where tiles are nearly zero, a tie may be told wrong.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.ops.fp8.quantize import E4M3, LARGEST, TILE, TINY, Quantized, padded_rows

SIDE = tl.constexpr(TILE)
LARGEST_NUMBER = tl.constexpr(LARGEST)
PER_LARGEST = tl.constexpr(torch.tensor(1 / LARGEST).item())
SMALLEST_BITS = tl.constexpr(torch.tensor(TINY).view(torch.int32).item())
INFINITY_BITS = tl.constexpr(0x7F800000)  # and the bits of an exponent
MANTISSA_BITS = tl.constexpr(0x7FFFFF)
PIECE = tl.constexpr(8)  # numbers side by side that a thread has: with 16, it would compute the scales of 16 columns
LOW = 32  # rows of a tile of which no columns are made: small tiles hide each other's waiting
TWO = {
    "num_warps": 16,
    "maxnreg": 64,
}  # programs on a multiprocessor, by its 65,536 registers: while one computes, another waits
THREE = {"num_warps": 8, "maxnreg": 80}
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def quantize_rows(x: Tensor, power_of_two: bool) -> Quantized:
    """x [M, K] → rows."""
    x = unit_stride(x)
    rows = empty_rows(x)
    _quantize[(triton.cdiv(len(x), LOW) * rows.scale.shape[1],)](
        x, *rows, None, None, *x.shape, x.stride(0), power_of_two, HEIGHT=LOW, num_warps=4
    )
    return rows


def quantize_columns(x: Tensor) -> Quantized:
    """x [M, K] → columns."""
    x = unit_stride(x)
    columns = empty_columns(x)
    _quantize[(columns.scale.shape[1] * triton.cdiv(x.shape[1], TILE),)](
        x, None, None, *columns, *x.shape, x.stride(0), False, HEIGHT=TILE, **TWO
    )
    return columns


def quantize_rows_and_columns(x: Tensor) -> tuple[Quantized, Quantized]:
    """x [M, K] → both."""
    x = unit_stride(x)
    rows, columns = empty_rows(x), empty_columns(x)
    _quantize[(columns.scale.shape[1] * rows.scale.shape[1],)](
        x, *rows, *columns, *x.shape, x.stride(0), False, HEIGHT=TILE, **TWO
    )
    return rows, columns


def requantize_columns(rows: Quantized, counts: Tensor | None) -> Quantized:
    """Rows [M, K] with powers of two, in groups of `counts` → columns with powers of two."""
    columns = empty_columns(rows.data, counts)
    tiles = columns.scale.shape[1]
    places = None if counts is None else tile_places(counts, tiles)
    _requantize[(tiles * rows.scale.shape[1],)](*rows, *columns, places, *rows.data.shape, tiles, **THREE)
    return columns


def quantize_blocks(weight: Tensor, compute_dtype: torch.dtype, transpose: bool) -> Quantized:
    """Blocks of weight [..., N, K] in the compute dtype, or of its transpose."""
    *batch, n, k = weight.shape
    weights = unit_stride(weight.reshape(-1, n, k))
    shape = (k, n) if transpose else (n, k)
    data = torch.empty(*batch, *shape, dtype=E4M3, device=weight.device)
    scale = data.new_empty(*batch, *(triton.cdiv(size, TILE) for size in shape), dtype=torch.float32)
    _quantize_blocks[(scale.numel(),)](
        weights, data, scale, n, k, weights.stride(0), weights.stride(1), TYPES[compute_dtype], transpose, **THREE
    )
    return Quantized(data, scale)


def tile_places(counts: Tensor, tiles: int) -> Tensor:
    """Which rows each tile of columns holds. counts [E] → [tiles, 2] int32: the first row, and how many (or fewer than none)."""
    places = torch.empty(tiles, 2, dtype=torch.int32, device=counts.device)
    _find_places[(tiles,)](counts, places, len(counts), triton.next_power_of_2(len(counts)), num_warps=1)
    return places


def unit_stride(x: Tensor) -> Tensor:
    """x with its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows(like: Tensor) -> Quantized:
    """Room for the rows of a matrix."""
    data = torch.empty(like.shape, dtype=E4M3, device=like.device)
    return Quantized(data, data.new_empty(len(like), triton.cdiv(like.shape[1], TILE), dtype=torch.float32))


def empty_columns(like: Tensor, counts: Tensor | None = None) -> Quantized:
    """Room for the columns of a matrix in groups of `counts`."""
    p = padded_rows(len(like), None if counts is None else len(counts))
    data = torch.empty(like.shape[1], p, dtype=E4M3, device=like.device)
    return Quantized(data, data.new_empty(like.shape[1], p // TILE, dtype=torch.float32))


@triton.jit(do_not_specialize=["M"])
def _quantize(
    x, rows, rows_scale, columns, columns_scale, M, K, stride, POWER_OF_TWO: tl.constexpr, HEIGHT: tl.constexpr
):  # fmt: skip
    """Reads a tile HEIGHT × 128 of x [M, K]; writes its rows, and its columns (HEIGHT 128), whichever are not None."""
    across = tl.cdiv(K, SIDE)
    row, tile = tl.program_id(0) // across * HEIGHT, tl.program_id(0) % across
    numbers = load_tile(x, row, tile * SIDE, M - row, K, stride, HEIGHT).to(tl.float32)
    if rows is not None:
        store_rows(numbers, rows, rows_scale, row, tile, M - row, K, POWER_OF_TWO, HEIGHT)
    if columns is not None:
        store_columns(numbers, columns, columns_scale, row // SIDE, tile, K, tl.cdiv(M, SIDE), POWER_OF_TWO)


@triton.jit(do_not_specialize=["M", "tiles"])
def _requantize(rows, rows_scale, columns, columns_scale, places, M, K, tiles):
    """Reads a tile 128 × 128 of rows, where `places` says or, if that is None, one below the other; writes its columns."""
    across = tl.cdiv(K, SIDE)
    place, tile = tl.program_id(0) // across, tl.program_id(0) % across
    row, left = rows_of_tile(places, place, M)
    numbers = load_values(rows, rows_scale, row, tile, left, K)
    store_columns(numbers, columns, columns_scale, place, tile, K, tiles, True)


@triton.jit
def _quantize_blocks(
    weight, data, scale, N, K, batch_stride, stride, COMPUTE: tl.constexpr, TRANSPOSE: tl.constexpr
):  # fmt: skip
    """Reads a tile 128 × 128 of one matrix [N, K]; writes it with one scale, as it lies or transposed."""
    down, across = tl.cdiv(N, SIDE), tl.cdiv(K, SIDE)
    matrix = (tl.program_id(0) // across // down).to(tl.int64)
    n, k = tl.program_id(0) // across % down, tl.program_id(0) % across
    numbers = load_tile(weight + matrix * batch_stride, n * SIDE, k * SIDE, N - n * SIDE, K, stride, SIDE)
    numbers = numbers.to(COMPUTE).to(tl.float32)
    factor = scale_of(tl.max(magnitude_bits(numbers), 1), 0, False)
    encoded = encode(numbers, factor, False)
    if TRANSPOSE:
        store_tile(tl.trans(encoded), data + matrix * N * K, k * SIDE, n * SIDE, K - k * SIDE, N, N, SIDE)
        tl.store(scale + (matrix * across + k) * down + n, factor)
    else:
        store_tile(encoded, data + matrix * N * K, n * SIDE, k * SIDE, N - n * SIDE, K, K, SIDE)
        tl.store(scale + (matrix * down + n) * across + k, factor)


@triton.jit
def _find_places(counts, places, groups, WIDTH: tl.constexpr):
    """Reads all counts; writes the first row of one tile and the number of rows from there to the end of its group."""
    tile = tl.program_id(0)
    group = tl.arange(0, WIDTH)
    count = tl.load(counts + group, mask=group < groups, other=0).to(tl.int32)
    needed = (count + SIDE - 1) // SIDE
    passed = tl.cumsum(needed, 0) <= tile  # of the groups, those that end before this tile: the first ones
    inside = (tile - tl.sum(tl.where(passed, needed, 0), 0)) * SIDE
    own = tl.sum(tl.where(group == tl.sum(passed.to(tl.int32), 0), count, 0), 0)
    tl.store(places + 2 * tile, tl.sum(tl.where(passed, count, 0), 0) + inside)
    tl.store(places + 2 * tile + 1, own - inside)


@triton.jit
def rows_of_tile(places, place, M):
    """The first row of a tile, and how many rows there are from it to the end of its group."""
    if places is None:
        row = place * SIDE
        left = M - row
    else:
        row = tl.load(places + 2 * place)
        left = tl.load(places + 2 * place + 1)
    return row, left


@triton.jit
def load_tile(x, row, column, left, K, stride, HEIGHT: tl.constexpr):
    """x [row : row + HEIGHT, column : column + 128], zero from `left` rows and from K columns on."""
    r, k = tl.arange(0, HEIGHT)[:, None], tl.max_contiguous(tl.arange(0, SIDE), PIECE)[None, :]
    tile = x + row.to(tl.int64) * stride + column
    return tl.load(tile + r * stride + k, mask=(r < left) & (column + k < K), other=0.0)


@triton.jit
def load_values(data, scale, row, tile, left, K):
    """`dequantize` of a tile 128 × 128 of rows."""
    r = tl.arange(0, SIDE)
    across = tl.cdiv(K, SIDE)
    factor = tl.load(scale + row.to(tl.int64) * across + tile + r * across, mask=r < left, other=0.0)
    return load_tile(data, row, tile * SIDE, left, K, K, SIDE).to(tl.float32) * factor[:, None]


@triton.jit
def store_tile(numbers, data, row, column, left, K, stride, HEIGHT: tl.constexpr):
    """The converse of `load_tile`."""
    r, k = tl.arange(0, HEIGHT)[:, None], tl.max_contiguous(tl.arange(0, SIDE), PIECE)[None, :]
    tile = data + row.to(tl.int64) * stride + column
    tl.store(tile + r * stride + k, numbers, mask=(r < left) & (column + k < K))


@triton.jit
def store_rows(
    numbers, data, scale, row, tile, left, K, POWER_OF_TWO: tl.constexpr, HEIGHT: tl.constexpr
):  # fmt: skip
    """numbers [HEIGHT, 128] fp32 as tiles 1 × 128."""
    factor = scale_of(magnitude_bits(numbers), 1, POWER_OF_TWO)
    store_tile(encode(numbers, factor[:, None], POWER_OF_TWO), data, row, tile * SIDE, left, K, K, HEIGHT)
    r = tl.arange(0, HEIGHT)
    across = tl.cdiv(K, SIDE)
    tl.store(scale + row.to(tl.int64) * across + tile + r * across, factor, mask=r < left)


@triton.jit
def store_columns(numbers, data, scale, place, tile, K, tiles, POWER_OF_TWO: tl.constexpr):
    """numbers [128, 128] fp32 as tiles 128 × 1, transposed; the tile of rows `place` of `tiles`."""
    factor = scale_of(magnitude_bits(numbers), 0, POWER_OF_TWO)
    encoded = tl.trans(encode(numbers, factor[None, :], POWER_OF_TWO))
    p = tiles * SIDE  # so that the compiler sees how it is aligned
    store_tile(encoded, data, tile * SIDE, place * SIDE, K - tile * SIDE, p, p, SIDE)
    k = tile * SIDE + tl.arange(0, SIDE)
    tl.store(scale + k.to(tl.int64) * tiles + place, factor, mask=k < K)


@triton.jit
def magnitude_bits(x):
    """|x|, fp32, as integers in the same order, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(bits, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scales of tiles along AXIS from the bits of magnitudes: RN(largest / 448), by one step of Markstein's."""
    largest = tl.maximum(tl.max(bits, AXIS), SMALLEST_BITS)
    finite = largest < INFINITY_BITS
    largest = largest.to(tl.float32, bitcast=True)
    scale = largest * PER_LARGEST
    scale = tl.fma(tl.fma(scale, -LARGEST_NUMBER, largest), PER_LARGEST, scale)
    if POWER_OF_TWO:  # round the exponent up wherever there is a mantissa
        rounded = (scale.to(tl.int32, bitcast=True) + MANTISSA_BITS) & INFINITY_BITS
        scale = rounded.to(tl.float32, bitcast=True)
    return tl.where(finite, scale, largest)


@triton.jit
def encode(x, scale, POWER_OF_TWO: tl.constexpr):
    return divide(x, scale, POWER_OF_TWO).to(tl.float8e4nv)


@triton.jit
def divide(x, scale, POWER_OF_TWO: tl.constexpr):
    """RN(x / scale), fp32. A scale that is not finite leaves zeros and NaN, as division does."""
    divisor = tl.where(scale < float("inf"), scale, 0.0)
    inverse = tl.rsqrt(scale) * tl.rsqrt(scale)  # to 2⁻²¹, then by Newton's steps to the nearest number
    inverse = tl.fma(tl.fma(inverse, -divisor, 1.0), inverse, inverse)
    inverse = tl.fma(tl.fma(inverse, -divisor, 1.0), inverse, inverse)
    quotient = x * inverse
    if not POWER_OF_TWO:
        # The residual is q·b − x: with this sign −0 stays what it is. Triton takes −x for 0 − x, another number where x is 0.
        minus_x, minus_inverse = x * -1.0, inverse * -1.0
        quotient = tl.fma(tl.fma(quotient, divisor, minus_x), minus_inverse, quotient)
    return quotient
