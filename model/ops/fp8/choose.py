"""Which kernels compute FP8 on a device, and whose matrix products: not known by name, but measured at start-up.

Every candidate at hand multiplies the shapes of the model. What raises, or differs from the emulation by more than rounding,
is left out; of the rest the fastest is used for that shape, and a line for the log has everybody's rate. The first rank measures
and the others follow, so that all ranks compute alike. What hangs, or makes the device fault, cannot be left out: such a run ends
there.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ConfigError
from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Kernels, Reference
from model.ops.fp8.products import (
    COLUMNS,
    EMULATION,
    GROUPS,
    IMPLEMENTATIONS,
    ROWS,
    WITHIN_GROUPS,
    Chosen,
    Products,
    Shape,
)
from model.ops.fp8.quantize import TILE, quantize_blocks, quantize_columns, quantize_rows
from model.ops.measure import reason, times

CANDIDATES = ("triton", "scaled_mm", "deep_gemm")
# Of a row's numbers in 128 columns, relative. Rounding to bf16 makes a quarter of it, sums of 14 bits a fiftieth; the last of
# 128 tiles with its neighbour's scale six times as much and more, in those rows where it is among the largest.
LARGEST_ERROR = 1e-2
HOPPER = (9, 0)
# Maps with one input, the gradients of which are summed in fp32 (`model.ops.fp8.arithmetic`).
READ_TOGETHER = {"gate_proj", "up_proj", "gate_up_proj", "q_proj", "q_a_proj", "kv_a_proj_with_mqa"}


def kernels_for(device: torch.device) -> Kernels:
    """The reference on a CPU, which emulates FP8; Triton's on a GPU.

    Raises:
        ConfigError: a GPU without Triton, or one that does not multiply E4M3 as these kernels do.
    """
    if device.type == "cpu":
        return Reference()
    if not find_spec("triton"):
        raise ConfigError(
            "precision.fp8 = true: needs Triton on a GPU, which is not installed; pip install 'rorqual[kernels]'"
        )
    if torch.cuda.get_device_capability(device) < HOPPER:
        raise ConfigError(
            f"precision.fp8 = true: {torch.cuda.get_device_name(device)} is older than Hopper, for which the kernels are "
            "written; set it to false"
        )
    import model.ops.fp8.vendor  # noqa: F401  further implementations
    from model.ops.fp8.triton import TritonKernels

    return TritonKernels()


class Workload(NamedTuple):
    """A product as training will ask for it."""

    shape: Shape
    rows: int  # M
    groups: int = 1


def workloads(model: nn.Module, rows: int, rows_of_experts: int, parts: int, dtype: torch.dtype) -> list[Workload]:
    """The products of a model's modules in FP8, each shape once.

    Args:
        model: has `fp8` on the modules that multiply so.
        rows: tokens that a process computes at a time.
        rows_of_experts: their copies, one for each expert that a token goes to.
        parts: processes among which the experts of a layer are split.
        dtype: that the model computes in.
    """
    found: dict[Workload, None] = {}
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "fp8", None), Fp8):
            continue
        for name, weight in module.named_parameters():
            *experts, n, k = weight.shape
            last = f"{path}.{name}".removesuffix(".weight").rpartition(".")[2]
            if last == "gate_up_proj":  # two matrices
                n //= 2
            if experts:
                sizes, by_blocks, by_columns = (rows_of_experts, experts[0] // parts), GROUPS, WITHIN_GROUPS
            else:
                sizes, by_blocks, by_columns = (rows, 1), ROWS, COLUMNS
            fprop, wgrad = Shape(by_blocks, n, k, dtype), Shape(by_columns, n, k, dtype)
            dgrad = Shape(by_blocks, k, n, torch.float32 if last in READ_TOGETHER else dtype)
            found |= dict.fromkeys(Workload(shape, *sizes) for shape in (fprop, dgrad, wgrad))
    return list(found)


def choose(
    kernels: Kernels,
    device: torch.device,
    wanted: Callable[[], list[Workload]],
    first: Callable[[Callable[[], Any]], Any],
) -> list[str]:
    """Let `kernels` compute each shape by whom it suits best. Returns what the log should say.

    Args:
        wanted: what will be computed.
        first: runs a function on one rank, and gives its result to all.

    Raises:
        ConfigError: a product that nobody computes, or whose implementation only the first rank has.
    """
    if not isinstance(kernels, Chosen) or device.type == "cpu":
        return ["fp8: emulated in plain PyTorch on this CPU"]
    kernels.choice, lines = first(lambda: choices(wanted(), CANDIDATES, device))
    if missing := set(kernels.choice.values()) - IMPLEMENTATIONS.keys():
        raise ConfigError(
            f"precision.fp8 = true: the first rank multiplies by {', '.join(sorted(missing))}, which is not installed on this one; "
            "install it for every rank or for none"
        )
    return lines


def choices(work: Iterable[Workload], names: Sequence[str], device: torch.device) -> tuple[dict[Shape, str], list[str]]:
    """The fastest implementation that is right, for each shape, and a line about each.

    Raises:
        ConfigError: all are wrong.
    """
    chosen, lines = {}, []
    for workload in work:
        trials = try_all(workload, names, device)
        best = min(trials, key=lambda name: trials[name].seconds)
        if trials[best].why:
            reasons = "; ".join(f"{name}: {trial.why}" for name, trial in trials.items())
            raise ConfigError(f"precision.fp8 = true: nothing here computes {describe(workload)}: {reasons}")
        chosen[workload.shape] = best
        flops = 2 * workload.rows * workload.shape.n * workload.shape.k
        told = (
            f"{name} – ({trial.why})" if trial.why else f"{name} {flops / trial.seconds / 1e12:.3g}"
            for name, trial in trials.items()
        )
        lines.append(f"fp8 {describe(workload)}: {', '.join(told)} TFLOP/s → {best}")
    return chosen, lines


def describe(workload: Workload) -> str:
    shape, dtype = workload.shape, str(workload.shape.dtype).removeprefix("torch.")
    groups = f" in {workload.groups} groups" if workload.groups > 1 else ""
    return f"{shape.product} [{workload.rows}×{shape.n}×{shape.k}]{groups} to {dtype}"


class Trial(NamedTuple):
    """What came of one implementation."""

    seconds: float = math.inf
    why: str = ""  # it is left out; empty where it is right


def try_all(workload: Workload, names: Sequence[str], device: torch.device) -> dict[str, Trial]:
    """Run every implementation, compare it with the emulation, and time those that are right in turn."""
    operands = draw(workload, device)
    expected = of(EMULATION, workload.shape.product)(*operands, torch.float32)  # type: ignore[misc]
    runs, trials = {}, {}
    for name in names:
        multiply = of(name, workload.shape.product)
        why = "not here" if multiply is None else ""
        if multiply:
            run = partial(multiply, *operands, workload.shape.dtype)
            try:
                if not agrees(run(), expected):
                    why = "wrong"
            except Exception as error:
                why = reason(error)
            else:
                runs[name] = run
        trials[name] = Trial(why=why)
    right = {name: run for name, run in runs.items() if not trials[name].why}
    return trials | {name: Trial(seconds) for name, seconds in times(right, device).items()}


def of(name: str, product: str) -> Callable[..., Tensor] | None:
    """An implementation's function for a product; None where it has none, or is not installed."""
    products = IMPLEMENTATIONS.get(name, Products(None, None, None))
    return {GROUPS: products.multiply_groups, WITHIN_GROUPS: products.multiply_within_groups}.get(
        product, products.multiply
    )


