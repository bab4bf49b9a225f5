"""What is ZeRO's own: flat parts, host memory, a merged ds_config. The whole matrix is `test_parity`'s."""

from typing import Any

import pytest
import torch

from model.transformer import Transformer
from parallel.ds_config import ds_config
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
    global_batch,
    micro_batches,
    train,
    whole,
)  # fmt: skip

STAGES = ("zero1", "zero2", "zero3")
# Nothing of the small model is small enough to stay whole on every rank but its norms and its gates; buckets are many.
SMALL = {"reduce_bucket_size": 5000, "allgather_bucket_size": 4000}
CUT = {"zero_optimization": {**SMALL, "stage3_param_persistence_threshold": 300, "stage3_prefetch_bucket_size": 2000}}


def case(engine: str, micro_batch: int = 3, poison: int | None = None, **options: Any) -> Case:
    return Case(ParallelConfig(engine=engine, micro_batch=micro_batch, **{"deepspeed": CUT, **options}), poison=poison)


@pytest.fixture(scope="module")
def reference(workers):
    return workers.run(1, train, REFERENCE)[0]


@pytest.mark.parametrize(
    ("world_size", "engine", "micro_batch", "options"),
    [
        (2, "zero1", 3, {}),
        (2, "zero2", 3, {"recompute": "selective"}),
        (2, "zero3", 3, {"recompute": "full"}),
        (4, "zero2", 4, {}),
        (4, "zero3", 4, {}),
        (2, "zero1", 3, {"offload": "optimizer"}),
        (2, "zero2", 3, {"offload": "optimizer"}),
        (2, "zero3", 3, {"offload": "all", "deepspeed": {"zero_optimization": {"sub_group_size": 20000}}}),
    ],
)
def test_every_stage_gives_the_reference_answer(workers, reference, world_size, engine, micro_batch, options):
    runs = workers.run(world_size, train, case(engine, micro_batch, **options))
    for run in runs:
        check_equal(run, reference)
    for name, tensor in runs[-1]["parameters"].items():
        assert torch.equal(tensor, runs[0]["parameters"][name]), f"ranks hold different {name}"


@pytest.mark.parametrize(
    ("engine", "options"), [("zero1", {}), ("zero2", {"offload": "optimizer"}), ("zero2", {}), ("zero3", {}),
                            ("zero3", {"offload": "all"})]
)  # fmt: skip
def test_a_skipped_step_leaves_no_trace(workers, engine, options):
    """Step 1 of 0, 1, 2 has a NaN on one rank; the others go on as DDP's do."""
    expected = workers.run(2, train, case("ddp", deepspeed={}, poison=1))[0]
    for run in workers.run(2, train, case(engine, poison=1, **options)):
        assert run["skipped"] == [False, True, False]
        compared = {
            **run,
            "losses": run["losses"][:1] + run["losses"][2:],
            "norms": run["norms"][:1] + run["norms"][2:],
        }
        wanted = {**expected, **{k: expected[k][:1] + expected[k][2:] for k in ("losses", "norms")}}
        assert max(errors(compared, wanted).values()) <= TOLERANCE


