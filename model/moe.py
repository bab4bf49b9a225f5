"""DeepSeekMoE: a gate (`model.router`), stacked routed experts, shared experts. DeepSeek-V3 §2.1.2, Eq. 12.

    y = FFN_shared(u) + Σ_chosen g_i FFN_i(u)

No token is dropped. How tokens reach their experts is the dispatcher's affair: `LocalDispatcher` sorts them on one device, and a
distributed one takes its place without the model knowing.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import MLP
from model.ops.fp8.arithmetic import Fp8
from model.ops.grouped_mm import GroupedMM
from model.ops.routing import sort_by_expert
from model.ops.swiglu import swiglu
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


H = TypeVar("H", bound=Handle)


class Dispatcher(Protocol[H]):
    """Brings tokens to their experts and the results back, in three steps, so that others can work while tokens travel."""

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> H:
        """Let tokens [N, D] set off to their experts [N, K], whose outputs will count by weights [N, K]."""
        ...

    def receive(self, handle: H) -> tuple[Tensor, Tensor]:
        """What has arrived for the experts of this device: (rows sorted by expert [M, D], rows of each [E_local])."""
        ...

    def combine(self, expert_output: Tensor, handle: H) -> Tensor:
        """Expert outputs [M, D] in the order of `receive` → weighted sum of each token's experts [N, D]."""
        ...


class MoE(nn.Module):
    """Shared experts plus the routed ones. `forward` also reports the layer's `LayerStats`."""

    def __init__(self, config: ModelConfig, grouped_mm: GroupedMM):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, grouped_mm)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher: Dispatcher[Any] = LocalDispatcher(config.n_routed_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, LayerStats]:
        """x [B, T, D] → ([B, T, D], LayerStats)."""
        tokens = x.flatten(0, 1)  # [N, D]
        routing = self.gate(x)
        handle = self.dispatcher.dispatch(tokens, routing.expert_ids, routing.weights)
        shared = self.shared_experts(x)  # while tokens travel
        rows, counts = self.dispatcher.receive(handle)
        routed = self.dispatcher.combine(self.experts(rows, counts), handle)  # [N, D]
        return routed.view_as(x) + shared, LayerStats(handle.counts, routing.balance)


class Experts(nn.Module):
    """All routed experts of a layer as two stacked tensors, [E, 2F, D] (gate rows first) and [E, D, F]."""

    fp8: Fp8 | None = None

    def __init__(self, config: ModelConfig, grouped_mm: GroupedMM):
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.grouped_mm = grouped_mm
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [M, D] sorted by expert, counts [E] rows of each → [M, D]."""
        if self.fp8:
            return self.fp8.experts(rows, counts, self.gate_up_proj, self.down_proj)
        gate, up = self.grouped_mm(rows, self.gate_up_proj.to(rows.dtype), counts).chunk(2, dim=-1)  # [M, F] each
        return self.grouped_mm(swiglu(gate, up), self.down_proj.to(rows.dtype), counts)


class LocalDispatcher:
    """Every expert on this device: sort the (token, expert) pairs by expert, and put the results back.

    Both moves are permutations, so forward and backward only gather: no scatter-add, and the same bits in every run. Where the
    K rows of a token are summed, gather and sum are one kernel (`_sum_rows`), and the [N, K, D] in between does not exist.
    """

    class Handle(NamedTuple):
        tokens: Tensor  # [N, D]
        place: Tensor  # [N, K] row of each (token, expert) pair in the sorted order
        order: Tensor  # [N·K] pair of each row: its inverse
        weights: Tensor  # [N, K]
        counts: Tensor  # [E]

    def __init__(self, experts: int):
        self.experts = experts

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Handle:
        order, place, counts = sort_by_expert(expert_ids, self.experts)
        return self.Handle(tokens, place, order, weights, counts)

    def receive(self, handle: Handle) -> tuple[Tensor, Tensor]:
        return _ToExperts.apply(handle.tokens, handle.place, handle.order), handle.counts

    def combine(self, expert_output: Tensor, handle: Handle) -> Tensor:
        weights = handle.weights.to(expert_output.dtype)
        return _FromExperts.apply(expert_output, weights, handle.place, handle.order)


class _ToExperts(torch.autograd.Function):
    """rows[m] = tokens[order[m] // K]; the gradient of a token is the sum over its K rows."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, place: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens.index_select(0, order // place.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        return _sum_rows(grad, place), None, None


class _FromExperts(torch.autograd.Function):
    """tokens[n] = Σ_k weights[n, k] · rows[place[n, k]]"""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, place: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, place, order)
        return _sum_rows(rows, place, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        rows, weights, place, order = ctx.saved_tensors
        of_rows = grad.index_select(0, order // place.shape[1])  # [M, D] gradient of each row's token
        d_weights = torch.linalg.vecdot(rows, of_rows)[place]  # [N, K]
        return of_rows.mul_(weights.flatten()[order].unsqueeze(-1)), d_weights, None, None


def _sum_rows(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ_k weights[n, k] · rows[place[n, k]]; weights of 1 where there are none. rows [M, D], place [N, K] → [N, D]."""
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weights)
