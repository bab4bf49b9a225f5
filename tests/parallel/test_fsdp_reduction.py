"""Gradients that are reduced once, after backward passes in two parts and out of order, are those of plain backward passes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model.flops import Recompute
from model.layers import RMSNorm, split_backward
from model.ops.weight_gradient import WeightGradients, put_aside
from model.router import Router
from parallel.fsdp_reduction import put_off_reduction, reduce_gradients, take_up_gradients
from parallel.recompute import apply_recompute
from tests.small_model import small_model

# Chunks of three micro-batches: W of one after B of the next, and two W one after the other.
ORDER = "F0 F1 B0 F2 B1 W0 B2 W1 W2"


def units_of(dtype: torch.dtype, recompute: Recompute) -> list[FSDPModule]:
    """A sharded model that stays gathered, cut as `parallel.fsdp` does; the root last."""
    model = small_model(num_hidden_layers=2)
    model.compute_dtype = dtype
    apply_recompute(model, recompute)
    split_backward(model)
    compute = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(
            [m for m in block.modules() if isinstance(m, RMSNorm | Router)],
            reshard_after_forward=False,
            mp_policy=exact,
        )
        fully_shard(block, reshard_after_forward=False, mp_policy=compute)
    fully_shard(model, reshard_after_forward=False, mp_policy=exact)
    return [unit for unit in model.modules() if isinstance(unit, FSDPModule)][::-1]


def loss_of(model: Any, batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(2 * batch + dist.get_rank())
    tokens = torch.randint(0, 96, (2, 10), generator=draw)
    losses = model(tokens, torch.zeros_like(tokens)).losses
    return losses.objective(losses.counts, 2, 0.3, 1e-4)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}


def compare(dtype: torch.dtype, recompute: Recompute) -> list[str]:
    """Which gradients differ."""
    *_, plain = units_of(dtype, recompute)
    for batch in range(3):
        plain.set_requires_gradient_sync(batch == 2)
        plain.set_reshard_after_backward(batch == 2)
        loss_of(plain, batch).backward()

    units = units_of(dtype, recompute)
    root = units[-1]
    losses: dict[str, Tensor] = {}
    late: dict[str, WeightGradients] = {}
    for _ in range(2):  # the second has what the first left
        root.zero_grad()
        put_off_reduction(units)
        for kind, batch in ORDER.split():
            if kind == "F":
                losses[batch] = loss_of(root, int(batch))
            elif kind == "B":
                with put_aside() as late[batch]:
                    losses.pop(batch).backward()
                assert len(late[batch]._products) == 8 + 10 + 11  # dense, with experts, MTP
            else:
                late.pop(batch).run()
                take_up_gradients(units)
        reduce_gradients(units)
    found, expected = gradients(root), gradients(plain)
    assert found.keys() == expected.keys() and len(found) > 30
    return [name for name in found if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize(
    ("dtype", "recompute"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "full")]
)
def test_gradients_reduced_at_the_end_have_the_bits_of_plain_ones(
    workers: Any, dtype: torch.dtype, recompute: Recompute
) -> None:
    assert workers.run(2, compare, dtype, recompute) == [[], []]
