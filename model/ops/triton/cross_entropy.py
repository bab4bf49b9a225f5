# mypy: disallow-untyped-defs=False
"""Losses of tokens, and gradients of logits in the logits' place, in Triton: a row is read twice and written once.

A row of 129,280 logits does not fit in registers. A program goes over its row for the maximum and the sum of exponentials, kept
relative to the largest logit so far, and again for the gradient; the second reading comes from the L2 cache. Arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # logits of a row at once


def softmax_loss_(logits: Tensor, labels: Tensor, ratio: Tensor, with_gradient: bool) -> Tensor:
    """`model.ops.cross_entropy.softmax_loss_`. logits [n, V] of any float type, labels [n], ratio [] fp32 → [n] fp32."""
    assert logits.stride(1) == 1
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _softmax_loss[(len(logits),)](
            logits, labels.contiguous(), ratio, losses, logits.shape[1], logits.stride(0),
            GRADIENT=with_gradient, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses


@triton.jit
def _softmax_loss(logits, labels, ratio, losses, V, stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row)
    picked = tl.load(z + tl.maximum(label, 0)).to(tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(peak, tl.max(x, 0))
        sums = sums * tl.exp(peak - larger) + tl.exp(x - larger)
        peak = larger
    total = tl.sum(sums, 0)
    tl.store(losses + row, tl.where(label >= 0, tl.log(total) + (peak - picked), 0.0))
    if GRADIENT:
        share = tl.where(label >= 0, tl.load(ratio), 0.0)
        scale = share / total
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(z + at, mask=at < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - peak) * scale
            p = tl.where(at == label, p - share, p)
            tl.store(z + at, p.to(logits.dtype.element_ty), mask=at < V)
