"""The footprint of a layout against what the engines hold, and against arithmetic by hand where no machine is large enough."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.activations import end_bytes
from model.config import ModelConfig, load_preset
from model.flops import parameter_counts
from model.hf import state_shapes
from model.moe import Experts
from model.transformer import Transformer
from parallel.footprint import Footprint, footprint, shapes_on, units_of
from parallel.layout import Layout, ParallelConfig
from parallel.parts import keep_parts, parts_of
from parallel.peak import Moment, forward_pass, moments_of
from parallel.pipeline import Stage
from parallel.placement import Schedule
from tests.parallel.harness import CONFIG, LENGTH, SEQUENCES, SETTINGS, Case, build, micro_batches
from tests.small_model import small_config

FSDP = ParallelConfig("fsdp", micro_batch=2)
SMALL_BUCKETS = {"zero_optimization": {"reduce_bucket_size": 5000, "allgather_bucket_size": 4000}}
ZERO = ParallelConfig(micro_batch=2, deepspeed=SMALL_BUCKETS)


# What the engines hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ParallelConfig("ddp", micro_batch=2)),
        (3, FSDP),  # rows that three ranks cannot share evenly
        (4, replace(FSDP, replicate=2, expert=2, reshard_after_forward=False)),
        (2, replace(FSDP, expert=2, offload="all")),
    ],
    ids=["ddp", "uneven", "replicate, expert", "expert, offload"],
)
def test_ddp_and_fsdp_hold_what_is_counted(workers, world_size, parallel):
    counted = footprint(Layout(parallel, world_size, CONFIG), CONFIG)
    held = fullest(workers.run(world_size, measure, Case(parallel)))
    if parallel.offload == "none":
        assert held == {kind: getattr(counted, kind) for kind in held}
    else:
        assert sum(held.values()) - biases(CONFIG) == counted.host
        assert counted.parameters == biases(CONFIG) and counted.gradients == counted.moments == 0


@pytest.mark.parametrize(("engine", "expert"), [("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero1", 2), ("zero2", 2)])
def test_zero_holds_what_is_counted(workers, engine, expert):
    """Stages 1 and 2 pad their flat parts, and keep a gradient whole that two ranks share; stage 1 all, between micro-batches."""
    parallel = replace(ZERO, engine=engine, expert=expert)
    counted = footprint(Layout(parallel, 2, CONFIG), CONFIG)
    ranks = workers.run(2, measure, Case(parallel))
    held = fullest(ranks)
    held["gradients"] = max(held["gradients"], *(rank["accumulated"] for rank in ranks))
    for kind, slack in {"parameters": 0.001, "gradients": 0.1, "moments": 0.001}.items():
        assert held[kind] == pytest.approx(getattr(counted, kind), rel=slack), kind


@pytest.mark.parametrize(("engine", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_zero_holds_on_the_host_what_is_counted(workers, engine, offload):
    parallel = replace(ZERO, engine=engine, offload=offload)
    counted = footprint(Layout(parallel, 2, CONFIG), CONFIG, micro_batches=4)
    held = [rank["host"] for rank in workers.run(2, measure, Case(parallel))]
    assert max(held) == pytest.approx(counted.host, rel=0.02)  # as above


@pytest.mark.parametrize(("reshard", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=str)
def test_fsdp_gathers_the_units_that_are_counted(workers, reshard, dtype):
    """At most the root and one block with half of its experts are whole, or else all; all gradients between micro-batches."""
    parallel = replace(FSDP, expert=2, reshard_after_forward=reshard)
    shapes = {name: tensor.shape for name, tensor in state_shapes(CONFIG).items() if "bias" not in name}
    units = units_of(Layout(parallel, 2, CONFIG), shapes, dtype.itemsize)
    root, blocks = units["root"].bytes, [unit.bytes for key, unit in units.items() if key.isdigit()]
    expected = root + max(blocks) if reshard else sum(unit.bytes for unit in units.values())
    ranks = workers.run(2, measure, Case(parallel, dtype))
    assert [rank["whole"] for rank in ranks] == [expected] * 2
    if dtype is torch.float32:  # elsewhere FSDP accumulates where nobody else can look
        assert [rank["accumulated"] for rank in ranks] == [4 * sum(unit.elements for unit in units.values())] * 2


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_what_lies_on_a_pipeline_rank_is_what_it_keeps_of_the_model(schedule):
    for depths in (0, 1):
        config = replace(CONFIG, num_hidden_layers=6, num_nextn_predict_layers=depths)
        layout = Layout(ParallelConfig(pipeline=4, schedule=schedule, unproven=True), 4, config, (LENGTH,))
        for rank in range(4):
            with torch.device("meta"):
                model = Transformer(config)
            keep_parts(model, [parts_of(layout)[stage] for stage in layout.placement.stages_of(rank)])
            kept = {name: parameter.shape for name, parameter in model.named_parameters()}
            assert shapes_on(layout, config, rank) == kept, (depths, rank)


@pytest.mark.parametrize(
    "schedule, recompute", [("1f1b", "none"), ("zbv", "none"), ("zbv", "full"), ("dualpipev", "selective")]
)
def test_a_pipeline_rank_has_as_many_activations_as_are_counted(workers, schedule, recompute):
    """After every chunk, beside parameters and gradients. What has just arrived, a state or two, is not counted, nor pieces of
    the batch."""
    parallel = ParallelConfig("ddp", pipeline=2, schedule=schedule, recompute=recompute, micro_batch=2)
    check_under_way(workers, parallel, 0.05)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_ranks_that_share_sequences_keep_what_is_counted(workers, recompute):
    """After a forward pass. Of the whole sequences each has latents, keys and values."""
    check_under_way(workers, ParallelConfig("ddp", context=2, recompute=recompute, micro_batch=16), 0.01)


def check_under_way(workers: Any, parallel: ParallelConfig, slack: float) -> None:
    layout = Layout(parallel, 2, CONFIG, (LENGTH,))
    size = parallel.micro_batch
    for rank, most in enumerate(workers.run(2, most_alive, Case(parallel))):
        forward = forward_pass(layout, sequence_length=LENGTH, micro_batch=size, element_size=4)
        moments = list(moments_of(layout, CONFIG, forward, 4, SEQUENCES // size, rank // layout.stage_ranks))
        counted = max(moment.activations for moment in moments)
        if parallel.pipeline == 1:
            counted += end_bytes(CONFIG, forward).head_gradient
        assert most == pytest.approx(counted, rel=slack)


# What no machine here can hold ----------------------------------------------------------------------------------------

V3 = ModelConfig.from_hf(load_preset("v3"))
P = parameter_counts(V3).trainable


def of_v3(world_size: int, moment_size: int = 2, micro_batches: int = 1, **parallel: Any) -> Footprint:
    return footprint(Layout(ParallelConfig(**parallel), world_size, V3), V3, moment_size, micro_batches)


def of_a_step(world_size: int, micro_batches: int = 1, **parallel: Any) -> dict[str, Moment]:
    """V3 in bf16, T = 4,096."""
    layout = Layout(ParallelConfig(**parallel), world_size, V3)
    forward = forward_pass(layout, sequence_length=4096, micro_batch=1, element_size=2, device="cuda")
    return {moment.when: moment for moment in moments_of(layout, V3, forward, 2, micro_batches)}


HEAD = 129280 * 7168
ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
SHARED, DENSE = 3 * 7168 * 2048, 3 * 7168 * 18432
EXPERTS = 256 * 3 * 7168 * 2048


def test_v3_on_1024_processes_of_fsdp_with_64_expert_ranks():
    """12 bytes a parameter over 1,024 ranks are 8.0 GB; a block is gathered with 4 of its 256 experts, and the head in fp32."""
    held = of_v3(1024, engine="fsdp", expert=64)
    assert held.parameters + held.gradients + held.moments == pytest.approx(12 * P / 1024 + biases(V3), rel=0.01)
    step = of_a_step(1024, engine="fsdp", expert=64)
    # Head and embedding in fp32, the latter a second time, as it arrived.
    assert step["first layers"].gathered == pytest.approx(
        12 * HEAD, rel=0.01
    )  # with rows that 1,024 ranks do not share evenly
    # Backward in a layer with experts: head in fp32, this layer and the one before it in bf16, without padding.
    layer = 2 * (ATTENTION + SHARED + EXPERTS // 64)
    assert step["backward in layer 30"].gathered == pytest.approx(4 * HEAD + 2 * layer, rel=0.03)
    # The gradient of what is not experts' of the layer behind is still being sent; and rows to and from experts travel.
    sent = step["backward in layer 30"].communication - 8 * 4096 * 2 * 7168
    assert sent == pytest.approx(4 * (ATTENTION + SHARED), rel=0.07)  # padding: 576 rows of kv_a, 256 of the gate
    # Head's, embedding's and one of them on its way.
    end = step["end, as they are sent"]
    assert end.gradients + end.communication == pytest.approx(12 * HEAD + held.gradients, rel=0.01)


def test_v3_without_resharding_keeps_every_block_whole():
    few = of_a_step(1024, engine="fsdp", expert=64, reshard_after_forward=False)
    experts = 59 * EXPERTS
    whole = P - experts + experts / 64
    assert few["loss"].gathered == pytest.approx(2 * (whole - 2 * HEAD) + 8 * HEAD, rel=0.05)  # padding, as above
    many = of_a_step(1024, 2, engine="fsdp", expert=64, reshard_after_forward=False)
    first = "backward in layer 61"  # of the last micro-batch: gradients of the others lie there whole, in fp32
    assert many[first].gradients == pytest.approx(4 * whole + 2 * EXPERTS / 64, rel=0.05)
    assert few[first].gradients == pytest.approx(4 * HEAD + 2 * EXPERTS / 64, rel=0.01)


def test_a_step_of_one_micro_batch_has_gradients_of_the_layers_that_have_gone_backward():
    """So that a further one needs the memory of all gradients while the first layers' activations are there."""
    one, two = (of_a_step(64, number, engine="fsdp")["backward in layer 61"] for number in (1, 2))
    assert two.gradients - one.gradients == pytest.approx(4 * P / 64, rel=0.01)
    assert two._replace(gradients=0) == one._replace(gradients=0)


