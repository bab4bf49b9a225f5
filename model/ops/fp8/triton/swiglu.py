# mypy: disallow-untyped-defs=False
"""SwiGLU between two FP8 products, in Triton: what goes in is read once, what the products take is written once.

    p = w · silu(g) · u,   silu(g) = g · σ(g)        dg = dp · w · u · σ(g) · (1 + g · (1 − σ(g))),   du = dp · w · silu(g)
                                                     dw = Σ dp · silu(g) · u

in fp32. The exponential and the division are a GPU's fast ones, right to some units in the last place, and multiplications fuse
with additions. So numbers differ from `model.ops.fp8.kernels.Reference` by roundings of fp32: scales by these, and where one falls
on the other side of a tie, a number in E4M3 by one step.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.ops.fp8.kernels import SwiGLUGradients
from model.ops.fp8.quantize import Quantized
from model.ops.fp8.triton.quantize import (
    LOW,
    SIDE,
    empty_columns,
    empty_rows,
    load_tile,
    load_values,
    rows_of_tile,
    store_columns,
    store_rows,
    tile_places,
    unit_stride,
)


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None) -> Quantized:
    """w · silu(gate) · up, both [M, F], weights [M] or 1 → rows."""
    gate, up = unit_stride(gate), unit_stride(up)
    rows = empty_rows(gate)
    _swiglu[(triton.cdiv(len(gate), LOW) * rows.scale.shape[1],)](
        gate, up, weights, *rows, *gate.shape, gate.stride(0), up.stride(0), HEIGHT=LOW, num_warps=4
    )
    return rows


def swiglu_backward(
    grad: Tensor, gate: Quantized, up: Quantized, weights: Tensor | None, counts: Tensor | None
) -> SwiGLUGradients:
    """From the gradient of w · silu(gate) · up [M, F] and both factors in rows, in groups of `counts`; weights [M], or 1."""
    grad = unit_stride(grad)
    product, gate_columns, up_columns = (empty_columns(grad, counts) for _ in range(3))
    gate_rows, up_rows = empty_rows(grad), empty_rows(grad)
    of_tiles = gate_rows.scale.new_empty((0, 0) if weights is None else gate_rows.scale.shape)  # parts of dw
    tiles = product.scale.shape[1]
    places = None if counts is None else tile_places(counts, tiles)
    _swiglu_backward[(3 * tiles * gate_rows.scale.shape[1],)](
        grad, *gate, *up, weights, *product, *gate_rows, *gate_columns, *up_rows, *up_columns, of_tiles,
        places, *grad.shape, tiles, grad.stride(0), num_warps=16,
    )  # fmt: skip
    return SwiGLUGradients(product, gate_rows, gate_columns, up_rows, up_columns, of_tiles.sum(1))


@triton.jit(do_not_specialize=["M"])
def _swiglu(gate, up, weights, data, scale, M, F, gate_stride, up_stride, HEIGHT: tl.constexpr):
    """Reads a tile HEIGHT × 128 of gate and of up [M, F]; writes the rows of their product."""
    across = tl.cdiv(F, SIDE)
    row, tile = tl.program_id(0) // across * HEIGHT, tl.program_id(0) % across
    g = load_tile(gate, row, tile * SIDE, M - row, F, gate_stride, HEIGHT).to(tl.float32)
    u = load_tile(up, row, tile * SIDE, M - row, F, up_stride, HEIGHT).to(tl.float32)
    product = g / (1.0 + tl.exp(-g)) * u
    if weights is not None:
        product *= load_weights(weights, row, M - row, HEIGHT)
    store_rows(product, data, scale, row, tile, M - row, F, False, HEIGHT)


@triton.jit(do_not_specialize=["M", "tiles"])
def _swiglu_backward(
    grad, gate, gate_scale, up, up_scale, weights,
    product, product_scale, d_gate, d_gate_scale, d_gate_columns, d_gate_columns_scale,
    d_up, d_up_scale, d_up_columns, d_up_columns_scale, d_weights,
    places, M, F, tiles, stride,
):  # fmt: skip
    """Reads a tile 128 × 128 of gate, and of grad and up as needed; writes what one of three programs is for.

    They are the product's columns, and the tile's part of the weights' gradient, d_weights [M, ⌈F/128⌉]; rows and columns of up's
    gradient; and of gate's. A program that made all of it would have no
    registers left. The three of a tile run at the same time, so the memory is read once, and the L2 cache twice more.
    """
    across = tl.cdiv(F, SIDE)
    program = tl.program_id(0) // 3
    place, tile = program // across, program % across
    row, left = rows_of_tile(places, place, M)
    g = load_values(gate, gate_scale, row, tile, left, F)
    s = sigmoid(g)
    if tl.program_id(0) % 3 == 0:
        u = load_values(up, up_scale, row, tile, left, F)
        made = g * s * u
        if weights is not None:
            d = load_tile(grad, row, tile * SIDE, left, F, stride, SIDE).to(tl.float32)
            r = tl.arange(0, SIDE)
            tl.store(d_weights + (row + r).to(tl.int64) * across + tile, tl.sum(d * made, 1), mask=r < left)
            made *= load_weights(weights, row, left, SIDE)
        store_columns(made, product, product_scale, place, tile, F, tiles, False)
    elif tl.program_id(0) % 3 == 1:
        d = load_tile(grad, row, tile * SIDE, left, F, stride, SIDE).to(tl.float32)
        by_up = d * (g * s)
        if weights is not None:
            by_up *= load_weights(weights, row, left, SIDE)
        store_rows(by_up, d_up, d_up_scale, row, tile, left, F, False, SIDE)
        store_columns(by_up, d_up_columns, d_up_columns_scale, place, tile, F, tiles, False)
    else:
        d = load_tile(grad, row, tile * SIDE, left, F, stride, SIDE).to(tl.float32)
        u = load_values(up, up_scale, row, tile, left, F)
        by_gate = d * u * s * (1.0 + g * (1.0 - s))
        if weights is not None:
            by_gate *= load_weights(weights, row, left, SIDE)
        store_rows(by_gate, d_gate, d_gate_scale, row, tile, left, F, False, SIDE)
        store_columns(by_gate, d_gate_columns, d_gate_columns_scale, place, tile, F, tiles, False)


@triton.jit
def load_weights(weights, row, left, HEIGHT: tl.constexpr):
    """Of the rows of a tile, [HEIGHT, 1]."""
    r = tl.arange(0, HEIGHT)
    return tl.load(weights + row + r, mask=r < left, other=0.0)[:, None]


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
