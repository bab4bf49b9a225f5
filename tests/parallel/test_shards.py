"""Shards as parts of a whole: where they lie, and that they are seen, not copied."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as ShardDim

from parallel.shards import Shard


def seen_from_another_device() -> bool:
    """Offloaded parts lie on the host though their mesh is that of a GPU; here the mesh claims to be of the meta device."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mesh._device_type = "meta"
    local = torch.arange(6.0).view(2, 3)
    whole = Shard(local, torch.Size([4, 3]), mesh, (ShardDim(0),)).as_whole(local)
    whole.to_local().add_(1)
    return whole.shape == (4, 3) and torch.equal(local, torch.arange(1.0, 7.0).view(2, 3))


def test_a_part_seen_as_part_of_the_whole_stays_where_it_is(workers: Any) -> None:
    assert workers.run(2, seen_from_another_device) == [True, True]


def written() -> list[tuple[list[float], list[int]]]:
    """What a rank keeps of 3 experts of [2, 2], and of which it asked for the values."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kept = []
    for dim, shape in ((0, (2, 2, 2) if dist.get_rank() == 0 else (1, 2, 2)), (1, (3, 1, 2))):
        asked: list[int] = []
        shard = Shard(torch.zeros(shape), torch.Size([3, 2, 2]), mesh, (ShardDim(dim),))
        for expert in range(3):

            def draw(expert: int = expert, asked: list[int] = asked) -> torch.Tensor:
                asked.append(expert)
                return torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10**expert

            shard.write(expert, draw)
        kept.append((shard.local.flatten().tolist(), asked))
    return kept


def test_a_rank_keeps_its_part_and_draws_only_experts_of_which_it_has_some(workers: Any) -> None:
    """Cut along the experts, 2 and 1 of them; cut inside, a row of each."""
    first, second = workers.run(2, written)
    assert first == [([1, 2, 3, 4, 10, 20, 30, 40], [0, 1]), ([1, 2, 10, 20, 100, 200], [0, 1, 2])]
    assert second == [([100, 200, 300, 400], [2]), ([3, 4, 30, 40, 300, 400], [0, 1, 2])]
