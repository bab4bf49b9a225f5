"""The kernels of `model.ops.triton.rms_norm` at V3's widths: hidden states, latents of queries, latents of keys and values."""

from model.ops.triton import rms_norm
from tests.triton.ahead_of_time import Case

ROWS = 4096
WIDE = (r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32")  # eight numbers in bf16 at a time


def _sizes(width: int, stride: int) -> dict[str, object]:
    height, block, _ = rms_norm.tile(width)
    return {"weight": "*fp32", "inverse": "*fp32", "N": ROWS, "stride": stride} | {
        "D": width, "HEIGHT": height, "BLOCK": block
    }  # fmt: skip


def _forward(width: int, stride: int, dtype: str) -> Case:
    arguments = {"rows": dtype, "normed": dtype, "eps": "fp32", **_sizes(width, stride)}
    warps = rms_norm.tile(width)[2]
    return Case(f"norm of {width} in {dtype}", rms_norm._rms_norm, arguments, WIDE, num_warps=warps)


def _backward(width: int, stride: int, dtype: str) -> Case:
    arguments = dict.fromkeys(("grad", "rows", "d_rows"), dtype) | {"shares": "*fp32", **_sizes(width, stride)}
    warps = 2 * rms_norm.tile(width)[2]
    return Case(f"norm of {width} in {dtype}, backward", rms_norm._rms_norm_backward, arguments, WIDE, num_warps=warps)


CASES = [
    case(width, stride, dtype)
    for width, stride, dtype in (
        (7168, 7168, "*bf16"),
        (1536, 1536, "*bf16"),
        (512, 576, "*bf16"),
        (7168, 7168, "*fp32"),
    )
    for case in (_forward, _backward)
]
