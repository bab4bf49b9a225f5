"""The kernels of `model.ops.triton.assemble` at V3's sizes, 4096 tokens, in the forms that training launches."""

from model.ops.triton import assemble
from tests.triton.ahead_of_time import Case

T, H, NOPE, ROPE, V = 4096, 128, 128, 64, 128
ANGLE = {"cos": "*fp32", "sin": "*fp32"}
SIZES = {"T": T, "H": H, "NOPE": NOPE, "ROPE": ROPE, "V": V, "HEADS": assemble.HEADS}
WIDE = (r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32")  # eight numbers in bf16 at a time


def strides_of(name: str, width: int, heads_first: bool = False) -> dict[str, int]:
    """Of [B, T, H, width], in memory [B, H, T, width] where heads come first; fewer queries may lie as far apart, in a longer q."""
    token, head = (width, T * width) if heads_first else (H * width, width)
    return {f"{name}_batch": T * H * width, f"{name}_token": token, f"{name}_head": head}


def _forward(width: int, queries: int = T) -> Case:
    nopes, pairs, widths = assemble.blocks(NOPE, ROPE, max(width, 1))
    tensors = dict.fromkeys(("q", "kv", "k_rope", "out_q", "out_k"), "*bf16") | {"out_v": "*bf16" if width else None}
    strides = strides_of("q", NOPE + ROPE) | strides_of("kv", NOPE + V)
    strides |= {"k_rope_batch": T * (512 + ROPE), "k_rope_token": 512 + ROPE}
    return Case(
        f"assemble{' and pad' * bool(width)}",
        assemble._assemble,
        {**tensors, **ANGLE, **SIZES, **strides, "Q": queries, "WIDTH": width}
        | {"NOPES": nopes, "PAIRS": pairs, "WIDTHS": widths},
        WIDE,
        num_warps=assemble.WARPS,
    )


def _backward(v_stride: int, heads_first: bool = False, queries: int = T) -> Case:
    nopes, pairs, vs = assemble.blocks(NOPE, ROPE, V)
    tensors = dict.fromkeys(("dq", "dk", "dv", "out_q", "out_kv", "out_rope"), "*bf16")
    widths = {"q": NOPE + ROPE, "k": NOPE + ROPE, "v": v_stride}
    strides = {
        name: stride for x, width in widths.items() for name, stride in strides_of(x, width, heads_first).items()
    }
    return Case(
        f"assemble, backward, values of {v_stride}{', heads first' * heads_first}",
        assemble._assemble_backward,
        {**tensors, **ANGLE, **SIZES, **strides, "Q": queries} | {"NOPES": nopes, "PAIRS": pairs, "VS": vs},
        WIDE,
        num_warps=assemble.WARPS,
    )


CASES = [
    _forward(0),
    _forward(NOPE + ROPE, queries=T // 4),
    _backward(V, queries=T // 4),
    _backward(NOPE + ROPE),
    _backward(NOPE + ROPE, heads_first=True),
]
