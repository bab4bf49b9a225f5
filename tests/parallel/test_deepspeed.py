"""What is ZeRO's own: flat parts, host memory, a merged ds_config. The whole matrix is `test_parity`'s."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.transformer import Transformer
from parallel.deepspeed import _import_deepspeed
from parallel.ds_config import OFFLOAD_TUNING, ZERO_TUNING, ds_config
from parallel.layout import LayoutError, ParallelConfig
from tests.parallel.harness import (
    CONFIG,
    REFERENCE,
    SETTINGS,
    STEPS,
    TOLERANCE,
    Case,
    build,
    check_equal,
    errors,
    fill,
    global_batch,
    micro_batches,
    train,
    whole,
)  # fmt: skip

# Of the small model only norms and gates stay whole on every rank under stage 3; and buckets are many.
SMALL = {"reduce_bucket_size": 5000, "allgather_bucket_size": 4000}
CUT = {"zero_optimization": {**SMALL, "stage3_param_persistence_threshold": 300, "stage3_prefetch_bucket_size": 2000}}


def case(engine: str, micro_batch: int = 3, poison: int | None = None, **options: Any) -> Case:
    return Case(ParallelConfig(engine=engine, micro_batch=micro_batch, **{"deepspeed": CUT, **options}), poison=poison)


@pytest.fixture(scope="module")
def reference(workers):
    return workers.run(1, train, REFERENCE)[0]


@pytest.fixture(scope="module")
def skipping(workers):
    """What DDP makes of a NaN in step 1."""
    return workers.run(2, train, case("ddp", deepspeed={}, poison=1))[0]


TUNED = {"parameter_alignment": True, "overlap_comm": True}
TO_OWNERS = {"use_multi_rank_bucket_allreduce": False}


@pytest.mark.parametrize(
    ("world_size", "engine", "micro_batch", "options"),
    [
        (4, "zero2", 4, {}),
        (4, "zero3", 4, {"recompute": "selective"}),
        (2, "zero1", 3, {"deepspeed": {"zero_optimization": {**SMALL, **TUNED}}}),
        pytest.param(2, "zero2", 3, {"deepspeed": {"zero_optimization": {**SMALL, **TUNED}}}, marks=pytest.mark.slow),
        (4, "zero2", 3, {"expert": 2, "deepspeed": {"zero_optimization": {**SMALL, **TUNED, **TO_OWNERS}}}),
        pytest.param(2, "zero2", 3, {"offload": "optimizer"}, marks=pytest.mark.slow),
        pytest.param(2, "zero3", 3, {"offload": "optimizer", "recompute": "full"}, marks=pytest.mark.slow),
        (2, "zero3", 3, {"offload": "all", "deepspeed": {"zero_optimization": {"sub_group_size": 20000}}}),
    ],
)
def test_every_stage_gives_the_reference_answer(workers, reference, world_size, engine, micro_batch, options):
    """Beside the matrix: parameters really cut, in many buckets and flat parts."""
    check_equal(workers.run(world_size, train, case(engine, micro_batch, **options))[0], reference)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("zero2", {}),
        ("zero2", {"offload": "optimizer"}),
        ("zero2", {"expert": 2}),
        ("zero3", {}),
        pytest.param("zero1", {}, marks=pytest.mark.slow),
        pytest.param("zero3", {"offload": "all"}, marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_leaves_no_trace(workers, skipping, engine, options):
    """Step 1 of 0, 1, 2 has a NaN on one rank; the others go on as DDP's do."""
    runs = workers.run(2, train, case(engine, poison=1, **options))
    for run in runs:
        assert run["skipped"] == [False, True, False]
    finite = [{**run, **{k: run[k][:1] + run[k][2:] for k in ("losses", "norms")}} for run in (runs[0], skipping)]
    assert max(errors(*finite).values()) <= TOLERANCE


def steps(case: Case, state: dict[str, Any] | None, first: int, last: int) -> dict[str, Any]:
    """Steps [first, last) from a state, on one rank; returns losses, and the state with every tensor whole."""
    engine = build(case)
    if state is not None:
        own = engine.state()  # as a checkpoint would be read: into what the engine hands out
        for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
            fill(own[kind], state[kind])
        engine.load({**own, "steps": state["steps"], "loss_scale": state["loss_scale"]})
    results = [engine.step(micro_batches(case, step), SETTINGS) for step in range(first, last)]
    return {"losses": [result.losses.main for result in results], "state": whole_state(engine)}


