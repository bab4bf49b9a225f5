# mypy: disallow-untyped-defs=False
"""The three matrix products of E4M3 in Triton, for Hopper: a bᵀ with a scale for every 128 numbers of the sum. DeepSeek-V3 §3.3.2.

    out[m, n] = Σ_k a_scale[m, k] · b_scale[n, k] · Σ_{i in tile k} a[m, i] · b[n, i]

The inner sum runs on tensor cores from zero, since they add E4M3 products with about 14 bits; it is scaled and added up by fp32
units ("promotion"), an FMA for each number of the output and tile. In the time that a tile of 128 × 128 × 128 takes tensor cores,
512 cycles, that is 128 cycles of every fp32 unit (256 where both scales are vectors), and it has to run beside them. Two ways:

| variant       | who overlaps                                                                                                   |
|---------------|----------------------------------------------------------------------------------------------------------------|
| `plain`       | several programs of a multiprocessor: one multiplies while the other promotes; or none, with tiles of 128 rows |
| `specialized` | one program: a warp loads, two groups of four warps take turns (the compiler splits it, `warp_specialize`)     |

Triton 3.7 cannot specialise `groups_by_blocks`, whose tiles depend on counts that it reads. Which variant is right and faster on
the GPU at hand is measured (`benchmarks/kernels.py`); how many stages is autotuned for each N and K and power of two of M, once for
all below 1,024, and remembered in Triton's cache.

Both factors come through the tensor memory accelerator, which fills with zeros what lies outside and wants rows in multiples of 16
bytes: others are padded by a copy. Programs are persistent: as many as fit on the GPU at once, each of which takes every n-th tile.
Neighbours in time work in a band of 8 tiles of rows, for the sake of the L2 cache.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from model.ops.fp8.products import IMPLEMENTATIONS, Products, in_columns
from model.ops.fp8.quantize import E4M3, Quantized

VECTOR = 16  # bytes, and numbers of E4M3
PLAIN, SPECIALIZED = "triton", "triton specialized"  # by these names in `IMPLEMENTATIONS`
PROGRAMS = {128: 1, 64: 3}  # that fit on a multiprocessor at once, by the rows of their tiles

_PLAIN = [
    triton.Config({"BLOCK_M": 128, "SPECIALIZE": False}, num_warps=8, num_stages=stages) for stages in (3, 4, 5)
] + [triton.Config({"BLOCK_M": 64, "SPECIALIZE": False}, num_warps=4, num_stages=3, maxnreg=168)]
_SPECIALIZED = [
    triton.Config({"BLOCK_M": 128, "SPECIALIZE": True}, num_warps=4, num_stages=stages) for stages in (3, 4, 5)
]


def multiply(a: Quantized, b: Quantized, dtype: torch.dtype, specialize: bool = False) -> Tensor:
    """a [M, K] in rows or columns times b [N, K] in blocks or columns → a bᵀ [M, N]."""
    if in_columns(b):
        return _multiply_columns(a, b, None, dtype, specialize)
    m, n = len(a.data), len(b.data)
    out = a.data.new_empty(m, n, dtype=dtype)
    if m:
        a, b = _whole_vectors(a), _whole_vectors(b)
        sizes = (m, n, a.data.shape[1], _bucket(m))
        _launch(rows_by_blocks, specialize, lambda rows: cdiv(m, rows) * cdiv(n, 128), (*a, *b, out), sizes)
    return out


def multiply_groups(a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Each group's rows of a [M, K] times its matrix of b, blocks [E, N, K] → [M, N]."""
    m, (e, n, _) = len(a.data), b.data.shape
    out = a.data.new_empty(m, n, dtype=dtype)
    if m:
        a, b = _whole_vectors(a), _whole_vectors(b)
        sizes = (m, n, a.data.shape[1], e, _bucket(m), triton.next_power_of_2(e))
        tiles = lambda rows: (m // rows + min(e, m)) * cdiv(n, 128)  # noqa: E731
        _launch(groups_by_blocks, False, tiles, (*a, *b, counts, out), sizes)
    return out


def multiply_within_groups(
    a: Quantized, b: Quantized, counts: Tensor, dtype: torch.dtype, specialize: bool = False
) -> Tensor:
    """a bᵀ over each group's columns apart: [N, P] and [K, P] → [E, N, K]; zero for a group without rows."""
    return _multiply_columns(a, b, counts, dtype, specialize)


def _multiply_columns(
    a: Quantized, b: Quantized, counts: Tensor | None, dtype: torch.dtype, specialize: bool
) -> Tensor:
    (n, p), k = a.data.shape, len(b.data)
    e = 1 if counts is None else len(counts)
    out = a.data.new_empty((n, k) if counts is None else (e, n, k), dtype=dtype)
    if p == 0:
        return out.zero_()
    a, b = _whole_vectors(a), _whole_vectors(b)
    sizes = (n, k, a.data.shape[1], e, _bucket(p), triton.next_power_of_2(e))
    tiles = lambda rows: e * cdiv(n, rows) * cdiv(k, 128)  # noqa: E731
    _launch(columns_by_columns, specialize, tiles, (*a, *b, counts, out), sizes)
    return out


def _bucket(rows: int) -> int:
    """Numbers of rows that are autotuned together; all small ones, so that a sample or a short batch finds it done."""
    return max(1024, triton.next_power_of_2(rows))


def _whole_vectors(x: Quantized) -> Quantized:
    """The same with zeros at the end of each row, so that rows are multiples of 16 bytes."""
    missing = -x.data.shape[-1] % VECTOR
    return Quantized(F.pad(x.data.view(torch.uint8), (0, missing)).view(E4M3), x.scale) if missing else x


def _launch(
    kernel: Any, specialize: bool, tiles: Callable[[int], int], tensors: Sequence[Any], sizes: Sequence[int]
) -> None:
    """Run a kernel. tiles: how many the output has, at most, where each has so many rows."""
    triton.set_allocator(_allocate)  # of this thread; the backward pass has its own
    multiprocessors = _multiprocessors(tensors[0].device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        rows = meta["BLOCK_M"]
        return (min(tiles(rows), multiprocessors * PROGRAMS[rows]),)

    _autotuned(kernel, specialize)[grid](*tensors, *sizes)


@cache
def _autotuned(kernel: Any, specialize: bool) -> Any:
    configs = _SPECIALIZED if specialize else _PLAIN
    return triton.autotune(configs, key=["N", "K", "bucket"], cache_results=True)(kernel)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Room for descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


IMPLEMENTATIONS[PLAIN] = Products(multiply, multiply_groups, multiply_within_groups)
IMPLEMENTATIONS[SPECIALIZED] = Products(
    partial(multiply, specialize=True), None, partial(multiply_within_groups, specialize=True)
)


@triton.jit
def tile_of(number, rows, columns, BAND: tl.constexpr):
    """Row and column of a tile by its number: a band of BAND rows after the other, each column by column."""
    band = number // (BAND * columns)
    inside = number % (BAND * columns)
    height = tl.minimum(rows - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@triton.jit
def sum_of_tiles(a, a_row, a_scale, b, b_row, b_scale, begin, end, BLOCK_M: tl.constexpr, B_IN_BLOCKS: tl.constexpr):
    """Σ over the tiles begin ≤ k < end, [BLOCK_M, 128] fp32.

    a, b: descriptors, of whose rows those from a_row and b_row on count. a_scale: pointers to the first scale of each row; b_scale
    likewise, or one pointer for all rows where B_IN_BLOCKS.
    """
    total = tl.zeros((BLOCK_M, 128), tl.float32)
    for k in range(begin, end):
        partial = tl.dot(a.load([a_row, k * 128]), b.load([b_row, k * 128]).T)
        if B_IN_BLOCKS:
            total += partial * (tl.load(a_scale + k) * tl.load(b_scale + k))[:, None]
        else:
            total += partial * tl.load(a_scale + k)[:, None] * tl.load(b_scale + k)[None, :]
    return total


@triton.jit(do_not_specialize=["M", "bucket"])
def rows_by_blocks(
    a, a_scale, b, b_scale, out, M, N, K, bucket, BLOCK_M: tl.constexpr, SPECIALIZE: tl.constexpr
):  # fmt: skip
    """a [M, K] in rows, b [N, K] in blocks → out [M, N]."""
    tiles, of_rows, of_columns = tl.cdiv(K, 128), tl.cdiv(M, BLOCK_M), tl.cdiv(N, 128)
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, 128])
    b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [128, 128])
    for number in tl.range(tl.program_id(0), of_rows * of_columns, tl.num_programs(0), warp_specialize=SPECIALIZE):
        i, j = tile_of(number, of_rows, of_columns, 8)
        rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * 128 + tl.arange(0, 128)
        a_scales = a_scale + tl.minimum(rows, M - 1).to(tl.int64) * tiles
        total = sum_of_tiles(
            a_tiles, i * BLOCK_M, a_scales, b_tiles, j * 128, b_scale + j * tiles, 0, tiles, BLOCK_M, True
        )
        place = out + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["M", "bucket"])
