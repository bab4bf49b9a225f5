"""Values and gradients of FP8's linear maps, feed-forward networks and experts against float64, with the error that E4M3 has.

An operand carries ERROR (2.65 %) for every rounding on its way, and these add up in squares: a result of n roundings is wrong by
√n · ERROR, and by n · BIAS (-0.07 %) too small. Bands are stated, since silu takes roundings larger or smaller, and since a tile's
largest number has none with fp32 scales, which counts where few tokens make a sum.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Reference
from tests.model.fp8.faults import FAULTS
from tests.model.fp8.numbers import BIAS, ERROR, norm_error, slope

TOKENS, WIDTH = 300, 256
COUNTS = [0, 130, 128, 0, 42]

Maps = Callable[..., tuple[Tensor, ...]]  # of x and weights


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int, seed: int) -> Tensor:
    """Its blocks of 128 × 128 have magnitudes of their own, from 1 to 4."""
    w = gaussian(*shape, seed=seed) / math.sqrt(shape[-1])
    blocks = torch.exp2(
        2 * torch.rand(-(-shape[-2] // 128), -(-shape[-1] // 128), generator=torch.Generator().manual_seed(seed))
    )
    return w * blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[-2], : shape[-1]]


def outliers(*shape: int, seed: int) -> Tensor:
    """Gradients: every 16th token's are 2¹⁶ times those of the others."""
    g = gaussian(*shape, seed=seed)
    g[::16] *= 2**16
    return g


def run(maps: Maps, x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """Outputs, and gradients of x and of each weight."""
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    outputs = maps(*leaves)
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, list(grads)))


def compare(
    fp8: Maps, plain: Maps, x: Tensor, weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of found and expected: outputs, gradient of x, gradients of weights."""
    found = run(fp8, x, weights, grads)
    expected = run(plain, x.double(), [w.double() for w in weights], [g.double() for g in grads])
    return list(zip((*found[0], *found[1]), (*expected[0], *expected[1])))


def check(name: str, pair: tuple[Tensor, Tensor], roundings: float, band: float, bias: float = 0.01) -> None:
    """The error of the norm is that of so many roundings, give or take a factor of `band`; numbers shrink by theirs ± `bias`."""
    found, expected = pair
    error = norm_error(found, expected) / (math.sqrt(roundings) * ERROR)
    assert 1 / band < error < band, f"{name}: error {error:.2f} of what {roundings} roundings make"
    rest = slope(found, expected) - roundings * BIAS
    assert abs(rest) < bias, f"{name}: {rest:+.4f} too large"


def check_linear(keeps_input: bool = False) -> None:
    """Of one map and of two that read the same x. Every product has two factors. Tokens of small gradients are looked at alone."""
    fp8 = Fp8(Reference(), keeps_input)
    x = gaussian(TOKENS, WIDTH, seed=0) * torch.exp2(3 * gaussian(TOKENS, 1, seed=1))
    weights = [weight(WIDTH, WIDTH, seed=2), weight(136, WIDTH, seed=3)]
    for n in (1, 2):
        grads = [outliers(TOKENS, len(w), seed=4) for w in weights[:n]]
        pairs = compare(fp8.linear, lambda x, *ws: tuple(x @ w.T for w in ws), x, weights[:n], grads)
        small = torch.arange(TOKENS) % 16 > 0
        d_x = pairs.pop(n)
        for name, pair in zip(["y"] * n + ["dW"] * n, pairs, strict=True):
            check(name, pair, 2, 1.2)
        check("dx of tokens with small gradients", (d_x[0][small], d_x[1][small]), 2, 1.1)
        check("dx", d_x, 2, 1.1)


@pytest.mark.parametrize("keeps_input", [False, True])
def test_a_linear_map_has_the_error_of_two_factors_forward_and_backward(keeps_input: bool) -> None:
    check_linear(keeps_input)


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("scales_of_rows_along_tokens_in_wgrad", "dW"),
        ("blocks_transposed_without_their_scales", "dx of tokens with small gradients"),
        ("gradients_in_tiles_along_tokens_in_dgrad", "dx of tokens with small gradients"),
        ("scale_of_the_next_tile", "y"),
        ("scale_of_a_whole_row_behind_the_sum", "y"),
        ("scales_of_powers_of_two_rounded_to_the_nearest", "y"),
    ],
)
def test_a_planted_fault_in_a_linear_map_is_caught(fault: str, where: str) -> None:
    with FAULTS[fault](), pytest.raises(AssertionError, match=f"^{where}: "):
        check_linear()


# Gate and up are products of x and W, 2 roundings each. y: both, the rounding of silu(gate) · up, and W. ddown: the same with one
# more of gate and one of up, as they were kept, and dy in W's place. dup: dy, W, gate's 3, its own, and x. dgate: up's 3 in the
# place of gate's, and of these a part, by silu'. dx: the mean of both.
ROUNDINGS = {"y": 6, "dx": 7.5, "dgate": 8, "dup": 7, "ddown": 8}


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    parts = x.split(COUNTS)
    outputs = [feed_forward(part, *gu.chunk(2), d) for part, gu, d in zip(parts, gate_up, down)]
    return torch.cat(outputs) * row_weights.unsqueeze(1)


def test_a_feed_forward_network_has_the_error_of_its_roundings() -> None:
    x, grad = gaussian(TOKENS, 144, seed=0), outliers(TOKENS, 144, seed=1)
    weights = [weight(200, 144, seed=2), weight(200, 144, seed=3), weight(144, 200, seed=4)]
    fp8 = Fp8(Reference())
    pairs = compare(lambda *a: (fp8.feed_forward(*a),), lambda *a: (feed_forward(*a),), x, weights, [grad])
    for (name, roundings), pair in zip(ROUNDINGS.items(), pairs, strict=True):
        check(name, pair, roundings, 1.15)


def test_experts_are_feed_forward_networks_of_their_own() -> None:
    """A gradient of zero for experts without rows, and for each of the others the error of its roundings."""
    x, grad = gaussian(TOKENS, 144, seed=0), outliers(TOKENS, 144, seed=1)
    gate_up = torch.stack([torch.cat([weight(136, 144, seed=s), weight(136, 144, seed=s + 9)]) for s in range(5)])
    down = torch.stack([weight(144, 136, seed=s) for s in range(5)])
    row_weights = torch.exp2(-torch.rand(TOKENS, generator=torch.Generator().manual_seed(5)))
    fp8, counts = Fp8(Reference()), torch.tensor(COUNTS)
    (y, d_x, d_row_weights, d_gate_up, d_down) = compare(
        lambda x, w, gu, d: (fp8.experts(x, counts, w, gu, d),),
        lambda *a: (experts(*a),),
        x,
        [row_weights, gate_up, down],
        [grad],
    )
    check("y", y, ROUNDINGS["y"], 1.15)
    check("dw", d_row_weights, ROUNDINGS["ddown"], 1.3, bias=0.03)  # 19 tokens of large gradients make the norm
    check("dx", d_x, ROUNDINGS["dx"], 1.15)
    for expert, count in enumerate(COUNTS):
        of_weights = {
            "dgate": d_gate_up[0][expert][:136],
            "dup": d_gate_up[0][expert][136:],
            "ddown": d_down[0][expert],
        }
        expected = (*d_gate_up[1][expert].chunk(2), d_down[1][expert])
        for (name, found), true in zip(of_weights.items(), expected, strict=True):
            if count:
                check(f"{name} of expert {expert}", (found, true), ROUNDINGS[name], 1.3, bias=0.02)
            else:
                assert (found == 0).all()
