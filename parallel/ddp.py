"""Data parallelism: every rank holds the whole model and reads its own share of each global batch.

PyTorch's DistributedDataParallel reduces gradients in buckets while the backward pass still runs. It would average them over the
ranks; here each micro-batch's loss is already divided by the targets of the global batch, so they are summed instead.

A single rank has nothing to sum: it calls the model without the wrapper, whose buckets would cost every gradient a copy.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from model.init import write_whole
from model.transformer import Output, Transformer
from parallel.engine import Alike, Fill, MakeOptimizer, MicroBatch, Pending, State, StepSettings, flat
from parallel.meshes import Meshes
from parallel.moments import moments, restore
from parallel.pipeline import Pipeline
from parallel.step import GlobalStep, step_optimizer

BUCKET = 25 << 20  # bytes that travel at once, as DDP's own


class DDPEngine(GlobalStep):
    """The `Engine` of `parallel.engine: ddp`.

    Args:
        model: on the meta device.
        device: where it shall be.
        fill: gives it its first weights, the same on every rank.
        make_optimizer: called once with the parameters.
        clip, pipeline: as of `GlobalStep`.
        meshes: of its layout; None: all ranks read data of their own.
    """

    def __init__(
        self,
        model: Transformer,
        device: torch.device,
        fill: Fill,
        make_optimizer: MakeOptimizer,
        clip: float | None,
        meshes: Meshes | None = None,
        pipeline: Pipeline | None = None,
    ):
        model.to_empty(device=device)
        fill(model, write_whole)
        super().__init__(model, device, clip, pipeline)
        self.group = meshes.in_stage.get_group() if meshes else dist.group.WORLD  # ranks that hold the same
        self.gradient_copies = ranks = dist.get_world_size(self.group)
        self.replicas = _replicas(model) if ranks > 1 and pipeline is None else None
        self.optimizer = make_optimizer(model.named_parameters())
        self.buckets_are_final = self.replicas is None or ranks < 3
        if pipeline:
            pipeline.sum_gradients = self._sum_gradients

    def launch(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> Pending:
        if not self.buckets_are_final:
            self._rehearse(micro_batches[0])
        return super().launch(micro_batches, settings)

    def forward(self, batch: MicroBatch, coefficients: Tensor, is_last: bool) -> Output:
        if self.replicas is None:
            return self.model(batch.tokens, batch.documents, coefficients)
        self.replicas.require_backward_grad_sync = is_last
        return self.replicas(batch.tokens, batch.documents, coefficients)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def update(self, lr: float, divisor: Tensor, skip: Tensor) -> None:
        step_optimizer(self.optimizer, lr, divisor, skip)

    def drop_gradients(self) -> None:
        """Gradients lie in DDP's buckets: dropped, those of the next step's first micro-batches would be memory of their own."""
        self.optimizer.zero_grad(set_to_none=self.replicas is None)

    def state(self) -> State:
        own = moments(self.optimizer, self.model.named_parameters())
        return {
            "parameters": self._without_copies(dict(self.model.named_parameters())),
            "buffers": dict(self.model.named_buffers()),
            "exp_avg": self._without_copies(own["exp_avg"]),
            "exp_avg_sq": self._without_copies(own["exp_avg_sq"]),
            "steps": own["steps"],
            "loss_scale": self.scaling.state(),
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        own = self.state()
        for kind in ("parameters", "buffers"):
            for name, tensor in own[kind].items():
                if tensor is not state[kind][name]:
                    tensor.copy_(state[kind][name])
        restore(self.optimizer, self.model.named_parameters(), state, self.copies)
        self._fill_copies(self.optimizer, dict(self.model.named_parameters()))
        self.scaling.load(state["loss_scale"])

    def alike(self) -> list[Alike]:
        assert self.group is not None
        named = dict(self.model.named_parameters())
        own = moments(self.optimizer, named.items())
        weights = {"parameters": named, "exp_avg": own["exp_avg"], "exp_avg_sq": own["exp_avg_sq"]}
        return [Alike(self.group, flat(weights) | self._beside_weights()), *self._alike_at_both_ends(weights)]

    def parts(self) -> dict[str, Tensor]:
        named = self._without_copies({name: p.detach() for name, p in self.model.named_parameters()})
        largest_first = sorted(named.items(), key=lambda item: -item[1].numel())
        return dict(largest_first[dist.get_rank(self.group) :: dist.get_world_size(self.group)])

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parts)

    def spread(self, state: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Nothing to do: they are the same tensors."""

    def _sum_gradients(self) -> None:
        """After a pipeline has run dry: nothing is left that this could hide behind."""
        if self.gradient_copies == 1:
            return
        for bucket in _take_tensors(self.gradients().values(), BUCKET):
            whole = _flatten_dense_tensors(bucket)
            dist.all_reduce(whole, group=self.group)
            torch._foreach_copy_(bucket, _unflatten_dense_tensors(whole, bucket))

    def _rehearse(self, batch: MicroBatch) -> None:
        """One pass without effect before the first step. DDP fills its buckets anew after its first backward pass.

        From three ranks on, the order of a sum over ranks depends on the place in the bucket. Without this pass the first step of a
        run that continues would differ in its last bits from the same step of a run that was never interrupted.
        """
        coefficients = torch.ones(1 + self.model.config.num_nextn_predict_layers, device=self.device)
        losses = self.forward(batch, coefficients, is_last=True).losses
        (losses.main + losses.mtp.sum() + losses.balance).backward()
        self.drop_gradients()
        self.buckets_are_final = True


def _replicas(model: Transformer) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers, and 2.11 does not know the new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        replicas = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    replicas.register_comm_hook(None, _sum_over_ranks)
    return replicas


def _sum_over_ranks(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum, where the default is the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
