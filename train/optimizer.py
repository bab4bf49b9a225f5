"""AdamW as DeepSeek-V3 uses it: decay on matrices only, moments in fp32 or bf16, an average of the weights on the host.

Master weights are fp32 always. Report §4.2 gives β = (0.9, 0.95) and weight decay 0.1, §3.3.3 keeps both moments in
BF16, §3.2.3 keeps the moving average of the weights in CPU memory and updates it beside the training step.

The optimizer's state leaves and enters by parameter name (`parallel.moments`). The learning rate is not state: the engine
sets `group["lr"]` of every step from the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.moments import start_state
from train.config import RecipeError


class OptimizerSettings(Protocol):
    """What `build_optimizer` reads of the recipe's section `optimizer`."""

    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    settings: OptimizerSettings,
    moments: Literal["fp32", "bf16"] = "fp32",
) -> torch.optim.Optimizer:
    """AdamW over fp32 master weights in two groups: decayed and not decayed (see `decays`).

    With fp32 moments this is `torch.optim.AdamW`, fused where every parameter lies on a device that has the fused
    kernel. With bf16 moments it is `AdamWBf16Moments`. The learning rate starts at 0: the engine sets it.

    Raises:
        RecipeError: β₂ so close to 1 that bf16 cannot represent the decay of the second moment.
    """
    parameters = list(named_parameters)
    groups = [
        {"params": [p for name, p in parameters if decays(name)], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in parameters if not decays(name)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if moments == "bf16":
        _check_bf16_can_decay(settings.betas)
        return AdamWBf16Moments(groups, lr=0.0, betas=settings.betas, eps=settings.eps)
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype == torch.float32 for _, p in parameters)
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter: on matrices only. This is the one place that decides it.

    Matrices are linear weights, stacked experts, router, embedding and head. RMSNorm weights are scales: pulled towards 0 they
    would only be fought by the matrices beside them. The name decides, since a parameter that is spread over ranks may be flat.
    """
    return "norm" not in name


class AdamWBf16Moments(torch.optim.Optimizer):
    """AdamW (1711.05101) whose moments are stored in bf16; all arithmetic is fp32.

    With g the gradient, θ the fp32 weight, t the step counted from 1 and bf16(·) rounding to nearest even:

        m̂ = β₁·m + (1 − β₁)·g               m ← bf16(m̂)
        v̂ = β₂·v + (1 − β₂)·g²              v ← bf16(v̂)
        θ ← θ·(1 − lr·λ) − lr/(1 − β₁ᵗ) · m̂ / (√v̂/√(1 − β₂ᵗ) + ε)

    The weight sees the moments before they are rounded, so that a rounding error acts only through the next steps'
    averages, where it decays by β. State per parameter as in `torch.optim.AdamW`: `step` (fp32 scalar), `exp_avg` and
    `exp_avg_sq` (bf16, the parameter's shape).

    Moments take 4 bytes a parameter in place of 8. On a GPU one kernel makes the step of a parameter; elsewhere, where PyTorch's
    operations make it, fp32 values exist for one bucket of parameters at a time.
    """

    # As of PyTorch's fused optimizers: [] fp32, what the gradients are divided by, and 1 where the step is to be skipped.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            | {"moments_dtype": torch.bfloat16, "fused": True},  # fused: steps are counted where the parameters are
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "AdamW evaluates the loss once, before the step"
        for group in self.param_groups:
            stepping = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepping:
                continue
            steps = [start_state(self, group, parameter)["step"] for parameter in stepping]
            if stepping[0].is_cuda:
                torch._foreach_add_(steps, 1 if self.found_inf is None else 1 - self.found_inf)
                self._step_on_gpu(group, stepping, steps[0])
            elif self.found_inf is None or not self.found_inf:
                torch._foreach_add_(steps, 1)
                self.step_in_buckets(group, stepping, int(steps[0]))

    def _step_on_gpu(self, group: dict[str, Any], parameters: list[Tensor], step: Tensor) -> None:
        """No number comes to the host: not the count of steps, which is the same for all, nor whether this one is skipped."""
        from model.ops.triton.adamw import adamw_

        (beta1, beta2), lr = group["betas"], group["lr"]
        t = step.double()
        factors = torch.stack([-lr / (1 - beta1**t), (1 - beta2**t).sqrt()]).float()
        divisor = step.new_ones(()) if self.grad_scale is None else self.grad_scale
        skip = step.new_zeros(()) if self.found_inf is None else self.found_inf
        for parameter in parameters:
            state = self.state[parameter]
            assert parameter.grad is not None
            tensors = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
            adamw_(*tensors, factors, divisor, skip, group["betas"], group["eps"], 1 - lr * group["weight_decay"])

    def step_in_buckets(self, group: dict[str, Any], parameters: Sequence[Tensor], step: int) -> None:
        """The update of a CPU, the step-th, of parameters of a group."""
        for bucket in _buckets(piece for parameter in parameters for piece in self._pieces(parameter)):
            self._update(group, bucket, step)

    def _pieces(self, parameter: Tensor) -> Iterator[_Piece]:
        """A parameter, flat, in pieces that fit a bucket. A rank's part of a whole model may be one parameter (ZeRO)."""
        state = self.state[parameter]
        assert parameter.grad is not None
        whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for pieces in zip(*(tensor.reshape(-1).split(BUCKET_ELEMENTS) for tensor in whole)):
            yield _Piece(*pieces)

    def _update(self, group: dict[str, Any], pieces: list[_Piece], step: int) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        weights = [piece.weight for piece in pieces]
        gradients = [piece.gradient.float() for piece in pieces]
        if self.grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, self.grad_scale))
        m = [piece.exp_avg.float() for piece in pieces]
        v = [piece.exp_avg_sq.float() for piece in pieces]

        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        torch._foreach_copy_([piece.exp_avg for piece in pieces], m)
        torch._foreach_copy_([piece.exp_avg_sq for piece in pieces], v)

        torch._foreach_sqrt_(v)
        torch._foreach_div_(v, math.sqrt(1 - beta2**step))
        torch._foreach_add_(v, group["eps"])
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, m, v, -lr / (1 - beta1**step))


