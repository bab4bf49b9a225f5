"""What a rank really sends: every collective, as PyTorch's dispatcher sees it.

All of `torch.distributed` ends in operations of the namespaces `c10d` and `_c10d_functional`, whoever calls it: DDP's
hook, FSDP's own collectives, DeepSpeed, or our all-to-all. On a CPU the backward pass runs on the thread that called it,
so a dispatch mode around a step also sees what hooks do there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.traffic import Collective


class Call(NamedTuple):
    """One collective of this rank."""

    collective: Collective
    ranks: int
    dtype: torch.dtype
    whole: int  # bytes of the whole tensor; of an all-to-all, of the rows that leave this rank or stay on it
    sent: int | None = None  # bytes that an all-to-all sends to other ranks


class TrafficCounter(TorchDispatchMode):
    """Use as a context manager around a step; `calls` are then its collectives.

    Raises:
        NotImplementedError: an operation of `torch.distributed` that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            if name not in KNOWN:
                raise NotImplementedError(f"{func} sends, and nobody counts it")
            self.calls += KNOWN[name](*args)
        return func(*args, **(kwargs or {}))


def _all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> list[Call]:
    return [_call("all_reduce", group, tensor) for tensor in tensors]


def _all_gather(output: Tensor, part: Tensor, group: Any, *_: Any) -> list[Call]:
    return [_call("all_gather", group, output)]


def _all_gather_coalesced(outputs: list[Tensor], parts: list[Tensor], group: Any, *_: Any) -> list[Call]:
    return [_call("all_gather", group, output) for output in outputs]


def _all_gather_lists(outputs: list[list[Tensor]], parts: list[Tensor], group: Any, *_: Any) -> list[Call]:
    return [_call("all_gather", group, *output) for output in outputs]


def _reduce_scatter(part: Tensor, whole: Tensor, group: Any, *_: Any) -> list[Call]:
    return [_call("reduce_scatter", group, whole)]


def _reduce(tensors: list[Tensor], group: Any, *_: Any) -> list[Call]:
    return [_call("reduce", group, tensor) for tensor in tensors]


def _broadcast(tensors: list[Tensor], group: Any, *_: Any) -> list[Call]:
    return [_call("broadcast", group, tensor) for tensor in tensors]


def _all_to_all(rows: Tensor, receive: list[int], send: list[int], group_name: Any) -> list[Call]:
    group = dist.distributed_c10d._resolve_process_group(group_name)
    to_others = sum(send) - send[group.rank()]
    return [Call("all_to_all", group.size(), rows.dtype, rows.nbytes, to_others * rows[:1].nbytes)]


def _gather_by_name(part: Tensor, ranks: int, group_name: Any) -> list[Call]:
    return [Call("all_gather", ranks, part.dtype, ranks * part.nbytes)]


def _scatter_by_name(whole: Tensor, operation: str, ranks: int, group_name: Any) -> list[Call]:
    return [Call("reduce_scatter", ranks, whole.dtype, whole.nbytes)]


def _reduce_by_name(tensor: Tensor, operation: str, group_name: Any) -> list[Call]:
    group = dist.distributed_c10d._resolve_process_group(group_name)
    return [Call("all_reduce", group.size(), tensor.dtype, tensor.nbytes)]


def _send(tensors: list[Tensor], *_: Any) -> list[Call]:
    return [Call("send", 2, tensor.dtype, tensor.nbytes, tensor.nbytes) for tensor in tensors]


def _call(collective: Collective, group: Any, *whole: Tensor) -> Call:
    ranks = dist.ProcessGroup.unbox(group).size()
    return Call(collective, ranks, whole[0].dtype, sum(tensor.nbytes for tensor in whole))


KNOWN: dict[str, Callable[..., list[Call]]] = {
    "allreduce_": _all_reduce,
    "_allgather_base_": _all_gather,
    "allgather_": _all_gather_lists,
    "allgather_into_tensor_coalesced_": _all_gather_coalesced,
    "_reduce_scatter_base_": _reduce_scatter,
    "reduce_": _reduce,
    "broadcast_": _broadcast,
    "all_to_all_single": _all_to_all,
    "all_gather_into_tensor": _gather_by_name,
    "reduce_scatter_tensor": _scatter_by_name,
    "all_reduce": _reduce_by_name,
    "send": _send,
    "recv_": lambda *_: [],
    "wait_tensor": lambda *_: [],
}
