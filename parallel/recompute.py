"""Activation checkpointing: what of a block's forward pass is kept for the backward pass, and what is computed again.

| mode        | kept of each block                            | computed again                                  |
|-------------|-----------------------------------------------|-------------------------------------------------|
| `none`      | everything                                    | nothing                                         |
| `selective` | outputs of attention and of matrix products   | RMSNorm, MLA up-projections, SwiGLU (V3 §3.2.3) |
| `full`      | the block's input                             | the block                                       |

Routing decisions are kept in every mode, never recomputed: recomputed scores could differ in the last bit, and a token would then
go backward through another expert than forward.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model.block import Block
from model.flops import Recompute
from model.transformer import Transformer

aten = torch.ops.aten
ROUTING = {aten.topk.default, aten.argsort.stable, aten.sort.stable}
MATRIX_PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default,
}  # fmt: skip
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")


def apply_recompute(model: Transformer, mode: Recompute) -> None:
    """Let every block of the model, MTP modules included, recompute in its backward pass what `mode` says."""
    if mode == "none":
        return
    for module in model.modules():
        if isinstance(module, Block):
            _checkpoint_block(module, mode)


def _checkpoint_block(block: Block, mode: Recompute) -> None:
    policy = _SelectivePolicy(block) if mode == "selective" else _keep_routing
    contexts = partial(create_selective_checkpoint_contexts, policy)
    block.forward = partial(  # type: ignore[method-assign]
        checkpoint, block.forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
    )


def _keep_routing(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ROUTING else CheckpointPolicy.PREFER_RECOMPUTE


class _SelectivePolicy:
    """Keeps products and attention, except a product that runs inside one of the block's up-projections."""

    def __init__(self, block: Block):
        self.inside_up_projection = False
        for name in UP_PROJECTIONS:
            projection = getattr(block.self_attn, name, None)
            if projection is not None:
                projection.register_forward_pre_hook(self._enter)
                projection.register_forward_hook(self._leave)

    def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op in ROUTING or op in ATTENTION or (op in MATRIX_PRODUCTS and not self.inside_up_projection)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def _enter(self, *_: Any) -> None:
        self.inside_up_projection = True

    def _leave(self, *_: Any) -> None:
        self.inside_up_projection = False
