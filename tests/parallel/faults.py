"""Mistakes that other stacks have made, planted one at a time: the comparison with one process must catch each of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import parallel.step
from model.loss import Losses
from model.mtp import MTPBlock
from model.transformer import Output
from parallel import context, ddp
from parallel.context import ZigZag
from parallel.fsdp import FSDPEngine
from parallel.meshes import Meshes
from parallel.pipeline import Pipeline, Stage

Fault = Callable[[], AbstractContextManager[Any]]


def gradients_reduced_over_half_of_the_ranks() -> AbstractContextManager[Any]:
    world = dist.get_world_size()
    halves = [dist.new_group(range(world // 2)), dist.new_group(range(world // 2, world))]
    mine = halves[dist.get_rank() // (world // 2)]

    def sum_over_half(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        dist.all_reduce(bucket.buffer(), group=mine)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    return patch.object(ddp, "_sum_over_ranks", sum_over_half)


def experts_sharded_over_the_ranks_that_have_others() -> AbstractContextManager[Any]:
    """Experts' gradients are then reduced between ranks that hold different experts."""
    return patch.object(Meshes, "expert_shard", property(lambda meshes: meshes.expert))


def replicas_that_never_meet() -> AbstractContextManager[Any]:
    return patch.object(Meshes, "dense", property(lambda meshes: meshes._dense["shard"]))


def gradients_averaged_over_the_ranks() -> AbstractContextManager[Any]:
    return patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, _: None)


def gradients_of_mtp_dropped() -> AbstractContextManager[Any]:
    honest = Losses.objective

    def objective(self: Losses, *args: Any, **more: Any) -> Tensor:
        return honest(self._replace(mtp=self.mtp.detach() + 0 * self.mtp), *args, **more)

    return patch.object(Losses, "objective", objective)


def the_last_micro_batch_counted_twice() -> AbstractContextManager[Any]:
    """As if recomputation had counted its experts' load again."""
    honest = parallel.step._sum_of_global_batch

    def sum_of_global_batch(outputs: Any, *args: Any) -> Any:
        *others, last = outputs
        return honest([*others, last._replace(expert_counts=2 * last.expert_counts)], *args)

    return patch.object(parallel.step, "_sum_of_global_batch", sum_of_global_batch)


def losses_divided_by_the_micro_batches() -> AbstractContextManager[Any]:
    """As libraries do whose losses are means."""
    return patch.object(FSDPEngine, "backward", lambda self, loss, is_last: (loss / 2).backward())


def the_norm_of_a_shard_for_the_norm_of_all() -> AbstractContextManager[Any]:
    return patch.object(
        FSDPEngine, "gradient_copies", property(lambda self: dist.get_world_size(), lambda self, _: None), create=True
    )


# Pipelines ------------------------------------------------------------------------------------------------------------


def the_gradient_of_mtp_lost_at_its_stage() -> AbstractContextManager[Any]:
    """Earlier stages then learn from the main head alone."""
    honest = MTPBlock.forward
    return patch.object(MTPBlock, "forward", lambda self, hidden, *others: honest(self, hidden.detach(), *others))


def the_copy_of_the_embedding_left_alone() -> AbstractContextManager[Any]:
    return patch.object(Pipeline, "sum_shared", lambda self, gradients: None)


def a_forward_pass_for_shapes_that_is_counted() -> AbstractContextManager[Any]:
    honest = Stage.forward_one_chunk

    def forward_one_chunk(self: Stage, chunk: int, *others: Any, **more: Any) -> Tensor:
        out = honest(self, chunk, *others, **more)
        if chunk == 0:
            counted = self.outputs[-1]
            nothing = Losses(*(torch.zeros_like(part) for part in counted.losses))
            self.outputs.append(Output(nothing, counted.expert_counts))
        return out

    return patch.object(Stage, "forward_one_chunk", forward_one_chunk)


