"""Load balance without an auxiliary loss that competes with the model (arXiv 2408.15664; DeepSeek-V3 §2.1.2).

A bias on each expert's affinity, used for selection only, is moved once per optimizer step against the load of the whole global
batch. A sequence-wise loss with a tiny weight α keeps single sequences from collapsing onto few experts (Eqs. 17–20).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def update(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """The bias after one step: b_e + γ · sign(mean(c) − c_e).

    The comparison is one of integers, sign(Σc − E·c_e), so that it is the same on every rank and device.

    Args:
        bias: [..., E] fp32.
        counts: [..., E] int64, tokens sent to each expert by the whole global batch.
        gamma: bias update speed; 0 freezes the bias.
    """
    experts = counts.shape[-1]
    direction = (counts.sum(-1, keepdim=True) - experts * counts).sign()
    return bias + gamma * direction.to(bias.dtype)


def sequence_balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Σ over the sequences of Σ_i f_i P_i (Eqs. 17–20), without the factor α.

        f_i = E / (K·T) · number of tokens whose K highest unbiased, ungrouped affinities include expert i
        P_i = mean over the tokens of s_i / Σ_j s_j

    Affinities over their own sum are computed as softmax(log sigmoid(logits)), which has no denominator: with s / (Σ s + 1e-20) a
    router can make the loss vanish by driving all of its affinities to zero.

    Args:
        logits: [B, T, E] fp32 router logits; s = sigmoid(logits).
        top_k: K.

    Returns:
        [] fp32; the gradient flows through P alone.
    """
    return (routed_frequency(logits.detach(), top_k) * affinity_shares(logits).mean(1)).sum()


def loss_of_pieces(logits: Tensor, top_k: int, pieces: int, average: Callable[[Tensor], Tensor]) -> Tensor:
    """What some pieces of sequences add to `sequence_balance_loss`: summed over all pieces it is that of the whole sequences.

    f and P of a sequence are the means of those of its equal pieces, and f has no gradient: so Σ_i f_i P_i is a sum over the
    pieces of Σ_i f_i P_i(piece) / pieces, and f alone needs the other pieces.

    Args:
        logits: [B', L, E] of pieces.
        pieces: of a sequence.
        average: brings [B', E] of pieces to the means over their sequences.
    """
    frequency = average(routed_frequency(logits.detach(), top_k))
    return (frequency * affinity_shares(logits).mean(1)).sum() / pieces


def routed_frequency(logits: Tensor, top_k: int) -> Tensor:
    """f of the balance loss. [B, T, E] → [B, E]."""
    batch, length, experts = logits.shape
    by_affinity = logits.sort(dim=-1, descending=True, stable=True).indices  # [B, T, E], top of s is top of its logit
    chosen = by_affinity[..., :top_k].flatten(1)  # [B, T·K]
    hits = torch.zeros(batch, experts, device=logits.device).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )
    return hits * experts / (top_k * length)


def affinity_shares(logits: Tensor) -> Tensor:
    """s_i / Σ_j s_j with s = sigmoid(logits), over the last dimension."""
    return F.logsigmoid(logits).softmax(-1)


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = max_e c_e / mean(c) − 1 (2408.15664 Eq. 4): 0 is perfect balance, E − 1 is one expert taking everything.

    [..., E] counts over a batch (MaxVio_batch) or a validation set (MaxVio_global) → [...] fp64.
    """
    load = counts.double()
    return load.amax(-1) / load.mean(-1).clamp_min(1e-9) - 1
