# mypy: disallow-untyped-defs=False
"""AdamW with moments in bf16 (`train.optimizer.AdamWBf16Moments`) in Triton: what a step reads is read once and written once.

    m̂ = m + (1 − β₁)(g − m),   v̂ = β₂ v + (1 − β₂) g²,   θ ← θ · decay + size · m̂ / (√v̂ / root + ε)

in fp32, g already divided. Multiplications fuse with additions, so numbers differ from PyTorch's by roundings of fp32.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 8


def adamw_(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor, divisor: Tensor, skip: Tensor,
    betas: tuple[float, float], eps: float, decay: float,
) -> None:  # fmt: skip
    """One parameter's step.

    Args:
        weight, gradient, exp_avg, exp_avg_sq: contiguous and of one size; the weight in fp32.
        factors: [2] fp32, what a step's size and root are.
        divisor, skip: [] fp32, of the gradient; nothing is written where skip is 1.
        decay: 1 − lr · λ.
    """
    size = weight.numel()
    _adamw[(triton.cdiv(size, BLOCK),)](
        weight, gradient, exp_avg, exp_avg_sq, factors, divisor, skip,
        size, decay, 1 - betas[0], betas[1], 1 - betas[1], eps, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _adamw(
    weight, gradient, exp_avg, exp_avg_sq, factors, divisor, skip,
    size, decay, rest1, beta2, rest2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor)
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=inside, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
        root = tl.sqrt_rn(v) / tl.load(factors + 1) + eps
        tl.store(weight + at, w * decay + tl.load(factors) * (m / root), mask=inside)
