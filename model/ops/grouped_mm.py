"""One matrix product per expert over tokens sorted by expert.

`grouped_mm` is PyTorch's fused kernel; `reference` is the loop it must agree with.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError

GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y[rows of e] = x[rows of e] · weight[e]ᵀ.

    Args:
        x: [M, in], the rows of expert 0 first, then those of expert 1, …
        weight: [E, out, in].
        counts: [E] int64 rows of each expert, summing to M; a count may be 0.

    Returns:
        [M, out] in x's dtype.
    """
    parts = x.split(counts.tolist())
    return torch.cat([part @ w.T for part, w in zip(parts, weight.unbind())])


def fused_grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`reference_grouped_mm` in one kernel; every row must be a multiple of 16 bytes."""
    return F.grouped_mm(x, weight.transpose(-1, -2), offs=counts.cumsum(0).to(torch.int32))


def check_widths(hidden_size: int, moe_intermediate_size: int, dtype: torch.dtype) -> None:
    """Refuse widths whose rows are no multiple of the kernel's 16 bytes.

    Raises:
        ConfigError: one of the widths is.
    """
    step = 16 // dtype.itemsize
    for name, width in {"hidden_size": hidden_size, "moe_intermediate_size": moe_intermediate_size}.items():
        if width % step:
            raise ConfigError(
                f"model.{name}: {width} is no multiple of {step}, which the grouped product needs in {dtype}; "
                f"write {-(-width // step) * step}"
            )


BACKENDS: dict[str, GroupedMM] = {"grouped_mm": fused_grouped_mm, "reference": reference_grouped_mm}
