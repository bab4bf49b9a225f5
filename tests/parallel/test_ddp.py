"""One answer under every layout, first rows: DDP over 1, 2 and 4 processes and micro-batches of any size."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.init import initialize
from model.transformer import Transformer
from parallel.ddp import DDPEngine
from parallel.engine import StepSettings
from parallel.recompute import apply_recompute

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_nextn_predict_layers=2, num_attention_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5,
    kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=32, initializer_range=0.1,
)  # fmt: skip
SEQUENCES, LENGTH, STEPS, GAMMA = 16, 24, 3, 1e-3
SETTINGS = StepSettings(lr=1e-3, gamma=GAMMA, alpha=1e-2, lambda_=0.3, batch=SEQUENCES)
CLIP = 0.5  # below the norms of these steps, so that clipping acts


class Batch(NamedTuple):
    tokens: torch.Tensor
    documents: torch.Tensor


def global_batch(step: int) -> Batch:
    """Random tokens in documents of uneven length, the last of some sequences padding: ranks hold unequal target counts."""
    generator = torch.Generator().manual_seed(step)
    width = LENGTH + 1 + CONFIG.num_nextn_predict_layers
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES, width), generator=generator)
    documents = (torch.rand(SEQUENCES, width, generator=generator) < 0.1).cumsum(1).int()
    documents[: SEQUENCES // 4, -9:] = -1
    return Batch(tokens, documents)


def train(
    micro_batch: int, recompute: str = "none", experts: str = "grouped_mm", poison: int | None = None
) -> dict[str, Any]:
    """A few steps as one rank of the current group. `poison` is the step whose gradient gets a NaN on the last rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Transformer(CONFIG, mask_documents=True, experts=experts)
    initialize(model, seed=0)
    apply_recompute(model, recompute)
    engine = DDPEngine(
        model, lambda m: torch.optim.AdamW(m.parameters(), betas=(0.9, 0.95), weight_decay=0.1), clip=CLIP
    )
    history: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "gradients": []}
    engine.optimizer.register_step_pre_hook(
        lambda *_: history["gradients"].append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    share = SEQUENCES // world
    for step in range(STEPS):
        if step == poison and rank == world - 1:
            handle = model.lm_head.weight.register_hook(lambda g: g.fill_(float("nan")))
        mine = [part[rank * share : (rank + 1) * share] for part in global_batch(step)]
        result = engine.step([Batch(*parts) for parts in zip(*(part.split(micro_batch) for part in mine))], SETTINGS)
        if step == poison and rank == world - 1:
            handle.remove()
        history["losses"].append([result.losses.main, *result.losses.mtp, result.losses.balance])
        history["norms"].append(result.grad_norm)
        history["skipped"].append(result.skipped)
    state = engine.state()
    history["counts"] = result.expert_counts
    for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
        history[kind] = {name: tensor.detach().clone() for name, tensor in state[kind].items()}
    return history


@pytest.fixture(scope="module")
def reference(workers):
    """One process, the whole batch at once, experts computed by the plain loop."""
    return workers.run(1, train, SEQUENCES, "none", "reference")[0]


def check_equal(run: dict[str, Any], reference: dict[str, Any]) -> None:
    """Losses, norm, gradients and moments within 1e-5 of the largest; biases equal as integers of updates."""
    torch.testing.assert_close(torch.tensor(run["losses"]), torch.tensor(reference["losses"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(run["norms"]), torch.tensor(reference["norms"]), rtol=1e-5, atol=0)
    assert min(reference["norms"]) > CLIP
    first = {"gradients": run["gradients"][0], "exp_avg": run["exp_avg"], "exp_avg_sq": run["exp_avg_sq"]}
    expected = {**reference, "gradients": reference["gradients"][0]}
    for kind, tensors in first.items():
        for name, tensor in tensors.items():
            worst = (tensor - expected[kind][name]).abs().max() / expected[kind][name].abs().max()
            assert worst <= 1e-5, f"{kind} of {name}: {worst:.1e}"
    for name, bias in run["buffers"].items():
        updates = bias / GAMMA
        assert torch.equal(updates.round(), (reference["buffers"][name] / GAMMA).round()), name
        assert updates.abs().max() >= 1, f"{name} never moved"
    for name, tensor in run["parameters"].items():
        solid = run["gradients"][0][name].abs() > 1e-6 * run["gradients"][0][name].abs().max()
        gap = (tensor - reference["parameters"][name]).abs()[solid].max()
        assert gap <= 1e-2 * SETTINGS.lr, f"{name}: {gap:.1e}"


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "recompute"),
    [(1, 16, "none"), (1, 3, "none"), (2, 8, "none"), (2, 3, "selective"), (4, 4, "full"), (4, 1, "none")],
)
def test_every_layout_gives_the_reference_answer(workers, reference, world_size, micro_batch, recompute):
    runs = workers.run(world_size, train, micro_batch, recompute)
    for run in runs:
        check_equal(run, reference)
    for name, tensor in runs[-1]["parameters"].items():
        assert torch.equal(tensor, runs[0]["parameters"][name]), f"ranks hold different {name}"


def test_counts_are_those_of_the_global_batch(reference):
    """Every MoE layer sends each of the 16·24 tokens to 3 experts; recomputation and accumulation count none twice."""
    assert reference["counts"].shape == (CONFIG.n_moe_layers, CONFIG.n_routed_experts)
    assert (reference["counts"].sum(-1) == SEQUENCES * LENGTH * 3).all()


def test_a_nan_on_one_rank_skips_the_step_on_all(workers):
    """Step 1 of 0, 1, 2 is poisoned: the run ends where a run of steps 0 and 2 alone would."""
    runs = workers.run(2, train, 3, "selective", "grouped_mm", 1)
    for run in runs:
        assert run["skipped"] == [False, True, False]
        assert len(run["gradients"]) == 2
        assert all(torch.isfinite(tensor).all() for tensor in run["parameters"].values())
        for bias in run["buffers"].values():
            assert ((bias / GAMMA).round().abs() <= 2).all()
