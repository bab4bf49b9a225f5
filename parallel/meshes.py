"""The process groups of a layout, as device meshes with named dimensions; `parallel.layout` says how ranks are arranged in them."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import Layout


class Meshes:
    """The device meshes of a layout. Making them is collective and done once a run."""

    def __init__(self, layout: Layout, device_type: str):
        replicate, shard, expert = layout.config.replicate, layout.shard, layout.config.expert
        self._dense = init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        self._experts = init_device_mesh(
            device_type, (replicate, shard // expert, expert), mesh_dim_names=("replicate", "expert_shard", "expert")
        )
        self._replicates = replicate > 1

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