def the_balance_loss_of_other_stages_than_the_last_lost() -> AbstractContextManager[Any]:
    honest = Stage.forward_one_chunk

    def forward_one_chunk(self: Stage, chunk: int, *others: Any, **more: Any) -> Tensor:
        result = honest(self, chunk, *others, **more)
        x, out, objective = self.under_way[chunk]
        self.under_way[chunk] = x, out, objective if out is None else objective.detach()
        return result

    return patch.object(Stage, "forward_one_chunk", forward_one_chunk)


def weights_put_aside_and_forgotten() -> AbstractContextManager[Any]:
    """One chunk of one stage."""
    honest = Stage.backward_weight_one_chunk

    def backward_weight_one_chunk(self: Stage, chunk: int, *others: Any, **more: Any) -> None:
        if self.stage_index == 1 and not self.forgot:
            self.forgot = True
            self.later.pop(chunk)
        else:
            honest(self, chunk, *others, **more)

    return patch.multiple(Stage, backward_weight_one_chunk=backward_weight_one_chunk, forgot=False, create=True)


# Shared sequences -----------------------------------------------------------------------------------------------------


def targets_behind_a_cut_taken_from_the_beginning_of_the_piece() -> AbstractContextManager[Any]:
    """As shifting each piece by itself does."""

    def cut(self: ZigZag, whole: Tensor, ahead: int) -> Tensor:
        length = (whole.shape[1] - ahead) // self.pieces
        pieces = [whole[:, piece * length : (piece + 1) * length] for piece in self.mine]
        return torch.cat([torch.cat((piece, piece[:, :ahead]), dim=1) for piece in pieces])

    return patch.object(ZigZag, "cut", cut)


def targets_behind_a_cut_dropped() -> AbstractContextManager[Any]:
    honest = ZigZag.cut

    def cut(self: ZigZag, whole: Tensor, ahead: int) -> Tensor:
        pieces = honest(self, whole, ahead)
        if whole.dtype is torch.int32:  # documents, of which -1 is padding
            pieces[:, -ahead:] = -1
        return pieces

    return patch.object(ZigZag, "cut", cut)


def the_balance_loss_of_pieces() -> AbstractContextManager[Any]:
    return patch.object(ZigZag, "average", lambda self, of_pieces: of_pieces)


def documents_that_begin_anew_with_each_piece() -> AbstractContextManager[Any]:
    honest = context._of_pieces

    def of_pieces(starts: Tensor, number: int, mine: tuple[int, int]) -> tuple[Tensor, ...]:
        length = starts.shape[1] // number
        return tuple(part.clamp_min(piece * length) for part, piece in zip(honest(starts, number, mine), mine))

    return patch.object(context, "_of_pieces", of_pieces)


def gradients_of_latents_left_where_they_were_read() -> AbstractContextManager[Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        zigzag: ZigZag = ctx.context
        return zigzag.by_rank(grad).chunk(zigzag.ranks)[zigzag.rank], None

    return patch.object(context._Gather, "backward", staticmethod(backward))


def _named(*faults: Fault) -> dict[str, Fault]:
    return {fault.__name__: fault for fault in faults}  # type: ignore[attr-defined]


EVERYWHERE = _named(
    gradients_reduced_over_half_of_the_ranks,
    experts_sharded_over_the_ranks_that_have_others,
    replicas_that_never_meet,
    gradients_averaged_over_the_ranks,
    gradients_of_mtp_dropped,
    the_last_micro_batch_counted_twice,
    losses_divided_by_the_micro_batches,
    the_norm_of_a_shard_for_the_norm_of_all,
)
OF_PIPELINES = _named(
    the_gradient_of_mtp_lost_at_its_stage,
    the_copy_of_the_embedding_left_alone,
    a_forward_pass_for_shapes_that_is_counted,
    the_balance_loss_of_other_stages_than_the_last_lost,
    weights_put_aside_and_forgotten,
)
OF_SHARED_SEQUENCES = _named(
    targets_behind_a_cut_taken_from_the_beginning_of_the_piece,
    targets_behind_a_cut_dropped,
    the_balance_loss_of_pieces,
    documents_that_begin_anew_with_each_piece,
    gradients_of_latents_left_where_they_were_read,
)
FAULTS = EVERYWHERE | OF_PIPELINES | OF_SHARED_SEQUENCES
