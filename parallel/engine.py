"""What the trainer talks to: an engine takes the micro-batches of one step and the step's settings, and returns its result.

An engine hides how the model is spread. Whatever it does inside, one step is the same function of the global batch:

    1. n_k ← valid targets of head k in the global batch            (one reduction of 1 + D integers)
    2. g   ← Σ over ranks and micro-batches of ∇ L(micro-batch)       L as in `model.loss`, already divided by n
    3. g   ← g · min(1, clip / ‖g‖);   a non-finite ‖g‖ ends the step here: nothing is updated
    4. optimizer step at the given learning rate
    5. b   ← balance.update(b, Σ counts, γ) for every router, MTP included      (one reduction for all layers)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.transformer import Transformer

MakeOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]
State = dict[str, Any]


class MicroBatch(Protocol):
    """What one process puts through the model at once. Both [B, T + 1 + D_mtp]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor: ...


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know of the schedules; pure functions of the tokens consumed (`train.schedule`)."""

    lr: float
    gamma: float  # bias update speed
    alpha: float  # weight of the sequence-wise balance loss
    lambda_: float  # weight of multi-token prediction
    batch: int  # sequences in the global batch


@dataclass(frozen=True)
class MeanLosses:
    """Losses of a step over the global batch: nats per valid target; the balance loss per sequence, without its α."""

    main: float
    mtp: list[float]
    balance: float


@dataclass(frozen=True)
class StepResult:
    losses: MeanLosses
    grad_norm: float  # before clipping
    expert_counts: Tensor  # [MoE layers, E] int64 on the host, of the global batch
    non_finite: tuple[str, ...] = ()  # parameters whose gradient is not finite

    @property
    def skipped(self) -> bool:
        """A non-finite gradient: no parameter, moment or bias was touched."""
        return bool(self.non_finite)


class Engine(Protocol):
    """A model, its optimizer, and the way both are spread over ranks."""

    model: Transformer

    @property
    def loss_scale(self) -> float:
        """The factor that keeps fp16 gradients from vanishing; 1 in other precisions."""
        ...

    def step(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        """One optimizer step over this rank's micro-batches of the global batch. Collective."""
        ...

    def state(self) -> State:
        """The canonical state, keyed by parameter name and the same under every layout; tensors are the live ones.

        {"parameters": {name: Tensor}, "buffers": {name: Tensor}, "exp_avg": {name: Tensor}, "exp_avg_sq": {name: Tensor},
        "steps": int64 [], "loss_scale": {"scale": fp32 [], "good_steps": int64 []}}
        """
        ...

    def load(self, state: State) -> None:
        """Take back what `state` handed out, from this or any other layout."""
        ...
