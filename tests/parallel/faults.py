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
from parallel import ddp
from parallel.fsdp import FSDPEngine
from parallel.meshes import Meshes

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


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        gradients_reduced_over_half_of_the_ranks,
        experts_sharded_over_the_ranks_that_have_others,
        replicas_that_never_meet,
        gradients_averaged_over_the_ranks,
        gradients_of_mtp_dropped,
        the_last_micro_batch_counted_twice,
        losses_divided_by_the_micro_batches,
        the_norm_of_a_shard_for_the_norm_of_all,
    )
}
