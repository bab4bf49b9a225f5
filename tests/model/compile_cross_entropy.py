"""The kernel of `model.ops.triton.cross_entropy` in the forms that training launches at V3's sizes."""

from model.ops.triton import cross_entropy
from tests.triton.ahead_of_time import Case

V = 129280


def _softmax_loss(dtype: str, gradient: bool) -> Case:
    return Case(
        f"softmax loss of {dtype}{', gradient in place' * gradient}",
        cross_entropy._softmax_loss,
        {"logits": dtype, "labels": "*i64", "ratio": "*fp32", "losses": "*fp32", "V": V, "stride": V}
        | {"GRADIENT": gradient, "BLOCK": cross_entropy.BLOCK},
        (r"ld\.global\.v4\.b32", r"ex2\.approx", *([r"st\.global\.v4\.b32"] if gradient else [])),
        num_warps=cross_entropy.WARPS,
        programs=4,
    )


CASES = [_softmax_loss("*bf16", True), _softmax_loss("*bf16", False), _softmax_loss("*fp32", True)]
