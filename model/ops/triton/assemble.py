# mypy: disallow-untyped-defs=False
"""MLA's queries and keys, rotated and put together, in Triton; what goes in is read once, what comes out written once.

    q_h ← [q_C ; RoPE(q_R)],   k_h ← [k_C ; RoPE(k_R)],   v_h ← [v ; 0] where attention wants values as wide as keys

Forward, a program takes some heads of one token. Backward, it takes all heads of one token, some at a time, so that the gradient of
the rotary key, which they share, is summed in fp32 in a fixed order. Rotating back is rotating with −sin. The first tokens may have
keys and no queries.
"""

import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # at a time; of V3's, 24 numbers of queries a thread
WARPS = 4


def assemble(
    q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, Tq, H, nope + rope], keys [B, Tk, H, nope + rope] and values [B, Tk, H, width], padded with zeros; none if
    width is 0.

    q: [B, Tq, H, nope + rope]. kv: [B, Tk, H, nope + v]. k_rope: [B, Tk, rope]. cos, sin: [Tk, rope/2].
    """
    b, t, h, _ = kv.shape
    qk, rope = q.shape[-1], k_rope.shape[-1]
    out_q, out_k, out_v = q.new_empty(q.shape), q.new_empty(b, t, h, qk), None
    if width:
        out_v = q.new_empty(b, t, h, width)
    given = [readable(x) for x in (q, kv, k_rope)]
    strides = [stride for x in given for stride in x.stride()[:-1]]
    heads = min(HEADS, triton.next_power_of_2(h))
    _assemble[(b * t, triton.cdiv(h, heads))](
        *given, cos.contiguous(), sin.contiguous(), out_q, out_k, out_v, q.shape[1], t, h, *strides,
        qk - rope, rope, kv.shape[-1] - qk + rope, width, *blocks(qk - rope, rope, max(width, 1)), heads, num_warps=WARPS,
    )  # fmt: skip
    return out_q, out_k, q.new_empty(b, t, h, 0) if out_v is None else out_v


def assemble_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, rope: int, v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope, from those of what `assemble` made. dv: [B, Tk, H, v or more]."""
    b, t, h, qk = dk.shape
    nope = qk - rope
    out_q, out_kv, out_rope = dq.new_empty(dq.shape), dq.new_empty(b, t, h, nope + v), dq.new_empty(b, t, rope)
    given = [readable(x) for x in (dq, dk, dv)]
    strides = [stride for x in given for stride in x.stride()[:-1]]
    heads = min(HEADS, triton.next_power_of_2(h))
    _assemble_backward[(b * t,)](
        *given, cos.contiguous(), sin.contiguous(), out_q, out_kv, out_rope, dq.shape[1], t, h, *strides,
        nope, rope, v, *blocks(nope, rope, v), heads, num_warps=WARPS,
    )  # fmt: skip
    return out_q, out_kv, out_rope