@pytest.mark.parametrize(
    ("engine", "offload", "device", "host"),
    [
        ("ddp", "none", 4 + 4 + 8, 0),
        ("zero1", "none", 4 + 4 + 8 / 64, 0),
        ("zero2", "none", 4 + 4 / 64 + 8 / 64, 0),
        ("zero3", "none", 16 / 64, 0),
        ("fsdp", "none", 16 / 64, 0),
        ("zero1", "optimizer", 4 + 4, 20 / 64),
        ("zero2", "optimizer", 4, 20 / 64),
        ("zero3", "optimizer", 4 / 64, 20 / 64),
        ("zero3", "all", 0, 24 / 64),
        ("fsdp", "all", 0, 16 / 64),
    ],
)
def test_bytes_of_a_parameter_under_each_engine_on_64_processes(engine, offload, device, host):
    held = of_v3(64, moment_size=4, engine=engine, offload=offload)
    assert held.parameters + held.gradients + held.moments - biases(V3) == pytest.approx(device * P, rel=1e-3)
    assert held.host == pytest.approx(host * P, rel=1e-3)


def test_deepspeed_has_as_many_parameters_whole_as_it_is_set_to_or_a_layer_of_experts():
    small = small_config()
    layout = Layout(ParallelConfig("zero3"), 4, small)
    assert footprint(layout, small).gathered == 4 * parameter_counts(small).trainable
    assert of_v3(64, engine="zero3").gathered == 4 * 256 * 3 * 7168 * 2048


