"""Experts on several ranks under ZeRO-1 and ZeRO-2: what DeepSpeed must know of them, and where they lie in the whole.

Layers and all-to-all are ours (`parallel.expert`). Of DeepSpeed's expert parallelism this uses the reduction alone: an expert's
gradient is summed over the ranks that have the same expert, and cut over them. No token is missed, since tokens have travelled to
their expert; and it is divided by the number of all ranks, as every other gradient is.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as ShardDim

from model.init import Draw, write_whole
from model.transformer import Transformer
from parallel.meshes import Meshes
from parallel.shards import Shard

GROUP = "experts"  # DeepSpeed's name for both: the ranks that share a layer, and those that have the same experts of it


def expert_shards(model: Transformer, meshes: Meshes) -> dict[str, Shard]:
    """The experts that this rank has, as parts of the stacked parameters [E, ·, ·]."""
    ranks = meshes.expert.size()
    return {
        name: Shard(p.detach(), torch.Size([p.shape[0] * ranks, *p.shape[1:]]), meshes.experts, (Replicate(), ShardDim(0)))
        for name, p in model.named_parameters()
        if ".experts." in name
    }  # fmt: skip


def write_own_experts(shards: dict[str, Shard], name: str, parameter: Tensor, expert: int | None, draw: Draw) -> None:
    """`model.init.write_whole` where experts are spread over ranks."""
    if name in shards:
        shards[name].write(expert, draw)
    else:
        write_whole(name, parameter, expert, draw)


def announce_experts(model: Transformer, optimizer: torch.optim.Optimizer, meshes: Meshes) -> None:
    """Mark the parameters that are not alike on all ranks, and give them optimizer groups of their own, as DeepSpeed asks for."""
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups

    class Sign(MoE):  # for the engine, which looks for a layer of this class, and asks it for its process groups
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = model.config.n_routed_experts

        def set_deepspeed_parallelism(self, *_: Any) -> None:
            groups._EXPERT_PARALLEL_GROUP[GROUP] = meshes.expert.get_group()
            groups._EXPERT_DATA_PARALLEL_GROUP[GROUP] = meshes.expert_shard.get_group()

    model.add_module("deepspeed_sign", Sign())
    for name in expert_shards(model, meshes):
        parameter: Any = model.get_parameter(name)
        parameter.allreduce, parameter.group_name = False, GROUP
    for number, group in enumerate(optimizer.param_groups):
        group["name"] = str(number)  # the splitting goes by it
    split_params_into_different_moe_groups_for_optimizer(optimizer.param_groups, max_group_size=math.inf)
