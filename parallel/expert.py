"""Expert parallelism: the experts of a layer lie on several ranks, and tokens travel to them and back by all-to-all.

    send:  a rank's N·K (token, expert) rows, sorted by expert, hence by the rank that has the expert
           counts [E] → every rank tells every other how many rows it will send to each of its experts
           rows [N·K, D] → rows [M, D] in the order (source rank, expert); sorted to (expert, source rank) for the experts
    back:  the same way in reverse; each token then sums its K rows by weight

Counts are exact: no capacity, no padding, no token dropped. With experts in groups (node-limited routing) nothing changes here:
fewer ranks have rows to exchange, and an empty message costs nothing.

The host must know how many rows to expect, so it waits for the device once a layer, in `dispatch`. Not to wait at all takes buffers
of a size known beforehand: the worst case N·min(K, E/ranks) rows from each rank, with equal splits. That pays for the wait with
memory and traffic, unless kernels send from the device (DeepEP's low-latency mode).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from model.moe import LocalDispatcher, MoE
from model.transformer import Transformer


def spread_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Leave each rank of `mesh` its E / ranks experts of every layer, MTP modules included, and let tokens travel.

    Args:
        model: on the meta device; its stacked expert parameters become [E / ranks, ·, ·].
        mesh: [expert]; rank r gets experts r·E/ranks and the following.
    """
    group = mesh.get_group()
    for layer in model.modules():
        if isinstance(layer, MoE):
            experts = layer.gate.config.n_routed_experts
            for name, parameter in list(layer.experts.named_parameters()):
                mine = torch.empty(experts // group.size(), *parameter.shape[1:], device="meta")
                setattr(layer.experts, name, nn.Parameter(mine))
            layer.dispatcher = AllToAllDispatcher(experts, group)


class AllToAllDispatcher:
    """The `Dispatcher` whose experts lie on the ranks of a group."""

    class Handle(NamedTuple):
        local: LocalDispatcher.Handle  # this rank's rows, sorted by expert
        counts: Tensor  # [E] of this rank's tokens
        arriving: Tensor  # [E_local] rows for each of this rank's experts
        order: Tensor  # [M] the row to take for each place, from (source rank, expert) to (expert, source rank)
        inverse: Tensor  # [M]
        on_their_way: Tensor  # [M, D]
        trip: "Trip"

    def __init__(self, experts: int, group: dist.ProcessGroup):
        self.local = LocalDispatcher(experts)
        self.group = group

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Handle:
        local = self.local.dispatch(tokens, expert_ids, weights)
        ranks = self.group.size()
        leaving = local.counts.view(ranks, -1)  # [ranks, E_local]
        arriving = _wait(_exchange(leaving, [1] * ranks, [1] * ranks, self.group))
        send, receive = to_host(torch.stack([leaving.sum(1), arriving.sum(1)])).tolist()  # the one wait for the device
        trip = Trip(self.group, send, receive)
        rows, _ = self.local.receive(local)  # [N·K, D]
        on_their_way = _Depart.apply(rows, trip)
        order, inverse = _orders(arriving, total=sum(receive))
        return self.Handle(local, local.counts, arriving.sum(0), order, inverse, on_their_way, trip)

    def receive(self, handle: Handle) -> tuple[Tensor, Tensor]:
        rows = _Arrive.apply(handle.on_their_way, handle.trip)  # (source rank, expert)
        return _Permute.apply(rows, handle.order, handle.inverse), handle.arriving

    def combine(self, expert_output: Tensor, handle: Handle) -> Tensor:
        home = handle.trip.back()
        rows = _Permute.apply(expert_output, handle.inverse, handle.order)  # (source rank, expert)
        return self.local.combine(_Arrive.apply(_Depart.apply(rows, home), home), handle.local)


class Trip:
    """Rows between the ranks of a group: forward once and, for the gradient, back once.

    Args:
        send: rows for each rank, in the order in which they lie here.
        receive: rows from each rank.
    """

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int]):
        self.group, self.send, self.receive = group, send, receive
        self.gradient: Tensor | None = None  # on its way

    def back(self) -> "Trip":
        """The way home of what this trip brought."""
        return Trip(self.group, self.receive, self.send)


class _Depart(torch.autograd.Function):
    """Let rows set off: the output must not be touched before `_Arrive`. The backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return _exchange(rows, trip.send, trip.receive, trip.group)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient, ctx.trip.gradient = ctx.trip.gradient, None
        return _wait(gradient), None


class _Arrive(torch.autograd.Function):
    """Wait for rows. In the backward pass their gradients set off, and travel while others compute.

    A gradient on its way has the shape of the rows that left, which autograd does not allow here: it goes to `_Depart` by the trip.
    """

    @staticmethod
    def forward(ctx: Any, on_their_way: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return _wait(on_their_way).view_as(on_their_way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.trip.gradient = _exchange(grad, ctx.trip.receive, ctx.trip.send, ctx.trip.group)
        return grad.new_zeros(()).expand_as(grad), None


def _orders(arriving: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """How to sort rows from (source rank, expert) to (expert, source rank), and back.

    Args:
        arriving: [ranks, E_local] rows from each rank for each expert.
        total: their sum, M, which the host knows.

    Returns:
        [M] the row to take for each place, and the inverse of that permutation.
    """
    flat = arriving.flatten()
    starts = (flat.cumsum(0) - flat).view_as(arriving).T.flatten()  # of the runs of rows, in their new order
    lengths = arriving.T.flatten()
    shift = starts - (lengths.cumsum(0) - lengths)
    place = torch.arange(total, device=arriving.device)
    order = place + shift.repeat_interleave(lengths, output_size=total)
    return order, torch.empty_like(order).scatter_(0, order, place)


@torch.library.custom_op("rorqual::to_host", mutates_args=())
def to_host(numbers: Tensor) -> Tensor:
    """A copy in host memory. An operation of its own, so that recomputation can recall it and need not wait again."""
    return numbers.to("cpu", copy=True)


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows on their way to the ranks of a group. The functional form, which `parallel.recompute` can keep."""
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), receive, send, group.group_name)


def _wait(on_their_way: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(on_their_way)


class _Permute(torch.autograd.Function):
    """rows[order]; its gradient is gathered too, by the inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


TO_HOST = torch.ops.rorqual.to_host.default
