"""Pipeline parallelism: the layers lie on several ranks, and the micro-batches of a step follow each other through them.

PyTorch's schedules (`torch.distributed.pipelining`) say in what order a rank runs the chunks, forward and backward, of its stages,
and its runtime runs them and sends between ranks what leaves a stage; `parallel.timeline` draws them. A chunk is ours (`Stage`):

    forward     states of the stage before [B', L, D] → states for the next one, or losses
    backward    gradients of these states, and of what the stage adds to the objective itself: the balance loss of its layers
    weights     zero-bubble schedules only: the gradients of weights, put aside in the backward pass (`model.ops.weight_gradient`)
    overlap     DualPipeV with experts on several ranks: a forward and a backward chunk of different micro-batches in turns, so that
                tokens of one travel while the other computes (`parallel.overlap`)

Only states and their gradients travel. Tokens do not: ranks at the same place of all stages read the same ones, so targets, MTP
inputs, rotary positions and document starts are where they are needed.

Which layers a stage has is decided by what they cost (`parallel.placement`). The embedding goes with the first stage, the final
norm, the heads and all MTP modules with the last. Under a V-shaped schedule these are on one rank, so that embedding and head are
there once for the main model and for MTP, as in DeepSeek's own system (V3 §3.2.2); under the others the last rank has a copy of the
embedding, and the gradients of both are summed.

A stage receives into memory that it allocates then, for one micro-batch, of the shape that it knows from the tokens: neither the
number of micro-batches nor their sizes cost memory, and no pass is run to find out shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import OVERLAP_F_B
from torch.distributed.pipelining.stage import _PipelineStageBase

from model.layers import split_backward
from model.loss import Losses
from model.ops.weight_gradient import WeightGradients, put_aside
from model.transformer import Output, Transformer
from parallel.between_steps import BetweenSteps
from parallel.engine import MicroBatch
from parallel.layout import Layout
from parallel.meshes import Meshes
from parallel.outbox import Outbox
from parallel.overlap import Turns
from parallel.parts import EMBEDDING, keep_parts, parts_of
from parallel.placement import V_SHAPED
from parallel.timeline import SCHEDULES

Objective = Callable[[Losses], Tensor]  # what a backward pass starts from


class Pipeline:
    """The stages of this rank, and the way of micro-batches through all of them.

    Args:
        model: on the meta device; what lies on other ranks is taken out of it. Its `score`, `decode`, `decode_mtp` and `logits`
            then go through all ranks, and must be called by all of them.

    Attributes:
        copies: names of parameters that are here and, counted for the model, on another rank.
        sum_gradients, take_up: an engine's part, which it gives: to sum the gradients of a step over the ranks of a stage, and to
            take note that gradients of weights have been added after their backward pass.
    """

    def __init__(self, layout: Layout, meshes: Meshes, model: Transformer, device: torch.device):
        self.model, self.device = model, device
        self.placement = layout.placement
        self.schedule = layout.config.schedule
        self.group = meshes.pipeline.get_group()
        self.in_stage = meshes.in_stage.get_group()
        self.rank, last = dist.get_rank(self.group), self.group.size() - 1
        self.parts = parts_of(layout)
        self.mine = self.placement.stages_of(self.rank)
        shared = model.config.num_nextn_predict_layers > 0 and self.placement.rank_of(len(self.parts) - 1) != 0
        self.copies = frozenset({EMBEDDING} if shared and self.rank == last else ())
        self.holders = _ends_of(layout, self.group) if shared else None  # of the embedding
        self.sum_gradients: Callable[[], None]
        self.take_up: Callable[[], None] = lambda: None
        self.schedules: dict[int, tuple[list[Stage], Any]] = {}  # by the number of micro-batches
        self.outbox = Outbox(self.group, device)
        tokens_travel = layout.config.expert > 1
        self.turns = Turns() if tokens_travel and self.schedule == "dualpipev" else None
        keep_parts(model, [self.parts[stage] for stage in self.mine])
        if self.schedule in V_SHAPED:  # whose backward passes are in two parts
            split_backward(model)
        BetweenSteps(model, self.parts, self.placement, self.outbox).answer()

    def run(self, micro_batches: Sequence[MicroBatch], coefficients: Tensor, objective: Objective) -> list[Output]:
        """Forward and backward pass of a step's micro-batches. Returns what each stage here adds to losses and counts."""
        stages, schedule = self._schedule(len(micro_batches))
        for stage in stages:
            stage.begin(micro_batches, coefficients, objective)
        schedule.step(target=torch.arange(len(micro_batches)), return_outputs=False)
        self.outbox.wait()
        return [output for stage in stages for output in stage.end()]

    def sum_shared(self, gradients: dict[str, Tensor]) -> None:
        """Sum the gradients of the embedding's copies, on whose ranks it is the same shard."""
        if self.holders is not None and EMBEDDING in gradients:
            dist.all_reduce(gradients[EMBEDDING], group=self.holders)

    def fill_copies(self, *sections: Mapping[str, Tensor]) -> None:
        """Give the embedding's copy, in each of some sections of an engine's state, the values of the first rank's."""
        for section in sections:
            if self.holders is not None and EMBEDDING in section:
                dist.broadcast(section[EMBEDDING], group=self.holders, group_src=0)

    def _schedule(self, micro_batches: int) -> tuple[list["Stage"], Any]:
        """The stages of this rank, and what runs them."""
        if micro_batches not in self.schedules:
            stages = [Stage(self, number) for number in self.mine]
            make = SCHEDULES[self.schedule]
            schedule = make(stages, micro_batches, loss_fn=lambda loss, _: loss, scale_grads=False)
            if self.turns is not None:
                schedule.register_custom_function(OVERLAP_F_B, partial(run_overlapped, self.turns))
            self.schedules[micro_batches] = stages, schedule
        return self.schedules[micro_batches]


