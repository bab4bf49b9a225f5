"""Data parallelism: every rank holds the whole model and reads its own share of each global batch.

PyTorch's DistributedDataParallel reduces gradients in buckets while the backward pass still runs. It would average them over the
ranks; here each micro-batch's loss is already divided by the targets of the global batch, so they are summed instead.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import balance
from model.loss import count_targets
from model.moe import Router
from model.transformer import Output, Transformer
from parallel.engine import MakeOptimizer, MeanLosses, MicroBatch, State, StepResult, StepSettings
from parallel.moments import moments, restore


class DDPEngine:
    """The `Engine` of `parallel.engine: ddp`. A default process group must exist, of one rank or many.

    Args:
        model: initialised the same way on every rank, on its device.
        make_optimizer: called once with the model.
        clip: largest global gradient norm; None does not clip.
    """

    def __init__(self, model: Transformer, make_optimizer: MakeOptimizer, clip: float | None):
        self.model = model
        self.clip = clip
        self.device = next(model.parameters()).device
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, and 2.11 does not know the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.replicas = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.replicas.register_comm_hook(None, _sum_over_ranks)
        self.optimizer = make_optimizer(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.compute_dtype is torch.float16)
        self.buckets_are_final = dist.get_world_size() < 3

    @property
    def loss_scale(self) -> float:
        return float(self.scaler.get_scale())

    def step(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepResult:
        if not self.buckets_are_final:
            self._rehearse(micro_batches[0])
        targets = self._targets_of_global_batch(micro_batches)
        outputs = []
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else self.replicas.no_sync():
                output = self.replicas(batch.tokens, batch.documents)
                loss = output.losses.objective(targets, settings.batch, settings.lambda_, settings.alpha)
                self.scaler.scale(loss).backward()
                outputs.append(output)
        losses, counts = self._sum_of_global_batch(outputs, targets, settings.batch)
        grad_norm, non_finite = self._update(settings.lr)
        if not non_finite:
            for router, layer_counts in zip(self.routers, counts):
                bias = router.e_score_correction_bias
                bias.copy_(balance.update(bias, layer_counts, settings.gamma))
        return StepResult(losses, grad_norm, counts.cpu(), non_finite)

    def state(self) -> State:
        scale = {
            "scale": torch.tensor(self.loss_scale, dtype=torch.float32),
            "good_steps": torch.tensor(self.scaler.state_dict().get("_growth_tracker", 0), dtype=torch.int64),
        }
        return {
            "parameters": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            **moments(self.optimizer, self.model.named_parameters()),
            "loss_scale": scale,
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        own = self.state()
        for kind in ("parameters", "buffers"):
            for name, tensor in own[kind].items():
                if tensor is not state[kind][name]:
                    tensor.copy_(state[kind][name])
        restore(self.optimizer, self.model.named_parameters(), state)
        if self.scaler.is_enabled():
            scale = state["loss_scale"]
            self.scaler.load_state_dict(
                self.scaler.state_dict() | {"scale": float(scale["scale"]), "_growth_tracker": int(scale["good_steps"])}
            )

    def _rehearse(self, batch: MicroBatch) -> None:
        """One pass without effect before the first step. DDP fills its buckets anew after its first backward pass.

        From three ranks on, the order of a sum over ranks depends on the place in the bucket. Without this pass the first step of a
        run that continues would differ in its last bits from the same step of a run that was never interrupted.
        """
        losses = self.replicas(batch.tokens, batch.documents).losses
        losses.objective(losses.counts, len(batch.tokens), lambda_=1.0, alpha=1.0).backward()
        self.optimizer.zero_grad()
        self.buckets_are_final = True

    def _targets_of_global_batch(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """[1 + D_mtp] valid targets of each head, over all ranks and micro-batches."""
        depths = self.model.config.num_nextn_predict_layers
        local = [count_targets(b.tokens, b.documents, depths, self.model.mask_documents) for b in micro_batches]
        targets = torch.stack(local).sum(0)
        dist.all_reduce(targets)
        return targets

    def _sum_of_global_batch(
        self, outputs: Sequence[Output], targets: Tensor, sequences: int
    ) -> tuple[MeanLosses, Tensor]:
        """Losses and expert counts over all ranks and micro-batches, in one reduction.

        They travel as fp64, which holds every integer up to 2⁵³ exactly.
        """
        sums = torch.stack([torch.cat([o.losses.main[None], o.losses.mtp, o.losses.balance[None]]) for o in outputs])
        counts = torch.stack([o.expert_counts for o in outputs]).sum(0)  # [L, E]
        packed = torch.cat([sums.detach().double().sum(0), counts.double().flatten()])
        dist.all_reduce(packed)
        n_sums = sums.shape[1]
        means = packed[:n_sums] / torch.cat([targets.clamp_min(1), targets.new_tensor([sequences])])
        main, *mtp, balance_loss = means.tolist()
        return MeanLosses(main, mtp, balance_loss), packed[n_sums:].to(torch.int64).view_as(counts)

    def _update(self, lr: float) -> tuple[float, tuple[str, ...]]:
        """Clip and step. Returns the gradient norm before clipping, and the parameters whose gradients forbade the step."""
        parameters = list(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(norm)  # gradients are the same on all ranks, and so is the decision
        non_finite: tuple[str, ...] = ()
        if math.isfinite(grad_norm):
            if self.clip is not None:
                clip_grads_with_norm_(parameters, self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            bad = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            non_finite = tuple(bad) or ("the norm of all gradients",)
        self.scaler.update()
        self.optimizer.zero_grad()
        return grad_norm, non_finite


def _sum_over_ranks(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum, where the default is the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
