"""Kernels as operations of PyTorch, `rorqual::NAME`: one name for the same work on every device.

What watches operations (recomputation, `torch.compile`, a profiler) then sees the work and not how it is done. An operation has no
derivative: an autograd function calls it, and another one for its gradients.
"""

from collections.abc import Callable
from typing import Any

import torch

# Not by `torch.library.custom_op`, which imports the compiler, seconds in every process, and takes three times as long to call.
_library = torch.library.Library("rorqual", "DEF")


def operation(schema: str, shape: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the function below an operation; what replaces it calls the operation.

    Args:
        schema: as PyTorch writes them, "name(Tensor x, float eps) -> (Tensor, Tensor)"; "Tensor(a!)" where it writes into x.
        shape: takes the same arguments and returns empty tensors like the results, for tensors without memory.
    """

    def define(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rorqual::{name}", shape, lib=_library)
        return getattr(torch.ops.rorqual, name).default

    return define
