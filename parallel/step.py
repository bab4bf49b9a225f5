"""One optimizer step, written once for all engines, so that no engine can have a mathematics of its own.

    1. n_k ← valid targets of head k in the global batch            (one reduction of 1 + D integers)
    2. g   ← Σ over ranks and micro-batches of ∇ L(micro-batch)       L as in `model.loss`, already divided by n; micro-batches go
                                              through one after the other, or through a pipeline (`parallel.pipeline`)
    3. losses and expert counts of the global batch                  (one reduction for all layers, MTP included)
    4. g   ← g · min(1, clip / (‖g‖ + 1e-6));   with a non-finite ‖g‖ nothing is updated; nor with a main loss above
                                              `max_loss`, or an FP8 scale that is out of bounds (`parallel.fp8_scales`)
    5. optimizer step at the given learning rate
    6. b   ← balance.update(b, counts, γ) for every router, MTP included

All of it is decided where the numbers are: the host launches the step and need not wait for it. What it wants to know follows in
one copy (`Pending`).

An engine says how a micro-batch goes forward and backward, where the summed gradients lie, and how the optimizer takes them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from model import balance
from model.loss import head_coefficients
from model.router import Router
from model.transformer import Output, Transformer
from parallel.engine import Alike, MeanLosses, MicroBatch, Pending, State, StepResult, StepSettings, flat
from parallel.footprint import parameter_shapes
from parallel.fp8_scales import StepScales, forget_scales, scales_of_step
from parallel.loss_scale import LossScale
from parallel.moments import moments
from parallel.parts import EMBEDDING
from parallel.pipeline import Objective, Pipeline


class GlobalStep(ABC):
    """An `Engine` but for what the abstract methods say. A default process group must exist, of one rank or many.

    Args:
        model: parameters fp32; under fp16 compute its loss is scaled dynamically.
        device: where it computes.
        clip: largest global gradient norm; None does not clip.
        pipeline: through which micro-batches go; None: they go through the model.
    """

    gradient_copies: int  # how many ranks hold each element of the gradient
    copied: frozenset[str] = frozenset()
    fp8_max_scale: float = 512.0
    groups: Mapping[str, dist.ProcessGroup] = {}

    def __init__(self, model: Transformer, device: torch.device, clip: float | None, pipeline: Pipeline | None = None):
        self.model = model
        self.device = device
        self.clip = clip
        self.pipeline = pipeline
        self.copies = pipeline.copies if pipeline else frozenset()  # parameters that another rank's state has
        by_layer = {int(name.split(".")[2]): m for name, m in model.named_modules() if isinstance(m, Router)}
        self.routers = list(by_layer.values())
        rows = [model.config.moe_layers.index(layer) for layer in by_layer]  # of the MoE layers, those that are here
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.scaling = LossScale(model.compute_dtype is torch.float16, device)

    @abstractmethod
    def forward(self, batch: MicroBatch, coefficients: Tensor, is_last: bool) -> Output:
        """The model on one micro-batch; `is_last` of the step, after which gradients must be summed."""

    @abstractmethod
    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradients of `loss` to those of the step. Over ranks they are summed, not averaged."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the summed gradients, fp32 and live: what is done to them is done to the step."""

    @abstractmethod
    def update(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        """The optimizer's step with gradients / divisor ([] fp32); none where skip ([] fp32) is 1. Gradients may change."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients, after the optimizer's step or instead of it."""

    @abstractmethod
    def state(self) -> State: ...

    @abstractmethod
    def load(self, state: State) -> None: ...

    @abstractmethod
    def alike(self) -> list[Alike]: ...

    @abstractmethod
    def parts(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @abstractmethod
    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None: ...

    def step(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        return self.launch(micro_batches, settings).result()

    def launch(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> Pending:
        targets = self._targets_of_global_batch(micro_batches)
        coefficients = head_coefficients(targets, settings.lambda_)
        forget_scales(self.model.fp8)
        outputs = self._forward_and_backward(
            micro_batches,
            coefficients,
            lambda losses: (
                losses.objective(targets, settings.batch, settings.lambda_, settings.alpha) * self.scaling.scale
            ),
        )
        with torch.no_grad():
            means, counts = _sum_of_global_batch(outputs, targets, settings.batch)
            scales = scales_of_step(self.model.fp8, self.model.fp8_names, self.fp8_max_scale, self.device)
            forbidden = means[0] > settings.max_loss
            if scales:
                forbidden = forbidden | scales.exploded
            squares, grad_norm, skip = self._update(settings.lr, forbidden)
            biases = self._balance(counts, settings.gamma, skip)
            numbers = {"means": means, "counts": counts, "biases": biases, "squares": squares, "norm": grad_norm}
            numbers |= {"loss scale": self.scaling.scale, "skip": skip}  # what the device did, not what the host would
            if scales:
                numbers["scales"] = scales.largest
        return Pending(numbers, partial(_read, self._names, scales))

    def _forward_and_backward(
        self, micro_batches: Sequence[MicroBatch], coefficients: Tensor, objective: Objective
    ) -> Sequence[Output]:
        """Gradients of the step, summed over ranks and micro-batches; losses and counts of this rank."""
        if self.pipeline is not None:
            outputs = self.pipeline.run(micro_batches, coefficients, objective)
            self.pipeline.sum_gradients()
            self.pipeline.sum_shared(self.gradients())
            return outputs
        outputs = []
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            output = self.forward(batch, coefficients, is_last)
            self.backward(objective(output.losses), is_last)
            outputs.append(output)
        return outputs

    def _without_copies(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """What belongs to the state of this rank."""
        return {name: tensor for name, tensor in named.items() if name not in self.copies}

    def _fill_copies(self, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> None:
        """Copies of parameters are what a loaded state made of the originals, moments included."""
        if self.pipeline:
            own = moments(optimizer, named.items())
            self.pipeline.fill_copies(named, own["exp_avg"], own["exp_avg_sq"])

    def _alike_at_both_ends(self, sections: Mapping[str, Mapping[str, Tensor]]) -> list[Alike]:
        """The embedding and its moments, where the last stage of a pipeline has a copy of the first one's."""
        holders = self.pipeline.holders if self.pipeline else None
        held = {name: tensors for name, tensors in flat(sections).items() if name.endswith(EMBEDDING)}
        return [Alike(holders, held)] if holders is not None and held else []

    def _beside_weights(self) -> dict[str, Tensor]:
        """What all ranks with the same layers hold, however weights are cut."""
        scaling = {f"loss_scale.{name}": tensor for name, tensor in self.scaling.state().items()}
        return scaling | {f"buffers.{name}": tensor for name, tensor in self.model.named_buffers()}

    def _targets_of_global_batch(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """[1 + D_mtp] valid targets of each head, over all ranks and micro-batches."""
        targets = torch.stack([self.model.count_targets(b.tokens, b.documents) for b in micro_batches]).sum(0)
        dist.all_reduce(targets, group=self.pipeline.in_stage if self.pipeline else None)
        return targets

    def _update(self, lr: float, forbidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip and step, if the gradient is finite and nothing else forbids it.

        Returns:
            `_squares`, the norm before clipping, and whether the step is skipped.
        """
        squares = self._squares(self.gradients())
        norm = squares.sum().sqrt() / self.scaling.scale
        finite = norm.isfinite()
        skip = ~finite | forbidden
        divisor = self.scaling.scale
        if self.clip is not None:
            divisor = divisor * ((norm + 1e-6) / self.clip).clamp_min(1)
        self.update(lr, divisor.float(), skip.float())
        self.drop_gradients()
        self.scaling.update(finite)
        return squares, norm, skip

    def _squares(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """[parameters] fp64 ‖g‖² of each over all ranks; from one reduction, so that it has the same bits on each of them."""
        filled = {name: part for name, part in gradients.items() if part.numel() and name not in self.copies}
        norms = dict(zip(filled, torch._foreach_norm(list(filled.values())))) if filled else {}
        zero = next(iter(norms.values())).new_zeros(()) if norms else torch.zeros((), device=self.device)
        squares = torch.stack([norms.get(name, zero) for name in self._names]).to(self.device).double().square()
        if self.gradient_copies < dist.get_world_size():
            dist.all_reduce(squares)
            squares = squares / self.gradient_copies
        return squares

    def _balance(self, counts: Tensor, gamma: float, skip: Tensor) -> Tensor:
        """Move every router's bias, unless the step is skipped. Returns them all, [MoE layers, E]."""
        all_biases = counts.new_zeros(counts.shape, dtype=torch.float32)
        if self.routers:
            biases = [router.e_score_correction_bias for router in self.routers]
            before = torch.stack(biases)
            after = torch.where(skip, before, balance.update(before, counts.index_select(0, self.rows), gamma))
            torch._foreach_copy_(biases, list(after.unbind()))
            all_biases.index_copy_(0, self.rows, after)
        if self.pipeline:
            dist.all_reduce(all_biases, group=self.pipeline.group)
        return all_biases

    @cached_property
    def _names(self) -> list[str]:
        return list(parameter_shapes(self.model.config))


def step_optimizer(optimizer: torch.optim.Optimizer, lr: float, divisor: Tensor, skip: Tensor) -> None:
    """A fused optimizer's step: it divides each gradient as it reads it, and does nothing where it shall skip."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = divisor, skip  # type: ignore[attr-defined]
    optimizer.step()


def _read(names: Sequence[str], scales: StepScales | None, numbers: dict[str, Tensor]) -> StepResult:
    """A step's numbers, once they are on the host."""
    main, *mtp, balance_loss = numbers["means"].tolist()
    is_finite = numbers["squares"].isfinite().tolist()
    return StepResult(
        MeanLosses(main, mtp, balance_loss),
        float(numbers["norm"]),
        numbers["counts"].to(torch.int64),
        numbers["biases"].float(),
        tuple(name for name, finite in zip(names, is_finite) if not finite),
        scales.read(numbers["scales"]) if scales else None,
        float(numbers["loss scale"]),
        bool(numbers["skip"]),
    )


def _sum_of_global_batch(outputs: Sequence[Output], targets: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Means of the losses [main, MTP depths, balance] and expert counts [MoE layers, E], over all ranks and micro-batches.

    They travel in one reduction as fp64, which holds every integer up to 2⁵³ exactly.
    """
    sums = torch.stack([torch.cat([o.losses.main[None], o.losses.mtp, o.losses.balance[None]]) for o in outputs])
    counts = torch.stack([o.expert_counts for o in outputs]).sum(0)
    packed = torch.cat([sums.detach().double().sum(0), counts.double().flatten()])
    dist.all_reduce(packed)
    n_sums = sums.shape[1]
    means = packed[:n_sums] / torch.cat([targets.clamp_min(1), targets.new_full((1,), sequences)])
    return means, packed[n_sums:].to(torch.int64).view_as(counts)
