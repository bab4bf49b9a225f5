"""ZeRO (1910.02054) as DeepSpeed does it: optimizer state, gradients and parameters are cut over the ranks, a stage at a time.

| engine  | a rank has its part of      | and whole            | travels in a micro-batch           | and in a step      |
|---------|-----------------------------|----------------------|------------------------------------|--------------------|
| `zero1` | moments                     | weights, gradients   |                                    | gradients, weights |
| `zero2` | moments, gradients          | weights              | gradients                          | weights            |
| `zero3` | moments, gradients, weights | weights while in use | weights twice, gradients           |                    |

Parameters are fp32 and the model casts them where it computes, as under the other engines, so that the answer is theirs;
DeepSpeed's own bf16 and fp16 modes round gradients before they are summed. The norm, clipping and the decision to skip a step are
`GlobalStep`'s; DeepSpeed reduces, keeps and updates.

With `expert`, under stages 1 and 2, the experts of a layer are first spread over ranks (`parallel.expert`); what lies on one of
them is then cut over the ranks that have the same. Stage 3 would take different experts for one, and train wrong without a word.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import MultiHeadLatentAttention
from model.init import Draw
from model.layers import MLP, Linear
from model.transformer import Output, Transformer
from parallel.ds_config import ds_config
from parallel.engine import Alike, Fill, MakeOptimizer, MicroBatch, State, flat
from parallel.expert import spread_experts
from parallel.layout import Layout, LayoutError
from parallel.meshes import Meshes
from parallel.shards import Shard
from parallel.step import GlobalStep
from parallel.zero_experts import announce_experts, expert_shards, write_own_experts
from parallel.zero_state import Owners, Partitions, ReplicatedPartitions, ShardedPartitions

READ_TOGETHER = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")  # in FP8, by `model.layers.read_by` in attention


class ZeroEngine(GlobalStep):
    """The `Engine` of `parallel.engine: zero1 | zero2 | zero3`.

    Args:
        layout: names the stage, what is offloaded, how experts are spread, and the user's ds_config.
        model: on the meta device.
        device: where it shall compute.
        fill: gives it its first weights, the same on every rank.
        make_optimizer: called once with the parameters; DeepSpeed then gives it this rank's flat parts of them instead.
        clip: as of `GlobalStep`.

    Raises:
        LayoutError: deepspeed is not installed, or the user's ds_config contradicts the recipe.
    """

    gradient_copies = 1

    def __init__(
        self,
        layout: Layout,
        model: Transformer,
        device: torch.device,
        fill: Fill,
        make_optimizer: MakeOptimizer,
        clip: float | None,
        meshes: Meshes,
    ):
        config = ds_config(layout.config, model.compute_dtype, clip, device)
        deepspeed = _import_deepspeed(device)
        self.is_sharded = layout.config.engine == "zero3"
        self.world_size = dist.get_world_size()
        self.meshes = meshes if layout.config.expert > 1 else None
        if self.is_sharded:
            _shard_parameters(deepspeed, model, device, config)
            fill(model, _write_piece)
        else:
            if self.meshes:
                spread_experts(model, self.meshes.expert, layout.config.fp8_dispatch)
            model.to_empty(device=device)
            fill(model, partial(write_own_experts, self._experts(model)))
        super().__init__(model, device, clip)
        optimizer = make_optimizer(model.named_parameters())
        if self.meshes:
            announce_experts(model, optimizer, self.meshes)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.partitions: Partitions
        if self.is_sharded:
            self.partitions = ShardedPartitions(model, self.engine.optimizer)
            _gather_what_is_read_directly(deepspeed, model)
        else:
            self.partitions = ReplicatedPartitions(model, self.engine.optimizer)
        self.owners = Owners(self.partitions, device)
        self.copied = frozenset({"exp_avg", "exp_avg_sq"} | ({"parameters"} if self.is_sharded else set()))
        self.has_gradients = False

    def forward(self, batch: MicroBatch, coefficients: Tensor, is_last: bool) -> Output:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return self.engine(batch.tokens, batch.documents, coefficients)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self.engine.backward(loss)
        self.has_gradients = True
        if is_last:  # DeepSpeed averages over ranks; on the loss this factor would cost fp16 its range
            torch._foreach_mul_(list(self.gradients().values()), self.world_size)

    def gradients(self) -> dict[str, Tensor]:
        return self.partitions.gradients()

    def update(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        if bool(skip):  # the host waits: DeepSpeed's step takes no condition
            return
        if (factor := 1 / float(divisor)) != 1:
            torch._foreach_mul_(list(self.gradients().values()), factor)
        self.engine.optimizer.set_lr(lr)
        self.engine.step()
        self.has_gradients = False

    def drop_gradients(self) -> None:
        if self.has_gradients:  # DeepSpeed's step has dropped them otherwise
            self.partitions.drop_gradients()
        self.has_gradients = False

    def state(self) -> State:
        steps = {int(state["step"]) for state in self.partitions.optimizer_states()}
        assert len(steps) == 1, f"parts of the optimizer took {sorted(steps)} steps"
        return {
            "parameters": self.gather(self.parts()) if self.is_sharded else self._parameters(),
            "buffers": dict(self.model.named_buffers()),
            "exp_avg": self.gather(self.partitions.moments("exp_avg")),
            "exp_avg_sq": self.gather(self.partitions.moments("exp_avg_sq")),
            "steps": torch.tensor(steps.pop(), dtype=torch.int64),
            "loss_scale": self.scaling.state(),
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        own = {"buffers": dict(self.model.named_buffers())}
        if self.is_sharded:
            self.spread(state["parameters"], self.parts())
        else:
            own["parameters"] = self._parameters()
        for kind, tensors in own.items():
            for name, tensor in tensors.items():
                if tensor is not state[kind][name]:
                    tensor.copy_(state[kind][name])
        self.partitions.publish()
        for kind in ("exp_avg", "exp_avg_sq"):
            self.spread(state[kind], self.partitions.moments(kind))
        for optimizer_state in self.partitions.optimizer_states():
            optimizer_state["step"].fill_(int(state["steps"]))
        self.scaling.load(state["loss_scale"])

    def alike(self) -> list[Alike]:
        """Weights but for stage 3; of moments and of what is offloaded there is one."""
        assert dist.group.WORLD is not None
        held = self._beside_weights()
        if self.is_sharded:
            return [Alike(dist.group.WORLD, held)]
        experts = self._experts(self.model)
        named = dict(self.model.named_parameters())
        held |= flat({"parameters": {name: p for name, p in named.items() if name not in experts}})
        alike = [Alike(dist.group.WORLD, held)]
        if self.meshes:
            stacked = {name: shard.local for name, shard in experts.items()}
            alike.append(Alike(self.meshes.expert_shard.get_group(), flat({"parameters": stacked})))
        return alike

    def parts(self) -> dict[str, Tensor]:
        return self.partitions.weights()

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.owners.gather(parts)

    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        self.owners.spread(state, parts)

    def _parameters(self) -> dict[str, Tensor]:
        """Live and whole, but for experts on several ranks."""
        experts = {name: shard.as_whole(shard.local) for name, shard in self._experts(self.model).items()}
        return {**dict(self.model.named_parameters()), **experts}

    def _experts(self, model: Transformer) -> dict[str, Shard]:
        return expert_shards(model, self.meshes) if self.meshes else {}


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what else it would guess or compile."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise LayoutError(
            f"parallel.engine: zero1, zero2 and zero3 need {error.name}, which is not installed; "
            "pip install 'deepspeed>=0.19.8,<0.20', or use fsdp"
        ) from error
    # It calls collectives by the names they had before torch 2.13, and it has never heard of `AdamWBf16Moments`.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated\. Please use", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # A shared-memory all-reduce for CPUs would be compiled at its first use, for more than a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    _forget_earlier_engines(deepspeed)
    return deepspeed


def _forget_earlier_engines(deepspeed: Any) -> None:
    """Let DeepSpeed start afresh in a process that had an engine before, perhaps in another process group.

    It numbers modules and compares the numbers of all ranks, which must therefore have counted alike.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = groups._WORLD_GROUP = None
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()
    parameter_offload.FWD_MODULE_STACK.clear()
    (counter,) = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = deepspeed.zero.Init.param_id = 0


