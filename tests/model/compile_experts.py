"""The kernels of `model.ops.triton.swiglu` and `.rows` at the widths of DeepSeek-V3's experts: D 7168, F 2048, K 8."""

from model.ops.triton import rows, swiglu
from tests.triton.ahead_of_time import Case

LOADS, STORES = r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"  # eight numbers of bf16 at once
HALVES = {"gate": "*bf16", "up": "*bf16", "F": 2048, "gate_stride": 4096, "up_stride": 4096}
WEIGHTS, DW, PLACE = {"weights": "*fp32"}, {"d_weights": "*fp32"}, {"place": "*i64"}


def _backward(**weights: str) -> Case:
    arguments = HALVES | {"grad": "*bf16", "d_gate_up": "*bf16", "product": "*bf16", "grad_stride": 2048}
    name = "SwiGLU, backward" + ", weighted" * bool(weights)
    options = swiglu.block(2048)
    return Case(
        name, swiglu._swiglu_backward, arguments | DW | weights | {"BLOCK": options["BLOCK"]}, (LOADS, STORES, r"ex2\.approx"),
        num_warps=options["num_warps"],
    )  # fmt: skip


def _rows(name: str, kernel: object, **arguments: object) -> Case:
    options = swiglu.block(7168)
    sizes = {"D": 7168, "stride": 7168, "K": 8, "BLOCK": options["BLOCK"]}
    return Case(name, kernel, PLACE | sizes | arguments, (LOADS, STORES), num_warps=options["num_warps"])


CASES = [
    Case(
        "SwiGLU, weighted",
        swiglu._swiglu,
        HALVES | WEIGHTS | {"product": "*bf16", "BLOCK": swiglu.block(2048)["BLOCK"]},
        (LOADS, STORES, r"ex2\.approx"),
        num_warps=swiglu.block(2048)["num_warps"],
    ),
    _backward(),
    _backward(**WEIGHTS),
    _rows("rows of tokens spread", rows._spread, tokens="*bf16", rows="*bf16"),
    _rows("rows of tokens summed", rows._sum_up, rows="*bf16", tokens="*bf16"),
]  # fmt: skip