def steps(case: Case, state: dict[str, Any] | None, first: int, last: int) -> dict[str, Any]:
    """Steps [first, last) from a state, on one rank; returns losses, and the state with every tensor whole."""
    engine = build(case)
    if state is not None:
        own = engine.state()  # as a checkpoint would be read: into what the engine hands out
        for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
            for name, tensor in own[kind].items():
                with torch.no_grad():
                    tensor.copy_(state[kind][name])
        engine.load({**own, "steps": state["steps"], "loss_scale": state["loss_scale"]})
    results = [engine.step(micro_batches(case, step), SETTINGS) for step in range(first, last)]
    end = engine.state()
    kinds = {kind: whole(end[kind]) for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq")}
    owned = sum(tensor.numel() for tensor in end["exp_avg"].values())
    return {
        "losses": [r.losses.main for r in results], "owned": owned, "state": {**end, **kinds}
    }  # fmt: skip


@pytest.mark.parametrize(("engine", "options"), [("zero1", {}), ("zero2", {"offload": "optimizer"}), ("zero3", {}),
                                                 ("zero3", {"offload": "all"})])  # fmt: skip
def test_a_run_that_continues_is_the_same_bit_for_bit(workers, engine, options):
    layout = case(engine, **options)
    straight = workers.run(2, steps, layout, None, 0, STEPS)[0]
    half = workers.run(2, steps, layout, None, 0, 1)[0]
    resumed = workers.run(2, steps, layout, half["state"], 1, STEPS)[0]
    assert resumed["losses"] == straight["losses"][1:]
    assert int(resumed["state"]["steps"]) == STEPS
    for kind in ("parameters", "buffers", "exp_avg", "exp_avg_sq"):
        for name, tensor in straight["state"][kind].items():
            assert torch.equal(resumed["state"][kind][name], tensor), f"{kind} of {name}"


def test_a_run_continues_under_any_other_stage_and_world_size(workers):
    """ddp@1 → zero3@4 → zero1@2 → zero2@3 … each a step, against DDP all the way."""
    chain = [(1, "ddp", 16), (4, "zero3", 4), (2, "zero1", 3), (4, "zero2", 1), (1, "ddp", 16)]
    state, losses = None, []
    for step, (world_size, engine, micro_batch) in enumerate(chain):
        layout = case(engine, micro_batch, deepspeed=CUT if engine != "ddp" else {})
        end = workers.run(world_size, steps, layout, state, step, step + 1)[0]
        state, losses = end["state"], losses + end["losses"]
    straight = workers.run(1, steps, case("ddp", 16, deepspeed={}), None, 0, len(chain))[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(straight["losses"]), rtol=TOLERANCE, atol=0)
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, tensor in straight["state"][kind].items():
            worst = (state[kind][name] - tensor).abs().max() / tensor.abs().max()
            assert worst <= 10 * TOLERANCE, f"{kind} of {name}: {worst:.1e}"


def test_no_rank_owns_the_whole_state(workers):
    """Each whole tensor is on one rank; the ranks' shares differ by less than the largest tensor."""
    largest = CONFIG.vocab_size * CONFIG.hidden_size
    for engine in STAGES:
        ends = workers.run(4, steps, case(engine, 4), None, 0, 0)
        owned = [end["owned"] for end in ends]
        assert sum(owned) == sum(t.numel() for t in ends[0]["state"]["parameters"].values())
        assert max(owned) - min(owned) <= 8 * largest


def read_everywhere(layout: Case) -> list[Any]:
    """Call every entry point between steps, on one rank; with what a whole model of the same weights answers."""
    engine = build(layout)
    differences, batch = [], global_batch(9)
    for step in range(3):
        plain = Transformer(CONFIG, mask_documents=True)
        state = engine.state()
        plain.load_state_dict({**whole(state["parameters"]), **whole(state["buffers"])})
        with torch.no_grad():
            pairs = [(model.score(*batch), model(*batch), decode(model)) for model in (engine.model, plain)]
        for found, expected in zip(*(flatten(pair) for pair in pairs)):
            differences.append((found - expected).abs().max().item())
        engine.step(micro_batches(layout, step), SETTINGS)
    return [differences, max(parameter.numel() for parameter in engine.model.parameters())]


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
    for differences, largest in workers.run(2, read_everywhere, case("zero3", 4)):
        assert max(differences) <= 1e-5
        assert largest <= 300, "a parameter stayed whole after a step"


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ("zero2", {"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: the recipe says 2 (parallel.engine"),
        ("zero2", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "says none (parallel.offload = none)"),
        ("zero3", {"zero_optimization": {"offload_param": {"device": "nvme"}}}, "says none (parallel.offload = none)"),
        ("zero1", {"gradient_clipping": 0.1}, "the recipe says 1.0 (optimizer.clip)"),
        ("zero1", {"fp16": {"enabled": True}}, "the recipe says false (precision.compute = bfloat16)"),
        ("zero1", {"train_batch_size": 64}, "is said by schedule.batch_tokens; drop it"),
        ("zero1", {"optimizer": {"type": "Lion"}}, "the recipe says AdamW"),
        ("zero1", {"zero_optimisation": {"stage": 1}}, "zero_optimisation.stage = 1: is not passed on"),
    ],
)  # fmt: skip
def test_a_ds_config_that_contradicts_the_recipe_is_refused(engine, own, message):
    with pytest.raises(LayoutError, match=r"^parallel\.deepspeed\.") as error:
        ds_config(ParallelConfig(engine=engine, deepspeed=own), torch.bfloat16, 1.0, torch.device("cpu"))
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
