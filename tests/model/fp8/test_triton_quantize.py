"""What the Triton kernels quantise has the bits of the definition, `model.ops.fp8.quantize` on a CPU.

Casts to E4M3 are in the interpreter those of PyTorch; that a GPU's are the same, these tests show when they run on one.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from model.ops.fp8.kernels import Reference
from model.ops.fp8.quantize import TILE, Quantized
from tests.triton import NO_TRITON

pytest.importorskip("triton", reason=NO_TRITON)

import triton
import triton.language as tl

from model.ops.fp8.triton import TritonKernels
from model.ops.fp8.triton.quantize import divide

REFERENCE, TRITON = Reference(), TritonKernels()
GROUPS = [[128, 0, 72], [1, 70, 129], [0, 0, 200], None]  # the rows of three experts; no groups


def hard_numbers(m: int = 200, k: int = 300, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of many sizes; zeros of both signs; tiny, large, and ties, some made by a rounded scale alone."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-6, 4, m)[torch.randperm(m, generator=torch.Generator().manual_seed(1))].unsqueeze(1)
    x[1], x[2, :TILE], x[3, 7] = 0, -0.0, -0.0
    x[4], x[5] = x[4].sign() * 1e-38, x[5] / x[5].abs().max() * 6e4
    ties = torch.arange(-31, 32, 2) / 2
    x[6, : len(ties)], x[6, -1], x[6, TILE] = ties, 448, 448  # scale 1: halves of steps
    x[7] = 3 / 64 * 1.375  # 21 of a scale of 1.375 / 448, which is rounded
    x[7, 0] = x[7, TILE] = x[7, -1] = -1.375
    return x.to(dtype)


def on_cpu(x: Quantized) -> Quantized:
    return Quantized(x.data.cpu(), x.scale.cpu())


def on(x: Quantized, device: torch.device) -> Quantized:
    return Quantized(x.data.to(device), x.scale.to(device))


def assert_same(found: Quantized, expected: Quantized) -> None:
    """Equal bits, NaN equal to NaN."""
    data, scale = on_cpu(found)
    assert data.dtype == expected.data.dtype and data.is_contiguous() and scale.is_contiguous()
    torch.testing.assert_close(scale, expected.scale, rtol=0, atol=0, equal_nan=True)
    nan = expected.data.float().isnan()
    assert torch.equal(data.float().isnan(), nan)
    assert torch.equal(data.view(torch.uint8)[~nan], expected.data.view(torch.uint8)[~nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns_have_the_bits_of_the_definition(device: torch.device, dtype: torch.dtype) -> None:
    x = hard_numbers(dtype=dtype)
    there = x.to(device)
    expected = REFERENCE.quantize_rows_and_columns(x)
    assert_same(TRITON.quantize_rows(there, False), expected[0])
    assert_same(TRITON.quantize_columns(there), expected[1])
    for found, of in zip(TRITON.quantize_rows_and_columns(there), expected):
        assert_same(found, of)
    assert_same(TRITON.quantize_rows(there, True), REFERENCE.quantize_rows(x, True))


def test_rows_may_lie_apart_or_not_at_all(device: torch.device) -> None:
    x = torch.randn(130, 288)
    for part in (x[:, 144:], x[::2, 3:7], x.T[:5], x[:0]):
        for found, expected in zip(
            TRITON.quantize_rows_and_columns(part.to(device)), REFERENCE.quantize_rows_and_columns(part)
        ):
            assert_same(found, expected)


def test_what_is_not_finite_stays_where_it_was(device: torch.device) -> None:
    x = torch.randn(140, 260)
    x[3, 5], x[4, 6], x[5, 200], x[135, 258] = torch.inf, torch.nan, -torch.inf, -torch.nan
    x[3, 9] = x[4, 9] = -0.0
    for found, expected in zip(TRITON.quantize_rows_and_columns(x.to(device)), REFERENCE.quantize_rows_and_columns(x)):
        assert_same(found, expected)
    assert_same(TRITON.quantize_rows(x.to(device), True), REFERENCE.quantize_rows(x, True))


@pytest.mark.parametrize("counts", GROUPS)
def test_requantised_columns_have_the_bits_of_the_definition(device: torch.device, counts: list[int] | None) -> None:
    rows = REFERENCE.quantize_rows(hard_numbers(), True)
    groups = None if counts is None else torch.tensor(counts)
    found = TRITON.requantize_columns(on(rows, device), None if groups is None else groups.to(device))
    assert_same(found, REFERENCE.requantize_columns(rows, groups))


@pytest.mark.parametrize("transpose", [False, True])
def test_blocks_have_the_bits_of_the_definition(device: torch.device, transpose: bool) -> None:
    weight = torch.randn(2, 520, 140) * torch.tensor([1e-3, 1.0]).view(2, 1, 1)
    weight[0, :128, :128], weight[0, 128:256, :128] = 0, 1e-38
    for part in (weight, weight.chunk(2, dim=1)[1], weight[0]):
        for dtype in (torch.bfloat16, torch.float32):
            found = TRITON.quantize_blocks(part.to(device), dtype, transpose)
            assert_same(found, REFERENCE.quantize_blocks(part, dtype, transpose))
    gathered = weight.bfloat16()
    assert_same(
        TRITON.quantize_blocks(gathered.to(device), torch.bfloat16, transpose),
        REFERENCE.quantize_blocks(gathered, torch.bfloat16, transpose),
    )


@triton.jit
def _divide(x, scale, quotients):
    r, k = tl.arange(0, 128), tl.arange(0, 128)
    place = (tl.program_id(0) * 128 + r)[:, None] * 128 + k[None, :]
    divisors = tl.load(scale + tl.program_id(0) * 128 + r)
    tl.store(quotients + place, divide(tl.load(x + place), divisors[:, None], False))


def test_division_by_a_tile_s_scale_is_that_of_ieee(device: torch.device) -> None:
    """In fp32, before E4M3 hides it: all pairs of mantissas of bf16, and 49,152 of fp32, half of them next to a tie of E4M3."""
    random = torch.Generator().manual_seed(0)
    exponents = torch.randint(-92, 119, (512,), generator=random)
    scale = (1 + torch.rand(512, generator=random)) * torch.exp2(exponents.float())
    wanted = (torch.rand(512, 128, generator=random) * 2 - 1) * 448
    wanted[:, ::2] = wanted[:, ::2].to(torch.float8_e4m3fn).float() * 1.0625
    x = wanted * scale.unsqueeze(1)
    mantissas = 1 + torch.arange(128) / 128
    scale[:128], x[:128] = mantissas / 448, mantissas
    found = torch.empty_like(x, device=device)
    _divide[(4,)](x.to(device), scale.to(device), found)
    assert torch.equal(found.cpu(), x / scale.unsqueeze(1))


class Difference(NamedTuple):
    scale: float  # the largest, relative
    steps: int  # the largest in E4M3
    share: float  # of numbers that differ at all


def difference(found: Quantized, expected: Quantized) -> Difference:
    def order(x: Quantized) -> Tensor:
        """Neighbours in E4M3 are neighbours; both zeros are 0."""
        bits = x.data.cpu().view(torch.uint8).int()
        return torch.where(bits < 128, bits, 128 - bits)

    steps = (order(found) - order(expected)).abs()
    scale = (found.scale.cpu() / expected.scale - 1).abs().max()
    return Difference(float(scale), int(steps.max()), float((steps > 0).float().mean()))


def assert_close(found: Quantized, expected: Quantized) -> None:
    apart = difference(found, expected)
    assert apart.scale < 2e-6 and apart.steps <= 1 and apart.share < 1e-4, apart


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_is_quantised_from_fp32(device: torch.device, weighted: bool) -> None:
    gate, up = (torch.randn(140, 600) * 4).bfloat16().chunk(2, dim=1)
    weights = torch.rand(140) if weighted else None
    there = None if weights is None else weights.to(device)
    assert_close(TRITON.swiglu(gate.to(device), up.to(device), there), REFERENCE.swiglu(gate, up, weights))


@pytest.mark.parametrize(("counts", "weighted"), [([128, 0, 22], True), ([128, 0, 22], False), (None, False)])
def test_the_backward_pass_of_swiglu_gives_what_five_products_take_and_the_gradient_of_weights(
    device: torch.device, counts: list[int] | None, weighted: bool
) -> None:
    gate, up = (REFERENCE.quantize_rows(torch.randn(150, 200) * size, False) for size in (4, 1))
    grad = torch.randn(150, 400)[:, ::2].bfloat16()
    groups = None if counts is None else torch.tensor(counts)
    weights = torch.rand(150) if weighted else None
    there = [None if t is None else t.to(device) for t in (weights, groups)]
    *found, d_weights = TRITON.swiglu_backward(grad.to(device), on(gate, device), on(up, device), *there)
    *expected, d_exact = REFERENCE.swiglu_backward(grad, gate, up, weights, groups)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    torch.testing.assert_close(d_weights.cpu(), d_exact, rtol=1e-4, atol=1e-4)
