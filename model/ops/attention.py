"""Softmax attention for MLA's unequal head sizes (query and key wider than value).

Two backends with one signature: `sdpa`, which PyTorch maps to a fused kernel, and `reference`, the equation itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, in fp32 inside the softmax.

    Args:
        q, k: [B, H, T, d_qk].
        v: [B, H, T, d_v]; d_v may differ from d_qk.
        scale: multiplies the scores.
        mask: [B, 1, T, T] added to the scores, −inf where a query may not look; None is causal.

    Returns:
        [B, H, T, d_v].
    """
    scores = (q @ k.transpose(-1, -2)).float() * scale  # [B, H, T, T]
    if mask is None:
        mask = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    return (scores + mask).softmax(-1).to(v.dtype) @ v  # [B, H, T, d_v]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """`reference_attention` by PyTorch's fused kernels.

    The CPU kernel wants equal head sizes, so there v is padded with zeros that are cut off again; without it PyTorch falls
    back to the unfused path, which keeps all T × T probabilities for the backward pass.
    """
    width = v.shape[-1]
    if q.device.type == "cpu" and width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


BACKENDS: dict[str, AttentionBackend] = {"sdpa": sdpa_attention, "reference": reference_attention}


def document_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention that stays inside a document. [B, T] document numbers → [B, 1, T, T] of 0 and −inf.

    In the dtype of the queries, so that all layers share it: SDPA would turn a bool mask into one of its own in each of them.
    """
    same = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).tril()  # [B, T, T]
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~same, float("-inf")).unsqueeze(1)
