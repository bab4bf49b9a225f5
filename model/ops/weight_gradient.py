"""The gradients of weights, put aside while those of inputs are made.

The backward pass of a product y = x Wᵀ has two parts, dx = dy W and dW = dyᵀ x. Only dx is waited for: by the layer before, and at
the end of a pipeline stage by the stage before. So zero-bubble schedules (arXiv 2401.10241) run one part, B, at once, and the
other, W, where a rank would have nothing to do:

    with put_aside() as later:
        loss.backward()          B
    later.run()                  W

A backward function says how its dW is made, by `weight_gradient`. As long as somebody puts aside, nothing but the operands of the
product is kept, and autograd gets None for dW; `run` then adds dW to the weight's `grad`, as autograd would have done. It can do so
only where the product reads a leaf, the parameter itself; of a weight that was cast first the gradient is made at once. So nothing
is put aside where an engine keeps fp32 parameters whole and computes in half precision without FP8: there zero-bubble schedules
want FSDP, which casts before the product sees the weight. Hooks on the accumulation of a gradient do not see what `run` adds.

Autograd's own split (`torch.autograd.grad` for the inputs, then for the weights) would run the backward of each Python function
twice, and recompute twice.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_collecting: "WeightGradients | None" = None  # of all threads: autograd runs backward functions in threads of its own


class WeightGradients:
    """Products that are yet to be computed, with their operands."""

    def __init__(self) -> None:
        self._products: deque[tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]] = deque()

    def add(self, weight: Tensor, product: Callable[..., Tensor], operands: tuple[Any, ...]) -> None:
        # The graph of earlier layers hangs on a tensor that was saved, and would live as long.
        detached = tuple(operand.detach() if isinstance(operand, Tensor) else operand for operand in operands)
        self._products.append((weight, product, detached))

    @torch.no_grad()
    def run(self) -> None:
        """Compute each and add it to its weight's gradient; what it took is free again. A second call does nothing."""
        while self._products:
            weight, product, operands = self._products.popleft()
            gradient = product(*operands)
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad += gradient


@contextmanager
def put_aside() -> Iterator[WeightGradients]:
    """Collect the gradients of weights that backward passes inside leave for later."""
    global _collecting
    outer, _collecting = _collecting, WeightGradients()
    try:
        yield _collecting
    finally:
        _collecting = outer


def leaf_of(weight: Tensor) -> Tensor | None:
    """What `weight_gradient` asks for: the weight where it is a parameter, None where it was made from one.

    For a forward function, to be kept on its `ctx` as it is: what `ctx.saved_tensors` gives back may be another tensor.
    """
    return weight if weight.is_leaf and weight.requires_grad else None


def weight_gradient(leaf: Tensor | None, product: Callable[..., Tensor], *operands: Any) -> Tensor | None:
    """What a backward function hands out for a weight: product(*operands), or None if that was put aside."""
    if _collecting is None or leaf is None:
        return product(*operands)
    _collecting.add(leaf, product, operands)
    return None
