"""Activation checkpointing: what of a block's forward pass is kept for the backward pass, and what is computed again.

| mode        | kept of each block                                         | computed again                                  |
|-------------|------------------------------------------------------------|-------------------------------------------------|
| `none`      | everything                                                 | nothing                                         |
| `selective` | outputs of attention and matrix products, rows that travel | RMSNorm, MLA up-projections, SwiGLU (V3 §3.2.3) |
| `full`      | the block's input                                          | the block                                       |

With expert parallelism `selective` keeps rows as they arrive, so that none travels twice: K·D elements a token and layer beyond
what one device keeps. The outputs of the experts are kept where they come home. Under `full` rows travel again.

In FP8 (`model.ops.fp8`) `none` keeps the inputs of products, and the gate and up of a SwiGLU, in E4M3. `selective` is what it is
without FP8: it keeps the outputs of products in the compute dtype, and quantises their inputs again. So it saves norms and
attention's queries, keys and values, as the report does, but of feed-forward networks it keeps more than `none`: gate and up in
two bytes for one. `model.flops.activation_bytes` counts both.

Routing decisions are kept in every mode, never recomputed: recomputed scores could differ in the last bit, and a token would then
go backward through another expert than forward.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from model.block import Block
from model.flops import Recompute
from model.ops.fp8 import products  # noqa: F401  # whose operations are named below
from model.transformer import Transformer
from parallel.expert import TO_HOST

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
ROUTING = {torch.ops.rorqual.route.default, TO_HOST}
EXCHANGES = {c10d.all_to_all_single.default, c10d.wait_tensor.default}  # of integers: how many tokens each expert gets
GROUPED_PRODUCTS = {aten._grouped_mm.default, torch.ops.rorqual.fp8_multiply_groups.default}
MATRIX_PRODUCTS = GROUPED_PRODUCTS | {
    aten.mm.default, aten.addmm.default, aten.bmm.default, torch.ops.rorqual.fp8_multiply.default,
}  # fmt: skip
ATTENTION = {
    torch.ops.rorqual.attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
UP_PROJECTIONS = ("q_b_proj", "kv_b_proj")

IsKept = Callable[[Any, tuple[Any, ...]], bool]  # of an operation and its arguments


def apply_recompute(model: Transformer, mode: Recompute) -> None:
    """Let every block of the model, MTP modules included, recompute in its backward pass what `mode` says."""
    if mode == "none":
        return
    for module in model.modules():
        if isinstance(module, Block):
            is_kept = _SelectivePolicy(module) if mode == "selective" else _is_routing
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=partial(_contexts, is_kept),
                preserve_rng_state=False,
            )


def _contexts(is_kept: IsKept) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes under which a block runs forward, and runs again.

    PyTorch's own selective checkpointing numbers all operations, and is put out by those that FSDP runs inside a block, which
    differ between the two passes. Here only what is kept is looked at.
    """
    kept: deque[tuple[Any, Any]] = deque()
    return _Keep(is_kept, kept), _Recall(is_kept, kept)


class _Keep(TorchDispatchMode):
    """Note the outputs of what is kept, in order."""

    def __init__(self, is_kept: IsKept, kept: deque[tuple[Any, Any]]):
        super().__init__()
        self.is_kept, self.kept = is_kept, kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.is_kept(func, args):
            if func is c10d.all_to_all_single.default and self.kept and self.kept[-1][0] in GROUPED_PRODUCTS:
                # What experts hand out is kept where it comes home; here its shape will do.
                product, output = self.kept[-1]
                self.kept[-1] = (product, tree_map_only(Tensor, _hollow, output))
            self.kept.append((func, tree_map_only(Tensor, Tensor.detach, out)))
        return out


class _Recall(_Keep):
    """Give out what was kept in place of running it, in the same order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_kept(func, args):
            return func(*args, **(kwargs or {}))
        kept_of, out = self.kept.popleft()
        assert kept_of is func, f"the backward pass ran {func} where the forward pass ran {kept_of}"
        return out


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without content: NaN, should anyone read it after all."""
    return tensor.new_full((), math.nan).expand_as(tensor)


def _is_routing(func: Any, args: tuple[Any, ...]) -> bool:
    return func in ROUTING or (func in EXCHANGES and args[0].dtype is torch.int64)


class _SelectivePolicy:
    """Keeps products, attention and what travels, except a product that runs inside one of the block's up-projections."""

    def __init__(self, block: Block):
        self.inside_up_projection = False
        for name in UP_PROJECTIONS:
            projection = getattr(block.self_attn, name, None)
            if projection is not None:
                projection.register_forward_pre_hook(self._enter)
                projection.register_forward_hook(self._leave)

    def __call__(self, func: Any, args: tuple[Any, ...]) -> bool:
        kept = func in ROUTING or func in ATTENTION or func in EXCHANGES
        return kept or (func in MATRIX_PRODUCTS and not self.inside_up_projection)

    def _enter(self, *_: Any) -> None:
        self.inside_up_projection = True

    def _leave(self, *_: Any) -> None:
        self.inside_up_projection = False