# ----------------------------------------------------------------------------------------------------------------------


def fullest(ranks: list[dict[str, int]]) -> dict[str, int]:
    return {kind: max(rank[kind] for rank in ranks) for kind in ("parameters", "gradients", "moments")}


def measure(case: Case) -> dict[str, int]:
    """Bytes that an engine holds, as one rank of the current group: gradients between micro-batches ("accumulated") and before the
    optimizer's step, the most that was gathered at once in the forward pass ("whole"), and what is there after the step."""
    engine: Any = build(case)
    model, update, backward = engine.model, engine.update, engine.backward
    held = {"accumulated": 0, "whole": 0}

    def note_and_go_back(loss: Tensor, is_last: bool) -> None:
        backward(loss, is_last)
        if not is_last:
            held["accumulated"] = bytes_of(parameter.grad for parameter in model.parameters())

    def note_and_update(*step: Any) -> None:
        held["gradients"] = bytes_of([*engine.gradients().values(), *(p.grad for p in model.parameters())])
        if case.parallel.deepspeed:
            held["host"] = bytes_of(on_host(engine, case.parallel.offload))
        update(*step)

    def note_whole(*_: Any) -> None:
        whole = sum(p.numel() * p.element_size() for p in model.parameters() if not isinstance(p, DTensor))
        held["whole"] = max(held["whole"], whole)

    engine.backward, engine.update = note_and_go_back, note_and_update
    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_pre_hook(note_whole)
    engine.step(micro_batches(case, 0), SETTINGS)
    optimizer = engine.engine.optimizer.optimizer if case.parallel.engine.startswith("zero") else engine.optimizer
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    held["parameters"] = bytes_of([*own, *updated, *model.buffers()])
    held["moments"] = bytes_of(t for state in optimizer.state.values() for t in state.values() if t.dim())
    if "host" in held:
        held["host"] += held["moments"]
    return held


