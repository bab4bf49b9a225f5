"""The kernel of `model.ops.triton.adamw` at the size of V3's output head."""

from model.ops.triton import adamw
from tests.triton.ahead_of_time import Case

CASES = [
    Case(
        "AdamW with moments in bf16",
        adamw._adamw,
        {"weight": "*fp32", "gradient": "*fp32", "exp_avg": "*bf16", "exp_avg_sq": "*bf16"}
        | dict.fromkeys(("factors", "divisor", "skip"), "*fp32")
        | dict.fromkeys(("decay", "rest1", "beta2", "rest2", "eps"), "fp32")
        | {"size": 129280 * 7168, "BLOCK": adamw.BLOCK},
        (r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"),
        num_warps=adamw.WARPS,
        programs=4,
    )
]
