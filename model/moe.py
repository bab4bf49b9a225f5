"""DeepSeekMoE: a sigmoid gate with node-limited routing, stacked routed experts, shared experts. DeepSeek-V3 §2.1.2, Eqs. 12–16.

    s_i = sigmoid(u · e_i)                        affinity of a token to expert i, in fp32
    chosen = top-K of s_i + b_i                   within the topk_group best groups; b only chooses, it never weighs
    g_i = s_i / Σ_chosen s · routed_scaling_factor
    y = FFN_shared(u) + Σ_chosen g_i FFN_i(u)

No token is dropped. How tokens reach their experts is the dispatcher's affair: `LocalDispatcher` sorts them on one device, and a
distributed one takes its place without the model knowing.
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.balance import sequence_balance_loss
from model.config import ModelConfig
from model.layers import MLP
from model.ops.fp8.arithmetic import Fp8
from model.ops.grouped_mm import GroupedMM
from model.ops.swiglu import swiglu


class Routing(NamedTuple):
    """Where each token goes, and how much each of its experts counts."""

    expert_ids: Tensor  # [N, K] int64
    weights: Tensor  # [N, K] fp32
    logits: Tensor  # [N, E] fp32, before the sigmoid and without the bias


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
        routing = self.gate(tokens)
        handle = self.dispatcher.dispatch(tokens, routing.expert_ids, routing.weights)
        shared = self.shared_experts(x)  # while tokens travel
        rows, counts = self.dispatcher.receive(handle)
        routed = self.dispatcher.combine(self.experts(rows, counts), handle)  # [N, D]
        logits = routing.logits.unflatten(0, x.shape[:2])  # [B, T, E]
        balance = sequence_balance_loss(logits, routing.expert_ids.shape[-1])
        return routed.view_as(x) + shared, LayerStats(handle.counts, balance)


class Router(nn.Module):
    """The gate. Its bias is a buffer: it is moved by `balance.update`, never by a gradient."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> Routing:
        """tokens [N, D] → Routing."""
        c = self.config
        logits = F.linear(tokens.float(), self.weight.float())  # [N, E]
        with torch.no_grad():
            choice = logits.sigmoid() + self.e_score_correction_bias
            if c.topk_group < c.n_group:
                choice = limit_to_groups(choice, c.n_group, c.topk_group)
            expert_ids = choice.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices  # [N, K]
        chosen = logits.gather(-1, expert_ids)
        if c.norm_topk_prob:
            # softmax(log sigmoid) is sigmoid over its own sum, without a denominator that can vanish.
            weights = F.logsigmoid(chosen).softmax(-1)
        else:
            weights = chosen.sigmoid()
        return Routing(expert_ids, weights * c.routed_scaling_factor, logits)


def limit_to_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Mask every expert outside each token's best groups (node-limited routing, DeepSeek-V3 §2.1.2).

    A group stands for the experts of one node, so a token is sent to at most `topk_group` nodes.

    Args:
        choice: [N, E] biased affinities; used to choose experts, never to weigh them.
        n_group: number of groups; must divide E.
        topk_group: groups kept per token.

    Returns:
        [N, E] `choice`, with -inf where the expert's group was not kept.
    """
    grouped = choice.unflatten(-1, (n_group, -1))  # [N, G, E/G]
    score = grouped.topk(2, dim=-1).values.sum(-1)  # [N, G]  two best experts speak for the group
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(-1, score.topk(topk_group, dim=-1).indices, True)  # [N, G]
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def count_experts(expert_ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert. [N, K] ids → [E] int64, exact and without a host round trip."""
    flat = expert_ids.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


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
        order = expert_ids.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        counts = count_experts(expert_ids, self.experts)
        return self.Handle(tokens, place.view_as(expert_ids), order, weights, counts)

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
