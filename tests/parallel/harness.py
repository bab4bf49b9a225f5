"""The same few steps under any layout, as one rank of the current group, and their comparison with one process.

The reference is one process with the whole batch at once and the experts of a plain loop; every other run must agree with it in
losses, gradient norm, every gradient and moment, and in the expert biases.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.config import ModelConfig
from model.init import initialize
from model.ops.fp8.kernels import Reference
from model.ops.routing import limit_to_groups
from model.router import Router, Routing
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.engine import Engine, StepSettings
from parallel.layout import Layout, ParallelConfig
from parallel.meshes import Meshes
from parallel.recompute import apply_recompute
from parallel.shards import Box, box_of
from tests.parallel.faults import FAULTS

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_nextn_predict_layers=2, num_attention_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5,
    kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=32, initializer_range=0.1,
)  # fmt: skip
SEQUENCES, LENGTH, STEPS, GAMMA = 16, 24, 3, 1e-3
SETTINGS = StepSettings(lr=1e-3, gamma=GAMMA, alpha=1e-2, lambda_=0.3, batch=SEQUENCES)
CLIP = 0.5  # below the norms of these steps, so that clipping acts
TOLERANCE = 1e-5  # of a tensor's largest element


class Batch(NamedTuple):
    tokens: Tensor
    documents: Tensor


@dataclass(frozen=True)
class Case:
    """A layout, and how a rank cuts its share of the global batch into micro-batches."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute_dtype: torch.dtype = torch.float32
    experts: str = "grouped_mm"
    model: ModelConfig = CONFIG
    mask_documents: bool = True
    sequences: int = SEQUENCES  # of the global batch
    steps: int = STEPS
    poison: int | None = None  # the step whose gradient gets a NaN on the last rank
    fault: str | None = None  # one of tests.parallel.faults


REFERENCE = Case(ParallelConfig(micro_batch=SEQUENCES), experts="reference")


def reference_of(case: Case) -> Case:
    """One process that takes the same steps with plain PyTorch, the whole batch at once."""
    parallel = ParallelConfig(micro_batch=case.sequences)
    return replace(case, parallel=parallel, experts="reference", poison=None, fault=None)


