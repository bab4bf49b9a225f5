"""Expert parallelism: the experts of a layer lie on several ranks, and tokens travel to them and back by all-to-all.

    send:  a rank's N·K (token, expert) rows, sorted by expert, hence by the rank that has the expert
           counts [E] → every rank tells every other how many rows it will send to each of its experts
           rows [N·K, D] → rows [M, D] in the order (source rank, expert); sorted to (expert, source rank) for the experts
           weights [N·K] → weights [M], in a message of their own: the experts weigh
    back:  the rows the same way in reverse; each token then sums its K

Since what comes home is weighed already, no gradient asks for it, and nobody keeps those K·D numbers a token (`model.ops.experts`).
The gradient of the weights is made by the experts and travels home with that of the rows: 4 bytes a row each way.

With FP8 dispatch (V3 §3.3.3) rows travel to experts, and the gradients of what experts hand out, in E4M3 with a power of two for
every 128 numbers: D + ⌈D/128⌉ bytes a row. What experts hand out and the gradients of their rows travel in the compute dtype:
they are yet to be summed. The answer is that of FP8 without it, to the bit: the experts quantise what arrived by powers of two
again, and find the same numbers (where rounding took a tile's largest to half of the range, as twice the data with half the
scale).

Counts are exact: no capacity, no padding, no token dropped. With experts in groups (node-limited routing) nothing changes here:
fewer ranks have rows to exchange, and an empty message costs nothing.

The host must know how many rows to expect, so it waits for the device once a layer, in `dispatch`. Not to wait at all takes buffers
of a size known beforehand: the worst case N·min(K, E/ranks) rows from each rank, with equal splits. That pays for the wait with
memory and traffic, unless kernels send from the device (DeepEP's low-latency mode).
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from model.moe import Arrived, LocalDispatcher, MoE
from model.ops.fp8.kernels import Kernels
from model.ops.fp8.quantize import Quantized, dequantize
from model.ops.operation import operation
from model.ops.rows import permute, spread_rows, sum_rows
from model.transformer import Transformer
from parallel.overlap import meanwhile


def spread_experts(model: Transformer, mesh: DeviceMesh, fp8_dispatch: bool = False) -> None:
    """Leave each rank of `mesh` its E / ranks experts of every layer, MTP modules included, and let tokens travel.

    Args:
        model: on the meta device; its stacked expert parameters become [E / ranks, ·, ·].
        mesh: [expert]; rank r gets experts r·E/ranks and the following.
        fp8_dispatch: let rows travel in E4M3 to experts that compute in FP8.
    """
    group = mesh.get_group()
    for layer in model.modules():
        if isinstance(layer, MoE):
            experts = layer.gate.config.n_routed_experts
            for name, parameter in list(layer.experts.named_parameters()):
                mine = torch.empty(experts // group.size(), *parameter.shape[1:], device="meta")
                setattr(layer.experts, name, nn.Parameter(mine))
            fp8 = layer.experts.fp8 if fp8_dispatch else None
            layer.dispatcher = AllToAllDispatcher(experts, group, fp8.kernels if fp8 else None)


class AllToAllDispatcher:
    """The `Dispatcher` whose experts lie on the ranks of a group.

    Args:
        experts: E, of all ranks.
        fp8: quantises the rows that travel to experts, and the gradients on the same way; None: nothing is quantised.
    """

    class Handle(NamedTuple):
        local: Arrived  # this rank's rows, were its experts all here
        counts: Tensor  # [E] of this rank's tokens
        arriving: Tensor  # [E_local] rows for each of this rank's experts
        order: Tensor  # [M] the row to take for each place, from (source rank, expert) to (expert, source rank)
        inverse: Tensor  # [M]
        on_their_way: Tensor  # [M, D]; in FP8 [M, D + ⌈D/128⌉]
        weights: Tensor  # [M] fp32, on their way too
        trip: "Trip"

    def __init__(self, experts: int, group: dist.ProcessGroup, fp8: Kernels | None = None):
        self.local = LocalDispatcher(experts)
        self.group = group
        self.fp8 = fp8

    def dispatch(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Handle:
        sorted_here = self.local.dispatch(tokens, expert_ids, weights)
        local = self.local.receive(sorted_here)
        ranks = self.group.size()
        leaving = local.counts.view(ranks, -1)  # [ranks, E_local]
        arriving = _wait(_exchange(leaving, [1] * ranks, [1] * ranks, self.group))
        send, receive = self.rows(leaving, arriving, local.place.numel())
        outward = InFp8(self.fp8, tokens.shape[1], tokens.dtype) if self.fp8 else AsTheyAre()
        trip = Trip(self.group, send, receive, outward, AsTheyAre())
        rows, weights = _Depart.apply(trip, spread_rows(tokens, local.place), local.weights)  # N·K leave
        order, inverse = _orders(arriving, total=sum(receive))
        return self.Handle(local, local.counts, arriving.sum(0), order, inverse, rows, weights, trip)

    def rows(self, leaving: Tensor, arriving: Tensor, total: int) -> tuple[list[int], list[int]]:
        """How many rows go to each rank and come from each, on the host: the one wait for the device.

        Args:
            leaving, arriving: [ranks, E_local].
            total: of all that leave. Where tensors have no values, this alone is known.
        """
        send, receive = to_host(torch.stack([leaving.sum(1), arriving.sum(1)])).tolist()
        return send, receive

    def receive(self, handle: Handle) -> Arrived:
        order, inverse = handle.order, handle.inverse
        rows, weights = _Arrive.apply(handle.trip, handle.on_their_way, handle.weights)  # (source rank, expert)
        return Arrived(rows, order, inverse.unsqueeze(1), handle.arriving, permute(weights, order, inverse))

    def combine(self, expert_output: Tensor, handle: Handle) -> Tensor:
        home = handle.trip.back()
        (rows,) = _Arrive.apply(home, *_Depart.apply(home, expert_output))  # [N·K, D]
        return sum_rows(rows, handle.local.place)


class Form(Protocol):
    """What rows [M, D] are while they travel."""

    def pack(self, rows: Tensor) -> Tensor: ...

    def unpack(self, travelled: Tensor) -> Tensor: ...


class AsTheyAre:
    """A `Form`: the rows themselves."""

    def pack(self, rows: Tensor) -> Tensor:
        return rows

    def unpack(self, travelled: Tensor) -> Tensor:
        return travelled


class InFp8:
    """A `Form` of one message: [M, D + ⌈D/128⌉] bytes, E4M3 and then a scale for each tile, a power of two by its exponent alone.

    Such numbers are bf16 numbers, so what arrives in the compute dtype is what was sent. A scale that is not finite arrives as NaN.

    Args:
        width: D.
        dtype: of the rows before and after.
    """

    def __init__(self, kernels: Kernels, width: int, dtype: torch.dtype):
        self.kernels, self.width, self.dtype = kernels, width, dtype

    def pack(self, rows: Tensor) -> Tensor:
        data, scale = self.kernels.quantize_rows(rows, power_of_two=True)
        return torch.cat((data.view(torch.uint8), scale.to(torch.float8_e8m0fnu).view(torch.uint8)), dim=1)

    def unpack(self, travelled: Tensor) -> Tensor:
        data, scale = travelled.view(torch.uint8).tensor_split([self.width], dim=1)
        rows = Quantized(data.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu).float())
        return dequantize(rows).to(self.dtype)


class Trip:
    """Rows between the ranks of a group, and a number for each where there is one: forward once and, for the gradient, back once.

    Args:
        send: rows for each rank, in the order in which they lie here.
        receive: rows from each rank.
        out, home: what the rows are on their way, and what their gradients are.
    """

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int], out: Form, home: Form):
        self.group, self.send, self.receive = group, send, receive
        self.out, self.home = out, home
        self.gradients: list[Tensor] = []  # on their way

    def back(self) -> "Trip":
        """The way home of what this trip brought; gradients then go the way of this trip, and in its form."""
        return Trip(self.group, self.receive, self.send, self.home, self.out)


class _Depart(torch.autograd.Function):
    """Let rows set off, and numbers beside them: outputs must not be touched before `_Arrive`.

    The backward pass waits for their gradients.
    """

    @staticmethod
    def forward(ctx: Any, trip: Trip, rows: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        beside = [_exchange(t, trip.send, trip.receive, trip.group) for t in numbers]
        on_their_way = _exchange(trip.out.pack(rows), trip.send, trip.receive, trip.group)
        # A collective takes bytes but no E4M3, and autograd follows E4M3 but no bytes.
        if not on_their_way.is_floating_point():
            on_their_way = on_their_way.view(torch.float8_e4m3fn)
        return on_their_way, *beside

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (of_rows, *beside), ctx.trip.gradients = ctx.trip.gradients, []
        return None, ctx.trip.home.unpack(wait_for_rows(of_rows)), *map(_wait, beside)


class _Arrive(torch.autograd.Function):
    """Wait for what has set off. In the backward pass gradients set off, and travel while others compute.

    A gradient on its way has the shape of the rows that left, which autograd does not allow here: it goes to `_Depart` by the trip.
    """

    @staticmethod
    def forward(ctx: Any, trip: Trip, on_their_way: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        ctx.forms = [(t.shape, t.dtype) for t in (on_their_way, *numbers)]
        rows = trip.out.unpack(wait_for_rows(on_their_way).view_as(on_their_way))
        return rows, *(_wait(t).view_as(t) for t in numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *of_numbers: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        trip = ctx.trip
        gradients = [*of_numbers, trip.home.pack(grad)]
        *beside, of_rows = (_exchange(t, trip.receive, trip.send, trip.group) for t in gradients)
        trip.gradients = [of_rows, *beside]
        return None, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.forms)


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


@operation("to_host(Tensor numbers) -> Tensor", lambda numbers: torch.empty_like(numbers, device="cpu"))
def to_host(numbers: Tensor) -> Tensor:
    """A copy in host memory. An operation of its own, so that recomputation can recall it and need not wait again."""
    return numbers.to("cpu", copy=True)


@operation("wait_for_rows(Tensor on_their_way) -> Tensor", torch.empty_like)
def wait_for_rows(on_their_way: Tensor) -> Tensor:
    """Rows that have arrived. An operation of its own: where recomputation recalls it, no other micro-batch need have its turn."""
    meanwhile()
    return _wait(on_their_way)


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Rows on their way to the ranks of a group. The functional form, which `parallel.recompute` can keep."""
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), receive, send, group.group_name)


def _wait(on_their_way: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(on_their_way)


TO_HOST, WAIT_FOR_ROWS = torch.ops.rorqual.to_host.default, torch.ops.rorqual.wait_for_rows.default