# fp32 copies of m, v and g of one bucket: 768 MiB at most.
BUCKET_ELEMENTS = 2**26


class _Piece(NamedTuple):
    """A flat piece of a parameter and what belongs to it."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def _buckets(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Cut a list into runs of at most BUCKET_ELEMENTS elements."""
    bucket: list[_Piece] = []
    elements = 0
    for piece in pieces:
        size = piece.weight.numel()
        if bucket and elements + size > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(piece)
        elements += size
    if bucket:
        yield bucket


class HostEMA:
    """Exponential moving average of the weights, fp32, in host memory (DeepSeek-V3 §3.2.3).

        ema₀ = θ₀,    emaₙ = decay·emaₙ₋₁ + (1 − decay)·θₙ

    `update` is called after each optimizer step. Weights on a GPU are copied to pinned memory by the training stream, in order
    with the steps, and averaged by a thread of the host while the GPU goes on; the next `update` waits for it. Device
    memory: none. Host memory: 4 bytes a parameter, and 4 more of pinned buffer for weights on a GPU.

    Each rank averages its parts of the weights as the engine lays them out; the average is elementwise, a part needs no other.

    Args:
        parts: {parameter name: what of it this rank averages}, live and of any shape (`Engine.parts`).
    """

    @torch.no_grad()
    def __init__(self, parts: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = parts
        self._average = {name: part.detach().to("cpu", torch.float32, copy=True) for name, part in parts.items()}
        self._buffers = {
            name: torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            for name, part in parts.items()
            if part.is_cuda
        }
        devices = {part.device for part in parts.values() if part.is_cuda}  # one, of which a new thread would not know
        self._thread = ThreadPoolExecutor(1, "ema", partial(torch.cuda.set_device, *devices)) if devices else None
        self._pending: Future[None] | None = None

    @torch.no_grad()
    def update(self, skipped: Callable[[], bool] = lambda: False) -> None:
        """Take the weights as they are now into the average, unless the step before was skipped, which may be known later only."""
        self._finish()
        if self._thread is None:
            self._blend(self._weights, skipped)
            return
        for name, buffer in self._buffers.items():
            buffer.copy_(self._weights[name], non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = self._thread.submit(self._blend, self._buffers, skipped, copied)

    def parts(self) -> dict[str, Tensor]:
        """{parameter name: fp32 average}, laid out as the weights: the tensors themselves, to be saved, or read into in place."""
        self._finish()
        return self._average

    @torch.no_grad()
    def _blend(
        self, weights: Mapping[str, Tensor], skipped: Callable[[], bool], copied: torch.cuda.Event | None = None
    ) -> None:
        if skipped():
            return
        if copied is not None:
            copied.synchronize()
        for name, weight in weights.items():
            self._average[name].lerp_(weight.float(), 1 - self.decay)

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _check_bf16_can_decay(betas: tuple[float, float]) -> None:
    """Refuse a β₂ at which bf16(β₂·v) can be v again.

    bf16 keeps 8 significant bits, so its numbers lie 2⁻⁸ to 2⁻⁷ apart in relative terms, and a change of less than half
    of that, 2⁻⁸ at worst, is rounded away: the second moment would never come down again after one large gradient.
    """
    limit = 1 - 2**-8
    if betas[1] > limit:
        raise RecipeError(
            f"optimizer.betas: β₂ = {betas[1]} with precision.moments: bf16: bf16 rounds a decay of less than 1/256 away; "
            f"set β₂ to at most {limit:.4f} or precision.moments to fp32"
        )
