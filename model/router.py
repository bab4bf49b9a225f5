"""The gate: sigmoid affinities, and the K experts of each token by node-limited routing. DeepSeek-V3 §2.1.2, Eqs. 12–16.

    s_i = sigmoid(u · e_i)                        affinity of a token to expert i, in fp32
    chosen = top-K of s_i + b_i                   within the topk_group best groups; b only chooses, it never weighs
    g_i = s_i / Σ_chosen s · routed_scaling_factor

Where the tokens then go is the affair of `model.moe`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class Routing(NamedTuple):
    """Where each token goes, and how much each of its experts counts."""

    expert_ids: Tensor  # [N, K] int64
    weights: Tensor  # [N, K] fp32
    logits: Tensor  # [N, E] fp32, before the sigmoid and without the bias


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