class Stage(_PipelineStageBase):
    """A stage as PyTorch's schedules run it. Chunks are called by the number of their micro-batch.

    1f1b hands PyTorch its messages, since neighbours that send to each other at once must do so in one batch; with the other
    schedules it sends and receives by itself, one message at a time, in the order in which they ask for it.
    """

    def __init__(self, pipeline: Pipeline, number: int):
        super().__init__(nn.Identity(), number, len(pipeline.parts), pipeline.device, pipeline.group)
        self.pipeline, self.part = pipeline, pipeline.parts[number]
        self.in_batches = pipeline.schedule == "1f1b"

    def begin(self, micro_batches: Sequence[MicroBatch], coefficients: Tensor, objective: Objective) -> None:
        """A step."""
        self.micro_batches, self.coefficients, self.objective = micro_batches, coefficients, objective
        self.outputs: list[Output] = []
        self.incoming: dict[int, Tensor] = {}  # states of the stage before
        self.under_way: dict[int, tuple[Tensor | None, Tensor | None, Tensor]] = {}  # came in, goes out, objective
        self.of_outgoing: dict[int, Tensor] = {}  # gradients from the stage behind
        self.of_incoming: dict[int, Tensor] = {}  # gradients for the stage before
        self.later: dict[int, WeightGradients] = {}
        self.arriving: dict[tuple[int, int], dist.Work] = {}  # by the stage that sends and the chunk

    def end(self) -> list[Output]:
        """What the step's micro-batches have added here. A schedule stays for other steps; what a step was made of does not."""
        left = self.incoming, self.under_way, self.of_outgoing, self.of_incoming, self.later, self.arriving
        assert not any(left), f"stage {self.stage_index} has not finished {[list(chunks) for chunks in left]}"
        outputs, self.outputs, self.micro_batches = self.outputs, [], ()
        del self.coefficients, self.objective
        return outputs

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Tensor:
        self._await(self.stage_index - 1, fwd_chunk_id)
        batch, x = self.micro_batches[fwd_chunk_id], self.incoming.pop(fwd_chunk_id, None)
        if x is not None:
            x.requires_grad_()
        out, output = self.pipeline.model.forward_part(self.part, x, batch.tokens, batch.documents, self.coefficients)
        objective = self.objective(output.losses)
        self.under_way[fwd_chunk_id] = x, out, objective
        losses = Losses(*(part.detach() for part in output.losses))
        self.outputs.append(Output(losses, output.expert_counts))
        return objective.detach() if out is None else out

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._await(self.stage_index + 1, bwd_chunk_id)
        x, out, objective = self.under_way.pop(bwd_chunk_id)
        gradients: dict[Tensor, Tensor | None] = {objective: None} if objective.requires_grad else {}
        if out is not None:
            gradients[out] = self.of_outgoing.pop(bwd_chunk_id)
        if full_backward:
            torch.autograd.backward(list(gradients), list(gradients.values()))
        else:
            with put_aside() as self.later[bwd_chunk_id]:
                torch.autograd.backward(list(gradients), list(gradients.values()))
        if x is not None:
            assert x.grad is not None
            self.of_incoming[bwd_chunk_id] = x.grad

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        self.later.pop(bwd_chunk_id).run()
        self.pipeline.take_up()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return [] if self.is_first else self._receive(self.incoming, fwd_chunk_id, self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        out = self.under_way[fwd_chunk_id][1]
        return [] if out is None else self._send(out.detach(), self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return [] if self.is_last else self._receive(self.of_outgoing, bwd_chunk_id, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return [] if self.is_first else self._send(self.of_incoming.pop(bwd_chunk_id), self.stage_index - 1)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self.incoming[mb_index] = prev_stage_outputs.detach()

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return self.of_incoming.pop(mb_index)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        self.of_outgoing[mb_index] = next_stage_bwd_outputs

    def clear_runtime_states(self) -> None:
        """`begin` has done so."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Gradients are summed over ranks after the schedule, by the engine."""

    def _receive(self, into: dict[int, Tensor], chunk: int, stage: int) -> list[dist.P2POp]:
        shape = self.pipeline.model.hidden_shape(self.micro_batches[chunk].tokens)
        tensor = into[chunk] = torch.empty(shape, dtype=self.pipeline.model.compute_dtype, device=self.device)
        if self.in_batches:
            return self._transfer(dist.irecv, tensor, stage)
        work = dist.irecv(tensor, group=self.group, group_src=self.stage_index_to_group_rank[stage])
        assert work is not None
        self.arriving[stage, chunk] = work
        return []

    def _await(self, stage: int, chunk: int) -> None:
        if work := self.arriving.pop((stage, chunk), None):
            work.wait()

    def _send(self, tensor: Tensor, stage: int) -> list[dist.P2POp]:
        if self.in_batches:
            return self._transfer(dist.isend, tensor.contiguous(), stage)
        self.pipeline.outbox.send(tensor, self.stage_index_to_group_rank[stage])
        return []

    def _transfer(self, how: Any, tensor: Tensor, stage: int) -> list[dist.P2POp]:
        return [dist.P2POp(how, tensor, group_peer=self.stage_index_to_group_rank[stage], group=self.group)]

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """A message to and from every neighbour on another rank. NCCL makes a group's communicator at its first batch of messages,
        and all of the group must be there: under 1f1b, the one schedule that needs it, not all would otherwise be."""
        ops = []
        for how, stage in [
            (dist.irecv, self.stage_index - 1),
            (dist.isend, self.stage_index + 1),
            (dist.isend, self.stage_index - 1),
            (dist.irecv, self.stage_index + 1),
        ]:
            if 0 <= stage < self.num_stages and self.stage_index_to_group_rank[stage] != self.group_rank:
                ops += self._transfer(how, torch.zeros(1, device=self.device), stage)
        return ops

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> Any:
        """Shapes are those of the micro-batches, and states go to the next stage alone: there is nothing to find out."""
        self.args_recv_info, self.act_send_info = {0: ()}, {}

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> Any:
        """As before the forward pass."""

    def _create_grad_recv_info(self, act_send_info: Any) -> Any:
        """Not asked for."""


def run_overlapped(turns: Turns, action: Any, context: Any) -> None:
    """A forward and a backward chunk of the two stages of a rank, while tokens of the other travel (`parallel.overlap`).

    The schedule's runtime calls it in place of running one after the other. What that does around a chunk
    (`_PipelineScheduleRuntime._step_microbatches`) is done here too: note the loss, and hand on to a stage on the same rank.
    """
    runtime = context.schedule_ref
    forward, backward = action.sub_actions
    stages: dict[int, Stage] = {stage.stage_index: stage for stage in runtime._stages}
    ahead, back = stages[forward.stage_index], stages[backward.stage_index]
    runtime.fwd_recv_ops.pop((ahead.stage_index, forward.microbatch_index), None)
    runtime.bwd_recv_ops.pop((back.stage_index, backward.microbatch_index), None)
    out, _ = turns.run(
        lambda: ahead.forward_one_chunk(forward.microbatch_index, ()),
        lambda: back.backward_one_chunk(backward.microbatch_index),
    )
    runtime._maybe_compute_loss(ahead, out, context.target_mbs, forward.microbatch_index)
    if ahead.stage_index + 1 in stages:
        stages[ahead.stage_index + 1].set_local_fwd_input(out, forward.microbatch_index)
    if back.stage_index - 1 in stages:
        gradient = back.get_local_bwd_output(backward.microbatch_index)
        stages[back.stage_index - 1].set_local_bwd_input(gradient, backward.microbatch_index)


def _ends_of(layout: Layout, pipeline: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of this rank's place in the first and in the last stage; every rank makes the groups of all places."""
    step, last = layout.stage_ranks, layout.config.pipeline - 1
    if last == 1:
        return pipeline
    groups = [dist.new_group([place, last * step + place]) for place in range(step)]
    return groups[dist.get_rank() % step]