def whole_state(engine: Any) -> dict[str, Any]:
    state = engine.state()
    kinds = {kind: whole(state[kind]) for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq")}
    return copy.deepcopy({**state, **kinds})


def straight_steps(case: Case) -> tuple[dict[str, Any], list[float], dict[str, Any]]:
    """All steps in one go, on one rank; returns the state after the first, the losses of the others, and the state at the end."""
    engine = build(case)
    engine.step(micro_batches(case, 0), SETTINGS)
    first = whole_state(engine)
    losses = [engine.step(micro_batches(case, step), SETTINGS).losses.main for step in range(1, STEPS)]
    return first, losses, whole_state(engine)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("zero1", {}),
        ("zero1", {"expert": 2}),
        ("zero3", {}),
        pytest.param("zero2", {"offload": "optimizer"}, marks=pytest.mark.slow),
        pytest.param("zero3", {"offload": "all"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_continues_is_the_same_bit_for_bit(workers, engine, options):
    layout = case(engine, 8, **options)
    first, losses, end = workers.run(2, straight_steps, layout)[0]
    resumed = workers.run(2, steps, layout, first, 1, STEPS)[0]
    assert resumed["losses"] == losses
    assert int(resumed["state"]["steps"]) == STEPS
    for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
        for name, tensor in end[kind].items():
            assert torch.equal(resumed["state"][kind][name], tensor), f"{kind} of {name}"


def test_a_run_continues_under_any_other_stage_and_world_size(workers):
    """A step each, against DDP all the way."""
    chain = [(1, "ddp", 16, 1), (4, "zero3", 4, 1), (2, "zero1", 3, 2), (4, "zero2", 1, 2), (1, "ddp", 16, 1)]
    state, losses = None, []
    for step, (world_size, engine, micro_batch, expert) in enumerate(chain):
        layout = case(engine, micro_batch, deepspeed=CUT if engine != "ddp" else {}, expert=expert)
        end = workers.run(world_size, steps, layout, state, step, step + 1)[0]
        state, losses = end["state"], losses + end["losses"]
    straight = workers.run(1, steps, case("ddp", 16, deepspeed={}), None, 0, len(chain))[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(straight["losses"]), rtol=TOLERANCE, atol=0)
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, tensor in straight["state"][kind].items():
            worst = (state[kind][name] - tensor).abs().max() / tensor.abs().max()
            assert worst <= 10 * TOLERANCE, f"{kind} of {name}: {worst:.1e}"


def test_a_state_with_spread_experts_is_the_state_of_any_other_layout(workers):
    spread = case("zero2", 4, expert=2)
    state = workers.run(4, steps, spread, None, 0, 1)[0]["state"]
    for world_size, layout in [(1, case("ddp", 16, deepspeed={})), (4, spread), (2, case("zero1", 8, expert=2))]:
        found = workers.run(world_size, steps, layout, state, 0, 0)[0]["state"]
        assert int(found["steps"]) == 1
        for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
            for name, tensor in state[kind].items():
                assert torch.equal(found[kind][name], tensor), f"{kind} of {name}"


def average(layout: Case) -> bool:
    """Whether a tensor that is laid out as this rank's parts of the weights leaves whole, and comes back."""
    engine = build(layout)
    twice = {name: 2 * part for name, part in engine.parts().items()}
    gathered, back = engine.gather(twice), {name: torch.zeros_like(part) for name, part in twice.items()}
    engine.spread(gathered, back)
    weights, found = whole(engine.state()["parameters"]), whole(gathered)
    return all(torch.equal(found[name], 2 * weight) for name, weight in weights.items()) and all(
        torch.equal(back[name], part) for name, part in twice.items()
    )


def test_an_average_of_spread_experts_leaves_and_comes_back(workers):
    assert workers.run(4, average, case("zero1", expert=2)) == [True] * 4


def owned(layout: Case) -> int:
    """Elements of the first moment that are whole on this rank."""
    return sum(tensor.numel() for tensor in build(layout).state()["exp_avg"].values())


@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_whole_tensors_are_shared_out_among_the_ranks(workers, reference, engine):
    """Each is on one rank. A rank differs from its fair share by less than the tensor at either end of its part, of each group."""
    sizes = [tensor.numel() for tensor in reference["exp_avg"].values()]
    shares = workers.run(4, owned, case(engine, 4))
    assert sum(shares) == sum(sizes)
    assert max(abs(share - sum(sizes) / 4) for share in shares) <= 2 * max(sizes)


def non_finite(layout: Case) -> tuple[str, ...]:
    """What a step says of a gradient that is not finite in the last rank's output head alone."""
    engine = build(layout)
    if dist.get_rank() == dist.get_world_size() - 1:
        engine.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    return engine.step(micro_batches(layout, 0), SETTINGS).non_finite


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(workers, engine):
    assert workers.run(2, non_finite, case(engine)) == [("lm_head.weight",)] * 2


def read_between_steps(layout: Case) -> tuple[float, int]:
    """Call every entry point, on one rank; returns how far the answers are from those of a whole model with the same weights, and
    the largest parameter that is still whole after a step."""
    engine, batch, worst = build(layout), global_batch(9), 0.0
    for step in range(2):
        state = engine.state()
        weights = [{**whole(state["parameters"]), **whole(state["buffers"])}]
        dist.broadcast_object_list(weights)
        plain = Transformer(CONFIG, mask_documents=True)
        plain.load_state_dict(weights[0])
        with torch.no_grad():
            found, expected = ([model.score(*batch), model(*batch), decode(model)] for model in (engine.model, plain))
        for a, b in zip(flatten(found), flatten(expected)):
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1)))
        engine.step(micro_batches(layout, step), SETTINGS)
    return worst, max(parameter.numel() for parameter in engine.model.parameters())


