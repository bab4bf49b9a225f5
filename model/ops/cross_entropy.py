"""Cross-entropy of a linear head without the [tokens, vocabulary] logits.

At V3's shape the logits of 4,096 tokens take 2 GiB in fp32, several times over in a plain implementation. Here the head and the
loss are computed a chunk of tokens at a time, and, because a loss has only one use, each chunk's gradient with respect to its
hidden states and to the head is taken at once, while its logits are at hand (the technique of Liger-Kernel, arXiv 2410.10989):

    loss = Σ_i  logsumexp(z_i) − z_i[y_i],      z_i = W h_i,      ∂loss/∂z_i = softmax(z_i) − onehot(y_i)

The backward pass then only scales. Sums are returned, not means: the denominators are known to the engine alone.

The main head and the MTP modules share W. Their sums count differently in the objective, L = Σ_k c_k · loss_k, and the c_k are
known before the forward pass: with c_k / c_0 on the gradient of head k's logits all heads add to one gradient of W, [V, D] in
fp32. The largest c, of the main head, counts as 1 there, so that gradients in fp16 do not vanish before the loss is scaled.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import cpu
from model.ops.operation import operation

IGNORE = -100
CHUNK_BYTES = 16 << 20  # fp32 logits of one chunk on a CPU; measured, see benchmarks/LOG.md
CPU_ROWS = 128  # of one chunk at least: each chunk goes over the whole head and its gradient
GPU_ROWS = 1024  # the same on a GPU


def reference_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy over the labels that are not −100, by way of the full logits.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: [N] int64, −100 where a token has no target.

    Returns:
        [] fp32.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`reference_cross_entropy` in chunks; same arguments, same values and gradients."""
    return heads_cross_entropy([hidden], weight, [labels], hidden.new_ones(1, dtype=torch.float32))[0]


def heads_cross_entropy(
    hidden: Sequence[Tensor], weight: Tensor, labels: Sequence[Tensor], coefficients: Tensor
) -> Tensor:
    """`reference_cross_entropy` of several heads with the same weight.

    Args:
        hidden, labels: of each head, as of `reference_cross_entropy`.
        coefficients: [heads] fp32, what each head's sum counts in the objective, or that times any factor; the first is not 0.
            Gradients that come back in another ratio make all gradients NaN.

    Returns:
        [heads] fp32 sums.
    """
    if not torch.is_grad_enabled():  # an autograd.Function cannot tell: inside it gradients are always off
        weight = weight.detach()
    return _LinearCrossEntropy.apply(weight, list(labels), coefficients, *hidden)


def count_hits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """How many targets have the largest logit, a chunk of tokens at a time. Arguments as of `linear_cross_entropy` → [] int64."""
    rows, head = rows_of_chunk(weight, len(hidden)), weight.to(hidden.dtype)
    chunks = zip(hidden.split(rows), labels.split(rows))
    return torch.stack([((h @ head.T).argmax(-1) == y).sum() for h, y in chunks]).sum()


