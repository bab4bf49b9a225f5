"""The gate: sigmoid affinities, and the K experts of each token by node-limited routing. DeepSeek-V3 §2.1.2, Eqs. 12–16.

    s_i = sigmoid(u · e_i)                        affinity of a token to expert i, in fp32
    chosen = top-K of s_i + b_i                   within the topk_group best groups; b only chooses, it never weighs
    g_i = s_i / Σ_chosen s · routed_scaling_factor

Where the tokens then go is the affair of `model.moe`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import balance
from model.config import ModelConfig
from model.context import WHOLE, Context
from model.ops.routing import Rule, route


class Routing(NamedTuple):
    """Where each token goes, and how much each of its experts counts."""

    expert_ids: Tensor  # [N, K] int64
    weights: Tensor  # [N, K] fp32
    logits: Tensor  # [N, E] fp32, before the sigmoid and without the bias
    balance: Tensor  # [] fp32, sequence-wise balance loss summed over the sequences


class Router(nn.Module):
    """The gate. Its bias is a buffer: it is moved by `balance.update`, never by a gradient."""

    e_score_correction_bias: Tensor
    context: Context = WHOLE

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.rule = Rule(c.n_group, c.topk_group, c.num_experts_per_tok, c.norm_topk_prob, c.routed_scaling_factor)
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """x [..., T, D], sequences of T tokens, N in all → Routing."""
        logits = _LinearInFp32.apply(x.flatten(0, -2), self.weight)  # [N, E]
        by_sequence = logits.view(-1, *x.shape[-2:-1], logits.shape[-1])  # [B, T, E]
        ids, weights, loss = route(by_sequence, self.e_score_correction_bias, self.rule)
        if self.context.pieces > 1 and torch.is_grad_enabled():  # without gradients nobody asks for it
            loss = balance.loss_of_pieces(by_sequence, self.rule.top_k, self.context.pieces, self.context.average)
        return Routing(ids, weights, logits, loss)


class _LinearInFp32(torch.autograd.Function):
    """x Wᵀ, [N, D] → [N, E] fp32. Keeps x in its own dtype, which others keep too, and not the copy in fp32 that it multiplies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return (grad @ weight.float()).to(x.dtype), (grad.T @ x.float()).to(weight.dtype)
