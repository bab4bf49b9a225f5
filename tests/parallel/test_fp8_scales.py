"""A tensor that explodes in FP8, or has a NaN, stops the step on every rank, which can all say what and where it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import initialize
from model.ops.fp8.arithmetic import Fp8
from model.ops.fp8.kernels import Reference
from model.ops.fp8.quantize import Quantized
from model.transformer import Transformer
from parallel.build import build_engine
from parallel.engine import Engine, FP8Scales, StepSettings
from parallel.layout import Layout, ParallelConfig
from parallel.recompute import apply_recompute
from tests.parallel.harness import CONFIG as SMALL
from tests.parallel.harness import Batch

CONFIG: ModelConfig = SMALL.override({"num_hidden_layers": 2, "num_nextn_predict_layers": 1})
WHOLE = ParallelConfig()
DENSE, EXPERTS = "model.layers.0", "model.layers.1"
SETTINGS = StepSettings(lr=1e-3, gamma=1e-3, alpha=1e-2, lambda_=0.3, batch=4)


def build(parallel: ParallelConfig) -> Engine:
    with torch.device("meta"):
        model = Transformer(CONFIG, mask_documents=True, fp8=Reference())
    apply_recompute(model, parallel.recompute)
    return build_engine(
        Layout(parallel, torch.distributed.get_world_size(), CONFIG),
        model,
        torch.device("cpu"),
        lambda model, write: initialize(model, 0, "cpu", write),
        lambda named: torch.optim.AdamW([p for _, p in named], lr=0.0, fused=True),
        clip=1.0,
    )


def batches(size: int) -> list[Batch]:
    """This rank's share of 4 sequences, in micro-batches of `size`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokens = torch.randint(CONFIG.vocab_size, (4, 22), generator=torch.Generator().manual_seed(0)).chunk(world)[rank]
    return [Batch(part, torch.zeros_like(part)) for part in tokens.split(size)]


def step_with(
    change: Callable[[Engine, int], Any] | None, size: int = 2, parallel: ParallelConfig = WHOLE
) -> FP8Scales | None:
    """What one step says of its scales, after `change(engine, rank)`; whether it moved the weights must follow from it."""
    engine = build(parallel)
    if change:
        change(engine, torch.distributed.get_rank())
    before = {name: part.clone() for name, part in engine.parts().items()}
    result = engine.step(batches(size), SETTINGS)
    for name, part in engine.parts().items():
        assert torch.equal(part, before[name]) == result.skipped, name
    assert result.skipped == bool(result.exploded)
    assert result.expert_counts.sum(-1).tolist() == [4 * 20 * CONFIG.num_experts_per_tok] * 2
    return result.scales


def nan_in_an_activation_of_the_last_rank(engine: Engine, rank: int) -> None:
    if rank == torch.distributed.get_world_size() - 1:
        poison = torch.tensor([1.0] * 7 + [torch.nan])
        engine.model.main_layers[0].self_attn.q_a_layernorm.register_forward_hook(
            lambda module, inputs, x: x * poison.repeat(x.shape[-1] // 8)
        )


def nan_in_a_gradient_of_the_first_rank(engine: Engine, rank: int) -> None:
    def poison(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: grad * torch.nan)

    if rank == 0:
        engine.model.main_layers[1].mlp.experts.register_forward_hook(poison)  # type: ignore[union-attr]


@torch.no_grad()
def large_gate_and_up(engine: Engine, rank: int) -> None:
    """Norms to 2,000: gate and up stay within what E4M3 reaches with a scale of 512, their product does not."""
    engine.model.main_layers[0].post_attention_layernorm.weight.fill_(2e3)


@torch.no_grad()
def a_large_weight_behind_the_first(engine: Engine, rank: int) -> None:
    engine.model.main_layers[1].self_attn.kv_a_proj_with_mqa.weight[0, 0] = 513 * 448


def scales_with(workers: Any, *args: Any, world: int = 2) -> FP8Scales:
    first, *others = workers.run(world, step_with, *args)
    assert all(other == first for other in others), "ranks disagree"
    return first


def test_an_honest_step_names_its_largest_scale(workers: Any) -> None:
    """Of all ranks, and the same however batch, parameters and experts are cut, and whether blocks run once or twice."""
    scales = scales_with(workers, None)
    assert 0 < scales.largest < 1 and not scales.exploded
    assert scales.at.startswith("model.layers.")
    cut = ParallelConfig(engine="fsdp", expert=2, recompute="full")
    for again in (scales_with(workers, None, 1, cut), scales_with(workers, None, 3, world=1)):
        assert again.at == scales.at and again.largest == pytest.approx(scales.largest, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "first", "last"),
    [
        (nan_in_an_activation_of_the_last_rank, f"{DENSE}.self_attn.q_b_proj input: scale not finite", DENSE),
        (nan_in_a_gradient_of_the_first_rank, f"{EXPERTS}.mlp.experts.down_proj gradient: scale not finite", DENSE),
        (
            a_large_weight_behind_the_first,
            f"{EXPERTS}.self_attn.kv_a_proj_with_mqa weight: scale 513 above 512",
            "",
        ),
    ],
)
def test_what_explodes_on_one_rank_is_named_on_all(workers: Any, change: Any, first: str, last: str) -> None:
    exploded = scales_with(workers, change).exploded
    assert exploded[0] == first
    assert exploded[-1].startswith(last or first)


def test_a_product_that_explodes_is_told_from_its_factors(workers: Any) -> None:
    scales = scales_with(workers, large_gate_and_up, world=1)
    assert scales.exploded[0].startswith(f"{DENSE}.mlp.down_proj input: scale ")
    assert scales.at == f"{DENSE}.mlp.down_proj input" and 512 < scales.largest < 1e5


def evaluate_and_step() -> list[FP8Scales | None]:
    """The scales of a step before which an exploding model was evaluated, and those of a step without that."""
    found = []
    for is_evaluated in (True, False):
        engine = build(WHOLE)
        weight = engine.model.main_layers[0].self_attn.o_proj.weight
        if is_evaluated:
            with torch.no_grad():
                weight.mul_(1e9)
                engine.model.score(*batches(4)[0])
                weight.div_(1e9)
        found.append(engine.step(batches(4), SETTINGS).scales)
    return found


def test_an_evaluation_leaves_nothing_in_the_next_step(workers: Any) -> None:
    after, without = workers.run(1, evaluate_and_step)[0]
    assert not after.exploded and after.at == without.at and after.largest == pytest.approx(without.largest, rel=1e-5)


def test_what_is_quantised_keeps_nan_and_the_largest() -> None:
    fp8, data = Fp8(Reference()), torch.zeros(0)
    for scales in ([1.0, 3.0], [2.0, 0.5], []):
        fp8.note(fp8.scales, {" input": Quantized(data, torch.tensor(scales))})
    assert fp8.scales == {(" input",): torch.tensor([3.0])}
    for scales in ([torch.nan, 1.0], [9.0]):
        fp8.note(fp8.scales, {" input": Quantized(data, torch.tensor(scales))})
    assert fp8.scales[" input",].isnan().all()
