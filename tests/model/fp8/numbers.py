"""E4M3 written down a second time, in numpy and float64, with the errors that it must have."""

import math

import numpy as np
import torch
from torch import Tensor

from model.ops.fp8.quantize import TILE, Quantized

# Of a number m·2ᵉ, 1 ≤ m < 2, the error is uniform within ± half a step 2ᵉ⁻³. Its variance is 4ᵉ/768, and 1/(768 m²) of its square.
# Where magnitudes spread over octaves, m is as frequent as 1/m, in numbers and in squares alike: ∫ 1/(m³ ln 2) dm = 0.375/ln 2.
ERROR = math.sqrt(0.375 / math.log(2) / 768)  # 2.65 %: the root mean square of error / x, and ‖error‖ / ‖x‖
# The mean of error / x. A number v stands for all x from a to b, ∫ v/x² dx = v (1/a - 1/b). Above a power of two the step is larger
# than below, so that more is rounded down to it than up.
_CELLS = [
    (1.0, 1.0, 1.0625),
    *((1 + k / 8, 1 + k / 8 - 0.0625, 1 + k / 8 + 0.0625) for k in range(1, 8)),
    (2.0, 1.9375, 2.0),
]
BIAS = sum(v * (1 / a - 1 / b) for v, a, b in _CELLS) / math.log(2) - 1  # -0.07 %


def value_of(code: int) -> float:
    """The number of an E4M3 byte: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, one NaN of each sign."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


POSITIVE = np.array([value_of(code) for code in range(0x7F)])  # 0 to 448, in the order of their bytes


def nearest(quotient: np.ndarray) -> np.ndarray:
    """The nearest of all numbers of E4M3, of two the one with the even mantissa: brute force, finite numbers only."""
    distance = np.abs(np.abs(quotient)[..., None].astype(np.float64) - POSITIVE)  # [..., 127]
    low = distance.argmin(-1)
    high = POSITIVE.size - 1 - distance[..., ::-1].argmin(-1)
    return np.copysign(POSITIVE[np.where(low % 2 == 0, low, high)], quotient)


def scales_of(largest: np.ndarray, power_of_two: bool) -> np.ndarray:
    """max / 448 in fp32, or the power of two at or above it."""
    scale = np.maximum(largest.astype(np.float32), np.float32(2.0**-100)) / np.float32(448)
    return np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32) if power_of_two else scale


def rows_of(x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """A loop over tiles: values [M, K] of E4M3, scales [M, ⌈K/128⌉]."""
    parts = [x[:, start : start + TILE] for start in range(0, x.shape[1], TILE)]
    if not parts:
        return x, x
    scales = [scales_of(np.abs(part).max(1), power_of_two) for part in parts]
    values = [nearest(part / scale[:, None]) for part, scale in zip(parts, scales)]
    return np.concatenate(values, 1), np.stack(scales, 1)


def exact(x: Quantized) -> Tensor:
    """data · scale in float64, of rows, columns or blocks; a product of two fp32 numbers is exact there."""
    rows = x.data.shape[-2] // x.scale.shape[-2] if x.scale.shape[-2] == x.data.shape[-2] else TILE
    scale = x.scale.double().repeat_interleave(TILE, -1)[..., : x.data.shape[-1]]
    return x.data.double() * scale.repeat_interleave(rows, -2)[..., : x.data.shape[-2], :]


def steps(x: Tensor, scale: Tensor) -> Tensor:
    """The distance of E4M3's numbers around x of the given scale, float64."""
    exponent = torch.frexp(x.double().abs() / scale)[1] - 1
    return torch.exp2(exponent.clamp(-6, 8).double() - 3) * scale


def norm_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected).norm() / expected.norm())


def slope(found: Tensor, expected: Tensor) -> float:
    """How much too large: ⟨found, expected⟩ / ‖expected‖² − 1."""
    return float((found.double() * expected).sum() / expected.square().sum()) - 1