def decode(model: Transformer) -> torch.Tensor:
    """Logits of a few tokens, one at a time, and of a first draft."""
    tokens, caches = global_batch(8).tokens[:2, :5], model.new_caches(2, 8)
    for token in tokens.split(1, dim=1):
        hidden = model.decode(token, caches[: CONFIG.num_hidden_layers])
    drafted = model.decode_mtp(1, hidden, tokens[:, -1:], caches[CONFIG.num_hidden_layers])
    return torch.stack([model.lm_head(hidden), model.lm_head(drafted)])


def flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)]


def test_a_sharded_model_can_be_read_between_steps(workers):
    for worst, largest in workers.run(2, read_between_steps, case("zero3", 8)):
        assert worst <= TOLERANCE
        assert largest <= 300, "a parameter stayed whole after a step"


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ("zero2", {"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: the recipe says 2 (parallel.engine"),
        ("zero2", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "says none (parallel.offload = none)"),
        ("zero3", {"zero_optimization": {"offload_param": {"device": "nvme"}}}, "says none (parallel.offload = none)"),
        ("zero2", {"zero_optimization": {"reduce_scatter": False}}, "the recipe says true (parallel.expert = 2)"),
        ("zero1", {"gradient_clipping": 0.1}, "the recipe says 1.0 (optimizer.clip)"),
        ("zero1", {"fp16": {"enabled": True}}, "the recipe says false (precision.compute = bfloat16)"),
        ("zero1", {"train_batch_size": 64}, "is said by schedule.batch_tokens; drop it"),
        ("zero1", {"optimizer": {"type": "Lion"}}, "the recipe says AdamW"),
        ("zero1", {"zero_optimisation": {"stage": 1}}, "zero_optimisation.stage = 1: is not passed on"),
    ],
)  # fmt: skip
def test_a_ds_config_that_contradicts_the_recipe_is_refused(engine, own, message):
    with pytest.raises(LayoutError, match=r"^parallel\.deepspeed\.") as error:
        ds_config(ParallelConfig(engine=engine, expert=2, deepspeed=own), torch.bfloat16, 1.0, torch.device("cpu"))
    assert message in str(error.value)


def test_a_ds_config_that_agrees_or_only_tunes_is_merged():
    own = {
        "bf16": {"enabled": True},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 1000,
            "offload_optimizer": {"device": "cpu", "buffer_count": 8},
            "offload_param": {"device": "none", "pin_memory": True},
            "zenflow": None,
        },
        "comms_logger": {"enabled": True},
    }
    config = ParallelConfig(engine="zero3", micro_batch=4, offload="optimizer", deepspeed=own)
    merged = ds_config(config, torch.bfloat16, 1.0, torch.device("cpu"))
    assert merged["comms_logger"] == {"enabled": True}
    assert merged["zero_optimization"] == {
        "stage": 3,
        "memory_efficient_linear": False,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 8},
    }
    assert merged["gradient_clipping"] == 0.0
    assert "bf16" not in merged and "optimizer" not in merged


def test_every_key_that_passes_is_one_of_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def keys(config: Any) -> set[str]:
        return {field.alias or name for name, field in config.model_fields.items()}

    assert keys(DeepSpeedZeroConfig) >= ZERO_TUNING
    assert keys(DeepSpeedZeroOffloadOptimizerConfig) | keys(DeepSpeedZeroOffloadParamConfig) >= OFFLOAD_TUNING


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        LayoutError, match=r"need deepspeed, which is not installed; pip install 'deepspeed>=0.19.8,<0.20'"
    ):
        _import_deepspeed(torch.device("cpu"))
