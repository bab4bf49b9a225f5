"""Cross-entropy of a linear head without the [tokens, vocabulary] logits.

At V3's shape the logits of 4,096 tokens take 2 GiB in fp32, several times over in a plain implementation. Here the head and the
loss are computed a chunk of tokens at a time, and, because a loss has only one use, each chunk's gradient with respect to its
hidden states and to the head is taken at once, while its logits are at hand (the technique of Liger-Kernel, arXiv 2410.10989):

    loss = Σ_i  logsumexp(z_i) − z_i[y_i],      z_i = W h_i,      ∂loss/∂z_i = softmax(z_i) − onehot(y_i)

The backward pass then only scales. The sum is returned, not the mean: the denominator is known to the engine alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = 16 << 20  # fp32 logits of one chunk on a CPU; measured, see benchmarks/LOG.md
GPU_ROWS = 1024  # of one chunk on a GPU: each chunk reads the whole head, so few rows would be bound by memory


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
    if not torch.is_grad_enabled():  # an autograd.Function cannot tell: inside it gradients are always off
        weight = weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels)


def count_hits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """How many targets have the largest logit, a chunk of tokens at a time. Arguments as of `linear_cross_entropy` → [] int64."""
    rows, head = rows_of_chunk(weight), weight.to(hidden.dtype)
    chunks = zip(hidden.split(rows), labels.split(rows))
    return torch.stack([((h @ head.T).argmax(-1) == y).sum() for h, y in chunks]).sum()


def rows_of_chunk(weight: Tensor) -> int:
    """Tokens whose logits are made at once."""
    fitting = CHUNK_BYTES // (4 * weight.shape[0])
    return max(fitting, GPU_ROWS if weight.is_cuda else 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        head = weight.to(hidden.dtype)
        rows = rows_of_chunk(weight)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for h, y, dh in zip(
            hidden.split(rows),
            labels.split(rows),
            d_hidden.split(rows) if d_hidden is not None else [None] * len(labels),
        ):
            total += _chunk(h, head, y, dh, d_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return (
            # The upstream gradient stays fp32: rounded to bf16 it would scale all gradients below the head by up to 0.4 %.
            None if d_hidden is None else (d_hidden.float() * grad).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype),
            None,
        )


def _chunk(hidden: Tensor, head: Tensor, labels: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> Tensor:
    """The loss of a few tokens; fills their rows of d_hidden [n, D] and adds to d_weight [V, D] where these are wanted.

    A function of its own, so that one chunk's logits are freed before the next one's are made.
    """
    z = F.linear(hidden, head).float()  # [n, V]
    valid = labels != IGNORE
    target = labels.clamp_min(0).unsqueeze(-1)  # [n, 1]
    picked = z.gather(-1, target).squeeze(-1)  # [n]
    peak = z.amax(-1, keepdim=True)  # [n, 1]
    p = z.sub_(peak).exp_()  # [n, V], over the logits
    normaliser = p.sum(-1, keepdim=True)  # [n, 1]
    loss = ((normaliser.log() + peak).squeeze(-1) - picked).where(valid, 0).sum()  # no index: a GPU need not wait
    if d_hidden is None and d_weight is None:
        return loss
    p.mul_(valid.unsqueeze(-1) / normaliser)
    p.scatter_add_(-1, target, -valid.unsqueeze(-1).to(p.dtype))
    dz = p.to(hidden.dtype)
    if d_hidden is not None:
        torch.mm(dz, head, out=d_hidden)
    if d_weight is not None:
        if dz.dtype == torch.float32:
            d_weight.addmm_(dz.T, hidden)
        else:
            d_weight += dz.T @ hidden
    return loss
