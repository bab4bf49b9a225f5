"""Where DeepSpeed's ZeRO optimizers keep what, and how a parameter's pieces become whole again.

ZeRO lays the fp32 weights out flat and cuts them into one part per rank; the optimizer knows only this rank's part, its gradient
and its two moments. Stages 1 and 2 flatten whole groups of parameters and cut them anywhere, stage 3 cuts each into equal parts.

    stage 1, 2    group     | p0 |    p1     |  p2  |pad      stage 3    p0 |0|1|   p1 |  0  |  1  |   p2 | 0 | 1|
                  ranks     |      0      |      1      |     flat of rank 0: its part of p0, of p1, of p2

Where ranks have different experts, a stacked parameter [E, ·, ·] is cut twice: into the experts of each rank, and these among the
ranks that have the same.

A `Fragment` says where a part of a parameter lies. The fragments of all ranks follow from shapes and world size, so every rank
knows them without asking. This is the only file that reaches into DeepSpeed's optimizers.

DeepSpeed keeps flat parts a second time, for models of lower precision. Here both are fp32, and one is let go: 4 bytes a parameter
over the ranks. Only with offloading there are two, one on the host for the optimizer and one to compute with.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.moments import start_state


class Fragment(NamedTuple):
    """A piece of a parameter on one rank: elements [start, start + size) of it, at `offset` of the rank's flat tensor `flat`."""

    rank: int
    flat: int
    offset: int
    start: int
    size: int


class Partitions(ABC):
    """This rank's flat parts of weights, gradients and moments.

    Args:
        model: its parameters have the names.
        optimizer: DeepSpeed's, of the stage that the subclass is for.
    """

    flats: list[Tensor]  # fp32 weights, what the inner optimizer steps on
    groups: list[dict[str, Any]]  # of each flat its group of the inner optimizer

    def __init__(self, model: nn.Module, optimizer: Any):
        self.optimizer = optimizer
        self.parameters = dict(model.named_parameters())
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.fragments = {name: list(self._cut(parameter)) for name, parameter in self.parameters.items()}
        self.mine = {
            name: piece for name, pieces in self.fragments.items() for piece in pieces if piece.rank == self.rank
        }

    @abstractmethod
    def _cut(self, parameter: nn.Parameter) -> Iterator[Fragment]:
        """The fragments of a parameter, by rank."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """After a step's last micro-batch: this rank's pieces of the reduced gradients, which `DeepSpeedEngine.step` will use."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """What DeepSpeed does to skip a step whose gradients overflow."""

    @abstractmethod
    def publish(self) -> None:
        """After a change of weights from outside, let every copy follow. Collective."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """A parameter's whole shape, which a partitioned one does not show."""

    def weights(self) -> dict[str, Tensor]:
        """This rank's pieces of the fp32 weights, flat."""
        return self._pieces(self.flats)

    def moments(self, kind: str) -> dict[str, Tensor]:
        """This rank's pieces of "exp_avg" or "exp_avg_sq"; zeros before the first step."""
        return self._pieces([state[kind] for state in self.optimizer_states()])

    def optimizer_states(self) -> list[dict[str, Any]]:
        """Of each flat the inner optimizer's state, made as its first step would make it where there is none yet."""
        inner = self.optimizer.optimizer
        return [start_state(inner, group, flat) for group, flat in zip(self.groups, self.flats)]

    def _pieces(self, flats: list[Tensor]) -> dict[str, Tensor]:
        return {name: flats[f.flat].detach().narrow(0, f.offset, f.size) for name, f in self.mine.items()}