def readable(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous. The others may lie in any order: some kernels of attention hand out
    gradients with the heads before the tokens."""
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks(nope: int, rope: int, v: int) -> tuple[int, int, int]:
    """The powers of two that hold the parts of a head; of a rotated part, its pairs."""
    return triton.next_power_of_2(nope), triton.next_power_of_2(rope // 2), triton.next_power_of_2(v)


@triton.jit
def _assemble(
    q, kv, k_rope, cos, sin, out_q, out_k, out_v, Q, T, H,
    q_batch, q_token, q_head, kv_batch, kv_token, kv_head, k_rope_batch, k_rope_token,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    NOPES: tl.constexpr, PAIRS: tl.constexpr, WIDTHS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Reads one token's queries, keys and values of some heads, and its rotary key; writes what `assemble` returns of them. Of T
    tokens the last Q have queries."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = head < H
    batch, position = token // T, token % T
    c, s = load_angle(cos, sin, position, ROPE, PAIRS)
    nope, turned = tl.arange(0, NOPES)[None, :], tl.arange(0, 2 * PAIRS)[None, :]
    is_nope, is_turned = inside & (nope < NOPE), inside & (turned < ROPE)

    query = position - (T - Q)
    if query >= 0:
        of_q = q + batch * q_batch + query * q_token + head * q_head
        to_q = out_q + ((batch * Q + query) * H + head) * (NOPE + ROPE)
        tl.store(to_q + nope, tl.load(of_q + nope, mask=is_nope), mask=is_nope)
        pairs = tl.load(of_q + NOPE + turned, mask=is_turned, other=0.0).to(tl.float32)
        tl.store(to_q + NOPE + turned, turn(pairs, c, s, HEADS, PAIRS), mask=is_turned)

    to_k = out_k + (token * H + head) * (NOPE + ROPE)
    kv += batch * kv_batch + position * kv_token + head * kv_head
    tl.store(to_k + nope, tl.load(kv + nope, mask=is_nope), mask=is_nope)
    k_rope += batch * k_rope_batch + position * k_rope_token
    pairs = tl.load(k_rope + turned, mask=turned < ROPE, other=0.0).to(tl.float32)
    shared = tl.broadcast_to(turn(pairs, c, s, 1, PAIRS), (HEADS, 2 * PAIRS))
    tl.store(to_k + NOPE + turned, shared, mask=is_turned)

    if out_v is not None:
        value = tl.arange(0, WIDTHS)[None, :]
        numbers = tl.load(kv + NOPE + value, mask=inside & (value < V), other=0.0)
        tl.store(out_v + (token * H + head) * WIDTH + value, numbers, mask=inside & (value < WIDTH))


@triton.jit
def _assemble_backward(
    dq, dk, dv, cos, sin, out_q, out_kv, out_rope, Q, T, H,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    NOPES: tl.constexpr, PAIRS: tl.constexpr, VS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Reads the gradients of one token's queries, keys and values; writes those of what they were made of."""
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // T, token % T
    query = position - (T - Q)
    c, s = load_angle(cos, sin, position, ROPE, PAIRS)
    nope, turned, value = tl.arange(0, NOPES)[None, :], tl.arange(0, 2 * PAIRS)[None, :], tl.arange(0, VS)[None, :]
    total = tl.zeros((HEADS, 2 * PAIRS), tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        inside = head < H
        is_nope, is_turned, is_value = inside & (nope < NOPE), inside & (turned < ROPE), inside & (value < V)

        if query >= 0:
            of_q = dq + batch * q_batch + query * q_token + head * q_head
            to_q = out_q + ((batch * Q + query) * H + head) * (NOPE + ROPE)
            tl.store(to_q + nope, tl.load(of_q + nope, mask=is_nope), mask=is_nope)
            pairs = tl.load(of_q + NOPE + turned, mask=is_turned, other=0.0).to(tl.float32)
            tl.store(to_q + NOPE + turned, turn(pairs, c, -s, HEADS, PAIRS), mask=is_turned)

        of_k = dk + batch * k_batch + position * k_token + head * k_head
        of_v = dv + batch * v_batch + position * v_token + head * v_head
        to_kv = out_kv + (token * H + head) * (NOPE + V)
        tl.store(to_kv + nope, tl.load(of_k + nope, mask=is_nope), mask=is_nope)
        tl.store(to_kv + NOPE + value, tl.load(of_v + value, mask=is_value), mask=is_value)
        total += tl.load(of_k + NOPE + turned, mask=is_turned, other=0.0).to(tl.float32)
    shared = turn(tl.sum(total, 0)[None, :], c, -s, 1, PAIRS)
    tl.store(out_rope + token * ROPE + turned, shared, mask=turned < ROPE)


@triton.jit
def load_angle(cos, sin, position, ROPE: tl.constexpr, PAIRS: tl.constexpr):
    """Cosines and sines of one position, both [1, PAIRS]."""
    pair = tl.arange(0, PAIRS)[None, :]
    place, is_pair = position * (ROPE // 2) + pair, pair < ROPE // 2
    return tl.load(cos + place, mask=is_pair, other=0.0), tl.load(sin + place, mask=is_pair, other=0.0)


@triton.jit
def turn(pairs, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Each pair of numbers side by side, turned by its angle. pairs: [HEADS, 2 · PAIRS] fp32."""
    even, odd = tl.split(tl.reshape(pairs, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HEADS, 2 * PAIRS))
