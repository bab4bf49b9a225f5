"""The process groups of a layout, as device meshes with named dimensions; `parallel.layout` says how ranks are arranged in them."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout


class Meshes:
    """The device meshes of a layout, those of this rank's stages. Making them is collective and done once a run."""

    def __init__(self, layout: Layout, device_type: str):
        c = layout.config
        pipeline, replicate, shard, context, expert = c.pipeline, c.replicate, layout.shard, c.context, c.expert
        copies = layout.stage_ranks // shard  # of the model: replicas, or the ranks of ddp
        dense = init_device_mesh(
            device_type, (pipeline, copies, shard), mesh_dim_names=("pipeline", "replicate", "shard")
        )
        self.pipeline = dense["pipeline"]  # ranks that have the same place among those of their stages
        self._dense = dense["replicate", "shard"]
        if expert > 1:
            self._experts = init_device_mesh(
                device_type,
                (pipeline, copies, shard // expert, expert),
                mesh_dim_names=("pipeline", "replicate", "expert_shard", "expert"),
            )["replicate", "expert_shard", "expert"]
        if context > 1:
            self.context = init_device_mesh(
                device_type, (layout.world_size // context, context), mesh_dim_names=("data", "context")
            )["context"]  # ranks that share sequences
        self._replicates = replicate > 1
        by_stage = init_device_mesh(
            device_type, (pipeline, layout.stage_ranks), mesh_dim_names=("pipeline", "in_stage")
        )
        self.in_stage = by_stage["in_stage"]  # ranks with the same stages

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups of more than one rank that this rank is in, beside that of all, by the names of the layout's axes."""
        dense = {"pipeline": self.pipeline, "replicate": self._dense["replicate"], "shard": self._dense["shard"]}
        named = dense | {"stage": self.in_stage}
        if hasattr(self, "_experts"):
            named |= {name: self._experts[name] for name in ("expert_shard", "expert")}
        if hasattr(self, "context"):
            named["context"] = self.context
        groups = {name: mesh.get_group() for name, mesh in named.items() if mesh.size() > 1}
        return {name: group for name, group in groups.items() if group is not dist.group.WORLD}

    @property
    def dense(self) -> DeviceMesh:
        """Where a dense parameter lies: [shard], or [replicate, shard] (HSDP)."""
        return self._dense if self._replicates else self._dense["shard"]

    @property
    def expert(self) -> DeviceMesh:
        """[expert]: the ranks among which tokens travel."""
        return self._experts["expert"]

    @property
    def expert_shard(self) -> DeviceMesh:
        """Where the experts of one expert rank lie: [expert_shard], or [replicate, expert_shard]."""
        return self._experts["replicate", "expert_shard"] if self._replicates else self._experts["expert_shard"]

    @property
    def experts(self) -> DeviceMesh:
        """Where the stacked experts of a layer lie: [expert_shard, expert], or [replicate, expert_shard, expert]."""
        return self._experts if self._replicates else self._experts["expert_shard", "expert"]
