"""The kernels of `model.ops.triton.routing` at V3's sizes: 8 of 256 experts, from 4 of 8 groups, sequences of 4096."""

from model.ops.triton import routing
from tests.triton.ahead_of_time import Case

T, E, G, KEPT, K = 4096, 256, 8, 4, 8
LOADS = (r"ld\.global\.v4\.b32",)


def _route(normalise: bool) -> Case:
    groups, size, height = routing.blocks(E, G)
    tensors = dict.fromkeys(("logits", "bias", "weights", "shares", "hits"), "*fp32") | {"ids": "*i64"}
    sizes = {"T": T, "scale": "fp32", "E": E, "G": G, "KEPT": KEPT, "K": K, "NORMALISE": normalise}
    blocks = {"GROUPS": groups, "SIZE": size, "KS": K, "HEIGHT": height}
    name = f"route{', weights over their sum' * normalise}"
    return Case(name, routing._route, {**tensors, **sizes, **blocks}, LOADS, num_warps=routing.WARPS)


def _route_backward() -> Case:
    _, block, height = routing.blocks(E, 1)
    names = ("logits", "weights", "frequency", "d_weights", "d_loss", "d_logits")
    tensors = dict.fromkeys(names, "*fp32") | {"ids": "*i64"}
    sizes = {"T": T, "scale": "fp32", "E": E, "K": K, "NORMALISE": True, "BLOCK": block, "KS": K, "HEIGHT": height}
    loads_and_stores = (*LOADS, r"st\.global\.v4\.b32")
    return Case("route, backward", routing._route_backward, tensors | sizes, loads_and_stores, num_warps=routing.WARPS)


CASES = [
    _route(True),
    _route(False),
    Case(
        "balance loss",
        routing._balance,
        dict.fromkeys(("shares", "hits", "frequency", "losses"), "*fp32")
        | {"T": T, "parts": 512, "top_k": K, "E": E, "BLOCK": E, "PARTS": routing.PARTS},
        LOADS,
        num_warps=routing.WARPS,
    ),
    _route_backward(),
]
