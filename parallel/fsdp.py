"""Fully sharded data parallelism (FSDP2): every rank keeps a shard of each parameter, and a block is whole only while it works.

| reshard_after_forward | like   | whole at one time                                 | moved                                      |
|-----------------------|--------|---------------------------------------------------|--------------------------------------------|
| true                  | ZeRO-3 | parameters and gradients of the blocks at work    | a micro-batch: two gathers and one scatter |
| false                 | ZeRO-1 | all parameters and gradients, throughout the step | a step: one gather and one scatter         |

What computes in the compute dtype travels in it. Norms, gates, embedding and head, which compute in fp32 or are cast where they are
used, travel in fp32, so that every number is cast where DDP casts it. Gradients are reduced in fp32, and summed, not averaged. With
`replicate` (HSDP) shards are gathered and scattered inside a replica, and summed between replicas once a step.

With `expert` the experts of a layer are first spread over ranks (`parallel.expert`); what lies on one of them is then sharded over
the ranks that have the same. The optimizer works on the local parts as plain tensors: Adam is elementwise, a shard needs no other.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardDim

from model.layers import RMSNorm
from model.moe import MoE
from model.router import Router
from model.transformer import Output, Transformer
from parallel.engine import Alike, Fill, MakeOptimizer, MicroBatch, Pending, State, StepSettings, flat
from parallel.expert import spread_experts
from parallel.fsdp_reduction import put_off_reduction, reduce_gradients, take_up_gradients
from parallel.layout import Layout, cut_of
from parallel.meshes import Meshes
from parallel.moments import moments, restore
from parallel.pipeline import Pipeline
from parallel.shards import Shard
from parallel.step import GlobalStep, step_optimizer


class FSDPEngine(GlobalStep):
    """The `Engine` of `parallel.engine: fsdp`. Arguments as of `parallel.build.build_engine`."""

    def __init__(
        self,
        layout: Layout,
        model: Transformer,
        device: torch.device,
        fill: Fill,
        make_optimizer: MakeOptimizer,
        clip: float | None,
        meshes: Meshes,
        pipeline: Pipeline | None = None,
    ):
        super().__init__(model, device, clip, pipeline)
        self.meshes = meshes
        self.gradient_copies = layout.config.replicate
        self.reshards = layout.config.reshards
        self.offloads = layout.config.offload == "all"
        if layout.config.expert > 1:
            spread_experts(model, meshes.expert, layout.config.fp8_dispatch)
        self.units = _shard(model, meshes, layout)
        if pipeline:
            pipeline.sum_gradients = partial(reduce_gradients, self.units)
            pipeline.take_up = partial(take_up_gradients, self.units)
        _materialize(model, device, offload=self.offloads)
        self.units[-1].unshard()  # FSDP settles where its shards lie when it first gathers
        self._reshard()
        self.parameters = dict(model.named_parameters())
        self.shards = {name: _shard_of(name, p, meshes, layout) for name, p in self.parameters.items()}
        with torch.no_grad():
            fill(model, lambda name, parameter, expert, draw: self.shards[name].write(expert, draw))
        self.optimizer = make_optimizer((name, shard.local) for name, shard in self.shards.items())

    def forward(self, batch: MicroBatch, coefficients: Tensor, is_last: bool) -> Output:
        root = self.units[-1]
        root.set_requires_all_reduce(is_last)
        if not self.reshards:
            root.set_requires_gradient_sync(is_last)
            root.set_reshard_after_backward(is_last)
        return self.model(batch.tokens, batch.documents, coefficients)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def launch(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> Pending:
        if self.pipeline:  # no backward pass knows that it is the last one
            put_off_reduction(self.units)
        return super().launch(micro_batches, settings)

    def gradients(self) -> dict[str, Tensor]:
        return {name: _local(p.grad) for name, p in self.parameters.items() if p.grad is not None}

    def update(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        for name, gradient in self.gradients().items():
            self.shards[name].local.grad = gradient
        if self.offloads:  # the optimizer works on the host, which must wait for the gradients anyway
            divisor, skip = divisor.cpu(), skip.cpu()
        step_optimizer(self.optimizer, lr, divisor, skip)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> State:
        own = moments(self.optimizer, self._locals())
        return {
            "parameters": self.gather(self.parts()),
            "buffers": dict(self.model.named_buffers()),
            "exp_avg": self.gather(self._without_copies(own["exp_avg"])),
            "exp_avg_sq": self.gather(self._without_copies(own["exp_avg_sq"])),
            "steps": own["steps"],
            "loss_scale": self.scaling.state(),
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        for name, part in self.parts().items():
            part.copy_(_local(state["parameters"][name]))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        local_moments = {kind: {n: _local(t) for n, t in state[kind].items()} for kind in ("exp_avg", "exp_avg_sq")}
        restore(self.optimizer, self._locals(), {**local_moments, "steps": state["steps"]}, self.copies)
        self._fill_copies(self.optimizer, dict(self._locals()))
        self.scaling.load(state["loss_scale"])
        self._reshard()

    def alike(self) -> list[Alike]:
        own = moments(self.optimizer, self._locals())
        shards = {"parameters": dict(self._locals()), "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
        held = [Alike(self.meshes.in_stage.get_group(), self._beside_weights()), *self._alike_at_both_ends(shards)]
        if self.gradient_copies > 1:  # HSDP
            held.append(Alike(self.meshes.dense.get_group("replicate"), flat(shards)))
        return held

    def parts(self) -> dict[str, Tensor]:
        return self._without_copies(dict(self._locals()))

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.shards[name].as_whole(part) for name, part in parts.items()}

    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Nothing to do: they share their memory."""

    def _locals(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, shard.local) for name, shard in self.shards.items())

    def _reshard(self) -> None:
        """Free what is gathered; an evaluation leaves something so."""
        for unit in self.units:
            unit.reshard()


