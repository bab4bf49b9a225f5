"""The reference's products are sums of scaled tiles, and their error is that of what they multiply."""

import math

import pytest
import torch
from torch import Tensor

from model.ops.fp8.kernels import Reference, multiply_by_tiles
from model.ops.fp8.quantize import Quantized, padded_ends, quantize_blocks, quantize_columns, quantize_rows
from tests.model.fp8.faults import FAULTS
from tests.model.fp8.numbers import ERROR, exact, norm_error

M, N = 200, 300
COUNTS = torch.tensor([0, 130, 128, 0, 1, 57, 0])


def operands(k: int, kind: str = "blocks") -> tuple[Tensor, Tensor, Quantized, Quantized]:
    """x [200, K] and w [300, K], whose tokens and tiles have magnitudes of their own, and both quantised."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(M, k, generator=generator) * torch.exp2(4 * torch.rand(M, 1, generator=generator))
    w = torch.randn(N, k, generator=generator)
    for tensor in (x, w):
        for tile in tensor.split(128, 1):
            tile *= torch.exp2(3 * torch.rand(1, generator=generator))
    if kind == "columns":
        return x, w, quantize_columns(x.T.contiguous()), quantize_columns(w.T.contiguous())
    return x, w, quantize_rows(x), quantize_blocks(w)


def check_products() -> None:
    """What a product gives is the sum in float64 of what it was given, but for fp32's roundings, below 2⁻²¹ of the magnitudes."""
    for kind, k in (("blocks", 130), ("blocks", 1024), ("columns", 384)):
        _, _, a, b = operands(k, kind)
        left, right = exact(a), exact(b)
        bound = 2**-21 * (left.abs() @ right.abs().T)
        for found in (Reference().multiply(a, b, torch.float32), multiply_by_tiles(a, b)):
            assert ((found.double() - left @ right.T).abs() <= bound).all(), f"{kind}, K = {k}"


def test_a_product_is_the_sum_of_its_scaled_tiles() -> None:
    check_products()


@pytest.mark.parametrize("fault", ["scale_of_the_next_tile", "scale_of_a_whole_row_behind_the_sum", "sums_of_14_bits"])
def test_a_planted_fault_in_a_product_is_caught(fault: str) -> None:
    with FAULTS[fault](), pytest.raises(AssertionError, match=r"blocks, K = \d+"):
        check_products()


@pytest.mark.parametrize("k", [128, 512, 2048])
def test_the_error_of_a_product_is_that_of_two_factors_whatever_its_length(k: int) -> None:
    """Errors of K products add up as √K, and so do the products: √2 · 2.65 % of the result for every K, 3.75 %, within 5 %."""
    generator = torch.Generator().manual_seed(k)
    x, w = torch.randn(256, k, generator=generator), torch.randn(256, k, generator=generator)
    found = Reference().multiply(quantize_rows(x), quantize_blocks(w), torch.float32)
    expected = x.double() @ w.double().T
    error = float((found - expected).square().mean().sqrt())
    assert error == pytest.approx(math.sqrt(2 * k) * ERROR, rel=0.05)
    assert norm_error(found, expected) == pytest.approx(math.sqrt(2) * ERROR, rel=0.05)
    assert abs(float((found - expected).mean())) < 4 * error / 256, "no bias"


def test_a_grouped_product_is_a_loop_over_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(int(COUNTS.sum()), 200, generator=generator)
    w = torch.randn(len(COUNTS), 136, 200, generator=generator)
    rows, blocks = quantize_rows(x), quantize_blocks(w)
    found = Reference().multiply_groups(rows, blocks, COUNTS, torch.float32)
    start = 0
    for group, count in enumerate(COUNTS.tolist()):
        mine = slice(start, start + count)
        part, matrix = Quantized(rows.data[mine], rows.scale[mine]), Quantized(blocks.data[group], blocks.scale[group])
        torch.testing.assert_close(found[mine], multiply_by_tiles(part, matrix), rtol=1e-4, atol=1e-4)
        start += count
    assert start == len(found)


def test_a_product_within_groups_is_a_loop_over_their_columns() -> None:
    """And zero for a group without rows. Every group is compared with columns of its own, quantised apart."""
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(int(COUNTS.sum()), width, generator=generator) for width in (136, 200))
    a, b = quantize_columns(y, COUNTS), quantize_columns(x, COUNTS)
    found = Reference().multiply_within_groups(a, b, COUNTS, torch.float32)
    assert found.shape == (7, 136, 200) and int(padded_ends(COUNTS)[-1]) == 5 * 128
    for group, (dy, part) in enumerate(zip(y.split(COUNTS.tolist()), x.split(COUNTS.tolist()))):
        if len(part) == 0:
            assert (found[group] == 0).all()
            continue
        expected = multiply_by_tiles(quantize_columns(dy), quantize_columns(part))
        torch.testing.assert_close(found[group], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_rounded_once_to_the_compute_dtype(dtype: torch.dtype) -> None:
    _, _, a, b = operands(256)
    expected = Reference().multiply(a, b, torch.float32).to(dtype)
    assert torch.equal(Reference().multiply(a, b, dtype), expected)
