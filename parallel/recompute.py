"""Activation checkpointing: what of a block's forward pass is kept for the backward pass, and what is computed again.

| mode        | kept of each block                                         | computed again                                  |
|-------------|------------------------------------------------------------|-------------------------------------------------|
| `none`      | everything                                                 | nothing                                         |
| `selective` | outputs of attention and matrix products, rows that travel | RMSNorm, MLA up-projections, SwiGLU (V3 §3.2.3) |
| `full`      | the block's input                                          | the block                                       |

Of a feed-forward network, routed experts included, the output of the last product is not kept: no gradient asks for it. In an MTP
module one does, that of the norm behind the block; there what the experts make of a token is kept, summed.

With expert parallelism `selective` keeps rows as they arrive, so that none travels twice, and their weights: K·(D + 1) numbers a
token and layer beyond what one device keeps. What experts hand out is weighed before it comes home, and no gradient asks for it.
Under `full` rows travel again. So with context parallelism: `selective` keeps the latents and rotary keys of whole sequences,
R + rope numbers for each of their tokens, and makes keys and values of them again; under `full` they are gathered again.

In FP8 (`model.ops.fp8`) `none` keeps the inputs of products, and the gate and up of a SwiGLU, in E4M3. `selective` keeps outputs
of products in the compute dtype, and quantises their inputs again. Of gate and up it keeps what `none` keeps (V3 §3.3.3): the
second run takes them up in E4M3, and needs nothing of what they were made of, nor what was made of them.

Routing decisions are kept in every mode, never recomputed: recomputed scores could differ in the last bit, and a token would then
go backward through another expert than forward.
"""

import math
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.flops import Recompute
from model.layers import MLP
from model.mtp import MTPBlock
from model.ops import experts  # noqa: F401  # whose operations are named below, as are those of
from model.ops.fp8 import kernels  # noqa: F401
from model.transformer import Transformer
from parallel.expert import TO_HOST, WAIT_FOR_ROWS

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
ROUTING = {torch.ops.rorqual.route.default, TO_HOST}
# Of integers (how many tokens each expert gets) kept in every mode. What sets off and the wait for it go together: both are kept,
# or both run again.
EXCHANGES = {
    c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default, c10d.all_reduce.default,
    c10d.wait_tensor.default, WAIT_FOR_ROWS,
}  # fmt: skip
GROUPED_PRODUCTS = {torch.ops.rorqual.multiply_groups.default, torch.ops.rorqual.fp8_multiply_groups.default}
SUM = torch.ops.rorqual.sum_rows.default
FP8_SWIGLU = torch.ops.rorqual.fp8_swiglu.default
MATRIX_PRODUCTS = GROUPED_PRODUCTS | {
    aten.mm.default, aten.addmm.default, aten.bmm.default, torch.ops.rorqual.fp8_multiply.default,
}  # fmt: skip
ATTENTION = {
    torch.ops.rorqual.attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._efficient_attention_forward.default,  # of queries at the last positions
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
ATTENTION_ELSEWHERE = {  # in packages that may be missing, by name
    "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward",
    "torch_attn::_varlen_attn",
}  # fmt: skip
UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")

Kept = deque[tuple[Any, Any]]  # operations of a forward pass, and what they gave out


def apply_recompute(model: Transformer, mode: Recompute) -> None:
    """Let every block of the model, MTP modules included, recompute in its backward pass what `mode` says."""
    if mode == "none":
        return
    for module in model.modules():
        if isinstance(module, Block):
            policy = _SelectivePolicy(module) if mode == "selective" else FullPolicy()
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=partial(contexts, policy),
                preserve_rng_state=False,
            )


