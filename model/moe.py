"""DeepSeekMoE: a gate (`model.router`), stacked routed experts, shared experts. DeepSeek-V3 §2.1.2, Eq. 12.

    y = FFN_shared(u) + Σ_chosen g_i FFN_i(u)

No token is dropped. How tokens reach their experts is the dispatcher's affair: `LocalDispatcher` sorts them on one device, and a
distributed one takes its place without the model knowing.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import MLP
from model.ops.experts import ExpertsBackend
from model.ops.fp8.arithmetic import Fp8
from model.ops.routing import sort_by_expert
from model.ops.rows import permute, spread_rows, sum_rows
from model.router import Router


class LayerStats(NamedTuple):
    """What a MoE layer reports beside its output."""

    expert_counts: Tensor  # [E] int64 tokens sent to each expert
    balance: Tensor  # [] fp32, sequence-wise balance loss summed over the sequences


class Handle(Protocol):
    """What a dispatcher remembers of one call."""

    @property
    def counts(self) -> Tensor:
        """[E] int64: how many of this device's tokens go to each expert, wherever it is."""
        ...


class Arrived(NamedTuple):
    """What the experts of this device have to do: N' rows, and the M = N'·K' (row, expert) pairs sorted by expert."""

    rows: Tensor  # [N', D]
    row_of: Tensor  # [M] the row of each pair
    place: Tensor  # [N', K'] the pairs of each row
    counts: Tensor  # [E_local] pairs of each expert
    weights: Tensor  # [M] fp32, how much each pair counts


H = TypeVar("H", bound=Handle)


class Dispatcher(Protocol[H]):
    """Brings tokens to their experts and the results back, in three steps, so that others can work while tokens travel."""

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> H:
        """Let tokens [N, D] set off to their experts [N, K], whose outputs will count by weights [N, K]."""
        ...

    def receive(self, handle: H) -> Arrived:
        """What has arrived for the experts of this device."""
        ...

    def combine(self, expert_output: Tensor, handle: H) -> Tensor:
        """What the experts made of each row that arrived, summed over its pairs, [N', D] → of each token [N, D]."""
        ...


class MoE(nn.Module):
    """Shared experts plus the routed ones. `forward` also reports the layer's `LayerStats`."""

    def __init__(self, config: ModelConfig, experts: ExpertsBackend):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, experts)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher: Dispatcher[Any] = LocalDispatcher(config.n_routed_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, LayerStats]:
        """x [B, T, D] → ([B, T, D], LayerStats)."""
        tokens = x.flatten(0, 1)  # [N, D]
        routing = self.gate(x)
        handle = self.dispatcher.dispatch(tokens, routing.expert_ids, routing.weights)
        shared = self.shared_experts(x)  # while tokens travel
        output = self.experts(*self.dispatcher.receive(handle))
        routed = self.dispatcher.combine(output, handle)  # [N, D]
        return routed.view_as(x) + shared, LayerStats(handle.counts, routing.balance)


class Experts(nn.Module):
    """All routed experts of a layer as two stacked tensors, [E, 2F, D] (gate rows first) and [E, D, F]."""

    fp8: Fp8 | None = None

    def __init__(self, config: ModelConfig, backend: ExpertsBackend):
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))

    def forward(self, rows: Tensor, index: Tensor, place: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """What has `Arrived` → [N', D]."""
        if self.fp8:
            pairs = self.fp8.experts(spread_rows(rows, place), counts, weights, self.gate_up_proj, self.down_proj)
            return sum_rows(pairs, place)  # of M
        gate_up, down = self.gate_up_proj.to(rows.dtype), self.down_proj.to(rows.dtype)
        return self.backend(rows, index, place, counts, weights, gate_up, down)


class LocalDispatcher:
    """Every expert on this device: tokens stay where they are, and the (token, expert) pairs are sorted by expert."""

    class Handle(NamedTuple):
        tokens: Tensor  # [N, D]
        order: Tensor  # [M] pair n·K + k of each place in the sorted order
        place: Tensor  # [N, K] its inverse
        weights: Tensor  # [N, K] fp32
        counts: Tensor  # [E]

    def __init__(self, experts: int):
        self.experts = experts

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Handle:
        order, place, counts = sort_by_expert(expert_ids, self.experts)
        return self.Handle(tokens, order, place, weights, counts)

    def receive(self, handle: Handle) -> Arrived:
        tokens, order, place, weights, counts = handle
        index = order // place.shape[1]
        return Arrived(tokens, index, place, counts, permute(weights.flatten(), order, place.flatten()))

    def combine(self, expert_output: Tensor, handle: Handle) -> Tensor:
        return expert_output
