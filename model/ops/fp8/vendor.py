"""The same products by cuBLAS (`torch.nn.functional.scaled_mm` with block scales) and by DeepGEMM, in the layouts these want.

| product                | `scaled_mm`, CUDA ≥ 12.9 on Hopper           | `deep_gemm`                                   |
|------------------------|----------------------------------------------|-----------------------------------------------|
| rows × blocks          | widths in multiples of 128, rows of 4        | bf16 out                                      |
| columns × columns      | likewise                                     | fp32 out, on top of what lies there           |
| grouped rows × blocks  | has no block scales                          | wants each group to begin at a multiple of 128 rows |
| grouped columns        | has no block scales                          | wants the sizes of groups on the host         |

Scales of rows and columns lie column after column for `scaled_mm`, those of blocks too, in columns padded to multiples of 4: a copy
of a 32nd of the factor's bytes, or less. DeepGEMM arranges scales itself. What does not suit either it refuses with an exception.

No GPU has run these yet. A wrapper that is wrong there is found out where implementations are compared, `model.ops.fp8.choose`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from model.ops.fp8.products import IMPLEMENTATIONS, Products, in_columns
from model.ops.fp8.quantize import E4M3, Quantized

SCALED_MM, DEEP_GEMM = "scaled_mm", "deep_gemm"


def scaled_mm(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a bᵀ by cuBLAS.

    Raises:
        RuntimeError, ValueError: a width that is no multiple of 128; a device or a version that cannot.
    """
    m, missing = len(a.data), -len(a.data) % 4
    if missing:
        data = F.pad(a.data.view(torch.uint8), (0, 0, 0, missing)).view(E4M3)
        a = Quantized(data, F.pad(a.scale, (0, 0, 0, missing)))
    if in_columns(b):
        recipe, b_scale = ScalingType.BlockWise1x128, _column_major(b.scale)
    else:
        recipe = ScalingType.BlockWise128x128
        b_scale = F.pad(b.scale, (0, -b.scale.shape[1] % 4)).T  # [⌈K/128⌉ padded, N/128], its columns contiguous
    a_scale = _column_major(a.scale)
    out = F.scaled_mm(a.data, b.data.T, a_scale, ScalingType.BlockWise1x128, b_scale, recipe, output_dtype=dtype)
    return out[:m]


def deep_gemm(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a bᵀ by DeepGEMM.

    Raises:
        RuntimeError: a shape or dtype that it does not take.
    """
    library: Any = import_module("deep_gemm")
    m, n = len(a.data), len(b.data)
    if not in_columns(b):
        out = a.data.new_empty(m, n, dtype=dtype)
        library.fp8_gemm_nt(tuple(a), tuple(b), out, disable_ue8m0_cast=True)
        return out
    out = a.data.new_zeros(m, n, dtype=torch.float32)
    library.fp8_gemm_nt(tuple(a), tuple(b), out, c=out, recipe=(1, 1, 128), disable_ue8m0_cast=True)
    return out.to(dtype)


def _column_major(scale: Tensor) -> Tensor:
    """The same numbers, column after column."""
    return scale.T.contiguous().T


IMPLEMENTATIONS[SCALED_MM] = Products(scaled_mm, None, None)
if find_spec("deep_gemm"):
    IMPLEMENTATIONS[DEEP_GEMM] = Products(deep_gemm, None, None)