def rows_of_chunk(weight: Tensor, rows: int) -> int:
    """Tokens whose logits are made at once, of so many; all chunks are about as large."""
    fitting = max(CHUNK_BYTES // (4 * weight.shape[0]), GPU_ROWS if weight.is_cuda else CPU_ROWS)
    return max(1, -(-rows // -(-rows // fitting))) if rows else 1


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, labels: list[Tensor], coefficients: Tensor, *hidden: Tensor) -> Tensor:
        needs_weight, _, _, *needs_hidden = ctx.needs_input_grad
        ratios = coefficients / coefficients[0]
        head = weight.to(hidden[0].dtype)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        sums, d_hidden = [], []
        for h, y, ratio, needed in zip(hidden, labels, ratios, needs_hidden):
            d_h = h.new_empty(h.shape) if needed else None
            sums.append(_head(h, head, y, ratio, d_h, d_weight))
            d_hidden.append(d_h)
        ctx.save_for_backward(ratios, d_weight, *d_hidden)
        ctx.weight_dtype = weight.dtype
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ratios, d_weight, *d_hidden = ctx.saved_tensors
        expected = grad[0] * ratios
        is_in_ratio = ((grad - expected).abs() <= 1e-5 * expected.abs()).all()
        scale = grad[0].where(is_in_ratio, torch.nan)  # no branch: a GPU need not wait
        # In place: nobody else has them. The scale stays fp32: rounded to bf16 it would change all gradients by up to 0.4 %.
        return (
            None if d_weight is None else d_weight.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
            *(None if d is None else d.copy_(d * scale) if d.dtype != scale.dtype else d.mul_(scale) for d in d_hidden),
        )


def _head(
    hidden: Tensor, head: Tensor, labels: Tensor, ratio: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None
) -> Tensor:
    """The summed loss of one head. Fills d_hidden [N, D] and adds to d_weight [V, D], times the ratio, where they are wanted."""
    rows = rows_of_chunk(head, len(hidden))
    if cpu.takes(hidden, head, ratio, d_weight) and (kernels := cpu.library("cross_entropy")):
        kernels.cross_entropy_scratch.restype = ctypes.c_int64
        scratch = hidden.new_empty(kernels.cross_entropy_scratch(*cpu.numbers(rows, *head.shape)))
        return head_with_loss(hidden, head, labels, ratio, rows, scratch, d_hidden, d_weight).sum()
    chunks = d_hidden.split(rows) if d_hidden is not None else [None] * len(labels)
    losses = [
        _chunk(h, head, y, ratio, d_h, d_weight) for h, y, d_h in zip(hidden.split(rows), labels.split(rows), chunks)
    ]
    return torch.stack(losses).sum()


@operation(
    "head_with_loss(Tensor hidden, Tensor head, Tensor labels, Tensor ratio, int rows, Tensor(a!) scratch, "
    "Tensor(b!)? d_hidden, Tensor(c!)? d_weight) -> Tensor",
    lambda hidden, *_: hidden.new_empty(len(hidden)),
)
def head_with_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    ratio: Tensor,
    rows: int,
    scratch: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """All of `_head` on a CPU, `rows` tokens at a time; the loss of each token [N]."""
    kernels = cpu.library("cross_entropy")
    assert kernels is not None
    losses = hidden.new_empty(len(hidden))
    hidden, head, labels = hidden.contiguous(), head.contiguous(), labels.contiguous()
    sizes = cpu.numbers(len(hidden), rows, *head.shape)
    tensors = (hidden, head, labels, ratio, losses, d_hidden, d_weight, scratch)
    kernels.cross_entropy(*sizes, *map(cpu.address, tensors), cpu.threads())
    return losses


def _chunk(
    hidden: Tensor, head: Tensor, labels: Tensor, ratio: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None
) -> Tensor:
    """`_head` of a few tokens. A function of its own, so that one chunk's logits are freed before the next one's are made."""
    z = F.linear(hidden, head)  # [n, V]
    loss = softmax_loss_(z, labels, ratio, d_hidden is not None or d_weight is not None).sum()
    if d_hidden is not None:
        torch.mm(z, head, out=d_hidden)
    if d_weight is not None:
        if z.dtype == torch.float32:
            d_weight.addmm_(z.T, hidden)
        elif z.is_cuda:
            torch.addmm(d_weight, z.T, hidden, out_dtype=torch.float32, out=d_weight)
        else:
            d_weight += z.T @ hidden
    return loss


@operation(
    "softmax_loss_(Tensor(a!) logits, Tensor labels, Tensor ratio, bool with_gradient) -> Tensor",
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32),
)
def softmax_loss_(logits: Tensor, labels: Tensor, ratio: Tensor, with_gradient: bool) -> Tensor:
    """The loss of each token, [n] fp32, from logits [n, V]; with a gradient, ratio · ∂loss/∂logits takes the logits' place."""
    if logits.is_cuda:
        from model.ops.triton import cross_entropy

        return cross_entropy.softmax_loss_(logits, labels, ratio, with_gradient)
    return reference_softmax_loss_(logits, labels, ratio, with_gradient)


def reference_softmax_loss_(logits: Tensor, labels: Tensor, ratio: Tensor, with_gradient: bool) -> Tensor:
    """`softmax_loss_` in plain PyTorch."""
    z = logits.float()
    valid = labels != IGNORE
    target = labels.clamp_min(0).unsqueeze(-1)  # [n, 1]
    picked = z.gather(-1, target).squeeze(-1)  # [n]
    peak = z.amax(-1, keepdim=True)  # [n, 1]
    p = z.sub_(peak).exp_()  # [n, V]; in fp32 over the logits
    normaliser = p.sum(-1, keepdim=True)  # [n, 1]
    losses = ((normaliser.log() + peak).squeeze(-1) - picked).where(valid, 0)
    if with_gradient:
        share = (valid * ratio).unsqueeze(-1)
        p.mul_(share / normaliser).scatter_add_(-1, target, -share)
        logits.copy_(p)
    return losses
