"""Inputs of attention, and patterns of documents; shapes are of different numbers, so that no two can be mixed up unnoticed."""

import torch

from model.ops.attention import document_starts
from model.rope import Rotation


def make_inputs(B=2, T=17, H=3, nope=8, rope=4, v=6, dtype=torch.float32, requires_grad=True, queries=None):
    """q, kv, k_rope and the rotation, as `AttentionBackend` takes them; k_rope is a view, as the model makes it. Where queries are
    fewer, all are views of a longer sequence, of which nothing else may be read."""
    q = torch.randn(B, T, H, nope + rope, dtype=dtype)
    kv = torch.randn(B, T, H, nope + v, dtype=dtype)
    k_rope = torch.randn(B, T, 10 + rope, dtype=dtype)[..., 10:]
    if queries is not None:
        q = q[:, T - queries :]
        kv, k_rope = (torch.cat((x, torch.full_like(x, float("nan"))), 1)[:, :T] for x in (kv, k_rope))
    angle = torch.arange(T).unsqueeze(-1) * torch.rand(rope // 2)
    return *(x.requires_grad_(requires_grad) for x in (q, kv, k_rope)), Rotation(angle.cos(), angle.sin())


def of_last(starts, queries):
    """Starts of the last queries."""
    return None if starts is None else starts[:, starts.shape[1] - queries :]


def starts_of(*rows):
    """Starts of documents of these lengths, one list a sequence."""
    numbers = [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in rows]
    return document_starts(torch.stack(numbers))
