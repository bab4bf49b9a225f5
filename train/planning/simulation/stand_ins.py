"""What takes the place of what fake tensors cannot do, or what a CPU does otherwise than a GPU, while a step is simulated.

Fake tensors have shapes and storages but no memory. Those of a GPU cannot be made where PyTorch has none, so all are a CPU's; where
code asks whether a tensor is a GPU's, it is told so, and kernels are stood for by their results.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

import model.ops.cpu
import parallel.build
import parallel.ddp
import parallel.overlap
import parallel.step
from model.ops.attention.assembled import Assembled
from model.ops.fp8.kernels import SwiGLUGradients
from model.ops.fp8.products import Chosen
from model.ops.fp8.quantize import E4M3, TILE, Quantized, padded_rows
from parallel.expert import WAIT_FOR_ROWS, AllToAllDispatcher
from parallel.meshes import Meshes
from train.optimizer import AdamWBf16Moments
from train.planning.simulation.live_bytes import WAITS, replaced
from train.planning.simulation.load import Load

ops = torch.ops.rorqual


@contextmanager
def stand_ins(load: Load, on_gpu: bool) -> Iterator[None]:
    """Let all of them stand in inside."""
    with ExitStack() as stack:
        for owner, name, by in (
            (parallel.build, "Meshes", _meshes),
            (parallel.step, "Pending", lambda *_: None),
            (nn.Module, "to_empty", _to_empty),
            (nn.parallel.distributed, "_verify_param_shape_across_processes", lambda *_: None),
            (nn.parallel.distributed, "_sync_module_states", lambda **_: None),
            (parallel.ddp, "_sum_over_ranks", _sum_over_ranks),
            (
                AdamWBf16Moments,
                "step",
                (lambda _: None) if on_gpu else _update,
            ),  # on a GPU a kernel that works in place
            (AllToAllDispatcher, "rows", lambda _, *counts: load.rows(*counts)),
            *(_of_a_gpu() if on_gpu else ()),
        ):
            stack.enter_context(replaced(owner, name, by))
        yield


def _meshes(*args: Any) -> Meshes:
    """Their numbers are read."""
    with unset_fake_temporarily():
        return Meshes(*args)


def _to_empty(whole: nn.Module, *, device: torch.device, recurse: bool = True) -> nn.Module:
    """PyTorch's swaps tensors, which fake ones refuse."""
    for module in whole.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            module.register_parameter(name, empty)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    for module in whole.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
            for sharded in group.fsdp_params:
                sharded.reset_sharded_param()
    return whole


def _sum_over_ranks(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A message that answers at once has no result."""
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@torch.no_grad()
def _update(optimizer: AdamWBf16Moments) -> None:
    """Without asking which step it is, and whether to skip it."""
    for group in optimizer.param_groups:
        stepping = [parameter for parameter in group["params"] if parameter.grad is not None]
        optimizer.step_in_buckets(group, stepping, step=1)


class Buckets:
    """DDP's reducer, whose buckets stay as they are: to fill them anew ranks compare numbers."""

    def __init__(self, reducer: Any):
        self.reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reducer, name)


class FakeTensors(FakeTensorMode):
    """Tensors without memory. What one waits for lies where it lay: the shapes of these operations would be new memory."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            if func is WAIT_FOR_ROWS:
                parallel.overlap.meanwhile()
            func = torch.ops.aten.detach.default
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Scratch(TorchDispatchMode):
    """Memory that grouped products take on a GPU while they run: the rows that they read by an index."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rows: list[Tensor | None] = []
        if func is ops.multiply_groups.default:
            x, index, *_ = args
            rows = [_taken(x, index)]
        elif func is ops.multiply_within_groups.default:
            dy, dy_index, x, x_index, _ = args
            rows = [_taken(dy, dy_index), _taken(x, x_index)]
        result = func(*args, **(kwargs or {}))
        del rows
        return result


def _taken(x: Tensor, index: Tensor | None) -> Tensor | None:
    return None if index is None else x.new_empty(len(index), x.shape[1])


def _of_a_gpu() -> Iterator[tuple[Any, str, Any]]:
    yield FakeTensor, "is_cuda", True
    yield model.ops.cpu, "takes", lambda *_: False


def attention_of_a_gpu() -> Assembled:
    """A kernel that takes values narrower than keys, and documents without a mask: it keeps what it reads, its output, and a number
    for each query and head."""
    return Assembled(_attend)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, _: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend: Callable[..., Any] = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, *_others = attend(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out.transpose(1, 2)


class Fp8OfAGpu(Chosen):
    """`model.ops.fp8.kernels.Kernels` by the shapes of what Triton's give out."""

    def __init__(self) -> None:
        super().__init__("simulated")

    def quantize_rows(self, x: Tensor, power_of_two: bool) -> Quantized:
        return _rows(x)

    def quantize_rows_and_columns(self, x: Tensor) -> tuple[Quantized, Quantized]:
        return _rows(x), _columns(x)

    def quantize_columns(self, x: Tensor) -> Quantized:
        return _columns(x)

    def requantize_columns(self, rows: Quantized, counts: Tensor | None) -> Quantized:
        return _columns(rows.data, counts)

    def quantize_blocks(self, weight: Tensor, compute_dtype: torch.dtype, transpose: bool) -> Quantized:
        *batch, n, k = weight.mT.shape if transpose else weight.shape
        scale = weight.new_empty(*batch, -(-n // TILE), -(-k // TILE), dtype=torch.float32)
        return Quantized(weight.new_empty(*batch, n, k, dtype=E4M3), scale)

    def swiglu(self, gate: Tensor, up: Tensor, weights: Tensor | None) -> Quantized:
        return _rows(gate)

    def swiglu_backward(
        self, grad: Tensor, gate: Quantized, up: Quantized, weights: Tensor | None, counts: Tensor | None
    ) -> SwiGLUGradients:
        product, gate_columns, up_columns = (_columns(grad, counts) for _ in range(3))
        d_weights = grad.new_empty(0 if weights is None else len(grad), dtype=torch.float32)
        return SwiGLUGradients(product, _rows(grad), gate_columns, _rows(grad), up_columns, d_weights)


def _rows(x: Tensor) -> Quantized:
    """x [M, K]."""
    scale = x.new_empty(len(x), -(-x.shape[1] // TILE), dtype=torch.float32)
    return Quantized(x.new_empty(x.shape, dtype=E4M3), scale)


def _columns(x: Tensor, counts: Tensor | None = None) -> Quantized:
    """x [M, K]."""
    p = padded_rows(len(x), None if counts is None else len(counts))
    scale = x.new_empty(x.shape[1], p // TILE, dtype=torch.float32)
    return Quantized(x.new_empty(x.shape[1], p, dtype=E4M3), scale)
