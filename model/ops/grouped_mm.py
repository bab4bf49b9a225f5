"""The products of rows, sorted by expert, with the matrices of their experts, as operations without a derivative.

    Fprop   y  = x Wᵀ       `multiply_groups(x, …, W)`
    Dgrad   dx = dy W       `multiply_groups(dy, …, W.mT)`
    Wgrad   dW = dyᵀ x      `multiply_within_groups(dy, …, x, …)`

Rows may be taken by an index: row m of the experts is then x[index[m]], and those copies of x are made a few at a time on a CPU, in
its cache, and never lie in memory. On a GPU the products are PyTorch's. In bf16 on sm_90 and sm_100 they ask the host for nothing;
in other dtypes and elsewhere each of them waits for the host to read the counts, and multiplies expert by expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ConfigError, ModelConfig
from model.ops import cpu
from model.ops.operation import operation

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


@operation(
    "multiply_groups(Tensor x, Tensor? index, Tensor weight, Tensor counts) -> Tensor",
    lambda x, index, weight, counts: x.new_empty(len(x) if index is None else len(index), weight.shape[1]),
)
def multiply_groups(x: Tensor, index: Tensor | None, weight: Tensor, counts: Tensor) -> Tensor:
    """`reference_grouped_mm` of the rows x[index]."""
    if x.is_cuda:
        return F.grouped_mm(_take(x, index), weight.mT, offs=_ends(counts))
    library = cpu.library("experts") if cpu.takes(x, weight) else None
    if library is None:
        return reference_grouped_mm(_take(x, index), weight, counts)
    x = cpu.unit_stride(x)
    weight = weight if 1 in weight.stride()[1:] else weight.contiguous()
    y = x.new_empty(len(x) if index is None else len(index), weight.shape[1])
    library.multiply_groups(
        *cpu.numbers(len(counts), *y.shape, x.shape[1]), *_rows(x, index),
        cpu.address(weight), *cpu.numbers(*weight.stride()), cpu.address(counts), cpu.address(y), cpu.threads(),
    )  # fmt: skip
    return y


@operation(
    "multiply_within_groups(Tensor dy, Tensor? dy_index, Tensor x, Tensor? x_index, Tensor counts) -> Tensor",
    lambda dy, dy_index, x, x_index, counts: x.new_empty(len(counts), dy.shape[1], x.shape[1]),
)
def multiply_within_groups(
    dy: Tensor, dy_index: Tensor | None, x: Tensor, x_index: Tensor | None, counts: Tensor
) -> Tensor:
    """dW[e] = Σ dy[m]ᵀ x[m] over the rows m of e; zero for an expert without rows. [M, out], [M, in] → [E, out, in]."""
    if x.is_cuda:
        dy, x = _take(dy, dy_index), _take(x, x_index)
        if not len(x):  # refused by PyTorch's (pull request 192497)
            return x.new_zeros(len(counts), dy.shape[1], x.shape[1])
        dw = F.grouped_mm(dy.T, x, offs=_ends(counts))
        # Of an expert without rows some GPUs leave what lay in memory (B200, pytorch issue 172439).
        return dw.masked_fill_((counts == 0)[:, None, None], 0)
    library = cpu.library("experts") if cpu.takes(dy, x) else None
    if library is None:
        parts = [_take(t, index).split(counts.tolist()) for t, index in ((dy, dy_index), (x, x_index))]
        return torch.stack([a.T @ b for a, b in zip(*parts)])
    dy, x = cpu.unit_stride(dy), cpu.unit_stride(x)
    dw = x.new_empty(len(counts), dy.shape[1], x.shape[1])
    library.multiply_within_groups(
        *cpu.numbers(*dw.shape), *_rows(dy, dy_index), *_rows(x, x_index), cpu.address(counts), cpu.address(dw),
        cpu.threads(),
    )  # fmt: skip
    return dw


def examine(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What the log should say of the products of a run's experts.

    Raises:
        ConfigError: the device cannot compute them.
    """
    if device.type != "cuda" or not config.n_moe_layers:
        return []
    check_widths(config.hidden_size, config.moe_intermediate_size, dtype)
    major, minor = torch.cuda.get_device_capability(device)
    if dtype == torch.bfloat16 and major in (9, 10):
        return []
    return [
        f"experts in {dtype} on sm_{major}{minor}: PyTorch's grouped product waits for the host in every layer; "
        "it does not in bf16 on sm_90 and sm_100"
    ]


def check_widths(hidden_size: int, moe_intermediate_size: int, dtype: torch.dtype) -> None:
    """Refuse widths whose rows are no multiple of the 16 bytes that PyTorch's grouped product reads at once.

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


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def _rows(x: Tensor, index: Tensor | None) -> tuple[object, ...]:
    """Where rows begin, how far apart they lie, and which are meant."""
    return *cpu.rows(x), cpu.address(index)