def draw(workload: Workload, device: torch.device) -> tuple[Any, ...]:
    """Factors of normal numbers, each tile with a magnitude of its own, and the sizes of equal groups.

    Without these magnitudes all scales would be nearly one, and a wrong one as good.
    """
    (product, n, k, _), m, groups = workload
    normal = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))

    def factor(height: int, width: int, *shape: int) -> Tensor:
        """shape [..., rows, columns] of tiles height × width."""
        rows, columns = shape[-2:]
        sizes = normal(*shape[:-2], -(-rows // height), -(-columns // width)).exp_()
        sizes = sizes.repeat_interleave(height, -2)[..., :rows, :].repeat_interleave(width, -1)[..., :columns]
        return sizes.mul_(normal(shape))

    of_rows, of_columns, of_blocks = (partial(factor, *tile) for tile in ((1, TILE), (TILE, 1), (TILE, TILE)))
    counts = torch.full((groups,), m // groups, device=device)
    counts[: m % groups] += 1
    if product == ROWS:
        return quantize_rows(of_rows(m, k)), quantize_blocks(of_blocks(n, k))
    if product == COLUMNS:
        return quantize_columns(of_columns(m, n)), quantize_columns(of_columns(m, k))
    if product == GROUPS:
        return quantize_rows(of_rows(m, k)), quantize_blocks(of_blocks(groups, n, k)), counts
    return quantize_columns(of_columns(m, n), counts), quantize_columns(of_columns(m, k), counts), counts


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether every row is right but for rounding, in each 128 columns (and what is left over, shared among them)."""
    if found.shape != expected.shape:
        return False
    parts = max(1, expected.shape[-1] // TILE)
    return all(
        bool(((f.float() - e).norm(dim=-1) <= LARGEST_ERROR * e.norm(dim=-1)).all())
        for f, e in zip(found.tensor_split(parts, -1), expected.tensor_split(parts, -1))
    )