def _shard(model: Transformer, meshes: Meshes, layout: Layout) -> list[FSDPModule]:
    """Cut the model into the units that are gathered together, the root last: experts, blocks, embedding, and the rest."""
    compute = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    common: dict[str, Any] = {"reshard_after_forward": layout.config.reshards, "mesh": meshes.dense}
    cut: dict[str, Any] = {"shard_placement_fn": lambda parameter: ShardDim(cut_of(parameter.shape, layout.shard))}
    if layout.config.offload == "all":
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in model.blocks:
        if layout.config.expert > 1 and isinstance(block.mlp, MoE):
            place = {"mesh": meshes.expert_shard, "shard_placement_fn": lambda _: ShardDim(1)}
            fully_shard(block.mlp.experts, **{**common, **place}, mp_policy=compute)
        if model.compute_dtype is not torch.float32:
            fully_shard([m for m in block.modules() if isinstance(m, RMSNorm | Router)], **common, mp_policy=exact)
        fully_shard(block, **common, **cut, mp_policy=compute)
        register_fsdp_forward_method(block, "decode")
    if isinstance(model.model.embed_tokens, nn.Embedding):  # on this rank of a pipeline
        embedding = fully_shard(model.model.embed_tokens, **common, mp_policy=exact)
        embedding.set_unshard_in_backward(False)  # its gradient asks for the tokens alone
    fully_shard(model, **{**common, "reshard_after_forward": False}, mp_policy=exact)
    in_pipeline = ("forward_part", "score_part", "decode_part", "decode_mtp", "logits")
    for method in in_pipeline if layout.config.pipeline > 1 else ("score", "decode", "decode_mtp"):
        register_fsdp_forward_method(model, method)
    if layout.config.expert > 1:
        _gather_ahead(model)
    for unit in _units_of(model):
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    return _units_of(model)[::-1]


def _gather_ahead(model: Transformer) -> None:
    """Let each block have the next one gathered while it works, in both directions.

    FSDP does so by itself as long as the host runs ahead of the device, which it cannot where it waits to learn how many tokens
    will arrive (`parallel.expert`).
    """
    units = [_units_of(block) for block in model.blocks]
    for earlier, later in pairwise(units):
        earlier[0].set_modules_to_forward_prefetch(later)
        later[0].set_modules_to_backward_prefetch(earlier)


def _units_of(module: nn.Module) -> list[FSDPModule]:
    """The units in it, the largest first; those of one `fully_shard` of several modules appear once for each of them."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def _materialize(model: Transformer, device: torch.device, offload: bool) -> None:
    """Give a sharded model from the meta device its memory; offloaded parameters live on the host, buffers never do."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _shard_of(name: str, parameter: Tensor, meshes: Meshes, layout: Layout) -> Shard:
    assert isinstance(parameter, DTensor)
    local = _local(parameter.detach())
    if layout.config.expert == 1 or ".experts." not in name:
        return Shard(local, parameter.shape, parameter.device_mesh, tuple(parameter.placements))
    shape = torch.Size([parameter.shape[0] * layout.config.expert, *parameter.shape[1:]])
    return Shard(local, shape, meshes.experts, (*parameter.placements, ShardDim(0)))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
