"""Targets and losses of the main head and of every MTP depth.

Losses are handed out as sums with the number of their valid targets; the engine divides each sum once by the number of valid
targets in the global batch, over all ranks and micro-batches, so that no layout can change the objective:

    L = main / n_0  +  λ/D Σ_k mtp_k / n_k  +  α · balance / sequences                  (DeepSeek-V3 Eqs. 24, 25, 17)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.ops.cross_entropy import IGNORE


def head_coefficients(targets: Tensor, lambda_: float) -> Tensor:
    """[1 + D_mtp] fp32 ∂L / ∂ sum of each head, known before the forward pass; arguments as of `Losses.objective`."""
    coefficients = 1 / targets.clamp_min(1)
    coefficients[1:] *= lambda_ / max(1, len(targets) - 1)
    return coefficients


class Losses(NamedTuple):
    """Sums over one micro-batch, all fp32 but the counts."""

    main: Tensor  # []  cross-entropy of the next token, in nats
    mtp: Tensor  # [D_mtp]  the same, k tokens further
    balance: Tensor  # []  sequence-wise balance loss, over sequences and MoE layers
    counts: Tensor  # [1 + D_mtp] int64  valid targets of the main head and of each depth

    def objective(self, targets: Tensor, sequences: int, lambda_: float, alpha: float) -> Tensor:
        """This micro-batch's share of L.

        Args:
            targets: [1 + D_mtp] valid targets in the global batch.
            sequences: sequences in the global batch.
            lambda_: weight of multi-token prediction, λ.
            alpha: weight of the sequence-wise balance loss, α.
        """
        n = targets.clamp_min(1)
        total = self.main / n[0] + alpha * self.balance / sequences
        if self.mtp.numel():
            total = total + lambda_ * (self.mtp / n[1:]).mean()
        return total


def targets_at(tokens: Tensor, documents: Tensor, depth: int, mtp_depth: int, mask_documents: bool) -> Tensor:
    """The targets of one head: the token depth + 1 ahead of every position.

    Args:
        tokens, documents: [B, T + 1 + D_mtp]; a document number below 0 is padding.
        depth: 0 for the main head, k for MTP module k.
        mtp_depth: D_mtp.
        mask_documents: True leaves out targets in another document than their position.

    Returns:
        [B, T] int64, −100 where a position has no target.
    """
    length = tokens.shape[1] - 1 - mtp_depth
    ahead = slice(1 + depth, 1 + depth + length)
    valid = (documents[:, ahead] >= 0) & (documents[:, :length] >= 0)
    if mask_documents:
        valid &= documents[:, ahead] == documents[:, :length]
    return tokens[:, ahead].masked_fill(~valid, IGNORE)


def count_targets(tokens: Tensor, documents: Tensor, mtp_depth: int, mask_documents: bool) -> Tensor:
    """Valid targets of the main head and of every depth in a batch, [1 + D_mtp] int64."""
    heads = (targets_at(tokens, documents, k, mtp_depth, mask_documents) for k in range(mtp_depth + 1))
    return torch.stack([(labels != IGNORE).sum() for labels in heads])
