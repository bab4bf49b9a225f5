"""One optimizer step, written once for all engines, so that no engine can have a mathematics of its own.

    1. n_k ← valid targets of head k in the global batch            (one reduction of 1 + D integers)
    2. g   ← Σ over ranks and micro-batches of ∇ L(micro-batch)       L as in `model.loss`, already divided by n
    3. losses and expert counts of the global batch                  (one reduction for all layers, MTP included)
    4. g   ← g · min(1, clip / (‖g‖ + 1e-6));   a non-finite ‖g‖ ends the step here: nothing is updated;
                                              so does an FP8 scale that is out of bounds (`parallel.fp8_scales`)
    5. optimizer step at the given learning rate
    6. b   ← balance.update(b, counts, γ) for every router, MTP included

An engine says how a micro-batch goes forward and backward, where the summed gradients lie, and how the optimizer takes them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model import balance
from model.loss import count_targets
from model.router import Router
from model.transformer import Output, Transformer
from parallel.engine import MeanLosses, MicroBatch, State, StepResult, StepSettings
from parallel.fp8_scales import forget_scales, read_scales
from parallel.loss_scale import LossScale


class GlobalStep(ABC):
    """An `Engine` but for what the abstract methods say. A default process group must exist, of one rank or many.

    Args:
        model: parameters fp32; under fp16 compute its loss is scaled dynamically.
        clip: largest global gradient norm; None does not clip.
    """

    gradient_copies: int  # how many ranks hold each element of the gradient
    copied: frozenset[str] = frozenset()
    fp8_max_scale: float = 512.0

    def __init__(self, model: Transformer, clip: float | None):
        self.model = model
        self.clip = clip
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.scaling = LossScale(enabled=model.compute_dtype is torch.float16)

    @abstractmethod
    def forward(self, batch: MicroBatch, is_last: bool) -> Output:
        """The model on one micro-batch; `is_last` of the step, after which gradients must be summed."""

    @abstractmethod
    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradients of `loss` to those of the step. Over ranks they are summed, not averaged."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the summed gradients, fp32 and live: what is done to them is done to the step."""

    @abstractmethod
    def update(self, lr: float) -> None:
        """The optimizer's step with the gradients as they are now."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients, after the optimizer's step or instead of it."""

    @abstractmethod
    def state(self) -> State: ...

    @abstractmethod
    def load(self, state: State) -> None: ...

    @abstractmethod
    def parts(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    @abstractmethod
    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None: ...

    @property
    def loss_scale(self) -> float:
        return self.scaling.scale

    def step(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        targets = self._targets_of_global_batch(micro_batches)
        forget_scales(self.model.fp8)
        outputs = []
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            output = self.forward(batch, is_last)
            loss = output.losses.objective(targets, settings.batch, settings.lambda_, settings.alpha)
            self.backward(loss * self.loss_scale, is_last)
            outputs.append(output)
        losses, counts = _sum_of_global_batch(outputs, targets, settings.batch)
        host_counts = counts.cpu()  # before the optimizer starts, or the host would wait for it
        scales = read_scales(self.model.fp8, self.fp8_max_scale)
        grad_norm, non_finite = self._update(settings.lr, is_allowed=not (scales and scales.exploded))
        result = StepResult(losses, grad_norm, host_counts, non_finite, scales)
        if not result.skipped:
            for router, layer_counts in zip(self.routers, counts):
                bias = router.e_score_correction_bias
                bias.copy_(balance.update(bias, layer_counts, settings.gamma))
        return result

    def _targets_of_global_batch(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """[1 + D_mtp] valid targets of each head, over all ranks and micro-batches."""
        depths = self.model.config.num_nextn_predict_layers
        local = [count_targets(b.tokens, b.documents, depths, self.model.mask_documents) for b in micro_batches]
        targets = torch.stack(local).sum(0)
        dist.all_reduce(targets)
        return targets

    @torch.no_grad()
    def _update(self, lr: float, is_allowed: bool) -> tuple[float, tuple[str, ...]]:
        """Clip and step, if allowed. Returns the gradient norm before clipping, and the parameters whose gradients forbade it."""
        gradients = self.gradients()
        grad_norm = self._norm(list(gradients.values())) / self.loss_scale
        finite = math.isfinite(grad_norm)
        non_finite: tuple[str, ...] = ()
        if finite and is_allowed:
            factor = 1.0 if self.clip is None else min(1.0, self.clip / (grad_norm + 1e-6))
            if factor != self.loss_scale:
                torch._foreach_mul_(list(gradients.values()), factor / self.loss_scale)
            self.update(lr)
        elif not finite:
            non_finite = self._non_finite(gradients) or ("the norm of all gradients",)
        self.drop_gradients()
        self.scaling.update(finite)
        return grad_norm, non_finite

    def _norm(self, parts: Sequence[Tensor]) -> float:
        """‖g‖ over all ranks; from one reduction, so that it has the same bits on each of them."""
        filled = [part for part in parts if part.numel()] or [torch.zeros(1, device=self.model.device)]
        square = torch.stack(torch._foreach_norm(filled)).double().square().sum().to(self.model.device)
        if self.gradient_copies < dist.get_world_size():
            dist.all_reduce(square)
            square = square / self.gradient_copies
        return math.sqrt(float(square))

    def _non_finite(self, gradients: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Names of the parameters whose gradients are not finite on any rank."""
        found: list[list[str]] = [[name for name, part in gradients.items() if not part.isfinite().all()]]
        if self.gradient_copies < dist.get_world_size():
            mine, found = found[0], [[]] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        bad = {name for names in found for name in names}
        return tuple(name for name, _ in self.model.named_parameters() if name in bad)


def _sum_of_global_batch(outputs: Sequence[Output], targets: Tensor, sequences: int) -> tuple[MeanLosses, Tensor]:
    """Losses, and expert counts [MoE layers, E], over all ranks and micro-batches, in one reduction.

    They travel as fp64, which holds every integer up to 2⁵³ exactly.
    """
    sums = torch.stack([torch.cat([o.losses.main[None], o.losses.mtp, o.losses.balance[None]]) for o in outputs])
    counts = torch.stack([o.expert_counts for o in outputs]).sum(0)
    packed = torch.cat([sums.detach().double().sum(0), counts.double().flatten()])
    dist.all_reduce(packed)
    n_sums = sums.shape[1]
    means = packed[:n_sums] / torch.cat([targets.clamp_min(1), targets.new_tensor([sequences])])
    main, *mtp, balance_loss = means.tolist()
    return MeanLosses(main, mtp, balance_loss), packed[n_sums:].to(torch.int64).view_as(counts)