def _shard_parameters(deepspeed: Any, model: Transformer, device: torch.device, config: dict[str, Any]) -> None:
    """From the meta device to one piece of each parameter, still without values; never more than one parameter is whole."""
    partitioning = deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty_like(buffer, device=device))
        for name, parameter in module.named_parameters(recurse=False):
            sharded = nn.Parameter(torch.empty_like(parameter, device=device))
            partitioning._convert_to_deepspeed_param(sharded)
            sharded.partition()  # type: ignore[attr-defined]
            sharded.ds_tensor.zero_()  # type: ignore[attr-defined]  # the last rank's is padded
            module.register_parameter(name, sharded)


@torch.no_grad()
def _write_piece(name: str, parameter: Any, expert: int | None, draw: Draw) -> None:
    """`model.init.write_whole` for a parameter that is cut over the ranks."""
    piece = parameter.ds_tensor
    begin = dist.get_rank() * piece.numel()
    size = parameter.ds_numel if expert is None else parameter.ds_shape[1:].numel()
    start = 0 if expert is None else expert * size
    low, high = max(start, begin), min(start + size, begin + piece.numel())
    if low < high:
        piece[low - begin : high - begin] = draw().flatten()[low - start : high - start]


def _gather_what_is_read_directly(deepspeed: Any, model: Transformer) -> None:
    """Let parameters be whole where they are read without a call of the module that has them."""
    register, gathered = deepspeed.zero.register_external_parameter, deepspeed.zero.GatheredParameters
    head = model.lm_head.weight
    register(model, head)  # in `forward`
    model.score = _within(partial(gathered, [head]), model.score)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, MLP):
            for linear in (module.gate_proj, module.up_proj, module.down_proj) if module.fp8 else (module.down_proj,):
                register(module, linear.weight)
        elif isinstance(module, MultiHeadLatentAttention):
            maps = [child for name, child in module.named_children() if name in READ_TOGETHER]
            weights = [child.weight for child in maps if isinstance(child, Linear) and child.fp8]
            for weight in weights:
                register(module, weight)
            weights.append(module.kv_b_proj.weight)
            module.decode = _within(partial(gathered, weights), module.decode)  # type: ignore[method-assign]


def _within(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return wrapped