def on_host(engine: Any, offload: str) -> Iterator[Tensor | None]:
    """What DeepSpeed's optimizers put where it is offloaded to, but for the moments."""
    optimizer = engine.engine.optimizer
    for flat in engine.partitions.flats:
        yield from (flat, flat.grad)
    yield from getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    yield from getattr(optimizer, "accumulated_grads_in_cpu", {}).values()
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)
    if offload == "all":
        yield from (parameter.ds_tensor for parameter in engine.model.parameters())


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of all that these tensors lie in, each once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


def most_alive(case: Case) -> int:
    """As one rank: most bytes that live after a chunk of a step and did not before the step, without gradients."""
    engine: Any = build(case)
    batches = micro_batches(case, 0)
    marks: list[int] = []  # bytes of gradients at each

    def gradients() -> int:
        return sum(p.grad.nbytes for p in engine.model.parameters() if p.grad is not None)

    def mark(returned: Any = None) -> None:
        marks.append(gradients() - before)
        with torch.profiler.record_function(f"mark {len(marks)}"):
            pass

    def marked(run: Any) -> Any:
        def run_and_mark(*args: Any, **kwargs: Any) -> Any:
            returned = run(*args, **kwargs)
            mark()
            return returned

        return run_and_mark

    for _ in range(2):  # one-time allocations; DDP makes its buckets anew in the second step
        engine.step(batches, SETTINGS)
    before = gradients()  # in DDP's buckets
    chunks = ["forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"]
    patches = [patch.object(Stage, name, marked(getattr(Stage, name))) for name in chunks]
    patches += [
        patch.object(engine, "backward", marked(engine.backward)),
        patch.object(engine, "forward", marked(engine.forward)),
    ]
    with ExitStack() as stack:
        for each in [alone(), *patches]:
            stack.enter_context(each)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            engine._forward_and_backward(
                batches, torch.ones(3), lambda losses: losses.main + losses.mtp.sum() + losses.balance
            )
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live, found = 0, {}
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name().startswith("mark "):
            found[int(event.name().split()[1])] = live
    return max(found[number] - new for number, new in enumerate(marks, start=1))


@contextmanager
def alone() -> Iterator[None]:
    """What ranks that share sequences hand each other is made here. Threads of gloo may be the last to hold what they send and
    receive, and the profiler does not see what another thread frees."""
    with torch.library._scoped_library("_c10d_functional", "IMPL") as library:
        library.impl("all_gather_into_tensor", lambda x, ranks, group: torch.cat([x] * ranks), "CPU")
        library.impl("reduce_scatter_tensor", lambda x, op, ranks, group: x.chunk(ranks)[0].clone(), "CPU")
        library.impl("all_reduce", lambda x, op, group: x.clone(), "CPU")
        yield


def biases(config: ModelConfig) -> int:
    return 4 * parameter_counts(config).expert_biases
