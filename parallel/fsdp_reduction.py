"""Gradients under FSDP2 that are summed over many backward passes of a step and reduced once, after the last of them.

A pipeline runs forward and backward passes of several micro-batches in any order, and the gradients of weights later still
(`model.ops.weight_gradient`). No backward pass then knows that it is the last, so none reduces:

    put_off_reduction(units)
    for every chunk:            forward, backward; or
                                with put_aside() as later: backward      …     later.run(); take_up_gradients(units)
    at the end of the step:     reduce_gradients(units)

FSDP keeps the sum in its reduce dtype, fp32, and adds a backward pass's gradients to it at that pass's end. What is added to a
parameter's gradient after that is in the compute dtype, so it must be taken up before more is added.

This reaches into FSDP as PyTorch's own pipeline does (`PipelineStage.perform_reduce_grad`); there is no public way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule


def put_off_reduction(units: Sequence[FSDPModule]) -> None:
    """Before the first pass of a step: let no backward pass reduce, and nothing that is gathered be freed.

    FSDP would free it where a backward pass ends while a forward pass is under way (`parallel.overlap`): it takes the forward
    pass for over.
    """
    root = units[-1]
    root.set_is_last_backward(False)
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_backward(False)
    for group in _groups(units):
        group.reshard = lambda: None


def take_up_gradients(units: Sequence[FSDPModule]) -> None:
    """Add what gradients of gathered parameters hold to FSDP's sums, as the end of a backward pass does."""
    for group in _groups(units):
        for parameter in group.fsdp_params:
            parameter.accumulate_unsharded_grad_if_needed()
            parameter.to_accumulated_grad_if_needed()


def reduce_gradients(units: Sequence[FSDPModule]) -> None:
    """Reduce the sums to the shards' gradients and free what is gathered. Collective.

    Args:
        units: of the model, in the same order on every rank, the root last, which has run forward.
    """
    take_up_gradients(units)
    root = units[-1]
    root.set_is_last_backward(True)
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    for group in _groups(units):
        group.__dict__.pop("reshard", None)
        group.post_backward()
    root._get_fsdp_state()._root_post_backward_final_callback()


def _groups(units: Sequence[FSDPModule]) -> Iterator[Any]:
    """What FSDP gathers and reduces together. Several modules of one `fully_shard` share one; the root may have none."""
    states = {id(state): state for state in (unit._get_fsdp_state() for unit in units)}
    return (state._fsdp_param_group for state in states.values() if state._fsdp_param_group is not None)
