"""The kernels of `model.ops.triton.assemble` at V3's sizes, 4096 tokens, in the forms that training launches."""

from model.ops.triton import assemble
from tests.triton.ahead_of_time import Case

T, H, NOPE, ROPE, V = 4096, 128, 128, 64, 128
ANGLE = {"cos": "*fp32", "sin": "*fp32"}
SIZES = {"T": T, "H": H, "NOPE": NOPE, "ROPE": ROPE, "V": V, "HEADS": assemble.HEADS}
WIDE = (r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32")  # eight numbers in bf16 at a time


def _forward(width: int) -> Case:
    nopes, pairs, widths = assemble.blocks(NOPE, ROPE, max(width, 1))
    tensors = dict.fromkeys(("q", "kv", "k_rope", "out_q", "out_k"), "*bf16") | {"out_v": "*bf16" if width else None}
    strides = {"q_token": H * (NOPE + ROPE), "q_head": NOPE + ROPE, "kv_token": H * (NOPE + V), "kv_head": NOPE + V}
    return Case(
        f"assemble{' and pad' * bool(width)}",
        assemble._assemble,
        {**tensors, **ANGLE, **SIZES, **strides, "k_rope_token": 512 + ROPE, "WIDTH": width}
        | {"NOPES": nopes, "PAIRS": pairs, "WIDTHS": widths},
        WIDE,
        num_warps=assemble.WARPS,
    )


def _backward(v_stride: int) -> Case:
    nopes, pairs, vs = assemble.blocks(NOPE, ROPE, V)
    tensors = dict.fromkeys(("dq", "dk", "dv", "out_q", "out_kv", "out_rope"), "*bf16")
    strides = {f"{name}_token": H * (NOPE + ROPE) for name in "qk"} | {f"{name}_head": NOPE + ROPE for name in "qk"}
    return Case(
        f"assemble, backward, values of {v_stride}",
        assemble._assemble_backward,
        {**tensors, **ANGLE, **SIZES, **strides, "v_token": H * v_stride, "v_head": v_stride}
        | {"NOPES": nopes, "PAIRS": pairs, "VS": vs},
        WIDE,
        num_warps=assemble.WARPS,
    )


CASES = [_forward(0), _forward(NOPE + ROPE), _backward(V), _backward(NOPE + ROPE)]