def global_batch(step: int, case: Case = REFERENCE) -> Batch:
    """Random tokens in documents of uneven length, the last of some sequences padding: ranks hold unequal target counts."""
    generator = torch.Generator().manual_seed(step)
    size = (case.sequences, LENGTH + 1 + case.model.num_nextn_predict_layers)
    tokens = torch.randint(case.model.vocab_size, size, generator=generator)
    documents = (torch.rand(size, generator=generator) < 0.1).cumsum(1).int()
    documents[: case.sequences // 4, -9:] = -1
    return Batch(tokens, documents)


def build(case: Case, device: str = "cpu") -> Engine:
    """The engine of a case, as one rank of the current group."""
    with torch.device("meta"):
        fp8 = Reference() if case.parallel.fp8 else None
        model = Transformer(
            case.model,
            compute_dtype=case.compute_dtype,
            mask_documents=case.mask_documents,
            experts=case.experts,
            fp8=fp8,
        )
    apply_recompute(model, case.parallel.recompute)
    return build_engine(
        Layout(case.parallel, dist.get_world_size(), case.model, (LENGTH,)),
        model,
        torch.device(device),
        lambda model, write: initialize(model, 0, "cpu", write),
        # eps lies above the rounding of gradients: a smaller one would make whole steps of elements that happen to be near 0
        lambda named: torch.optim.AdamW(
            [p for _, p in named], lr=0.0, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True
        ),
        CLIP,
    )


def train(case: Case) -> dict[str, Any]:
    """A few steps as one rank; gradients are those that the optimizer sees, all tensors are whole."""
    with FAULTS[case.fault]() if case.fault else nullcontext():
        return _train(case)


def train_all(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """`train` of one case after another in one group."""
    with meshes_made_once():
        return [train(case) for case in cases]


def meshes_made_once() -> AbstractContextManager[Any]:
    """Let layouts of one group share the meshes that are alike: making them takes as long as a step."""
    made: dict[tuple[int, ...], Meshes] = {}

    def meshes(layout: Layout, device_type: str) -> Meshes:
        c = layout.config
        shape = (c.pipeline, c.replicate, layout.shard, c.expert, c.context)
        if shape not in made:
            made[shape] = Meshes(layout, device_type)
        return made[shape]

    return patch("parallel.build.Meshes", meshes)


def _train(case: Case) -> dict[str, Any]:
    engine: Any = build(case)
    assert case.poison is None or engine.pipeline is None, (
        "a pipeline does not call `backward`, so nothing would be poisoned"
    )
    history: dict[str, Any] = {
        "losses": [],
        "norms": [],
        "skipped": [],
        "gradients": [],
        "margin": smallest_margin(engine),
    }
    update, backward = engine.update, engine.backward

    def note_gradients(lr: float, divisor: Tensor, skip: Tensor) -> None:
        if not skip:
            history["gradients"].append({name: g / divisor for name, g in full_gradients(engine, case).items()})
        update(lr, divisor, skip)

    engine.update = note_gradients
    for step in range(case.steps):
        is_poisoned = case.poison == step and dist.get_rank() == dist.get_world_size() - 1
        engine.backward = (lambda loss, is_last: backward(loss * math.nan, is_last)) if is_poisoned else backward
        result = engine.step(micro_batches(case, step), replace(SETTINGS, batch=case.sequences))
        history["losses"].append([result.losses.main, *result.losses.mtp, result.losses.balance])
        history["norms"].append(result.grad_norm)
        history["skipped"].append(result.skipped)
    history["counts"] = result.expert_counts
    history["margin"] = min(history["margin"])
    state = engine.state()
    for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
        history[kind] = whole(state[kind])
    return history


def micro_batches(case: Case, step: int) -> list[Batch]:
    """This rank's share of a step."""
    layout = Layout(replace(case.parallel, unproven=True), dist.get_world_size(), case.model, (LENGTH,))
    rank, share = layout.data_rank(dist.get_rank()), case.sequences // layout.data_ranks
    mine = [part[rank * share : (rank + 1) * share] for part in global_batch(step, case)]
    return [Batch(*parts) for parts in zip(*(part.split(case.parallel.micro_batch) for part in mine))]


def whole(section: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A section of an engine's state with every tensor whole, on rank 0. Collective; infinite where ranks disagree."""
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
    mine = {
        name: (*place, part.numpy()) for name, (*place, part) in ((n, _part(t.detach())) for n, t in section.items())
    }
    dist.gather_object(mine, parts if dist.get_rank() == 0 else None)
    full: dict[str, Tensor] = {}
    for held in parts:
        for name, (shape, box, array) in held.items():  # tensors take far longer to pickle
            part = torch.from_numpy(array)
            place = full.setdefault(name, torch.full(shape, math.nan))[box]
            agree = place.isnan().all() or torch.equal(place, part)
            place.copy_(part if agree else torch.full_like(part, math.inf))
    return full


@torch.no_grad()
def fill(section: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Whole values into a section of an engine's state, in place, as a checkpoint is read."""
    for name, tensor in section.items():
        _, box, part = _part(tensor)
        part.copy_(values[name][box])


def _part(tensor: Tensor) -> tuple[torch.Size, Box, Tensor]:
    """The shape of the whole, where this rank's part lies in it, and the part."""
    if not isinstance(tensor, DTensor):
        return tensor.shape, tuple(slice(0, size) for size in tensor.shape), tensor
    return tensor.shape, box_of(tensor.shape, tensor.device_mesh, tensor.placements), tensor.to_local()


def full_gradients(engine: Engine, case: Case) -> dict[str, Tensor]:
    """The gradients before they are clipped, whole, on rank 0. Collective."""
    named = engine.model.named_parameters()
    if case.parallel.engine == "fsdp" or case.parallel.expert > 1:
        return whole(engine.gather(engine.gradients()))
    if case.parallel.engine.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).clone() for name, parameter in named}
    return whole({name: parameter.grad for name, parameter in named})


def smallest_margin(engine: Engine) -> list[float]:
    """Fills itself with how far each routing decision was from another: a tie that rounding could turn is no error of a layout."""
    margins: list[float] = []

    def note(router: Router, inputs: Any, routing: Routing) -> None:
        c = router.config
        choice = limit_to_groups(routing.logits.sigmoid() + router.e_score_correction_bias, c.n_group, c.topk_group)
        best = choice.detach().topk(c.num_experts_per_tok + 1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    for module in engine.model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    return margins


def errors(run: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """The worst relative error of each kind: max|Δ| / max|reference| of losses and norms by step, of tensors by tensor.

    Gradients are those of all steps; from the second on they also carry what the optimizer made of the first.
    """
    worst = {}
    for kind in ("losses", "norms"):
        found, expected = torch.tensor(run[kind]), torch.tensor(reference[kind])
        worst[kind] = float(((found - expected).abs() / expected.abs()).max())
    pairs = [
        ("gradients", run["gradients"][step], reference["gradients"][step]) for step in range(len(run["gradients"]))
    ]
    pairs += [(kind, run[kind], reference[kind]) for kind in ("exp_avg", "exp_avg_sq")]
    for kind, found, expected in pairs:
        assert found.keys() == expected.keys()
        gaps = [float((found[n] - t).abs().max() / t.abs().max()) for n, t in expected.items()]
        worst[kind] = float(
            torch.tensor([worst.get(kind, 0.0), *gaps]).max()
        )  # NaN where a part is missing, unlike `max`
    return worst


def check_equal(run: Mapping[str, Any], reference: Mapping[str, Any], tolerance: float = TOLERANCE) -> dict[str, float]:
    """Assert that a run gave the reference's answer; returns `errors`."""
    worst = errors(run, reference)
    for kind, error in worst.items():
        assert error <= tolerance, f"{kind}: {error:.1e}, smallest routing margin {run['margin']:.1e}: {worst}"
    assert min(reference["norms"]) > CLIP
    for name, bias in reference["buffers"].items():
        updates = (run["buffers"][name] / GAMMA).round()
        assert torch.equal(updates, (bias / GAMMA).round()), f"{name}, smallest routing margin {run['margin']:.1e}"
        assert updates.abs().max() >= 1, f"{name} never moved"
    assert torch.equal(run["counts"], reference["counts"])
    for name, tensor in reference["parameters"].items():
        gradient = reference["gradients"][0][name]
        solid = (
            gradient.abs() > 1e-6 * gradient.abs().max()
        )  # Adam makes a whole step of a gradient that is all rounding
        gap = (run["parameters"][name] - tensor).abs()[solid].max()
        assert gap <= 1e-2 * SETTINGS.lr, f"{name}: {gap:.1e}"
    return worst