def contexts(policy: "FullPolicy") -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes under which a block runs forward, and runs again.

    PyTorch's own selective checkpointing numbers all operations, and is put out by those that FSDP runs inside a block, which
    differ between the two passes. Here only what is kept is looked at.
    """
    kept: Kept = deque()
    return _Keep(policy, kept), _Recall(policy, kept)


class _Keep(TorchDispatchMode):
    """Note the outputs of what is kept, in order."""

    def __init__(self, policy: "FullPolicy", kept: Kept):
        super().__init__()
        self.policy, self.kept = policy, kept

    def __enter__(self) -> "_Keep":
        self.policy.kept = self.kept
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.policy.kept = None
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.policy.keeps(func, args):
            self.kept.append((func, tree_map_only(Tensor, Tensor.detach, out)))
            self.policy.has_kept(self.kept)
        return out


class _Recall(TorchDispatchMode):
    """Give out what was kept in place of running it, in the same order."""

    def __init__(self, policy: "FullPolicy", kept: Kept):
        super().__init__()
        self.policy, self.kept = policy, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.policy.keeps(func, args):
            return func(*args, **(kwargs or {}))
        kept_of, out = self.kept.popleft()
        assert kept_of is func, f"the backward pass ran {func} where the forward pass ran {kept_of}"
        return out


class FullPolicy:
    """Keeps routing decisions."""

    kept: Kept | None = None  # of the forward pass that runs

    def keeps(self, func: Any, args: tuple[Any, ...]) -> bool:
        return func in ROUTING or (func in EXCHANGES and args[0].dtype is torch.int64)

    def has_kept(self, kept: Kept) -> None:
        """Look at the last of them."""


class _SelectivePolicy(FullPolicy):
    """Keeps products, attention and what travels, except a product that runs inside one of the block's up-projections.

    Of what the last product of a feed-forward network gave out it keeps the shape, unless it is read in the block.
    """

    def __init__(self, block: Block):
        self.inside_up_projection = False
        self.reads_output = isinstance(block, MTPBlock)
        for name in UP_PROJECTIONS:
            projection = getattr(block.self_attn, name, None)
            if projection is not None:
                projection.register_forward_pre_hook(self._enter)
                projection.register_forward_hook(self._leave)
        network = block.mlp if isinstance(block.mlp, MLP) else block.mlp.shared_experts
        network.register_forward_hook(self._leave_feed_forward)

    def keeps(self, func: Any, args: tuple[Any, ...]) -> bool:
        if func in (SUM, FP8_SWIGLU) or func in ROUTING or func in EXCHANGES:
            return True
        kept = func in ATTENTION or func.name() in ATTENTION_ELSEWHERE
        return kept or (func in MATRIX_PRODUCTS and not self.inside_up_projection)

    def has_kept(self, kept: Kept) -> None:
        last, before = kept[-1][0], kept[-2][0] if len(kept) > 1 else None
        if last is SUM:
            if before in GROUPED_PRODUCTS:
                _hollow(kept, -2)
            elif before is WAIT_FOR_ROWS:  # outputs that came home, weighed
                _hollow(kept, -2)
                _hollow(kept, -3)
            if not self.reads_output:
                _hollow(kept, -1)
        elif last is c10d.all_to_all_single.default and before is SUM:
            _hollow(kept, -2)  # on their way home
        elif last is FP8_SWIGLU:
            _hollow(kept, -2)  # up and gate, as the products gave them out
            _hollow(kept, -3)
            product, scale, *factors = kept[-1][1]
            # A scale of zero, as the largest of all scales is noted once more.
            kept[-1] = last, (_without_memory(product), scale.new_zeros(()).expand_as(scale), *factors)

    def _enter(self, *_: Any) -> None:
        self.inside_up_projection = True

    def _leave(self, *_: Any) -> None:
        self.inside_up_projection = False

    def _leave_feed_forward(self, *_: Any) -> None:
        if self.kept is not None and not self.reads_output:
            assert self.kept[-1][0] in MATRIX_PRODUCTS, self.kept[-1][0]
            _hollow(self.kept, -1)


def _hollow(kept: Kept, place: int) -> None:
    """Leave of an output its shape and dtype: NaN without memory, should anyone read it after all."""
    func, out = kept[place]
    kept[place] = func, tree_map_only(Tensor, _without_memory, out)


def _without_memory(t: Tensor) -> Tensor:
    return t.new_full((), math.nan).expand_as(t)