def groups_by_blocks(
    a, a_scale, b, b_scale, counts, out, M, N, K, E, bucket,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """a [M, K] in rows, `counts` [E] of each group; b [E, N, K] in blocks → out [M, N]. GROUPS ≥ E is a power of two."""
    tiles, of_columns = tl.cdiv(K, 128), tl.cdiv(N, 128)
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, 128])
    b_tiles = tl.make_tensor_descriptor(b, [E * N, K], [K, 1], [128, 128])
    groups = tl.arange(0, GROUPS)
    sizes = tl.load(counts + groups, mask=groups < E, other=0).to(tl.int32)
    heights = tl.cdiv(sizes, BLOCK_M)
    ends = tl.cumsum(heights, 0)  # in tiles of rows
    for number in tl.range(tl.program_id(0), tl.sum(heights) * of_columns, tl.num_programs(0)):
        group = tl.sum((ends <= number // of_columns).to(tl.int32))
        before = groups < group
        begin, height = tl.sum(tl.where(before, sizes, 0)), tl.sum(tl.where(groups == group, heights, 0))
        end = begin + tl.sum(tl.where(groups == group, sizes, 0))
        i, j = tile_of(number - tl.sum(tl.where(before, heights, 0)) * of_columns, height, of_columns, 8)
        first = begin + i * BLOCK_M
        rows, columns = first + tl.arange(0, BLOCK_M), j * 128 + tl.arange(0, 128)
        a_scales = a_scale + tl.minimum(rows, M - 1).to(tl.int64) * tiles
        b_scales = b_scale + (group * of_columns + j).to(tl.int64) * tiles
        total = sum_of_tiles(a_tiles, first, a_scales, b_tiles, group * N + j * 128, b_scales, 0, tiles, BLOCK_M, True)
        place = out + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["bucket"])
def columns_by_columns(
    a, a_scale, b, b_scale, counts, out, N, K, P, E, bucket,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """a [N, P] and b [K, P] in columns, those of each of the E groups in tiles of their own → out [E, N, K].

    Without counts the sum is over all of P.
    """
    tiles, of_rows, of_columns = tl.cdiv(P, 128), tl.cdiv(N, BLOCK_M), tl.cdiv(K, 128)
    a_tiles = tl.make_tensor_descriptor(a, [N, P], [P, 1], [BLOCK_M, 128])
    b_tiles = tl.make_tensor_descriptor(b, [K, P], [P, 1], [128, 128])
    groups = tl.arange(0, GROUPS)
    if counts is None:
        sizes = tl.where(groups == 0, tiles, 0)  # in tiles
    else:
        sizes = tl.cdiv(tl.load(counts + groups, mask=groups < E, other=0).to(tl.int32), 128)
    for number in tl.range(tl.program_id(0), E * of_rows * of_columns, tl.num_programs(0), warp_specialize=SPECIALIZE):
        group = number // (of_rows * of_columns)
        begin, end = tl.sum(tl.where(groups < group, sizes, 0)), tl.sum(tl.where(groups <= group, sizes, 0))
        i, j = tile_of(number % (of_rows * of_columns), of_rows, of_columns, 8)
        rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * 128 + tl.arange(0, 128)
        a_scales = a_scale + tl.minimum(rows, N - 1).to(tl.int64) * tiles
        b_scales = b_scale + tl.minimum(columns, K - 1).to(tl.int64) * tiles
        total = sum_of_tiles(a_tiles, i * BLOCK_M, a_scales, b_tiles, j * 128, b_scales, begin, end, BLOCK_M, False)
        place = out + (group.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (columns < K)[None, :])