class ReplicatedPartitions(Partitions):
    """Stages 1 and 2: each rank has whole parameters and updates its part of each flat group."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.flats = optimizer.single_partition_of_fp32_groups
        self.groups = optimizer.optimizer.param_groups
        self._places = {
            parameter: (index, offset)
            for index, (parameters, offsets) in enumerate(
                zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets)
            )
            for parameter, offset in zip(parameters, offsets)
        }
        super().__init__(model, optimizer)
        if not optimizer.cpu_offload:
            groups = optimizer.real_dp_process_group
            for flat, parts, group in zip(self.flats, optimizer.parallel_partitioned_bit16_groups, groups):
                flat.data = parts[dist.get_rank(group)].data
            optimizer._link_all_hp_params()

    def _cut(self, parameter: nn.Parameter) -> Iterator[Fragment]:
        index, begin = self._places[parameter]
        end, part = begin + parameter.numel(), self.optimizer.partition_size[index]
        ranks = self._expert_ranks(parameter)
        for expert_rank in range(ranks):
            first = expert_rank * parameter.numel()  # of the whole stack's elements
            for place in range(begin // part, (end - 1) // part + 1):
                low, high = max(begin, place * part), min(end, (place + 1) * part)
                rank = place * ranks + expert_rank
                yield Fragment(rank, index, low - place * part, first + low - begin, high - low)

    def _expert_ranks(self, parameter: nn.Parameter) -> int:
        """How many ranks have different experts of a stacked parameter; 1 for what is alike on all."""
        index, _ = self._places[parameter]
        return self.world_size // self.optimizer.partition_count[index]

    def shape(self, name: str) -> torch.Size:
        parameter = self.parameters[name]
        return torch.Size([parameter.shape[0] * self._expert_ranks(parameter), *parameter.shape[1:]])

    def gradients(self) -> dict[str, Tensor]:
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()  # from a GPU they come while the host goes on
            return self._pieces([flat.grad for flat in self.flats if flat.grad is not None])
        return {
            self.names[parameter]: piece
            for index, parameters in enumerate(self.optimizer.params_in_partition)
            for parameter, piece in zip(
                parameters,
                (g for g in self.optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)),
            )
        }

    def drop_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = -1  # DeepSpeed's INITIAL_MICRO_STEP_ID: nothing accumulated
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
        for index in optimizer.averaged_gradients:
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None

    def publish(self) -> None:
        self.optimizer.refresh_fp32_params()


class ShardedPartitions(Partitions):
    """Stage 3: each rank has its piece of every parameter, and whole ones only while they are used."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.flats = optimizer.fp32_partitioned_groups_flat
        groups = optimizer.optimizer.param_groups
        self.groups = [groups[optimizer.sub_group_to_group_id[index]] for index in range(len(self.flats))]
        super().__init__(model, optimizer)
        if not optimizer.offload_optimizer:
            for flat, part in zip(self.flats, optimizer.fp16_partitioned_groups_flat):
                flat.data = part.data

    def _cut(self, parameter: Any) -> Iterator[Fragment]:
        index, offset, part = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        for rank in range(self.world_size):
            size = min(part, parameter.ds_numel - rank * part)
            if size > 0:
                yield Fragment(rank, index, offset, rank * part, size)

    def shape(self, name: str) -> torch.Size:
        parameter: Any = self.parameters[name]
        return parameter.ds_shape

    def gradients(self) -> dict[str, Tensor]:
        by_flat = self.optimizer.get_fp32_grad_partitions()
        return {
            self.names[parameter]: by_flat[index][place].narrow(0, 0, self.mine[self.names[parameter]].size)
            for index, parameters in enumerate(self.optimizer.fp16_groups)
            for place, parameter in enumerate(parameters)
            if self.names[parameter] in self.mine
        }

    def drop_gradients(self) -> None:
        optimizer = self.optimizer
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(prev_scale=1.0)

    def publish(self) -> None:
        for index in range(len(self.flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        self.optimizer._partition_all_parameters()
        self.optimizer._post_step(set())


class Owners:
    """Whole tensors of what lies in fragments, each in host memory of one rank, its owner; gathered and spread one at a time.

    A parameter belongs to a rank that holds much of it already and, among those, to the one that owns least: under stages 1 and 2
    hardly anything travels, under stage 3 no rank owns more than another by over one tensor.

    Args:
        partitions: says where the fragments are.
        device: that the default group's backend can send from.
    """

    def __init__(self, partitions: Partitions, device: torch.device):
        self.partitions, self.device = partitions, device
        self.of: dict[str, int] = {}
        owned = [0] * partitions.world_size
        sizes = {name: partitions.shape(name).numel() for name in partitions.fragments}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            pieces = partitions.fragments[name]
            most = max(piece.size for piece in pieces)
            owner = min((piece.rank for piece in pieces if 2 * piece.size > most), key=owned.__getitem__)
            owned[owner] += sizes[name]
            self.of[name] = owner

    def gather(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pieces of every parameter → the whole tensors that it owns. Collective."""
        whole = {}
        for name, owner in self.of.items():
            mine = pieces[name].flatten().to(self.device) if name in pieces else None
            if owner != self.partitions.rank:
                self._exchange([dist.P2POp(dist.isend, mine, owner)] if mine is not None else [])
                continue
            assert mine is not None, f"{name}: its owner has none of it"
            shape = self.partitions.shape(name)
            flat = torch.empty(shape.numel(), dtype=mine.dtype, device=self.device)
            own, others = self._parts(name, flat)
            own.copy_(mine)
            self._exchange([dist.P2POp(dist.irecv, part, rank) for rank, part in others])
            whole[name] = flat.view(shape).cpu()
        return whole

    def spread(self, whole: Mapping[str, Tensor], pieces: Mapping[str, Tensor]) -> None:
        """Whole tensors on their owners → the pieces of all ranks, in place. Collective."""
        for name, owner in self.of.items():
            piece = pieces.get(name)
            if owner == self.partitions.rank:
                assert piece is not None, f"{name}: its owner has none of it"
                own, others = self._parts(name, whole[name].detach().flatten().to(self.device, piece.dtype))
                piece.copy_(own)
                self._exchange([dist.P2POp(dist.isend, part, rank) for rank, part in others])
            elif piece is not None:
                received = torch.empty_like(piece, device=self.device)
                self._exchange([dist.P2POp(dist.irecv, received, owner)])
                piece.copy_(received)

    def _parts(self, name: str, flat: Tensor) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Of a whole tensor, flat: this rank's part, and the others' with their ranks."""
        parts = {f.rank: flat.narrow(0, f.start, f.size) for f in self.partitions.fragments[name]}
        own = parts.pop(self.partitions.rank)
        return own, list(parts.items())

    @staticmethod
    def _exchange(operations: list[dist.P2POp]) -> None:
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
