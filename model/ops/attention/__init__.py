"""Softmax attention of MLA, from what the linear maps hand out to what the output map reads.

    q_h = [q_C ; RoPE(q_R)],   k_h = [k_C ; RoPE(k_R)],   o_h = softmax(q_h k_hᵀ · scale) v_h        (DeepSeek-V3 Eqs. 4–10)

Rotating and putting together belong to attention here, because a kernel that reads its operands as they lie need not write
queries and keys out, nor keep them: for the backward pass it keeps outputs of linear maps.
"""

from typing import Protocol

import torch
from torch import Tensor

from model.ops.attention.cpu import fused_attention
from model.ops.attention.reference import reference_attention
from model.ops.attention.sdpa import sdpa_attention
from model.rope import Rotation


class AttentionBackend(Protocol):
    def __call__(
        self, q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None
    ) -> Tensor:
        """Causal attention of every head: a query sees the keys from its document's start to its own position.

        Queries may be fewer than keys: those of the last Tq of the Tk positions, Tq ≤ Tk. Of a sequence that is cut into
        pieces, that is a piece and all that lies before it.

        Args:
            q: [B, Tq, H, nope + rope] queries, the second part not yet rotated.
            kv: [B, Tk, H, nope + v] first part of the keys, and values.
            k_rope: [B, Tk, rope] second part of the keys, which all heads share, not yet rotated.
            rotation: cosines and sines of the Tk positions, [Tk, rope/2]; the queries' are the last Tq rows.
            scale: multiplies the scores.
            starts: [B, Tq] int32 first of the Tk positions that a query may see, which never falls within a sequence; None: 0.

        Returns:
            [B, Tq, H, v].
        """


BACKENDS: dict[str, AttentionBackend] = {
    "fused": fused_attention,
    "sdpa": sdpa_attention,
    "reference": reference_attention,
}


def document_starts(documents: Tensor) -> Tensor:
    """Where the document of each position begins, [B, T] int32. documents: [B, T] numbers; a document is a run of equal ones."""
    positions = torch.arange(documents.shape[1], dtype=torch.int32, device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(begins, positions, 0).cummax(1).values
