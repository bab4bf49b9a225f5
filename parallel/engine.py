"""What the trainer talks to: an engine takes the micro-batches of one step and the step's settings, and returns its result.

An engine hides how the model is spread. Whatever it does inside, one step is the same function of the global batch; `parallel.step`
writes it down.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.init import Write
from model.transformer import Transformer

Fill = Callable[[Transformer, Write], None]  # gives a model its first weights, by way of the engine's `write`
# Of named parameters, or this rank's parts. It takes `grad_scale` and `found_inf`, as PyTorch's fused optimizers do.
MakeOptimizer = Callable[[Iterable[tuple[str, Tensor]]], torch.optim.Optimizer]
State = dict[str, Any]


class MicroBatch(Protocol):
    """What one process puts through the model at once. Both [B, T + 1 + D_mtp]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor: ...


@dataclass(frozen=True)
class StepSettings:
    """What a step needs to know: of the schedules, pure functions of the tokens consumed (`train.schedule`), and of its loss."""

    lr: float
    gamma: float  # bias update speed
    alpha: float  # weight of the sequence-wise balance loss
    lambda_: float  # weight of multi-token prediction
    batch: int  # sequences in the global batch
    max_loss: float = math.inf  # of the main head; a step with more is skipped


@dataclass(frozen=True)
class MeanLosses:
    """Losses of a step over the global batch: nats per valid target; the balance loss per sequence, without its α."""

    main: float
    mtp: list[float]
    balance: float


@dataclass(frozen=True)
class FP8Scales:
    """The scales of a step in FP8, over all ranks and micro-batches; `parallel.fp8_scales` says which are too large."""

    largest: float  # of all inputs and weights; infinite in place of NaN
    at: str  # layer and tensor that have it
    exploded: tuple[str, ...]  # tensors whose scale is too large, in the order of the forward and the backward pass


@dataclass(frozen=True)
class StepResult:
    losses: MeanLosses
    grad_norm: float  # before clipping
    expert_counts: Tensor  # [MoE layers, E] int64 on the host, of the global batch
    expert_biases: Tensor  # [MoE layers, E] fp32 on the host, as the step left them
    non_finite: tuple[str, ...] = ()  # parameters whose gradient, or its norm, is not finite
    scales: FP8Scales | None = None  # with FP8 only
    loss_scale: float = 1.0  # of the next step: the factor that keeps fp16 gradients from vanishing
    skipped: bool = False  # no parameter, moment or bias was touched: see `parallel.step`

    @property
    def exploded(self) -> tuple[str, ...]:
        """Tensors whose FP8 scale is too large or not finite."""
        return self.scales.exploded if self.scales else ()


class Pending:
    """The result of a step that the device may still be at work on.

    Its numbers are on their way to the host, in one piece and into page-locked memory; `result` waits for them and for no more.

    Args:
        numbers: of any shapes, all exact in fp64.
        read: makes the result of them, once they are on the host.
    """

    def __init__(self, numbers: Mapping[str, Tensor], read: Callable[[dict[str, Tensor]], StepResult]):
        self._shapes = {name: part.shape for name, part in numbers.items()}
        self._packed = torch.cat([part.detach().double().flatten() for part in numbers.values()])
        self._read = read
        self._result: StepResult | None = None
        self._arrived: torch.cuda.Event | None = None
        if self._packed.is_cuda:
            on_host = torch.empty(self._packed.shape, dtype=torch.float64, pin_memory=True)
            self._packed = on_host.copy_(self._packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @property
    def is_here(self) -> bool:
        """Whether nobody would have to wait: on a CPU always, of a GPU not until somebody has."""
        return self._arrived is None or self._result is not None

    def result(self) -> StepResult:
        """May be called from several threads, and again."""
        if self._result is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            parts = self._packed.split([shape.numel() for shape in self._shapes.values()])
            self._result = self._read(
                {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
            )
        return self._result


class Alike(NamedTuple):
    """What every rank of a group holds bit for bit the same, as long as no bit flips."""

    group: dist.ProcessGroup
    tensors: dict[str, Tensor]  # live, by section and name as in a checkpoint: "exp_avg.model.norm.weight"


def flat(sections: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{"exp_avg": {"model.norm.weight": t}} → {"exp_avg.model.norm.weight": t}."""
    return {f"{section}.{name}": tensor for section, named in sections.items() for name, tensor in named.items()}


class Engine(Protocol):
    """A model, its optimizer, and the way both are spread over ranks."""

    model: Transformer  # its methods may be called between steps, by all ranks together
    fp8_max_scale: float  # of inputs and weights in FP8; beyond it a step is skipped
    groups: Mapping[str, dist.ProcessGroup]  # that this rank is in, by the names of the layout's axes

    def launch(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> Pending:
        """One optimizer step over this rank's micro-batches of the global batch, left to the device. Collective."""
        ...

    def step(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        """`launch`, and its result at once."""
        ...

    def state(self) -> State:
        """The canonical state, keyed by parameter name and the same under every layout. Collective.

        Tensors are the live ones, DTensors where a rank holds a shard, or whole ones that a single rank holds; what none of the
        ranks holds in that form is gathered one parameter at a time.

        {"parameters": {name: Tensor}, "buffers": {name: Tensor}, "exp_avg": {name: Tensor}, "exp_avg_sq": {name: Tensor},
        "steps": int64 [], "loss_scale": {"scale": fp32 [], "good_steps": int64 []}}
        """
        ...

    def load(self, state: State) -> None:
        """Take back what `state` handed out, filled with the values of this or any other layout. Collective."""
        ...

    copied: frozenset[str]  # sections of `state` that nobody else holds, and that no step will change

    def alike(self) -> list[Alike]:
        """What this rank holds as other ranks do, with those that do. Groups may be of one rank."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """This rank's parts of the weights, live. What ranks of ddp hold alike is shared out among them: no element is on two."""
        ...

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are laid out as `parts`, in a form in which `state` hands out tensors. Collective."""
        ...

    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """What `gather` made of `parts`, filled by a checkpoint, back into them. Collective."""
        ...
