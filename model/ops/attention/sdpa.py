"""Attention by PyTorch's own kernels, for any device and dtype."""

import torch.nn.functional as F
from torch import Tensor

from model.ops.attention.assembled import mask_of
from model.ops.attention.reference import assemble
from model.rope import Rotation


def sdpa_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Rotation, scale: float, starts: Tensor | None = None
) -> Tensor:
    """`AttentionBackend` by `F.scaled_dot_product_attention`.

    The CPU kernel wants equal head sizes, so there v is padded with zeros that are cut off again; without it PyTorch falls
    back to the unfused path, which keeps all Tq × Tk probabilities for the backward pass.
    """
    q, k, v = assemble(q, kv, k_rope, rotation)
    width = v.shape[-1]
    if q.device.type == "cpu" and width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    mask = mask_of(starts, q, k)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width].transpose(1, 2)  # [B, Tq, H, v]
