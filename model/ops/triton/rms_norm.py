# mypy: disallow-untyped-defs=False
"""RMSNorm in Triton: what goes in is read once, what comes out written once, in the dtype of x; in between is fp32.

Backward, a fixed number of programs share the rows out, and each sums its share of the gradient of weight in registers. The shares
are then added in order, so that the same bits come out in every run and on every device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of several narrow rows at a time
PROGRAMS = 256  # backward; about two for each multiprocessor


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rows [N, D], weight [D] fp32 → the normed rows, contiguous, and 1/rms of each [N] fp32."""
    n, width = rows.shape
    normed, inverse = rows.new_empty(n, width), rows.new_empty(n, dtype=torch.float32)
    height, block, warps = tile(width)
    if n:
        _rms_norm[(triton.cdiv(n, height),)](
            rows, weight, normed, inverse, n, rows.stride(0), eps, width, height, block, num_warps=warps
        )
    return normed, inverse


def rms_norm_backward(grad: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """From grad [N, D], contiguous, the gradients of rows, contiguous, and of weight."""
    n, width = rows.shape
    height, block, warps = tile(width)
    programs = min(PROGRAMS, triton.cdiv(n, height))
    d_rows, shares = rows.new_empty(n, width), weight.new_empty(programs, width)
    if n:
        _rms_norm_backward[(programs,)](
            grad, rows, weight, inverse, d_rows, shares, n, rows.stride(0), width, height, block, num_warps=2 * warps
        )
    return d_rows, shares.sum(0)


def tile(width: int) -> tuple[int, int, int]:
    """Rows of a program, the power of two that holds one, and warps for so many numbers."""
    block = triton.next_power_of_2(width)
    height = max(1, NUMBERS // block)
    return height, block, min(16, max(1, height * block // 1024))


@triton.jit(do_not_specialize=["N"])
def _rms_norm(
    rows, weight, normed, inverse, N, stride, eps, D: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """x / √(mean(x²) + eps) · weight of HEIGHT rows."""
    row, column, inside = places(tl.program_id(0), N, D, HEIGHT, BLOCK)
    x = tl.load(rows + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    w = tl.load(weight + column, mask=column < D, other=0.0)
    tl.store(normed + row * D + column, x * scale * w, mask=inside)
    tl.store(inverse + row, scale, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_backward(
    grad, rows, weight, inverse, d_rows, shares, N, stride, D: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """With n = x/rms and g = grad · weight:  ∂x = (g − n · mean(g · n)) / rms. Its share of ∂weight is Σ grad · n over its rows."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < D, other=0.0)[None, :]
    total = tl.zeros((HEIGHT, BLOCK), tl.float32)
    for turn in range(tl.program_id(0), tl.cdiv(N, HEIGHT), tl.num_programs(0)):
        row, across, inside = places(turn, N, D, HEIGHT, BLOCK)
        scale = tl.load(inverse + row, mask=row < N, other=0.0)
        n = tl.load(rows + row * stride + across, mask=inside, other=0.0).to(tl.float32) * scale
        g = tl.load(grad + row * D + across, mask=inside, other=0.0).to(tl.float32)
        total += g * n
        g *= w
        mean = tl.sum(g * n, 1)[:, None] / D
        tl.store(d_rows + row * D + across, (g - n * mean) * scale, mask=inside)
    tl.store(shares + tl.program_id(0) * D + column, tl.sum(total, 0), mask=column < D)


@triton.jit
def places(turn, N, D: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [HEIGHT, 1] and columns [1, BLOCK] of a tile, and which of its places are inside."""
    row = (turn * HEIGHT + tl.arange(0, HEIGHT))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    return row, column, (row < N) & (column < D)
